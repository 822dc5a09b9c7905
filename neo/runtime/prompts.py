"""Token ids for the prompts of a workload, which knows their lengths only: drawn, or read from its trace."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neo.core.errors import InputError
from neo.workload import Workload
from neo.workload.source import FieldError, open_source, shown

IDS_FIELD = "prompt_token_ids"
"""In a trace in neo's own format (docs/workloads.md): token ids, as many as ``prompt_tokens`` says."""


class Prompts:
    """Prompts of a workload, by position: made before the run, so that the run does not pay for them.

    Args:
        flat: int32, the token ids of all prompts, one after the other.
        lengths: tokens of each.
    """

    def __init__(self, flat: npt.NDArray[np.int32], lengths: list[int]) -> None:
        self._flat = flat
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __getitem__(self, position: int) -> list[int]:
        low, high = self._offsets[position], self._offsets[position + 1]
        tokens: list[int] = self._flat[low:high].tolist()
        return tokens


def random_prompts(workload: Workload, vocab: int, seed: int = 0) -> Prompts:
    """Token ids drawn uniformly from the vocabulary; the first prompts are the same however many there are.

    Raises InputError if they do not fit in memory.
    """
    lengths = [r.prompt_tokens for r in workload.requests]
    draw = np.random.Generator(np.random.PCG64(seed))
    try:
        return Prompts(draw.integers(0, vocab, sum(lengths), dtype=np.int32), lengths)
    except MemoryError as error:
        raise InputError(f"prompts of {sum(lengths)} tokens in all do not fit in memory") from error


def read_prompts(path: str | Path, workload: Workload, vocab: int) -> Prompts:
    """The token ids in the trace that ``workload`` was read from; neo's own format only.

    Args:
        path: of the trace.
        workload: its requests, in its order; perhaps only its first ones.
        vocab: tokens of the model.

    Raises:
        InputError: ids are missing, not as many as the prompt has tokens, or not in the vocabulary; the
            message has file, line and field.
    """
    if workload.source.get("format") != "jsonl":
        raise InputError(
            f"{path}: only traces in neo's own format (jsonl) have token ids, this is "
            f"{workload.source.get('format')}; use --token-ids random"
        )
    flat = array("i")
    with open_source(path) as source:
        records = source.objects()
        for request in workload.requests:
            try:
                flat.extend(_ids(next(records, {}), request.prompt_tokens, vocab))
            except FieldError as error:
                raise source.error(str(error)) from None
    return Prompts(np.frombuffer(flat, dtype=np.int32), [r.prompt_tokens for r in workload.requests])


def _ids(record: dict[str, object], count: int, vocab: int) -> list[int]:
    ids = record.get(IDS_FIELD)
    if not isinstance(ids, list):
        problem = "missing" if ids is None else f"expected a list of token ids, got {shown(ids)}"
        raise FieldError(IDS_FIELD, problem)
    if len(ids) != count:
        raise FieldError(IDS_FIELD, f"{len(ids)} token ids, but prompt_tokens is {count}")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab:
            raise FieldError(IDS_FIELD, f"{shown(token)} is no token of a vocabulary of {vocab}")
    return ids

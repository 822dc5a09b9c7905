"""One request's side of sampling: its parameters, its tokens, its random numbers. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from neo.core.errors import InputError
from neo.runtime.sampling_params import SamplingParams

_WORD = (1 << 64) - 1
# SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014;
# the multipliers are those of its mix64variant13.
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class SamplerState:
    """One request's side of sampling: its parameters, its tokens, what penalties need of them.

    `request_seed` is used where `params.seed` is None; `eos_token_ids` are barred before `params.min_tokens`.
    Raises InputError for token ids outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab: int,
        request_seed: int,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.tokens: list[int] = []
        """Generated so far."""
        self.vocab = vocab
        _within(params.stop_token_ids, vocab, "stop_token_ids")
        bias = params.logit_bias or {}
        _within(list(bias), vocab, "logit_bias")
        self.bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        ends = {*params.stop_token_ids, *(t for t in eos_token_ids if 0 <= t < vocab)}
        self.end_ids = np.array(sorted(ends), np.int64)
        self._stream = _mix((request_seed if params.seed is None else params.seed) & _WORD)
        self.history: History | None = None
        if params.penalised:
            _within(prompt, vocab, "prompt")
            self.history = History(prompt if params.repetition_penalty != 1.0 else ())

    def append(self, token: int) -> None:
        """Note a generated token."""
        if not 0 <= token < self.vocab:
            raise ValueError(f"token {token} is not in the vocabulary of {self.vocab}")
        self.tokens.append(token)
        if self.history is not None:
            self.history.append(token)

    @property
    def barred(self) -> npt.NDArray[np.int64]:
        """Token ids that may not come next."""
        return self.end_ids if len(self.tokens) < self.params.min_tokens else self.end_ids[:0]

    @property
    def plain(self) -> bool:
        """Whether the next token depends on nothing but logits, temperature, top-k, top-p, min-p and seed."""
        params = self.params
        return not (
            self.bias_ids.size or params.min_tokens or self.history is not None or params.logprobs is not None
        )

    def uniform(self, pending: int = 0) -> float:
        """The number in [0, 1) that draws the next token: 53 bits, a function of seed and position.

        ``pending``: tokens that come before it and are not appended yet.
        """
        position = len(self.tokens) + pending + 1
        return (_mix((self._stream + position * _GOLDEN) & _WORD) >> 11) * 2.0**-53


class History:
    """The different tokens a request has seen, each with how often it is in the output."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids = np.unique(np.asarray(prompt, np.int64))
        self._counts = np.zeros(len(self._ids), np.float32)
        self._slot = dict(zip(self._ids.tolist(), range(len(self._ids)), strict=True))

    def append(self, token: int) -> None:
        """Count one more of the output."""
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._ids):  # room doubles, so that appending stays cheap
            room = max(64, slot)
            self._ids = np.concatenate([self._ids, np.zeros(room, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])
        self._ids[slot] = token
        self._counts[slot] += 1

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Token ids, each once."""
        return self._ids[: len(self._slot)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """How often each of `ids` was generated; 0 if it is in the prompt only."""
        return self._counts[: len(self._slot)]


def _mix(z: int) -> int:
    """SplitMix64's output function: a bijection of 64-bit words in which every bit depends on all."""
    z = ((z ^ (z >> 30)) * _MIX_1) & _WORD
    z = ((z ^ (z >> 27)) * _MIX_2) & _WORD
    return z ^ (z >> 31)


def _within(tokens: Sequence[int], vocab: int, name: str) -> None:
    if len(tokens) and not (min(tokens) >= 0 and max(tokens) < vocab):
        token = next(t for t in tokens if not 0 <= t < vocab)
        raise InputError(f"{name}: token {token} is not in the vocabulary of {vocab}")

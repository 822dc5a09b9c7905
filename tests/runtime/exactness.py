"""Tiny models, what transformers generates with them, and engines that are to generate the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from engine_builders import Collected, add
from model_builders import hf_generate, hf_model, save_tiny
from support import Chaos

from neo.core.request import FinishReason
from neo.runtime.model import Model

LONGEST = 20  # tokens generated of each prompt
PROMPTS = 24


@dataclass(frozen=True)
class Reference:
    """A tiny model and its folder, prompts, and what transformers generates from each."""

    folder: Path
    model: Model
    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]


@cache
def reference_of(arch: str, folder: Path) -> Reference:
    path = save_tiny(folder / arch, arch, seed=7)
    rnd = Random(11)
    prompts = tuple(tuple(rnd.randrange(3, 128) for _ in range(rnd.randint(1, 60))) for _ in range(PROMPTS))
    torch.set_num_threads(1)  # a test's matrices are too small to be shared out
    hf = hf_model(path)
    tokens = tuple(tuple(hf_generate(hf, p, LONGEST)) for p in prompts)
    return Reference(path, Model.load(path), prompts, tokens)


def serve(ref: Reference, engine: Any, seed: int, abort: float = 0.0, most: int = 3000) -> Collected:
    """Requests come in a few at a time, with random lengths; some are aborted."""
    rnd, found = Random(seed), Collected()
    waiting = list(range(len(ref.prompts)))
    rnd.shuffle(waiting)
    lengths = {i: rnd.randint(1, LONGEST) for i in waiting}
    for _ in range(most):
        if not (waiting or engine.has_work):
            break
        for _ in range(rnd.randint(0, 3)):
            if waiting:
                i = waiting.pop()
                add(engine, str(i), ref.prompts[i], lengths[i])
        if rnd.random() < abort and (live := list(engine.scheduler.view.requests)):
            engine.abort(rnd.choice(live))
        found.take(engine.step())
        if not engine.options.ahead:
            engine.check_integrity()
    assert not engine.has_work
    engine.check_integrity()
    for tier in engine.scheduler.view.pools.values():
        assert tier.used == 0
    check(ref, lengths, found)
    engine.close()
    return found


def check(ref: Reference, lengths: dict[int, int], found: Collected) -> None:
    assert sorted(found.reasons) == sorted(str(i) for i in lengths)
    for i, length in lengths.items():
        reason, tokens = found.reasons[str(i)], tuple(found.tokens.get(str(i), ()))
        if reason is FinishReason.LENGTH:
            assert tokens == ref.tokens[i][:length], f"prompt {i} ({len(ref.prompts[i])} tokens)"
        else:
            assert reason is FinishReason.ABORT
            assert tokens == ref.tokens[i][: len(tokens)], f"aborted prompt {i}"


BUDGETS: dict[str, dict[str, Any]] = {
    "ample": {"gpu": 120, "cpu": 120},
    "tight": {"gpu": 14, "cpu": 60},
    "blocks of 16": {"gpu": 9, "cpu": 30, "limits": {"block_size": 16}},
    "tiny chunks": {"gpu": 14, "cpu": 60, "limits": {"max_batch_tokens": 9}},
    "planned ahead": {"gpu": 14, "cpu": 60, "ahead": True},
    "two kernel threads": {"gpu": 14, "cpu": 60, "threads": 2},
}


class ToFinish(Chaos):
    """Random decisions that lead somewhere: eviction only drops so much work."""

    def __init__(self, seed: int, relays: float = 0.0) -> None:
        super().__init__(seed, staging_layers=1 + seed % 3, relays=relays)

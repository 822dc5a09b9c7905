"""Tiny models, what transformers generates with them, and engines that are to generate the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from engine_builders import Collected, add
from model_builders import hf_generate, hf_model, save_tiny
from support import Chaos

from neo.core.errors import PlanError
from neo.core.plan import IDLE, Evict, EvictMode, KVMove, PrefillChunk, StepPlan, SubBatch
from neo.core.request import FinishReason, Request, Tier
from neo.core.validate import check as check_plan
from neo.core.view import SystemView
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


class Ferry:
    """Nearly every step without prefill moves KV ahead of it: somebody leaves the GPU, somebody comes back.

    Who has come decodes at once. Those on the host decode there, relayed or not; some as soon as they come.

    Attributes:
        moving: steps of decodes alone that have moved or evicted something.
    """

    def __init__(self, seed: int, relays: bool) -> None:
        self.random = Random(seed)
        self.relays = relays
        self.moving = 0

    def plan(self, view: SystemView, cost: Any) -> StepPlan:
        """The first wish that can be had."""
        for plan in self._wishes(view):
            try:
                check_plan(view, plan)
            except PlanError:
                continue
            moves = plan.moves or plan.evict
            self.moving += bool(moves and not any(b.prefill for b in plan.batches))
            return plan
        return IDLE

    def _wishes(self, view: SystemView) -> Iterator[StepPlan]:
        gpu = list(view.gpu_decodes)
        host = [r for r in view.cpu_decodes if not r.relay_layers]
        for people in (gpu, host):
            self.random.shuffle(people)
        new = [*view.prefilling, *view.waiting][:1] if self.random.random() < 0.3 or not gpu + host else []
        for r in new:
            length = min(r.remaining_prefill, view.limits.max_batch_tokens // 2)
            yield self._plan(view, gpu, host, chunks=(PrefillChunk(r, r.computed, length),))
        mode = self.random.choice(list(EvictMode))
        if gpu and self.random.random() < 0.1:
            yield self._plan(view, gpu[1:], host, evict=(Evict(gpu[0], mode),))
        numbers = [(1, 1), (1, 0), (0, 1)]
        self.random.shuffle(numbers)
        numbers.insert(0 if self.random.random() < 0.2 else 3, (0, 0))
        for out, into in numbers:
            if out <= len(gpu) and into <= len(host):
                for together in (True, False):
                    stay, there = [*gpu[out:], *host[:into]], [*host[into:], *gpu[: out * together]]
                    moves = [KVMove(r, Tier.CPU) for r in gpu[:out]]
                    moves += [KVMove(r, Tier.GPU) for r in host[:into]]
                    yield self._plan(view, stay, there, moves=tuple(moves))
        if gpu:
            yield self._plan(view, gpu[1:], host, evict=(Evict(gpu[0]),))
        yield self._plan(view, gpu[:1], [])

    def _plan(
        self, view: SystemView, gpu: Sequence[Request], host: Sequence[Request], chunks: Any = (), **more: Any
    ) -> StepPlan:
        moving = {m.request.id for m in more.get("moves", ())}
        relayed: list[Request] = [r for r in view.cpu_decodes if r.relay_layers]
        if self.relays:
            relayed += [r for r in host if r.id not in moving]
        on_cpu = () if self.relays else tuple(host)
        return StepPlan((SubBatch(chunks, tuple(gpu), on_cpu, relay_decode=tuple(relayed)),), **more)

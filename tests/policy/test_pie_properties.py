"""``pie`` and ``flexgen`` under random loads; the core under random rings and moves of scattered layers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Chaos, Drive, Pure, ToyCost, make_scheduler, toy_model

from neo.core.plan import KVMove, MoveOrder, StepPlan
from neo.core.request import FinishReason, Request, Tier
from neo.policy.registry import load_policy
from neo.sim.driver import Client, Simulation

BOUND = 12 * 42 * 12  # steps: see test_scheduler_properties
EAGER = {"min_gain": "0", "watermark": "0"}
POLICIES: dict[str, tuple[str, dict[str, str]]] = {
    "pie/chunked": ("pie", {}),
    "pie/whole": ("pie", {"prefill": "whole"}),
    "pie/eager": ("pie", {"ring": "1", "expand_stall": "5", "contract_stall": "6", **EAGER}),
    "pie/nervous": ("pie", {"expand_stall": "0.3", "contract_stall": "0.3", "hysteresis": "0", **EAGER}),
    "flexgen": ("flexgen", {"prompt_tokens": "15", "output_tokens": "7"}),
    "flexgen/cpu": ("flexgen", {"prompt_tokens": "8", "output_tokens": "12", "attention": "cpu"}),
    "flexgen/stream": ("flexgen", {"prompt_tokens": "30", "output_tokens": "2", "attention": "stream"}),
}

costs = st.builds(
    ToyCost,
    gpu=st.sampled_from([1.0, 0.05]),
    cpu=st.sampled_from([1.0, 0.02, 30.0]),
    link=st.sampled_from([1.0, 0.1, 0.001, 50.0]),
)


@st.composite
def loads(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(arrives at step, prompt, output) of up to a dozen requests."""
    one = st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(1, 14))
    return sorted(draw(st.lists(one, min_size=1, max_size=12)))


def made(name: str, tokens: int | None = None) -> Any:
    spec, options = POLICIES[name]
    if tokens is not None and spec == "pie":
        options = {**options, "token_budget": str(tokens)}
    return load_policy(spec, options)


@pytest.mark.parametrize("name", POLICIES)
@given(
    load=loads(),
    gpu=st.integers(1, 14),
    cpu=st.integers(0, 24),
    layers=st.integers(1, 9),
    block=st.integers(1, 6),
    seqs=st.integers(1, 8),
    tokens=st.integers(1, 48),
    budget=st.integers(1, 48),
    cost=costs,
)
@settings(max_examples=60)
def test_everyone_is_served(name, load, gpu, cpu, layers, block, seqs, tokens, budget, cost) -> None:
    """No rule broken, nobody starves, nobody is preempted without end, and all blocks come back."""
    scheduler = make_scheduler(
        Pure(lambda: made(name, budget)),
        gpu=gpu,
        cpu=cpu,
        model=toy_model(layers),
        cost=cost,
        block_size=block,
        max_seqs=seqs,
        max_batch_tokens=tokens,
    )
    drive = Drive(scheduler)
    for at, prompt, output in load:
        while drive.steps < at and drive.step():
            pass
        drive.add(prompt, output)
    drive.drain(BOUND)
    drive.check_end()
    for r in drive.submitted:
        assert r.finish_reason in (FinishReason.LENGTH, FinishReason.REJECTED)
        if "flexgen" in name:
            assert r.preemptions == 0
        if r.peak_kv_tokens <= gpu * block and not (name.endswith("whole") and r.prompt_tokens > tokens):
            assert r.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("name", POLICIES)
@given(load=loads(), cost=costs, gpu=st.integers(5, 12), stop=st.integers(0, 3))
@settings(max_examples=15)
def test_aborts_and_early_stops_leave_nothing(name, load, cost, gpu, stop) -> None:
    scheduler = make_scheduler(
        Pure(lambda: made(name)), gpu=gpu, cpu=40, model=toy_model(8), cost=cost, max_seqs=6
    )
    drive = Drive(scheduler)
    for i, (_, prompt, output) in enumerate(load):
        drive.add(prompt, output)
        if not drive.start():
            continue
        decodes = [r for b in drive.planned.plan.batches for r in b.decodes]
        if i % 4 == stop and decodes:
            drive.abort(decodes[0])
        drive.finish(1, {decodes[-1].id: FinishReason.STOP} if len(decodes) > 1 and i % 3 == 0 else {})
    drive.drain(BOUND)
    drive.check_end()


@pytest.mark.parametrize("name", POLICIES)
@given(load=loads(), cost=costs, gpu=st.integers(5, 12))
@settings(max_examples=10)
def test_both_levels_of_the_simulator_agree(name, load, cost, gpu) -> None:
    """Step by step by recurrence, operation by operation by events: the same times, to 1e-9."""

    def ends(level: Any) -> list[float | None]:
        scheduler = make_scheduler(
            made(name), gpu=gpu, cpu=40, model=toy_model(8), cost=cost, max_batch_tokens=32
        )
        clients = [Client(Request(f"r{i}", p, o, 0.05 * at)) for i, (at, p, o) in enumerate(load)]
        return [r.finish_s for r in Simulation(scheduler, clients, level).run().requests]

    assert ends("op") == pytest.approx(ends("step"), rel=1e-9)


class Scattered(Chaos):
    """Chaos that also brings rings of its own, and moves several ranges of a request's layers."""

    def plan(self, view: Any, cost: Any) -> StepPlan:
        self.ring = self.random.choice([0, 0, 1, 2, view.model.layers, view.model.layers + 1])
        return super().plan(view, cost)

    def _build(self, draft: dict[str, list[Any]]) -> StepPlan:
        plan = super()._build(draft)
        return StepPlan(plan.batches, plan.moves, plan.evict, why=plan.why, ring=self.ring)

    def _role(self, view: Any, r: Any) -> list[tuple[str, Any]]:
        found = []
        for kind, thing in super()._role(view, r):
            if kind == "m" and self.random.random() < 0.6:
                dst = thing.dst if self.random.random() < 0.9 else self.random.choice(list(Tier))
                order = thing.order if self.random.random() < 0.9 else MoveOrder.BEFORE
                found.append(("m", KVMove(r, dst, self._layers(view.model.layers), order)))
            found.append((kind, thing))
        return found


@given(
    seed=st.integers(0, 2**32 - 1),
    load=loads(),
    gpu=st.integers(1, 14),
    cpu=st.integers(0, 24),
    layers=st.integers(1, 6),
    block=st.integers(1, 6),
    staging=st.integers(0, 2),
)
@settings(max_examples=120)
def test_whatever_check_accepts_keeps_the_accounts_rings_and_scattered_moves_included(
    seed, load, gpu, cpu, layers, block, staging
) -> None:
    policy = Scattered(seed, staging)
    drive = Drive(make_scheduler(policy, gpu=gpu, cpu=cpu, model=toy_model(layers), block_size=block))
    for _, prompt, output in load:
        drive.add(prompt, output)
        drive.step()
    for _ in range(80):
        drive.step()
    for r in drive.submitted:
        if not r.done:
            drive.abort(r)
    drive.check_end()

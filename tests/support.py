"""Shared by the tests of core, policies and simulator: a tiny machine, a checking driver, a random policy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from random import Random
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from neo.core.blocks import blocks_for
from neo.core.errors import PlanError
from neo.core.graph import OpKind, Work
from neo.core.plan import Evict, EvictMode, KVMove, MoveOrder, PrefillChunk, StepPlan, SubBatch
from neo.core.request import FinishReason, Request, State, Tier
from neo.core.scheduler import Planned, Scheduler, StepResult
from neo.core.specs import HardwareSpec, ModelSpec
from neo.core.validate import check
from neo.core.view import Limits, SystemView

if os.environ.get("CI"):
    settings.register_profile("neo-ci", settings.get_profile("neo"), derandomize=True)
    settings.load_profile("neo-ci")

MACHINE = HardwareSpec(
    name="toy",
    gpu="toy",
    cpu="toy",
    gpu_memory_bytes=1e9,
    gpu_bandwidth=1e9,
    gpu_flops=1e12,
    cpu_cores=4,
    cpu_memory_bytes=1e10,
    cpu_bandwidth=1e8,
    cpu_bandwidth_beside_copy=5e7,
    cpu_flops=1e10,
    h2d_bandwidth=1e7,
    d2h_bandwidth=1e7,
    duplex_bandwidth=1.5e7,
    link_latency=1e-5,
)


def toy_model(layers: int = 4, tp: int = 1) -> ModelSpec:
    return ModelSpec("toy", layers, 64, 4, 2, 16, 128, 1000, 100_000, tp=tp)


class ToyCost:
    """Affine in every quantity, with a weight per kind; so cheap and so plain that tests can recompute it."""

    vectorized = True

    def __init__(self, gpu: float = 1.0, cpu: float = 1.0, link: float = 1.0) -> None:
        base = {
            OpKind.SCHEDULE: 3e-4,
            OpKind.EMBED: 1e-4,
            OpKind.PRE: 2e-3 * gpu,
            OpKind.POST: 5e-3 * gpu,
            OpKind.GPU_ATTN: 1e-3 * gpu,
            OpKind.CPU_ATTN: 5e-4 * cpu,
            OpKind.SEND: 1e-4 * link,
            OpKind.RECV: 1e-4 * link,
            OpKind.HEAD: 2e-4,
        }
        self.base = {kind: base.get(kind, 1e-4 * link) for kind in OpKind}
        self.gpu, self.cpu, self.link = gpu, cpu, link

    def seconds(self, kind: OpKind, work: Work) -> Any:
        total = self.base[kind] + 1.1e-5 * self.gpu * work.tokens
        if kind is OpKind.CPU_ATTN:
            total += 2.3e-5 * self.cpu * work.kv_tokens
        elif kind is OpKind.GPU_ATTN:
            total += 0.7e-6 * self.gpu * work.kv_tokens
            total += sum(1.3e-7 * self.gpu * n * (2 * s + n) for s, n in work.chunks)
        else:
            total += 1.7e-9 * self.link * (work.bytes + 0.1 * work.beside_bytes)
        return total

    def describe(self) -> dict[str, Any]:
        return {"name": "toy"}


class ScalarCost(ToyCost):
    """The same without numpy arrays."""

    vectorized = False

    def seconds(self, kind: OpKind, work: Work) -> Any:
        assert not isinstance(work.kv_tokens, np.ndarray)
        return super().seconds(kind, work)


class Fixed:
    """A policy that returns the plans it is given, one after the other (or functions of the view)."""

    def __init__(self, *plans: Any, staging_layers: int = 0) -> None:
        self.plans = list(plans)
        self.staging_layers = staging_layers

    def plan(self, view: SystemView, cost: Any) -> Any:
        plan = self.plans.pop(0) if self.plans else StepPlan()
        return plan(view) if callable(plan) else plan


def make_scheduler(
    policy: Any = None,
    *,
    gpu: int = 8,
    cpu: int = 16,
    model: ModelSpec | None = None,
    cost: Any = None,
    **limits: int,
) -> Scheduler:
    """A scheduler over tiny pools (block size 4 unless said otherwise)."""
    budget = Limits(**{"block_size": 4, "max_seqs": 8, "max_batch_tokens": 64, **limits})
    return Scheduler(
        policy or Fixed(),
        cost or ToyCost(),
        model or toy_model(),
        MACHINE,
        budget,
        gpu_blocks=gpu,
        cpu_blocks=cpu,
    )


def run_plan(scheduler: Scheduler, plan: StepPlan, end_s: float = 1.0, **result: Any) -> Planned:
    """Run one step with exactly ``plan``."""
    planned = start_plan(scheduler, plan)
    scheduler.extend_step(planned, result.get("steps", 1))
    scheduler.finish_step(planned, StepResult(end_s, **result))
    return planned


def start_plan(scheduler: Scheduler, plan: StepPlan) -> Planned:
    """Apply ``plan`` without finishing the step."""
    scheduler.policy = Fixed(plan)
    planned = scheduler.plan_step(0.0)
    assert planned is not None
    return planned


def decoding(
    scheduler: Scheduler,
    name: str,
    prompt: int = 8,
    max_tokens: int = 8,
    tier: Tier = Tier.GPU,
    chunk: int = 0,
) -> Request:
    """A new request, prefilled to ``tier`` and in decode (or still prefilling, ``chunk`` tokens in)."""
    request = Request(name, prompt, max_tokens)
    scheduler.add(request)
    chunks = (PrefillChunk(request, 0, chunk or prompt, tier),)
    # On its way to the CPU, KV passes through what the policy has set aside, or else through free blocks.
    ring = int(tier is Tier.CPU and not scheduler.staging_layers)
    run_plan(scheduler, StepPlan((SubBatch(chunks),), ring=ring))
    return request


def spread(scheduler: Scheduler, request: Request, layers: tuple[int, int], end_s: float = 1.0) -> Planned:
    """Run a step in which a GPU decode's KV of ``layers`` leaves for the CPU behind it."""
    move = KVMove(request, Tier.CPU, layers, MoveOrder.AFTER)
    role = "stream_decode" if request.host_layers else "gpu_decode"
    return run_plan(scheduler, StepPlan((SubBatch(**{role: (request,)}),), (move,)), end_s)


# -- the state of a scheduler, as a value -----------------------------------------------------------------


def snapshot(scheduler: Scheduler) -> Any:
    """Everything a scheduler holds, comparable with ``==``."""
    view = scheduler.view
    return (
        {r.id: request_state(r) for r in view.requests.values()},
        view_state(view),
        [r.id for r in scheduler.ended],
        scheduler._in_flight,
        list(scheduler._books.source_blocks),
        dict(scheduler._aborting),
        scheduler._books.admitted,
    )


def view_state(view: SystemView) -> Any:
    """All that a policy can see."""
    return (
        view.now,
        view.limits,
        {name: request_state(r) for name, r in view.requests.items()},
        [r.id for r in view.waiting],
        [r.id for r in view.prefilling],
        [[r.id for r in group] for group in (view.gpu_decodes, view.cpu_decodes, view.split_decodes)],
        {t: (p.total, p.used, p.blocks, p.staging_blocks, p.holders()) for t, p in view.pools.items()},
        view.relaying,
        view.in_flight,
    )


def request_state(request: Request) -> tuple[Any, ...]:
    return tuple(getattr(request, f.name) for f in fields(Request))


def check_integrity(scheduler: Scheduler) -> None:
    """Between two steps: every block is accounted for and every live request is in exactly one place."""
    view = scheduler.view
    layers, size = view.model.layers, view.limits.block_size
    expected: dict[Tier, dict[str, int]] = {Tier.GPU: {}, Tier.CPU: {}}
    for r in view.requests.values():
        on_host = r.host_layers.bit_count()
        blocks = blocks_for(r.computed + bool(r.relay_layers), size)
        for tier, count in ((Tier.CPU, on_host), (Tier.GPU, layers - on_host)):
            if blocks * count:
                expected[tier][r.id] = blocks * count
    for tier, pool in view.pools.items():
        assert pool.holders() == expected[tier], f"{tier} pool"
        assert pool.used == sum(expected[tier].values())
        assert 0 <= pool.used <= pool.total
        assert pool.free == pool.total - pool.used
    assert view.in_flight is None
    assert view.relaying == sum(r.relay_layers > 0 for r in view.requests.values())
    assert all(0 <= r.relay_layers <= layers for r in view.requests.values())
    assert all(r in view.cpu_decodes for r in view.requests.values() if r.relay_layers)
    places = [view.waiting, view.prefilling, view.gpu_decodes, view.cpu_decodes, view.split_decodes]
    assert sorted(r.id for place in places for r in place) == sorted(view.requests)
    for place, tier, full in zip(
        places[2:], (Tier.GPU, Tier.CPU, None), (0, (1 << layers) - 1, None), strict=True
    ):
        assert [r.sequence for r in place] == sorted(r.sequence for r in place), "decodes by admission"
        for r in place:
            assert r.state is State.DECODE
            assert r.tier is tier
            assert r.computed == r.known - 1
            assert full is None or r.host_layers == full
    for r in view.waiting:
        assert r.state is State.WAITING
        assert (r.computed, r.host_layers, r.tier) == (0, 0, None)
    for r in view.prefilling:
        assert r.state is State.PREFILL
        assert 0 < r.computed < r.known
    for r in scheduler.ended:
        assert r.done
        assert r.id not in view.requests


# -- a driver that checks as it goes ----------------------------------------------------------------------


class Pure:
    """Asks a policy twice, and a fresh one of its kind: same view, same plan, and a view left untouched."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.policy = make()
        self.staging_layers = getattr(self.policy, "staging_layers", 0)

    def plan(self, view: SystemView, cost: Any) -> StepPlan:
        before = view_state(view)
        plan = self.policy.plan(view, cost)
        assert view_state(view) == before, "the policy changed the view"
        assert self.policy.plan(view, cost) == plan, "same view, another plan"
        assert self.make().plan(view, cost) == plan, "a plan depends on more than the view"
        assert view_state(view) == before, "the policy changed the view"
        check(view, plan)
        return plan


class Drive:
    """Drives a Scheduler and holds every invariant of a plan and of the accounts at every step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.now = 0.0
        self.planned: Planned | None = None
        self.submitted: list[Request] = []
        self.aborted: set[str] = set()
        self.steps = 0
        self._before: dict[str, tuple[int, int, int]] = {}
        self._layers: dict[str, int] = {}  # that relayed decodes had behind them

    def add(self, prompt: int, max_tokens: int) -> Request:
        request = Request(f"r{len(self.submitted)}", prompt, max_tokens, arrival_s=self.now)
        self.submitted.append(request)
        self.scheduler.add(request)
        return request

    def abort(self, request: Request, reason: FinishReason = FinishReason.ABORT) -> None:
        first = not request.done and request.id not in self.aborted
        assert self.scheduler.abort(request.id, self.now, reason) is first
        if first:
            self.aborted.add(request.id)

    def start(self) -> bool:
        """Plan a step; whether there is one to run."""
        before = {r.id: (r.computed, r.generated, r.preemptions) for r in self.submitted}
        self.planned = self.scheduler.plan_step(self.now)
        if self.planned is None:
            check_integrity(self.scheduler)
            return False
        plan = self.planned.plan
        self._layers = {r.id: r.relay_layers for b in plan.batches for r in b.relay_decode}
        evicted = {e.request.id for e in plan.evict}
        for e in plan.evict:
            assert e.request.preemptions == before[e.request.id][2] + 1
        self._before = {
            r.id: (0 if r.id in evicted and r.state is State.WAITING else before[r.id][0], before[r.id][1], 0)
            for r in self.submitted
        }
        for r in self.submitted:
            assert r.generated == before[r.id][1], "planning yields no token"
        for pool in self.scheduler.view.pools.values():
            assert 0 <= pool.used <= pool.total
            assert pool.used == sum(pool.holders().values())
        return True

    def finish(self, steps: int = 1, stopped: dict[str, FinishReason] | None = None) -> None:
        """End the running step and check who got what."""
        assert self.planned is not None
        plan = self.planned.plan
        self.now += 0.125 * steps
        self.steps += steps
        if steps > 1:
            self.scheduler.extend_step(self.planned, steps)
            for pool in self.scheduler.view.pools.values():
                assert pool.used == sum(pool.holders().values()) <= pool.total
        self.scheduler.finish_step(self.planned, StepResult(self.now, steps, stopped or {}))
        self.planned = None
        advanced: dict[str, tuple[int, int]] = {}
        for batch in plan.batches:
            for r in batch.decodes:
                assert r.id not in advanced, "two roles"
                advanced[r.id] = (steps, steps)
            for c in batch.prefill:
                assert c.request.id not in advanced, "two roles"
                done = c.start + c.length == c.request.prompt_tokens + self._before[c.request.id][1]
                advanced[c.request.id] = (c.length, int(done))
            for r in batch.relay_decode:
                assert r.id not in advanced, "two roles"
                done = self._layers[r.id] == self.scheduler.view.model.layers
                advanced[r.id] = (int(done), int(done))
                if not r.done:
                    assert r.relay_layers == (0 if done else self._layers[r.id] + 1)
        assert advanced, "a step that advances nobody"
        for e in plan.evict:
            assert e.request.id not in advanced, "evicted and run"
        for r in self.submitted:
            if r.id in self._before:
                more = advanced.get(r.id, (0, 0))
                was = self._before[r.id]
                assert (r.computed - was[0], r.generated - was[1]) == more, r
            assert r.generated <= r.max_tokens
            if r.generated == r.max_tokens:
                assert r.done
        check_integrity(self.scheduler)

    def step(self) -> bool:
        """One whole step; False if the policy has nothing to do."""
        if not self.start():
            return False
        self.finish()
        return True

    def drain(self, most: int) -> int:
        """Step until nobody is left; fails after ``most`` steps or when the policy stalls."""
        taken = 0
        while self.scheduler.unfinished:
            stepped = self.step()
            left = list(self.scheduler.view.requests.values())
            assert stepped or not left, f"stalled: {left}"
            taken += 1
            assert taken <= most, f"still there after {most} steps: {left}"
        return taken

    def check_end(self) -> None:
        """Everyone ended once, tokens add up, nothing leaks."""
        scheduler = self.scheduler
        assert scheduler.unfinished == 0
        for pool in scheduler.view.pools.values():
            assert pool.free == pool.total
            assert pool.holders() == {}
        ended = [r.id for r in scheduler.ended]
        assert sorted(ended) == sorted(r.id for r in self.submitted), "each request ends once"
        for r in self.submitted:
            if r.finish_reason is FinishReason.LENGTH:
                assert r.generated == r.max_tokens
                assert r.computed == r.peak_kv_tokens
                assert r.state is State.FINISHED
            elif r.finish_reason is FinishReason.REJECTED:
                assert r.state is State.REJECTED
                assert any(c.isdigit() for c in r.detail), "the reason gives numbers"
            else:
                assert r.id in self.aborted or r.finish_reason is FinishReason.STOP
            assert r.finish_s is not None
            assert r.finish_s >= r.arrival_s
            if r.generated:
                assert r.scheduled_s is not None
                assert r.first_token_s is not None
                assert r.last_token_s is not None
                assert r.scheduled_s <= r.first_token_s <= r.last_token_s


# -- a policy that does anything ``check`` lets it do -----------------------------------------------------


class Chaos:
    """Random decisions of every kind the plan language has; whatever ``check`` accepts is played.

    Its holes are therefore the holes of ``validate.check``: a plan that passes and then breaks the
    accounting is a bug of the core.
    """

    def __init__(self, seed: int, staging_layers: int = 1, rejects: float = 0.0, relays: float = 0.0) -> None:
        self.random = Random(seed)
        self.relays = relays  # share of decodes on the CPU that are relayed rather than anything else
        self.staging_layers = staging_layers
        self.rejects = rejects

    def plan(self, view: SystemView, cost: Any) -> StepPlan:
        rnd = self.random
        people = list(view.requests.values())
        rnd.shuffle(people)
        draft: dict[str, list[Any]] = {k: [] for k in ("p", "g", "c0", "c1", "s", "r", "m", "e")}
        best = StepPlan()
        if view.relaying and rnd.random() < 0.8:
            best = self._go_on(view, draft, best)
        passive: list[list[tuple[str, Any]]] = []
        for r in people:
            if rnd.random() < 0.15:
                continue
            action = self._role(view, r)
            if not any(kind in ("p", "g", "c0", "c1", "s", "r") for kind, _ in action):
                passive.append(action)
            else:
                best = self._try(view, draft, action, best)
        for action in passive:
            best = self._try(view, draft, action, best)
        return best

    def _go_on(self, view: SystemView, draft: dict[str, list[Any]], best: StepPlan) -> StepPlan:
        """Those within a relayed token go on together, or those who do not are evicted."""
        action: list[tuple[str, Any]] = [
            ("e", Evict(r)) if self.random.random() < 0.02 else ("r", r)
            for r in view.cpu_decodes
            if r.relay_layers
        ]
        return self._try(view, draft, action, best)

    def _try(
        self, view: SystemView, draft: dict[str, list[Any]], action: list[tuple[str, Any]], best: StepPlan
    ) -> StepPlan:
        if not action:
            return best
        for kind, thing in action:
            # Anywhere, not only at the end: no order of these tuples is promised to matter.
            draft[kind].insert(self.random.randint(0, len(draft[kind])), thing)
        plan = self._build(draft)
        try:
            check(view, plan)
        except PlanError:
            for kind, thing in action:
                draft[kind].remove(thing)
            return best
        return plan

    def _build(self, draft: dict[str, list[Any]]) -> StepPlan:
        parts = {k: tuple(v) for k, v in draft.items()}
        first = SubBatch(parts["p"], parts["g"], parts["c0"], parts["s"], parts["r"])
        second = SubBatch(cpu_decode=parts["c1"])
        if not second.sequences:
            batches: tuple[SubBatch, ...] = (first,) if first.sequences or first.relay_decode else ()
        elif not (first.sequences or first.relay_decode):
            batches = (second,)
        else:
            batches = (first, second)
        return StepPlan(batches, parts["m"], parts["e"], why="chaos")

    def _role(self, view: SystemView, r: Request) -> list[tuple[str, Any]]:
        rnd, layers = self.random, view.model.layers
        if r.state is State.WAITING or r.state is State.PREFILL:
            if r.computed and rnd.random() < 0.15:
                return [("e", Evict(r, rnd.choice(list(EvictMode))))]
            dst = rnd.choice(list(Tier))
            moves: list[tuple[str, Any]] = []
            if r.computed and rnd.random() < 0.3:
                moves = [("m", KVMove(r, dst))]
                if rnd.random() < 0.3:
                    return [("m", KVMove(r, dst, self._layers(layers)))]
            elif r.computed and rnd.random() < 0.9:
                dst = r.tier or dst
            most = min(r.remaining_prefill, view.limits.max_batch_tokens)
            length = most if rnd.random() < 0.5 else rnd.randint(1, most)
            return [*moves, ("p", PrefillChunk(r, r.computed, length, dst))]
        if r.tier is Tier.CPU and self.relays and rnd.random() < self.relays:
            return [("r", r)]
        roll = rnd.random()
        if roll < 0.08:
            return [("e", Evict(r, rnd.choice(list(EvictMode))))]
        if roll < 0.16:
            return [("m", KVMove(r, rnd.choice(list(Tier)), self._layers(layers)))]
        if r.tier is Tier.CPU and roll < 0.4:
            return [("r", r)]
        cpu = rnd.choice(["c0", "c1"])
        if roll < 0.5:
            natural = {Tier.GPU: "g", Tier.CPU: cpu, None: "s"}[r.tier]
            return [(natural, r)]
        move_to = rnd.choice(list(Tier))
        some = self._layers(layers)
        return rnd.choice(
            [
                [("m", KVMove(r, Tier.CPU)), (cpu, r)],
                [("m", KVMove(r, Tier.GPU)), ("g", r)],
                [("m", KVMove(r, move_to, some)), ("s", r)],
                [("m", KVMove(r, move_to, some)), ("g" if move_to is Tier.GPU else cpu, r)],
                [("m", KVMove(r, Tier.CPU, some, MoveOrder.AFTER)), (rnd.choice("gs"), r)],
                [("m", KVMove(r, Tier.CPU, None, MoveOrder.AFTER)), ("g", r)],
                [("s", r)],
            ]
        )

    def _layers(self, layers: int) -> tuple[int, int]:
        start = self.random.randrange(layers)
        return start, self.random.randint(start + 1, layers)


# -- strategies ---------------------------------------------------------------------------------------------

BUILT_IN: dict[str, Callable[[], Any]] = {}


def _register() -> Iterator[tuple[str, Callable[[], Any]]]:
    from neo.policy.registry import load_policy

    for name in ("gpu-only", "neo", "fastdecode", "pie"):
        for mode in ("chunked", "whole"):
            yield (
                f"{name}/{mode}",
                lambda name=name, mode=mode, **more: load_policy(name, {"prefill": mode, **more}),
            )
    lengths = {"prompt_tokens": "15", "output_tokens": "7"}
    yield "flexgen", lambda token_budget="", **more: load_policy("flexgen", {**lengths, **more})


BUILT_IN.update(_register())

costs = st.builds(
    ToyCost,
    gpu=st.sampled_from([1.0, 0.05]),
    cpu=st.sampled_from([1.0, 0.02, 30.0]),
    link=st.sampled_from([1.0, 0.1, 50.0]),
)

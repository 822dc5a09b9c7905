"""What the CPU executor ran is the StepGraph that the simulator prices: the same operations, in its order, on
its resources, each behind what it depends on. Held on timelines that were recorded, for whole runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from random import Random
from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")

from engine_builders import Ran, Watched, add, make_engine, prompt_of, run, tiny_model, watch
from support import Chaos, ToyCost

from neo.core.graph import RELAY, Op, OpKind, Resource
from neo.core.plan import KVMove, MoveOrder, StepPlan
from neo.core.record import Slice
from neo.core.request import Tier
from neo.policy.registry import load_policy
from neo.runtime.backend import Backend
from neo.runtime.backend_torch import TorchJob
from neo.runtime.executor import operation_names
from neo.runtime.program import FUSED

LAYERS = 4
TICK = 1e-9  # of the clocks: the kernels' workers tell nanoseconds, Python makes floats of them
COPIES = {OpKind.SWAP_OUT, OpKind.SWAP_IN, OpKind.STREAM}
Key = tuple[str, int | None, int]


def eager_neo() -> Any:
    return load_policy("neo", {"eager": "true", "worth": "tokens"})


def pie() -> Any:
    return load_policy("pie", {"watermark": "0", "min_gain": "0"})


def chaos() -> Any:
    return Chaos(3, staging_layers=2)


POLICIES: dict[str, Callable[[], Any]] = {
    "gpu-only": lambda: load_policy("gpu-only", {}),
    "neo": eager_neo,
    "fastdecode": lambda: load_policy("fastdecode", {}),
    "pie": pie,
    "anything": chaos,
}
EXPECTED: dict[str, set[OpKind]] = {
    "gpu-only": set(),
    "neo": {OpKind.CPU_ATTN, OpKind.SWAP_OUT},
    "fastdecode": {OpKind.CPU_ATTN, OpKind.SWAP_OUT},
    "pie": {OpKind.STREAM, OpKind.SWAP_OUT},
    "anything": {OpKind.CPU_ATTN, OpKind.SWAP_OUT, OpKind.SWAP_IN, OpKind.STREAM},
}


class Slow:
    """A backend whose workers take their time: what does not wait for them is ahead of them."""

    def __init__(self, inner: Backend, seconds: float) -> None:
        self.inner, self.seconds = inner, seconds

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if not name.endswith("_job"):
            return found

        def slowly(*arguments: Any) -> TorchJob:
            job: TorchJob = found(*arguments)
            return TorchJob(job.kind, (lambda: time.sleep(self.seconds), *job.parts))

        return slowly


def played(policy: Any, slow: float = 0.0, **more: Any) -> Watched:
    """A run of requests of many lengths, with everything that it left."""
    # Fast CPU attention and links, so that policies that weigh them use them.
    cost = ToyCost(cpu=0.02, link=1e-6)
    budget = {"gpu": 14, "cpu": 60, "slices_of": 10_000, "cost": cost, **more}
    engine = make_engine(tiny_model(LAYERS), policy, kind="torch" if slow else "auto", **budget)
    watched = watch(engine)
    if slow:
        stub: Any = Slow(watched.inner.backend, slow)
        watched.inner.backend = stub
    rnd = Random(4)
    for i in range(14):
        add(engine, f"r{i}", prompt_of(rnd.randint(1, 40), i), rnd.randint(2, 14))
    run(engine)
    engine.close()
    return watched


CASES = [(name, slow) for name in POLICIES for slow in (0.0, 0.001) if not slow or EXPECTED[name]]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0] + ", slow workers" * bool(case[1]))
def timeline(request: pytest.FixtureRequest) -> tuple[str, Watched]:
    name, slow = request.param
    return name, played(POLICIES[name](), slow)


def operations(ran: Ran) -> list[Op]:
    return list(ran.graph.expand())


def key(op: Op | Slice) -> Key:
    return (str(op.kind if isinstance(op, Op) else op.name), op.layer, op.batch)


def slices_by_op(ran: Ran) -> dict[int, Slice]:
    """Index of an operation in the expanded graph -> its slice."""
    found = {key(s): s for s in ran.times.slices}
    assert len(found) == len(ran.times.slices), "an operation ran twice"
    return {op.index: found[key(op)] for op in operations(ran) if key(op) in found}


def test_every_operation_that_does_something_ran_once(timeline: tuple[str, Watched]) -> None:
    """Copies too, in every layer in which there is anything to copy."""
    name, watched = timeline
    seen: set[OpKind] = set()
    for ran in watched.ran:
        ops = operations(ran)
        assert max(Counter(map(key, ops)).values()) == 1, "names tell operations apart"
        wanted = {key(op) for op in ops if op.kind not in FUSED}
        got = {key(s) for s in ran.times.slices}
        assert got <= wanted, "an operation that is not the graph's"
        missing = {k for k in wanted - got if k[0] not in COPIES}
        assert {k for k in missing if k[2] != RELAY} == set(), "an operation that never ran"
        relayed = {k for k in wanted if k[2] == RELAY}  # in some layers there may be nobody
        assert not relayed or relayed - missing, "relayed decodes whose attention never ran"
        for kind in COPIES:
            there = [k for k in got if k[0] == kind]
            assert bool(there) == any(k[0] == kind for k in wanted), f"{kind} copies nothing at all"
            if name != "anything" and whole_copies(ran.plan, kind):  # its requests may be split already
                assert len(there) == len([k for k in wanted if k[0] == kind])
        seen |= {op.kind for op in ops}
    assert EXPECTED[name] <= seen, "this policy should do more than this run shows"


def whole_copies(plan: StepPlan, kind: OpKind) -> bool:
    """Whether a plan copies something in every layer for each of its operations of this kind."""
    moves = [KVMove(e.request, Tier.CPU) for e in plan.evict] + list(plan.moves)
    spills = [c for b in plan.batches for c in b.prefill if c.dst is Tier.CPU]
    if any(b.stream_decode for b in plan.batches) or any(m.layers is not None for m in moves):
        return False
    if kind is OpKind.STREAM:
        return any(c.start for c in spills)
    if kind is OpKind.SWAP_IN:
        return any(m.dst is Tier.GPU for m in moves)
    return bool(spills) or any(m.dst is Tier.CPU and m.order is MoveOrder.BEFORE for m in moves)


def test_resources_are_the_graphs_and_run_one_operation_at_a_time_in_its_order(
    timeline: tuple[str, Watched],
) -> None:
    for ran in timeline[1].ran:
        slices = slices_by_op(ran)
        for resource in Resource:
            mine = [
                slices[op.index] for op in operations(ran) if op.resource is resource and op.index in slices
            ]
            for s in mine:
                assert s.resource == resource
                assert ran.times.begin_s - TICK <= s.start_s <= s.end_s <= ran.times.end_s + TICK
            for first, then in pairwise(mine):  # in program order
                assert first.end_s <= then.start_s + TICK, f"{then} begins before the end of {first}"


def dependencies(op: Op, ops: list[Op], slices: dict[int, Slice]) -> Iterator[Slice]:
    """What an operation must come after, through operations that are fused or copied nothing."""
    for index in op.deps:
        if index in slices:
            yield slices[index]
        else:
            yield from dependencies(ops[index], ops, slices)


def test_everything_runs_behind_what_it_depends_on(timeline: tuple[str, Watched]) -> None:
    count = 0
    for ran in timeline[1].ran:
        ops, slices = operations(ran), slices_by_op(ran)
        for op in ops:
            if op.index not in slices:
                continue
            for before in dependencies(op, ops, slices):
                count += 1
                assert before.end_s <= slices[op.index].start_s + TICK, f"{op} ran before the end of {before}"
    assert count > 100


def test_times_by_operation_are_sums_of_the_slices(timeline: tuple[str, Watched]) -> None:
    for ran in timeline[1].ran:
        sums: dict[str, float] = {}
        for s in ran.times.slices:
            sums[f"{s.name}:{s.batch}"] = sums.get(f"{s.name}:{s.batch}", 0.0) + s.end_s - s.start_s
        measured = ran.times.by_operation(ran.graph)
        assert set(measured) == set(operation_names(ran.graph))
        for name, (_, seconds) in measured.items():
            if name != "SCHEDULE:-1":  # the engine's, who knows when planning began
                assert seconds == pytest.approx(sums.get(name, 0.0), rel=1e-6, abs=1e-9)


def test_slices_stop_where_they_were_asked_to() -> None:
    watched = played(eager_neo(), slices_of=3)
    assert [bool(ran.times.slices) for ran in watched.ran[:5]] == [True, True, True, False, False]
    assert {s.step for ran in watched.ran for s in ran.times.slices} == {0, 1, 2}


# -- beside each other ------------------------------------------------------------------------------------


def overlaps(slices: list[Slice], one: Resource, other: Resource) -> list[tuple[Slice, Slice]]:
    """Pairs of slices of two resources that ran at the same time."""
    pairs = [
        (a, b) if a.resource == one else (b, a)
        for a, b in combinations(slices, 2)
        if {a.resource, b.resource} == {one, other}
    ]
    return [(a, b) for a, b in pairs if a.start_s < b.end_s and b.start_s < a.end_s]


def test_cpu_attention_runs_beside_the_other_sub_batch() -> None:
    """NEO's picture: sub-batch 1 on the CPU beside POST and PRE of 0, sub-batch 0 beside those of 1."""
    watched = played(eager_neo(), slow=0.003)  # far longer than anything the tiny model does
    pipelined = [ran for ran in watched.ran if len(ran.plan.batches) == 2]
    assert pipelined
    beside: set[tuple[int, str, int]] = set()
    for ran in pipelined:
        for cpu, gpu in overlaps(ran.times.slices, Resource.CPU, Resource.GPU):
            beside.add((cpu.batch, gpu.name, gpu.batch))
    assert {(1, "POST", 0), (1, "PRE", 0)} <= beside
    if any(ran.plan.batches[0].cpu_decode for ran in pipelined):
        assert {(0, "POST", 1), (0, "PRE", 1)} <= beside
    assert not {(b, name, c) for b, name, c in beside if b == c and name == "POST"}, (
        "POST needs its own result"
    )

"""The simulator: many steps at once, both levels, clients that give up, and what it leaves behind."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BUILT_IN, Chaos, Fixed, ScalarCost, ToyCost, costs, make_scheduler, toy_model

from neo.core.errors import PlanError, PolicyError
from neo.core.plan import Evict, KVMove, MoveOrder, PrefillChunk, Reject, StepPlan, SubBatch
from neo.core.record import Mode, RunRecord
from neo.core.request import FinishReason, Request, State, Tier
from neo.core.runlog import RunLog
from neo.core.scheduler import Scheduler
from neo.sim.driver import Client, Simulation, until

Row = tuple[float, int, int, float | None, float | None]  # arrival, prompt, output, timeout, abort


def clients_of(rows: Sequence[Row]) -> list[Client]:
    ordered = sorted(rows, key=lambda row: row[0])
    return [Client(Request(f"r{i}", p, o, at), t, a) for i, (at, p, o, t, a) in enumerate(ordered)]


def simulate(rows: Sequence[Row], scheduler: Scheduler, **options: Any) -> tuple[Simulation, RunRecord]:
    simulation = Simulation(scheduler, clients_of(rows), **options)
    return simulation, simulation.run()


def outcome(record: RunRecord) -> list[tuple[Any, ...]]:
    """All that a run says about its requests."""
    return [tuple(getattr(r, f.name) for f in fields(Request)) for r in record.requests]


def gaps(record: RunRecord) -> Counter[float]:
    found: Counter[float] = Counter()
    for value, count in zip(record.itl_values, record.itl_counts, strict=True):
        found[value] += count
    return found


def totals(record: RunRecord) -> tuple[Any, ...]:
    return (
        sum(record.columns.steps),
        record.busy,
        record.bytes_h2d,
        record.bytes_d2h,
        record.preemptions,
        record.start_s,
        record.end_s,
    )


def expected_gaps(record: RunRecord) -> int:
    """Gaps between tokens: one fewer than tokens, per request."""
    return sum(max(0, r.generated - 1) for r in record.requests)


@st.composite
def workloads(draw: st.DrawFn, give_up: bool = True, most: int = 10) -> list[Row]:
    times = st.one_of(st.just(0.0), st.floats(0, 2, allow_subnormal=False))
    patience = st.one_of(st.none(), st.none(), st.floats(0, 2)) if give_up else st.none()
    row = st.tuples(times, st.integers(1, 30), st.integers(1, 40), patience, patience)
    return draw(st.lists(row, min_size=1, max_size=most))


def small(
    name: str = "gpu-only/chunked",
    *,
    cost: Any = None,
    gpu: int = 24,
    cpu: int = 24,
    layers: int = 3,
    **more: Any,
) -> Scheduler:
    policy = BUILT_IN[name](token_budget="24")
    return make_scheduler(policy, gpu=gpu, cpu=cpu, cost=cost, model=toy_model(layers), **more)


SIMULATED = [
    "gpu-only/chunked",
    "gpu-only/whole",
    "neo/chunked",
    "fastdecode/chunked",
    "pie/chunked",
    "flexgen",
]


# -- advancing many steps at once -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SIMULATED)
@given(rows=workloads(), cost=costs, gpu=st.integers(12, 40), scalar=st.booleans(), data=st.data())
@settings(max_examples=40)
def test_many_steps_at_once_give_the_numbers_of_stepping(
    name: str, rows: list[Row], cost: ToyCost, gpu: int, scalar: bool, data: st.DataObject
) -> None:
    """Bit for bit: also when somebody comes or gives up exactly where a step ends."""
    if scalar:
        cost = ScalarCost(cost.gpu, cost.cpu, cost.link)
    _, first = simulate(rows, small(name, cost=cost, gpu=gpu), repeat=False)
    ends = sorted(set(first.columns.end_s))
    if ends:
        boundaries = st.sampled_from(ends)
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(boundaries)
            rows = [*rows, (at, data.draw(st.integers(1, 30)), data.draw(st.integers(1, 40)), None, None)]
            rows = [*rows, (0.0, 5, 40, data.draw(boundaries), None)]
    _, stepped = simulate(rows, small(name, cost=cost, gpu=gpu), repeat=False)
    _, jumped = simulate(rows, small(name, cost=cost, gpu=gpu), repeat=True)
    assert outcome(jumped) == outcome(stepped)
    assert totals(jumped) == totals(stepped)
    assert gaps(jumped) == gaps(stepped)
    assert sum(gaps(jumped).values()) == expected_gaps(jumped)
    assert len(jumped.columns.steps) <= len(stepped.columns.steps)


def test_a_lone_decode_is_one_row_and_its_kv_peak_is_that_of_stepping() -> None:
    rows: list[Row] = [(0.0, 5, 30, None, None)]
    _, stepped = simulate(rows, small(), repeat=False)
    _, jumped = simulate(rows, small(), repeat=True)
    assert list(jumped.columns.steps) == [1, 29]
    assert len(stepped.columns.steps) == 30
    assert max(jumped.columns.kv_gpu) == max(stepped.columns.kv_gpu)


def test_a_policy_that_promises_nothing_is_stepped() -> None:
    class Careful:
        def __init__(self) -> None:
            self.inner = BUILT_IN["gpu-only/chunked"]()

        def plan(self, view: Any, cost: Any) -> StepPlan:
            plan = self.inner.plan(view, cost)
            return StepPlan(plan.batches, plan.moves, plan.evict, plan.reject, plan.why)

    _, record = simulate([(0.0, 5, 30, None, None)], make_scheduler(Careful(), gpu=24))
    assert list(record.columns.steps) == [1] * 30


def test_a_promise_of_few_steps_is_kept_to() -> None:
    class Few:
        def plan(self, view: Any, cost: Any) -> StepPlan:
            chunks = tuple(PrefillChunk(r, 0, r.remaining_prefill) for r in view.waiting)
            repeat = 0 if chunks else 3
            return StepPlan((SubBatch(chunks, view.gpu_decodes),), repeat=repeat)

    _, record = simulate([(0.0, 5, 30, None, None)], make_scheduler(Few(), gpu=24))
    assert list(record.columns.steps) == [1, 4, 4, 4, 4, 4, 4, 4, 1]


# -- the two levels -------------------------------------------------------------------------------------


def close(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and abs(a - b) <= 1e-9 * max(abs(a), abs(b)))


@pytest.mark.parametrize("name", [*SIMULATED, "chaos"])
@given(rows=workloads(give_up=False, most=5), cost=costs, layers=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=12)
def test_both_levels_agree_on_whole_runs(
    name: str, rows: list[Row], cost: ToyCost, layers: int, seed: int
) -> None:
    # All at once: an arrival within rounding of a step's end could be seen by that plan or by the next.
    rows = [(0.0, p, min(o, 12), t, a) for _, p, o, t, a in rows]

    def run(level: Any) -> tuple[RunRecord, PlanError | None]:
        policy = Patient(seed) if name == "chaos" else BUILT_IN[name](token_budget="24")
        scheduler = make_scheduler(policy, gpu=24, cpu=24, cost=cost, model=toy_model(layers))
        simulation = Simulation(scheduler, clients_of(rows), level=level, repeat=False)
        try:
            return simulation.run(), None
        except PlanError as stalled:
            return simulation.record, stalled

    (fine, stop_fine), (coarse, stop_coarse) = run("op"), run("step")
    assert str(stop_fine) == str(stop_coarse)
    if name != "chaos":
        assert stop_fine is None
    assert len(fine.columns.steps) == len(coarse.columns.steps)
    for a, b in zip(fine.columns.end_s, coarse.columns.end_s, strict=True):
        assert close(a, b)
    for x, y in zip(fine.requests, coarse.requests, strict=True):
        assert (x.generated, x.state, x.preemptions, x.cpu_steps) == (
            y.generated,
            y.state,
            y.preemptions,
            y.cpu_steps,
        )
        assert close(x.first_token_s, y.first_token_s)
        assert close(x.finish_s, y.finish_s)
    assert fine.busy.keys() == coarse.busy.keys()
    assert all(close(fine.busy[k], coarse.busy[k]) for k in fine.busy)
    assert (fine.bytes_h2d, fine.bytes_d2h) == (coarse.bytes_h2d, coarse.bytes_d2h)


class Patient(Chaos):
    """Chaos that stays idle only when nothing at all is possible, as it knows no arrivals to wait for."""

    def plan(self, view: Any, cost: Any) -> StepPlan:
        for _ in range(20):
            plan = super().plan(view, cost)
            if not plan.idle:
                return plan
        return plan


def test_two_runs_are_equal() -> None:
    rows: list[Row] = [(0.03 * i, 3 + 7 * i % 23, 2 + 5 * i % 19, None, None) for i in range(30)]
    first, second = (simulate(rows, small("neo/chunked", gpu=10, cpu=60))[1] for _ in range(2))
    assert outcome(first) == outcome(second)
    assert totals(first) == totals(second)
    assert first.columns == second.columns
    assert gaps(first) == gaps(second)


def test_timeline_slices_of_the_first_steps_lie_within_them_and_never_overlap_on_a_resource() -> None:
    rows: list[Row] = [(0.0, 9, 8, None, None)] * 8
    _, record = simulate(
        rows, small("fastdecode/chunked", cost=ToyCost(cpu=10.0)), level="op", timeline_steps=6
    )
    columns = record.columns
    assert Mode.PIPELINED in columns.mode[:6]
    assert {s.step for s in record.slices} == set(range(6))
    for s in record.slices:
        assert columns.start_s[s.step] <= s.start_s <= s.end_s <= columns.end_s[s.step]
    for resource in {s.resource for s in record.slices}:
        own = sorted((s.start_s, s.end_s) for s in record.slices if s.resource == resource)
        for (_, end), (start, _) in pairwise(own):
            assert end <= start
    for step in range(6):
        assert max(s.end_s for s in record.slices if s.step == step) == columns.end_s[step]


# -- clients that give up -------------------------------------------------------------------------------


def ends_of(rows: Sequence[Row], **options: Any) -> list[float]:
    return list(simulate(rows, small(**options), repeat=False)[1].columns.end_s)


def test_a_timeout_ends_a_request_in_the_queue_at_once() -> None:
    rows: list[Row] = [(0.0, 5, 40, None, None), (0.0, 30, 4, 0.01, None)]
    _, record = simulate(rows, small(max_seqs=1))
    served, late = record.requests
    assert (served.generated, served.finish_reason) == (40, FinishReason.LENGTH)
    assert (late.finish_reason, late.state, late.finish_s) == (FinishReason.TIMEOUT, State.ABORTED, 0.01)
    assert (late.generated, late.scheduled_s) == (0, None)


def test_an_abort_in_mid_prefill_takes_effect_when_the_running_step_ends() -> None:
    ends = ends_of([(0.0, 60, 4, None, None)])
    middle = (ends[0] + ends[1]) / 2
    simulation, record = simulate([(0.0, 60, 4, None, middle)], small())
    (request,) = record.requests
    assert (request.finish_reason, request.finish_s) == (FinishReason.ABORT, ends[1])
    assert (request.computed, request.generated) == (48, 0)
    assert simulation.scheduler.view.pools[Tier.GPU].used == 0


@pytest.mark.parametrize("repeat", [True, False])
def test_an_abort_in_mid_decode_takes_effect_when_the_running_step_ends(repeat: bool) -> None:
    ends = ends_of([(0.0, 5, 40, None, None)])
    middle = (ends[16] + ends[17]) / 2
    simulation, record = simulate([(0.0, 5, 40, None, middle)], small(), repeat=repeat)
    (request,) = record.requests
    assert (request.finish_reason, request.finish_s, request.generated) == (FinishReason.ABORT, ends[17], 18)
    assert simulation.scheduler.view.pools[Tier.GPU].used == 0


def test_an_abort_during_the_last_step_comes_too_late() -> None:
    ends = ends_of([(0.0, 5, 4, None, None)])
    _, record = simulate([(0.0, 5, 4, None, (ends[2] + ends[3]) / 2)], small())
    assert record.requests[0].finish_reason is FinishReason.LENGTH
    assert record.requests[0].generated == 4


def test_a_client_that_leaves_on_arrival_is_never_served() -> None:
    _, record = simulate([(0.5, 5, 4, None, 0.0)], small())
    assert record.requests[0].finish_reason is FinishReason.ABORT
    assert record.requests[0].finish_s == 0.5
    assert len(record.columns.steps) == 0


@pytest.mark.parametrize("name", SIMULATED)
@given(rows=workloads(), gpu=st.integers(2, 16))
@settings(max_examples=40)
def test_every_request_ends_once_and_no_block_leaks(name: str, rows: list[Row], gpu: int) -> None:
    file = io.StringIO()
    simulation, record = simulate(rows, small(name, gpu=gpu, cpu=30), log=RunLog(file, {}))
    for r in record.requests:
        assert r.done
        assert (r.generated == r.max_tokens) is (r.finish_reason is FinishReason.LENGTH)
        if r.finish_reason is FinishReason.REJECTED:
            assert any(c.isdigit() for c in r.detail)
    for pool in simulation.scheduler.view.pools.values():
        assert pool.holders() == {}
    assert sum(gaps(record).values()) == expected_gaps(record)
    assert record.end_s == max(r.finish_s or 0.0 for r in record.requests)


# -- what goes wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gpu-only/chunked", "gpu-only/whole", "neo/chunked", "neo/whole", "fastdecode/chunked"]
)
def test_a_request_that_can_never_fit_is_rejected_with_its_numbers(name: str) -> None:
    rows: list[Row] = [(0.0, 5, 4, None, None), (0.0, 300, 77, None, None), (0.0, 5, 4, None, None)]
    file = io.StringIO()
    scheduler = small(name, max_batch_tokens=512)
    _, record = simulate(rows, scheduler, log=RunLog(file, {}))
    assert [r.finish_reason for r in record.requests] == ["length", "rejected", "length"]
    assert "300" in record.requests[1].detail or "94" in record.requests[1].detail
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["id"] for line in lines if line["type"] == "end"] == ["r1"]


def test_a_policy_that_stays_idle_is_an_error_that_names_a_request() -> None:
    simulation = Simulation(make_scheduler(Fixed()), clients_of([(0.0, 5, 4, None, None)]))
    with pytest.raises(PlanError, match="r0") as caught:
        simulation.run()
    assert caught.value.rule == "progress"
    assert caught.value.request_id == "r0"


def test_a_stall_is_reported_even_while_timers_of_ended_requests_run() -> None:
    class OnlyFirst:
        def plan(self, view: Any, cost: Any) -> StepPlan:
            chunks = tuple(PrefillChunk(r, 0, r.remaining_prefill) for r in view.waiting if r.id == "r0")
            batch = SubBatch(chunks, view.gpu_decodes)
            return StepPlan((batch,) if batch.sequences else ())

    rows: list[Row] = [(0.0, 5, 4, 100.0, None), (0.0, 5, 4, None, None)]
    simulation = Simulation(make_scheduler(OnlyFirst()), clients_of(rows))
    with pytest.raises(PlanError) as caught:
        simulation.run()
    assert (caught.value.rule, caught.value.request_id) == ("progress", "r1")
    assert simulation.record.requests[0].finish_reason is FinishReason.LENGTH


def test_an_idle_policy_is_asked_again_when_somebody_arrives_or_gives_up() -> None:
    class TwoAtOnce:
        """Serves only while two are there."""

        def plan(self, view: Any, cost: Any) -> StepPlan:
            if len(view.requests) < 2:
                return StepPlan()
            chunks = tuple(PrefillChunk(r, 0, r.remaining_prefill) for r in view.waiting)
            return StepPlan((SubBatch(chunks, view.gpu_decodes),))

    rows: list[Row] = [(0.0, 5, 9, None, 1.5), (1.0, 5, 4, None, None)]
    _, record = simulate(rows, make_scheduler(TwoAtOnce()))
    assert record.requests[1].finish_reason is FinishReason.LENGTH
    assert record.requests[1].scheduled_s == 1.0
    assert record.requests[0].finish_reason is FinishReason.ABORT
    assert record.requests[0].finish_s == 1.5


def test_what_ran_before_a_policy_failed_is_kept() -> None:
    class FailsLater:
        def __init__(self) -> None:
            self.inner = BUILT_IN["gpu-only/chunked"]()
            self.calls = 0

        def plan(self, view: Any, cost: Any) -> StepPlan:
            self.calls += 1
            if self.calls == 3:
                raise ZeroDivisionError("by nothing")
            return self.inner.plan(view, cost)

    rows: list[Row] = [(0.0, 5, 4, None, None), (0.0, 5, 40, None, None)]
    simulation = Simulation(make_scheduler(FailsLater(), gpu=24), clients_of(rows))
    with pytest.raises(PolicyError, match=r"FailsLater raised ZeroDivisionError at .*: by nothing"):
        simulation.run()
    assert simulation.record.requests[0].finish_reason is FinishReason.LENGTH
    assert simulation.record.end_s == simulation.record.requests[0].finish_s


def test_an_empty_workload_is_an_empty_record() -> None:
    _, record = simulate([], small())
    assert (len(record.columns.steps), record.end_s) == (0, 0.0)


@given(
    first=st.floats(0, 1e6, allow_subnormal=False),
    then=st.lists(st.floats(0, 1e4, allow_subnormal=False), max_size=4),
)
def test_an_idle_system_serves_exactly_at_the_arrival(first: float, then: list[float]) -> None:
    """However far away the time before was: 1 token is served in under a second, so all find it idle."""
    arrivals = [first]
    for more in then:
        arrivals.append(arrivals[-1] + 1.0 + more)
    _, record = simulate([(at, 1, 1, None, None) for at in arrivals], small())
    assert [r.scheduled_s for r in record.requests] == arrivals


@given(
    start=st.floats(0, 1e9, allow_subnormal=False), waits=st.lists(st.floats(0, 1e4), min_size=1, max_size=5)
)
def test_the_clock_can_be_set_to_any_time(start: float, waits: list[float]) -> None:
    env = simpy.Environment(initial_time=start)
    for wait in waits:
        then = env.now + wait
        env.run(env.process(until(env, then)))
        assert env.now == then


# -- the run log ----------------------------------------------------------------------------------------


class Recorder:
    """A policy in between that notes the members of every step, and what else the plans hold."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.staging_layers = getattr(policy, "staging_layers", 0)
        self.plans: list[StepPlan] = []

    def plan(self, view: Any, cost: Any) -> StepPlan:
        plan = self.policy.plan(view, cost)
        if plan.batches:
            self.plans.append(plan)
        return plan


ROLES = ("gpu_decode", "cpu_decode", "stream_decode")


def check_log(text: str, plans: list[StepPlan], record: RunRecord) -> None:
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0] == {"type": "run", "policy": "x"}
    steps = [line for line in lines if line["type"] == "step"]
    assert [line["id"] for line in lines if line["type"] == "add"] == [r.id for r in record.requests]
    assert [s["t"] for s in steps] == list(record.columns.start_s)
    assert [s["end"] for s in steps] == list(record.columns.end_s)
    assert [s["steps"] for s in steps] == list(record.columns.steps)
    members: dict[tuple[int, str], set[str]] = {}
    for line, plan in zip(steps, plans, strict=True):
        assert len(line["batches"]) == len(plan.batches)
        for i, (entry, batch) in enumerate(zip(line["batches"], plan.batches, strict=True)):
            chunks = [[c.request.id, c.start, c.length, str(c.dst)] for c in batch.prefill]
            assert entry.get("prefill", []) == chunks
            for role in ROLES:
                now = members.setdefault((i, role), set())
                delta = entry.get(role, {"n": 0})
                assert not now & set(delta.get("add", []))
                assert set(delta.get("drop", [])) <= now
                now |= set(delta.get("add", []))
                now -= set(delta.get("drop", []))
                assert now == {r.id for r in getattr(batch, role)}
                assert delta["n"] == len(now)
        moves = [[m.request.id, str(m.dst), *(m.layers or ()), str(m.order)] for m in plan.moves]
        assert line.get("moves", []) == moves
        assert line.get("evict", []) == [[e.request.id, str(e.mode)] for e in plan.evict]
        assert line.get("reject", []) == [[x.request.id, x.reason] for x in plan.reject]
        assert line["why"] == plan.why
    ended = {line["id"]: line["reason"] for line in lines if line["type"] == "end"}
    assert len(ended) == len([line for line in lines if line["type"] == "end"]), "one end per request"
    for r in record.requests:
        if r.finish_reason is not FinishReason.LENGTH:
            assert ended[r.id] == r.finish_reason


@pytest.mark.parametrize("name", [*SIMULATED, "chaos"])
@given(rows=workloads(), gpu=st.integers(4, 20), seed=st.integers(0, 999))
@settings(max_examples=25)
def test_the_log_tells_every_step_and_who_was_in_it(name: str, rows: list[Row], gpu: int, seed: int) -> None:
    policy = Recorder(Patient(seed) if name == "chaos" else BUILT_IN[name](token_budget="24"))
    scheduler = make_scheduler(policy, gpu=gpu, cpu=30, model=toy_model(3))
    file = io.StringIO()
    simulation = Simulation(scheduler, clients_of(rows), log=RunLog(file, {"policy": "x"}))
    try:
        simulation.run()
    except PlanError as stalled:
        if name != "chaos" or stalled.rule != "progress":
            raise
        return
    check_log(file.getvalue(), policy.plans, simulation.record)


def test_the_log_is_json_when_a_cost_model_answers_in_numpy_scalars() -> None:
    class Numpy(ScalarCost):
        def seconds(self, kind: Any, work: Any) -> Any:
            return np.float64(super().seconds(kind, work))

    file = io.StringIO()
    _, record = simulate([(0.0, 5, 9, None, None)], small(cost=Numpy()), log=RunLog(file, {"policy": "x"}))
    steps = [json.loads(line) for line in file.getvalue().splitlines()][2:]
    assert [s["end"] for s in steps] == list(record.columns.end_s)


def test_the_log_quotes_what_people_write() -> None:
    request = Request('a"b\\ü\n', 4, 2)

    def first(view: Any) -> StepPlan:
        return StepPlan((SubBatch((PrefillChunk(request, 0, 4),)),), why='so "be" it\n\u2028')

    def second(view: Any) -> StepPlan:
        return StepPlan((SubBatch(gpu_decode=(request,)),))

    file = io.StringIO()
    simulation = Simulation(make_scheduler(Fixed(first, second)), [Client(request)], log=RunLog(file, {}))
    simulation.run()
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert lines[1]["id"] == request.id
    assert lines[2]["why"] == 'so "be" it\n\u2028'
    assert lines[2]["batches"][0]["prefill"] == [[request.id, 0, 4, "gpu"]]
    assert lines[3]["batches"][0]["gpu_decode"] == {"n": 1, "add": [request.id]}


def test_the_log_keeps_moves_evictions_and_rejections() -> None:
    a, b, c = (Request(name, 4, 3) for name in "abc")

    def admit(view: Any) -> StepPlan:
        return StepPlan(
            (SubBatch((PrefillChunk(a, 0, 4), PrefillChunk(b, 0, 4))),), reject=(Reject(c, "too 1"),)
        )

    def shuffle(view: Any) -> StepPlan:
        move = KVMove(a, Tier.CPU, (1, 3), MoveOrder.AFTER)
        return StepPlan((SubBatch(gpu_decode=(a,)),), (move,), (Evict(b),))

    file = io.StringIO()
    policy = Recorder(Fixed(admit, shuffle, staging_layers=1))
    simulation = Simulation(
        make_scheduler(policy, gpu=20), [Client(r) for r in (a, b, c)], log=RunLog(file, {})
    )
    with pytest.raises(PlanError, match="idle"):
        simulation.run()
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    steps = [line for line in lines if line["type"] == "step"]
    assert steps[0]["reject"] == [["c", "too 1"]]
    assert steps[1]["moves"] == [["a", "cpu", 1, 3, "after"]]
    assert steps[1]["evict"] == [["b", "recompute"]]

"""Every rule of ``validate.RULES`` broken by a plan made by hand, and caught by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Chaos, Fixed, decoding, make_scheduler, run_plan, snapshot, spread

from neo.core import validate
from neo.core.errors import NeoError, PlanError, PolicyError
from neo.core.plan import Evict, EvictMode, KVMove, MoveOrder, PrefillChunk, Reject, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.core.scheduler import Scheduler
from neo.core.validate import RULES, check

CPU, GPU = Tier.CPU, Tier.GPU


class Stage:
    """A scheduler with a request of every kind. 4 layers, blocks of 4 tokens.

    ``gpu`` and ``g2`` decode on the GPU, ``cpu`` and ``c2`` on the CPU, ``split`` has layers 2 and 3 on the
    CPU; ``part`` is 5 tokens into its prefill on the GPU, ``cpart`` on the CPU; ``new`` and ``huge`` wait;
    ``gone`` has ended. Layer-blocks free: 18 of 48 on the GPU, 26 of 56 on the CPU; staging blocks: 12.
    """

    def __init__(self, **limits: int) -> None:
        budgets = {"max_seqs": 6, "max_batch_tokens": 24, **limits}
        self.scheduler = s = make_scheduler(Fixed(staging_layers=1), gpu=15, cpu=14, **budgets)
        self.gpu = decoding(s, "gpu")
        self.g2 = decoding(s, "g2", 7)
        self.cpu = decoding(s, "cpu", tier=CPU)
        self.c2 = decoding(s, "c2", 6, tier=CPU)
        self.split = decoding(s, "split")
        spread(s, self.split, (2, 4))
        self.part = decoding(s, "part", 12, chunk=5)
        self.cpart = decoding(s, "cpart", 12, chunk=5, tier=CPU)
        self.gone = decoding(s, "gone", max_tokens=1)
        self.new, self.huge = Request("new", 6, 4), Request("huge", 60, 4)
        s.add(self.new)
        s.add(self.huge)
        gpu, cpu = s.view.pools[GPU], s.view.pools[CPU]
        assert (gpu.free, gpu.total, gpu.staging_blocks, cpu.free, cpu.total) == (18, 48, 12, 26, 56)


def chunk(request: Request, length: int, dst: Tier = GPU, start: int | None = None) -> PrefillChunk:
    return PrefillChunk(request, request.computed if start is None else start, length, dst)


def one(*chunks: PrefillChunk, gpu: Any = (), cpu: Any = (), stream: Any = (), **plan: Any) -> StepPlan:
    return StepPlan((SubBatch(chunks, tuple(gpu), tuple(cpu), tuple(stream)),), **plan)


def relay(requests: Any, *chunks: PrefillChunk, gpu: Any = (), cpu: Any = (), **plan: Any) -> StepPlan:
    return StepPlan((SubBatch(chunks, tuple(gpu), tuple(cpu), relay_decode=tuple(requests)),), **plan)


def within(s: Stage) -> None:
    """``cpu`` has begun a relayed token: one of its layers is behind it."""
    run_plan(s.scheduler, relay([s.cpu]))


def narrow(s: Stage, rows: int) -> None:
    view = s.scheduler.view
    view.limits = replace(view.limits, relay_rows=rows)


Broken = Callable[[Stage], StepPlan]

# rule, what its message must name, which request it must name, the plan
CASES: list[tuple[str, list[str], str | None, Broken]] = [
    ("batches", ["3"], None, lambda s: StepPlan((SubBatch(gpu_decode=(s.gpu,)),) * 3)),
    ("batches", ["0", "empty"], None, lambda s: StepPlan((SubBatch(),))),
    ("batches", ["1", "empty"], None, lambda s: StepPlan((SubBatch(gpu_decode=(s.gpu,)), SubBatch()))),
    *(
        (
            "batches",
            ["1", "only CPU decodes"],
            None,
            lambda s, b=b: StepPlan((SubBatch(cpu_decode=(s.cpu,)), b(s))),
        )
        for b in (
            lambda s: SubBatch(gpu_decode=(s.gpu,)),
            lambda s: SubBatch(stream_decode=(s.split,)),
            lambda s: SubBatch((chunk(s.new, 6),)),
        )
    ),
    ("known", [], "gone", lambda s: one(gpu=[s.gone])),
    ("known", [], "gpu", lambda s: one(gpu=[Request("gpu", 8, 8)])),
    ("known", [], "gone", lambda s: one(gpu=[s.gpu], evict=(Evict(s.gone),))),
    ("known", [], "gone", lambda s: one(gpu=[s.gpu], moves=(KVMove(s.gone, CPU),))),
    ("known", [], "gone", lambda s: one(gpu=[s.gpu], reject=(Reject(s.gone, "no"),))),
    ("known", [], "x", lambda s: one(chunk(Request("x", 4, 4), 4))),
    ("roles", [], "gpu", lambda s: one(gpu=[s.gpu, s.gpu])),
    (
        "roles",
        [],
        "cpu",
        lambda s: StepPlan(
            (SubBatch(gpu_decode=(s.gpu,), cpu_decode=(s.cpu,)), SubBatch(cpu_decode=(s.cpu,)))
        ),
    ),
    ("roles", [], "part", lambda s: one(chunk(s.part, 2), chunk(s.part, 2))),
    ("roles", [], "gpu", lambda s: one(gpu=[s.gpu, s.g2], evict=(Evict(s.gpu),))),
    ("roles", [], "new", lambda s: one(chunk(s.new, 6), reject=(Reject(s.new, "no 1"),))),
    ("state", ["DECODE"], "gpu", lambda s: one(chunk(s.gpu, 1))),
    ("state", ["PREFILL"], "part", lambda s: one(gpu=[s.part])),
    ("state", ["WAITING"], "new", lambda s: one(gpu=[s.new])),
    ("state", ["PREFILL"], "cpart", lambda s: one(cpu=[s.cpart])),
    ("state", ["WAITING"], "new", lambda s: one(stream=[s.new])),
    ("chunk", ["4", "5"], "part", lambda s: one(chunk(s.part, 2, start=4))),
    ("chunk", ["6", "5"], "part", lambda s: one(chunk(s.part, 2, start=6))),
    ("chunk", ["8", "7"], "part", lambda s: one(chunk(s.part, 8))),
    ("chunk", ["0", "6"], "new", lambda s: one(chunk(s.new, 0))),
    ("chunk", ["-1", "6"], "new", lambda s: one(chunk(s.new, -1))),
    ("residency", ["4 of 4"], "cpu", lambda s: one(gpu=[s.cpu])),
    ("residency", ["2 of 4"], "split", lambda s: one(gpu=[s.split])),
    ("residency", ["2 of 4"], "split", lambda s: one(cpu=[s.split])),
    ("residency", ["0 of 4"], "gpu", lambda s: one(cpu=[s.gpu])),
    ("residency", ["nothing to stream"], "gpu", lambda s: one(stream=[s.gpu])),
    ("residency", ["1 of 4"], "cpu", lambda s: one(gpu=[s.cpu], moves=(KVMove(s.cpu, GPU, (0, 3)),))),
    ("residency", ["4 of 4"], "gpu", lambda s: one(gpu=[s.gpu], moves=(KVMove(s.gpu, CPU),))),
    (
        "residency",
        ["nothing"],
        "split",
        lambda s: one(stream=[s.split], moves=(KVMove(s.split, GPU, (2, 4)),)),
    ),
    ("residency", ["cpu"], "part", lambda s: one(chunk(s.part, 2, CPU))),
    ("residency", ["gpu"], "cpart", lambda s: one(chunk(s.cpart, 2, GPU))),
    ("residency", ["gpu"], "part", lambda s: one(chunk(s.part, 2), moves=(KVMove(s.part, CPU, (0, 1)),))),
    ("token-budget", ["25", "24"], None, lambda s: one(chunk(s.huge, 24), gpu=[s.gpu])),
    (
        "seq-budget",
        ["7", "6"],
        None,
        lambda s: one(
            chunk(s.part, 1), chunk(s.cpart, 1, CPU), chunk(s.new, 1), gpu=[s.gpu, s.g2], cpu=[s.cpu, s.c2]
        ),
    ),
    ("gpu-blocks", ["24", "18", "48"], None, lambda s: one(chunk(s.huge, 21))),
    (
        "gpu-blocks",
        ["4 ", "16", "18", "48"],
        None,
        lambda s: one(gpu=[s.cpu, s.c2], moves=(KVMove(s.cpu, GPU), KVMove(s.c2, GPU))),
    ),
    ("cpu-blocks", ["28", "26", "56"], None, lambda s: one(chunk(s.huge, 21, CPU), cpu=[s.cpu])),
    (
        "cpu-blocks",
        ["12", "16", "26"],
        None,
        lambda s: one(chunk(s.new, 5, CPU), cpu=[s.cpu], moves=(KVMove(s.gpu, CPU), KVMove(s.g2, CPU))),
    ),
    (
        "staging",
        ["14", "12"],
        None,
        lambda s: one(
            chunk(s.cpart, 7, CPU), chunk(s.new, 6, CPU), chunk(s.huge, 9, CPU), stream=[s.split, s.cpu]
        ),
    ),
    (
        "moves",
        ["twice"],
        "split",
        lambda s: one(gpu=[s.gpu], moves=(KVMove(s.split, CPU, (0, 2)), KVMove(s.split, CPU, (1, 2)))),
    ),
    (
        "moves",
        ["evicted"],
        "g2",
        lambda s: one(gpu=[s.gpu], moves=(KVMove(s.g2, CPU),), evict=(Evict(s.g2),)),
    ),
    ("moves", ["0..5", "4"], "g2", lambda s: one(gpu=[s.gpu], moves=(KVMove(s.g2, CPU, (0, 5)),))),
    ("moves", ["2..2"], "g2", lambda s: one(gpu=[s.gpu], moves=(KVMove(s.g2, CPU, (2, 2)),))),
    ("moves", ["-1..2"], "g2", lambda s: one(gpu=[s.gpu], moves=(KVMove(s.g2, CPU, (-1, 2)),))),
    ("moves", ["no KV"], "new", lambda s: one(gpu=[s.gpu], moves=(KVMove(s.new, CPU),))),
    (
        "moves",
        ["4 of layers 0..4", "gpu already"],
        "g2",
        lambda s: one(gpu=[s.gpu], moves=(KVMove(s.g2, GPU),)),
    ),
    (
        "moves",
        ["1 of layers 1..3", "cpu already"],
        "split",
        lambda s: one(gpu=[s.gpu], moves=(KVMove(s.split, CPU, (1, 3)),)),
    ),
    (
        "moves",
        ["behind"],
        "cpu",
        lambda s: one(cpu=[s.cpu], moves=(KVMove(s.cpu, GPU, None, MoveOrder.AFTER),)),
    ),
    (
        "moves",
        ["behind"],
        "g2",
        lambda s: one(gpu=[s.gpu], moves=(KVMove(s.g2, CPU, None, MoveOrder.AFTER),)),
    ),
    (
        "moves",
        ["behind"],
        "part",
        lambda s: one(chunk(s.part, 1), moves=(KVMove(s.part, CPU, None, MoveOrder.AFTER),)),
    ),
    ("moves", ["AFTER"], "gpu", lambda s: one(stream=[s.gpu], moves=(KVMove(s.gpu, CPU, (0, 1)),))),
    ("state", ["WAITING"], "new", lambda s: relay([s.new])),
    ("residency", ["0 of 4"], "gpu", lambda s: relay([s.gpu])),
    ("residency", ["2 of 4"], "split", lambda s: relay([s.split])),
    ("roles", [], "cpu", lambda s: relay([s.cpu, s.cpu])),
    ("relay", ["other CPU decodes"], "cpu", lambda s: relay([s.cpu], cpu=[s.c2])),
    (
        "relay",
        ["not in two sub-batches"],
        "cpu",
        lambda s: StepPlan((SubBatch(relay_decode=(s.cpu,)), SubBatch(cpu_decode=(s.c2,)))),
    ),
    (
        "relay",
        ["not in two sub-batches"],
        "c2",
        lambda s: StepPlan(
            (SubBatch(gpu_decode=(s.gpu,)), SubBatch(cpu_decode=(s.cpu,), relay_decode=(s.c2,)))
        ),
    ),
    ("relay", ["1 layers on"], "cpu", lambda s: within(s) or one(cpu=[s.cpu])),
    ("relay", ["1 layers on"], "cpu", lambda s: within(s) or one(gpu=[s.cpu], moves=(KVMove(s.cpu, GPU),))),
    ("relay", ["1 layers on"], "cpu", lambda s: within(s) or one(stream=[s.cpu, s.split])),
    ("relay", ["1 layers on"], "cpu", lambda s: within(s) or one(gpu=[s.gpu], moves=(KVMove(s.cpu, GPU),))),
    ("relay", ["left behind", "0 of 1"], "cpu", lambda s: within(s) or relay([s.c2])),
    ("relay", ["left behind", "0 of 1"], "cpu", lambda s: within(s) or relay([s.c2], gpu=[s.gpu])),
    ("relay", ["2 rows", "relay_rows is 1"], None, lambda s: narrow(s, 1) or relay([s.cpu, s.c2])),
    ("relay", ["1 rows", "relay_rows is 0"], None, lambda s: narrow(s, 0) or relay([s.cpu])),
    ("relay", ["cannot move"], "split", lambda s: relay([s.split], moves=(KVMove(s.split, CPU, (0, 2)),))),
    ("token-budget", ["25", "24"], None, lambda s: relay([s.cpu, s.c2], chunk(s.huge, 23))),
    (
        "cpu-blocks",
        ["28", "26", "56"],
        None,
        lambda s: relay([s.cpu], chunk(s.huge, 21, CPU)),
    ),
    ("repeat", ["relayed"], None, lambda s: relay([s.cpu], repeat=1)),
    ("evict", ["no KV"], "new", lambda s: one(gpu=[s.gpu], evict=(Evict(s.new),))),
    ("evict", ["already"], "cpu", lambda s: one(gpu=[s.gpu], evict=(Evict(s.cpu, EvictMode.SWAP),))),
    ("preemption-bound", ["0 times"], "g2", lambda s: one(gpu=[s.gpu], evict=(Evict(s.g2),))),
    ("reject", ["DECODE"], "gpu", lambda s: StepPlan(reject=(Reject(s.gpu, "1 of 2"),))),
    ("reject", ["PREFILL"], "part", lambda s: StepPlan(reject=(Reject(s.part, "1 of 2"),))),
    ("reject", ["no reason"], "new", lambda s: StepPlan(reject=(Reject(s.new, ""),))),
    ("progress", [], None, lambda s: StepPlan(moves=(KVMove(s.gpu, CPU),))),
    ("progress", [], None, lambda s: StepPlan(evict=(Evict(s.gpu),))),
    ("progress", [], None, lambda s: StepPlan(moves=(KVMove(s.cpu, GPU),), reject=(Reject(s.huge, "64"),))),
    ("repeat", ["-1"], None, lambda s: one(gpu=[s.gpu], repeat=-1)),
    ("repeat", [], None, lambda s: one(chunk(s.new, 1), repeat=2)),
    ("repeat", [], None, lambda s: one(gpu=[s.gpu], moves=(KVMove(s.g2, CPU),), repeat=2)),
    ("repeat", [], None, lambda s: one(gpu=[s.gpu], evict=(Evict(s.part),), repeat=2)),
    ("repeat", [], None, lambda s: one(gpu=[s.gpu], reject=(Reject(s.huge, "64"),), repeat=2)),
]


def stage_for(rule: str) -> Stage:
    stage = Stage()
    if rule == "preemption-bound":
        view = stage.scheduler.view
        view.limits = replace(view.limits, max_preemptions=0)
    return stage


@pytest.mark.parametrize(("rule", "numbers", "request_id", "broken"), CASES)
def test_a_broken_rule_is_named_with_request_and_numbers(
    rule: str, numbers: list[str], request_id: str | None, broken: Broken
) -> None:
    stage = stage_for(rule)
    plan = broken(stage)
    before = snapshot(stage.scheduler)
    with pytest.raises(PlanError) as caught:
        check(stage.scheduler.view, plan)
    error = caught.value
    assert (error.rule, error.request_id) == (rule, request_id), error
    assert f"rule '{rule}'" in str(error)
    assert "\n" not in str(error)
    if request_id:
        assert f"(request {request_id})" in str(error)
    for number in numbers:
        assert number in str(error), error
    assert snapshot(stage.scheduler) == before


@pytest.mark.parametrize(("rule", "numbers", "request_id", "broken"), CASES)
def test_a_broken_policy_is_caught_by_name_and_nothing_is_applied(
    rule: str, numbers: list[str], request_id: str | None, broken: Broken
) -> None:
    stage = stage_for(rule)
    scheduler = stage.scheduler
    scheduler.policy = Fixed(broken(stage), one(gpu=[stage.gpu]))
    before = snapshot(scheduler)
    with pytest.raises(PlanError) as caught:
        scheduler.plan_step(scheduler.view.now)
    assert caught.value.rule == rule
    assert snapshot(scheduler) == before
    assert scheduler.plan_step(0.0) is not None, "and it can go on"


def test_every_rule_has_been_broken() -> None:
    assert {rule for rule, *_ in CASES} == set(RULES)


GOOD: list[Broken] = [
    lambda s: relay([s.cpu, s.c2]),
    lambda s: relay([s.cpu], chunk(s.new, 6), chunk(s.cpart, 2, CPU), gpu=[s.gpu, s.g2]),
    lambda s: relay([s.cpu], chunk(s.huge, 16)),
    lambda s: relay([s.cpu], chunk(s.huge, 17, CPU)),
    lambda s: relay([s.cpu, s.c2], evict=(Evict(s.g2, EvictMode.SWAP),)),
    lambda s: within(s) or relay([s.cpu]),
    lambda s: within(s) or relay([s.c2, s.cpu]),
    lambda s: within(s) or relay([s.cpu], gpu=[s.c2], moves=(KVMove(s.c2, GPU),)),
    lambda s: within(s) or relay([s.c2], evict=(Evict(s.cpu),)),
    lambda s: within(s) or one(gpu=[s.gpu]),  # it stands still, as a decode may
    lambda s: relay([s.cpu, s.c2], evict=(Evict(s.cpart),)),
    lambda s: one(gpu=[s.gpu]),
    lambda s: one(gpu=[s.gpu, s.g2], cpu=[s.cpu], stream=[s.split]),
    lambda s: one(stream=[s.cpu, s.split]),
    lambda s: StepPlan((SubBatch((chunk(s.new, 3),), (s.gpu,), (s.c2,)), SubBatch(cpu_decode=(s.cpu,)))),
    lambda s: StepPlan((SubBatch(cpu_decode=(s.c2,)), SubBatch(cpu_decode=(s.cpu,)))),
    lambda s: one(cpu=[s.gpu, s.g2], moves=(KVMove(s.gpu, CPU), KVMove(s.g2, CPU))),
    lambda s: one(gpu=[s.cpu], moves=(KVMove(s.cpu, GPU),)),
    lambda s: one(gpu=[s.split], moves=(KVMove(s.split, GPU, (2, 4)),)),
    lambda s: one(cpu=[s.split], moves=(KVMove(s.split, CPU, (0, 2)),)),
    lambda s: one(stream=[s.split], moves=(KVMove(s.split, GPU, (3, 4)),)),
    lambda s: one(gpu=[s.gpu], moves=(KVMove(s.gpu, CPU, (1, 3), MoveOrder.AFTER),)),
    lambda s: one(stream=[s.split], moves=(KVMove(s.split, CPU, (0, 1), MoveOrder.AFTER),)),
    lambda s: one(gpu=[s.gpu], moves=(KVMove(s.part, CPU),)),
    lambda s: one(chunk(s.cpart, 2), moves=(KVMove(s.cpart, GPU),)),
    lambda s: one(chunk(s.cpart, 7, CPU), chunk(s.part, 7), chunk(s.new, 6)),
    lambda s: one(gpu=[s.gpu], evict=(Evict(s.g2), Evict(s.part, EvictMode.SWAP), Evict(s.cpu))),
    lambda s: one(gpu=[s.gpu], evict=(Evict(s.split, EvictMode.SWAP),)),
    lambda s: StepPlan(reject=(Reject(s.huge, "64 tokens"), Reject(s.new, "10 tokens"))),
    lambda s: one(chunk(s.huge, 17), gpu=[s.g2], evict=(Evict(s.gpu),)),
    lambda s: one(chunk(s.huge, 17), cpu=[s.gpu], gpu=[s.g2], moves=(KVMove(s.gpu, CPU),)),
]


def test_relayed_rows_are_those_of_the_fullest_layer() -> None:
    """Two that begin one after the other are never at the same layer: one row does."""
    s = Stage()
    narrow(s, 1)
    run_plan(s.scheduler, relay([s.cpu]))
    for _ in range(4):
        plan = relay([s.cpu, s.c2])
        check(s.scheduler.view, plan)
        assert (plan.batches[0].tokens, plan.batches[0].sequences) == (1, 0)
        run_plan(s.scheduler, plan)
    assert (s.cpu.relay_layers, s.cpu.generated, s.c2.relay_layers) == (0, 2, 4)


@pytest.mark.parametrize("good", GOOD)
def test_what_the_rules_allow(good: Broken) -> None:
    stage = Stage()
    check(stage.scheduler.view, good(stage))


@pytest.mark.parametrize(
    "plan",
    [
        # Blocks that a swap-in leaves behind on the CPU are free only when the step ends...
        lambda s: one(chunk(s.huge, 21, CPU), chunk(s.new, 2, CPU), gpu=[s.cpu], moves=(KVMove(s.cpu, GPU),)),
        # ...and blocks that leave the GPU cannot take in what arrives in the same step.
        lambda s: one(
            gpu=[s.cpu, s.c2, s.split],
            cpu=[s.gpu],
            moves=(
                KVMove(s.cpu, GPU),
                KVMove(s.c2, GPU),
                KVMove(s.split, GPU, (2, 4)),
                KVMove(s.gpu, CPU),
            ),
        ),
        # What trails behind a step frees nothing within it.
        lambda s: one(chunk(s.huge, 17), gpu=[s.gpu], moves=(KVMove(s.gpu, CPU, None, MoveOrder.AFTER),)),
    ],
)
def test_blocks_of_a_moves_source_are_not_free_before_its_copy_has_ended(plan: Broken) -> None:
    stage = Stage()
    with pytest.raises(PlanError, match=r"-blocks'"):
        check(stage.scheduler.view, plan(stage))


def test_a_policy_that_raises_is_named_and_changes_nothing() -> None:
    class Careless:
        def plan(self, view: Any, cost: Any) -> StepPlan:
            raise KeyError("r7")

    stage = Stage()
    stage.scheduler.policy = Careless()
    before = snapshot(stage.scheduler)
    with pytest.raises(PolicyError, match=r"policy Careless raised KeyError at .*: 'r7'") as caught:
        stage.scheduler.plan_step(0.0)
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value, NeoError)
    assert snapshot(stage.scheduler) == before


@pytest.mark.parametrize("what", [StopIteration, GeneratorExit, MemoryError])
def test_whatever_a_policy_raises_is_its_error_and_has_no_dangling_colon(what: type[BaseException]) -> None:
    class Careless:
        def plan(self, view: Any, cost: Any) -> StepPlan:
            raise what

    stage = Stage()
    stage.scheduler.policy = Careless()
    with pytest.raises(PolicyError, match=rf"policy Careless raised {what.__name__} at [\w.]+:\d+$"):
        stage.scheduler.plan_step(0.0)


@pytest.mark.parametrize(
    ("rule", "said", "request_id", "plan"),
    [
        ("chunk", "length 6.0", "new", lambda s: one(chunk(s.new, 6.0))),  # type: ignore[arg-type]
        ("chunk", "length '6'", "new", lambda s: one(chunk(s.new, "6"))),  # type: ignore[arg-type]
        ("chunk", "start 5.0", "part", lambda s: one(chunk(s.part, 7, start=5.0))),  # type: ignore[arg-type]
        ("chunk", "length True", "new", lambda s: one(chunk(s.new, True), gpu=s.scheduler.view.gpu_decodes)),
        ("repeat", "1.5", None, lambda s: one(gpu=[s.gpu], repeat=1.5)),
        ("repeat", "True", None, lambda s: one(gpu=[s.gpu], repeat=True)),
        ("staging", "1.0", None, lambda s: one(gpu=[s.gpu], ring=1.0)),
        (
            "moves",
            "0.0..2",
            "gpu",
            lambda s: one(gpu=[s.g2], moves=(KVMove(s.gpu, CPU, (0.0, 2)),)),  # type: ignore[arg-type]
        ),
    ],
)
def test_numbers_of_a_plan_are_integers(rule: str, said: str, request_id: str | None, plan: Broken) -> None:
    stage = Stage()
    stage.scheduler.policy = Fixed(plan(stage), staging_layers=1)
    before = snapshot(stage.scheduler)
    with pytest.raises(PlanError, match=r"not (a )?whole number") as caught:
        stage.scheduler.plan_step(0.0)
    assert (caught.value.rule, caught.value.request_id) == (rule, request_id)
    assert said in str(caught.value)
    assert snapshot(stage.scheduler) == before


@pytest.mark.parametrize(("answer", "name"), [(None, "NoneType"), ((), "tuple"), ("idle", "str")])
def test_a_policy_that_returns_no_plan_is_named(answer: Any, name: str) -> None:
    stage = Stage()
    stage.scheduler.policy = Fixed(answer)
    before = snapshot(stage.scheduler)
    with pytest.raises(PolicyError, match=f"policy Fixed returned {name}, not a StepPlan"):
        stage.scheduler.plan_step(0.0)
    assert snapshot(stage.scheduler) == before


def verdict(scheduler: Scheduler, plan: StepPlan, plain: bool) -> str | None:
    """The rule that ``plan`` breaks, by the short way (as is) or by the general one."""
    view = scheduler.view
    if not plain:  # an equal tuple that is not the view's own
        batch = plan.batches[0]
        plan = replace(plan, batches=(replace(batch, gpu_decode=(*batch.gpu_decode,)),))
        assert not plan.batches[0].gpu_decode or plan.batches[0].gpu_decode is not view.gpu_decodes
    try:
        check(view, plan)
    except PlanError as error:
        return error.rule
    return None


@given(seed=st.integers(0, 10**6), gpu=st.integers(2, 15), seqs=st.integers(1, 6), tokens=st.integers(1, 20))
@settings(max_examples=150)
def test_the_short_way_for_plain_steps_judges_as_the_general_one(
    seed: int, gpu: int, seqs: int, tokens: int
) -> None:
    rnd = Random(seed)
    scheduler = make_scheduler(gpu=gpu + 10, cpu=12, max_seqs=6)
    for i in range(rnd.randint(1, 5)):
        scheduler.add(Request(f"r{i}", rnd.randint(1, 14), rnd.randint(2, 9)))
    chaos = Chaos(seed)
    for _ in range(rnd.randint(1, 12)):
        plan = chaos.plan(scheduler.view, None)
        if plan.batches:
            run_plan(scheduler, plan)
    view = scheduler.view
    if not view.requests:
        return
    view.limits = replace(view.limits, max_seqs=seqs, max_batch_tokens=tokens)
    chunks = tuple(
        PrefillChunk(
            r,
            max(0, r.computed + rnd.choice([0, 0, 0, 0, 1, -1])),
            rnd.choice([rnd.randint(0, r.remaining_prefill + 1), r.remaining_prefill]),
            rnd.choice([r.tier or GPU, r.tier or GPU, CPU]),
        )
        for r in [*view.waiting, *view.prefilling, *view.running]
        if rnd.random() < 0.4
    )
    plan = StepPlan((SubBatch(chunks, view.gpu_decodes),), repeat=rnd.choice([0, 0, 3, -1]))
    short, general = verdict(scheduler, plan, True), verdict(scheduler, plan, False)
    # Where several rules are broken at once, which of them is named may differ.
    assert (short is None) == (general is None), (short, general)


def test_plain_steps_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    taken = []
    monkeypatch.setattr(validate, "_check_plain", lambda *args: taken.append(args))
    check(stage.scheduler.view, one(chunk(stage.new, 3), gpu=()))
    assert not taken, "gpu_decode is not the view's own tuple"
    check(stage.scheduler.view, StepPlan((SubBatch((), stage.scheduler.view.gpu_decodes),)))
    assert len(taken) == 1

"""What the built-in policies decide in situations made by hand, and loads that once broke them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support import BUILT_IN, Drive, Fixed, Pure, ToyCost, decoding, make_scheduler, run_plan, toy_model

from neo.core.graph import OpKind
from neo.core.plan import EvictMode, StepPlan, SubBatch
from neo.core.request import FinishReason, Request, Tier
from neo.core.scheduler import Scheduler
from neo.core.validate import check

CPU, GPU = Tier.CPU, Tier.GPU


def scene(
    name: str, *, cost: ToyCost | None = None, options: dict[str, str] | None = None, **sizes: Any
) -> tuple[Scheduler, Callable[[], StepPlan]]:
    """A scheduler to set up by hand, and the policy's plan for what it then is."""
    policy = BUILT_IN[name](**(options or {}))
    scheduler = make_scheduler(Fixed(staging_layers=getattr(policy, "staging_layers", 0)), cost=cost, **sizes)

    def plan() -> StepPlan:
        found = policy.plan(scheduler.view, scheduler.cost)
        check(scheduler.view, found)
        assert isinstance(found, StepPlan)
        return found

    return scheduler, plan


def ids(requests: Any) -> list[str]:
    return [r.id for r in requests]


# -- gpu-only -------------------------------------------------------------------------------------------


def test_gpu_only_runs_every_decode_and_fills_the_rest_with_prefill_in_order() -> None:
    s, plan = scene("gpu-only/chunked", gpu=40, max_batch_tokens=12)
    a = decoding(s, "a")
    for name, prompt in (("b", 6), ("c", 9), ("d", 3)):
        s.add(Request(name, prompt, 4))
    (batch,) = plan().batches
    assert batch.gpu_decode == (a,)
    assert [(c.request.id, c.start, c.length, c.dst) for c in batch.prefill] == [
        ("b", 0, 6, GPU),
        ("c", 0, 5, GPU),
    ]


def test_gpu_only_whole_prompts_wait_for_a_step_that_takes_them() -> None:
    s, plan = scene("gpu-only/whole", gpu=40, max_batch_tokens=12)
    decoding(s, "a")
    for name, prompt in (("b", 6), ("c", 9), ("d", 3)):
        s.add(Request(name, prompt, 4))
    assert [(c.request.id, c.length) for c in plan().batches[0].prefill] == [("b", 6)], (
        "first come, first served"
    )


def test_gpu_only_preempts_the_newest_when_blocks_run_out() -> None:
    s, plan = scene("gpu-only/chunked", gpu=6)
    a, b, c = (decoding(s, name) for name in "abc")  # 2 full blocks each: all need a third
    got = plan()
    assert [(e.request, e.mode) for e in got.evict] == [(c, EvictMode.RECOMPUTE)]
    assert got.batches == (SubBatch(gpu_decode=(a, b)),)
    assert not got.batches[0].prefill


def test_gpu_only_promises_to_repeat_only_what_is_decode_alone() -> None:
    s, plan = scene("gpu-only/chunked", gpu=40)
    decoding(s, "a")
    assert plan().repeat > 0
    s.add(Request("b", 6, 4))
    assert plan().repeat == 0
    assert plan().batches[0].prefill


# -- neo ------------------------------------------------------------------------------------------------


def test_neo_plans_as_gpu_only_while_all_fits() -> None:
    s, plan = scene("neo/chunked", gpu=60, cpu=60)
    decoding(s, "a")
    s.add(Request("b", 6, 4))
    assert plan() == BUILT_IN["gpu-only/chunked"]().plan(s.view, s.cost)


def test_neo_swaps_the_newest_out_until_the_others_fit() -> None:
    s, plan = scene("neo/chunked", gpu=6, cpu=40)
    a, b, c = (decoding(s, name, max_tokens=9) for name in "abc")
    got = plan()
    assert [(m.request, m.dst, m.layers) for m in got.moves] == [(c, CPU, None)]
    assert got.batches[0].gpu_decode == (a, b)
    assert not got.evict


def test_neo_preempts_where_host_memory_is_full_too() -> None:
    s, plan = scene("neo/chunked", gpu=6, cpu=1)
    a, b, c = (decoding(s, name, max_tokens=9) for name in "abc")
    got = plan()
    assert [e.request for e in got.evict] == [c]
    assert got.batches[0].gpu_decode == (a, b)
    assert not got.moves


def test_neo_swaps_the_oldest_in_and_never_in_both_directions() -> None:
    s, plan = scene("neo/chunked", gpu=40, cpu=40)
    first, second = (decoding(s, name, tier=CPU) for name in "ab")
    got = plan()
    assert [(m.request, m.dst) for m in got.moves] == [(first, GPU), (second, GPU)]
    assert got.batches[0].gpu_decode == (first, second)


def test_neo_puts_prefills_on_the_cpu_behind_the_first_that_does_not_fit() -> None:
    eager = {"eager": "true"}
    s, plan = scene("neo/chunked", gpu=10, cpu=60, options=eager)  # 8 blocks remain beside the staging layer
    decoding(s, "a", max_tokens=9)
    for name, prompt in (("b", 10), ("c", 14), ("d", 3)):
        s.add(Request(name, prompt, 4))
    got = [(c.request.id, c.dst) for c in plan().batches[0].prefill]
    assert got == [("b", GPU), ("c", CPU), ("d", CPU)]


def test_neo_pipelines_where_that_pays_and_stays_on_the_gpu_where_it_does_not() -> None:
    def under(cost: ToyCost) -> StepPlan:
        s, plan = scene("neo/chunked", gpu=9, cpu=80, cost=cost, max_seqs=20, options={"relay": "false"})
        for name in "abc":
            decoding(s, name, 8, 40)
        for name in "uvwxyz":
            decoding(s, name, 8, 40, tier=CPU)
        for i in range(99):  # more than the GPU alone could serve
            s.add(Request(f"w{i}", 8, 40, arrival_s=0.001 * i))
        s.view.now = 0.1
        return plan()

    fast, slow = under(ToyCost(cpu=0.02, link=0.1)), under(ToyCost(cpu=1000.0))
    assert sum(len(b.cpu_decode) for b in fast.batches) > 0
    assert ids(fast.batches[0].gpu_decode)[:2] == ["a", "b"]
    assert [len(b.cpu_decode) for b in slow.batches] == [0]


def test_neo_does_not_let_a_cpu_request_starve() -> None:
    s, plan = scene("neo/chunked", gpu=9, cpu=80, cost=ToyCost(cpu=1000.0))
    for name in "abc":
        decoding(s, name, 8, 40)
    old = decoding(s, "old", 8, 40, tier=CPU)
    assert [len(b.cpu_decode) for b in plan().batches] == [0]
    s.view.now = 100.0
    assert any(old in b.cpu_decode for b in plan().batches)


# -- fastdecode -----------------------------------------------------------------------------------------


def test_fastdecode_decodes_everything_on_the_cpu_in_every_step() -> None:
    s, plan = scene("fastdecode/chunked", gpu=40, cpu=80, cost=ToyCost(cpu=10.0), max_seqs=20)
    decodes = [decoding(s, name, tier=CPU) for name in "abcdef"]
    s.add(Request("new", 7, 4))
    got = plan()
    assert sorted(ids([r for b in got.batches for r in b.cpu_decode])) == ids(decodes)
    assert [(c.request.id, c.dst) for b in got.batches for c in b.prefill] == [("new", CPU)]
    assert not any(b.gpu_decode for b in got.batches)
    assert len(got.batches) == 2


def test_fastdecode_preempts_the_newest_prefills_under_way_included() -> None:
    s, plan = scene("fastdecode/chunked", gpu=40, cpu=4)
    a = decoding(s, "a", tier=CPU)
    b = decoding(s, "b", 12, tier=CPU, chunk=5)
    got = plan()
    assert ids(e.request for e in got.evict) == [b.id]
    assert got.batches == (SubBatch(cpu_decode=(a,)),)


# -- all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_nothing_to_do_is_an_idle_plan(name: str) -> None:
    _, plan = scene(name)
    assert plan().idle


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_never_fits_is_rejected_whether_or_not_the_system_is_busy(name: str) -> None:
    for busy in (False, True):
        s, plan = scene(name, gpu=10, cpu=10, max_batch_tokens=200)
        if busy:
            decoding(s, "a", tier=CPU if "fastdecode" in name else GPU)
        s.add(Request("huge", 30, 80))
        got = plan()
        assert ids(x.request for x in got.reject) == ["huge"]
        assert any(c.isdigit() for c in got.reject[0].reason)
        assert bool(got.batches) is busy


Load = list[tuple[int, int, int]]  # arrives at step, prompt, output

BROKE: list[tuple[str, Load, dict[str, int], int, int, tuple[float, float, float]]] = [
    # neo: a decode that outgrows the GPU alone
    ("neo/chunked", [(4, 2, 10), (5, 6, 24), (5, 9, 4)],
     {"gpu": 6, "cpu": 23, "block_size": 4, "max_seqs": 5, "max_batch_tokens": 10}, 1, 11, (1, 30, 1)),
    ("neo/chunked", [(0, 7, 13), (0, 12, 13), (0, 16, 14)],
     {"gpu": 12, "cpu": 20, "block_size": 4, "max_seqs": 3, "max_batch_tokens": 10}, 1, 24, (1, 30, 1)),
    # neo: a prompt longer than the staging buffer, at the head of the queue for ever
    ("neo/whole",
     [(0, 9, 8), (0, 17, 6), (1, 9, 5), (1, 21, 8), (1, 22, 14), (4, 9, 2), (4, 26, 6), (5, 16, 6)],
     {"gpu": 11, "cpu": 16, "block_size": 2, "max_seqs": 1, "max_batch_tokens": 36}, 3, 43, (0.05, 30, 50)),
    # neo: the last request needs the whole GPU, and swapping in stops at 95% of it
    ("neo/chunked", [(0, 1, 19), (0, 17, 9), (0, 17, 28), (0, 24, 39), (0, 26, 20), (0, 28, 29), (0, 29, 15)],
     {"gpu": 13, "cpu": 8, "block_size": 3, "max_seqs": 6, "max_batch_tokens": 6}, 3, 45, (1, 0.02, 1)),
    # neo: GPU decodes fill max_batch_tokens, and a chunk of one token comes on top
    ("neo/chunked", [(1, 9, 5), (4, 5, 4)],
     {"gpu": 14, "cpu": 0, "block_size": 4, "max_seqs": 5, "max_batch_tokens": 1}, 2, 21, (1, 1, 1)),
    # neo: swaps in as if prefills under way took no place
    ("neo/chunked",
     [(0, 12, 17), (1, 19, 12), (2, 1, 6), (2, 8, 32), (3, 2, 9), (5, 2, 12), (5, 10, 15), (5, 25, 7)],
     {"gpu": 11, "cpu": 20, "block_size": 5, "max_seqs": 3, "max_batch_tokens": 6}, 2, 39, (0.05, 0.02, 0.1)),
    # neo: preempts a CPU request and runs it all the same
    ("neo/chunked",
     [(0, 8, 10), (0, 18, 2), (0, 24, 9), (0, 4, 9), (0, 16, 6), (0, 16, 6), (0, 25, 6), (0, 1, 6),
      (2, 16, 6), (4, 1, 2)],
     {"gpu": 19, "cpu": 30, "block_size": 4, "max_seqs": 8, "max_batch_tokens": 64}, 3, 24, (1, 1, 1)),
    # fastdecode: decodes grow into the blocks of a prefill under way
    ("fastdecode/chunked", [(0, 4, 8), (0, 4, 13), (0, 11, 9)],
     {"gpu": 13, "cpu": 8, "block_size": 3, "max_seqs": 8, "max_batch_tokens": 10}, 3, 25, (0.05, 1, 1)),
    ("fastdecode/chunked", [(0, 2, 17), (1, 5, 6), (3, 14, 6), (5, 14, 16)],
     {"gpu": 12, "cpu": 7, "block_size": 5, "max_seqs": 3, "max_batch_tokens": 1}, 5, 33, (1, 1, 0.1)),
]  # fmt: skip


@pytest.mark.parametrize("attention", [1.0, 1e4], ids=["dense-bound", "attention-bound"])
def test_neo_runs_the_oldest_cpu_request_hidden_or_not_once_its_patience_is_over(attention: float) -> None:
    """Whichever sub-batch has more slack: an overlong CPU stage is accepted for it, and only for it."""
    cost = ToyCost()
    cost.base[OpKind.CPU_ATTN] = 1e6  # never hidden
    cost.base[OpKind.GPU_ATTN] *= attention
    scheduler, plan = scene("neo/chunked", cost=cost, gpu=6)
    decoding(scheduler, "old", tier=CPU)
    decoding(scheduler, "young", tier=CPU)
    for name in "ab":
        decoding(scheduler, name)  # which leave no room to swap in
    scheduler.view.now = 10.9  # all had a token at 1.0
    assert not any(b.cpu_decode for b in plan().batches)
    scheduler.view.now = 11.1
    assert [ids(b.cpu_decode) for b in plan().batches] == [[], ["old"]]


@pytest.mark.parametrize(("name", "load", "sizes", "layers", "budget", "factors"), BROKE)
def test_loads_that_once_broke_a_policy(
    name: str,
    load: Load,
    sizes: dict[str, int],
    layers: int,
    budget: int,
    factors: tuple[float, float, float],
) -> None:
    policy = Pure(lambda: BUILT_IN[name](token_budget=str(budget)))
    drive = Drive(make_scheduler(policy, model=toy_model(layers), cost=ToyCost(*factors), **sizes))
    for at, prompt, output in load:
        while drive.steps < at and drive.step():
            pass
        drive.add(prompt, output)
    drive.drain(2000)
    drive.check_end()


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_running_plan_may_be_seen_but_planning_waits_for_its_end(name: str) -> None:
    s = make_scheduler(BUILT_IN[name](), gpu=40, cpu=40)
    request = Request("a", 6, 3)
    s.add(request)
    planned = s.plan_step(0.0)
    assert planned is not None
    assert s.view.in_flight is planned.plan
    with pytest.raises(AssertionError, match="while a step is running"):
        s.plan_step(0.0)


def test_a_scheduler_goes_on_after_a_bad_plan_with_another_policy() -> None:
    s, _ = scene("gpu-only/chunked", gpu=40)
    a = decoding(s, "a", max_tokens=2)
    run_plan(s, StepPlan((SubBatch(gpu_decode=(a,)),)))
    assert a.finish_reason is FinishReason.LENGTH

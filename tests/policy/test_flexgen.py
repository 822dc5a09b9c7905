"""``flexgen``: the search, and the blocks it is run in."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
from support import Drive, ToyCost, make_scheduler, toy_model

from neo.core.errors import InputError
from neo.core.plan import StepPlan
from neo.core.request import Request, Tier
from neo.core.scheduler import Scheduler, StepResult
from neo.core.view import Limits
from neo.policy import flexgen
from neo.policy.flexgen_search import Placement, Problem, _Block, search
from neo.policy.registry import load_policy
from neo.sim.setup import SystemConfig, build_system

CPU, GPU = Tier.CPU, Tier.GPU
LENGTHS = {"prompt_tokens": "9", "output_tokens": "8"}  # 16 tokens of KV at the end: 4 blocks of 4


def problem(cost: ToyCost | None = None, **sizes: Any) -> Problem:
    s = make_scheduler(cost=cost, **{"gpu": 40, "cpu": 400, "max_seqs": 64, **sizes})
    return Problem.of(s.view, s.cost, 9, 8, 2, None)


def server(cost: ToyCost | None = None, gpu: int = 8, cpu: int = 40, **options: str) -> Scheduler:
    return make_scheduler(
        load_policy("flexgen", {**LENGTHS, **options}),
        gpu=gpu,
        cpu=cpu,
        cost=cost,
        max_seqs=64,
        model=toy_model(8),
    )


# -- the search -------------------------------------------------------------------------------------------


def test_all_stays_on_the_gpu_where_there_is_room() -> None:
    assert search(problem(ToyCost(link=1e4, cpu=1e4), gpu=1000))[:2] == (64, 0.0)


def test_a_cheap_link_means_streaming_and_a_cheap_cpu_means_cpu_attention() -> None:
    assert search(problem(ToyCost(link=1e-6, cpu=1e4))).attention == "stream"
    assert search(problem(ToyCost(link=1e4, cpu=1e-6))).attention == "cpu"


def test_dear_hosts_are_left_alone() -> None:
    assert search(problem(ToyCost(link=1e5, cpu=1e5)))[:2] == (10, 0.0), "40 blocks hold ten requests"


@pytest.mark.parametrize("way", ["cpu", "stream"])
@pytest.mark.parametrize("requests", [2, 8, 20, 40])
@pytest.mark.parametrize(("gpu", "cpu"), [(40, 400), (12, 60), (40, 0)])
def test_the_share_fits_both_memories(way: Any, requests: int, gpu: int, cpu: int) -> None:
    p = problem(gpu=gpu, cpu=cpu)
    share = _Block(p).best_share(requests, way)
    kv = requests * p.request_blocks * p.model.layers
    if share is None:
        assert kv > p.gpu_blocks, "it would fit on the GPU"
        return
    staged = 0 if way == "cpu" else 2 * requests * p.request_blocks * share
    assert 0.0 <= share <= 1.0
    assert (1 - share) * kv + staged <= p.gpu_blocks * (1 + 1e-6)
    assert share * kv <= p.cpu_blocks + 1e-6 * kv


@pytest.mark.parametrize("way", ["cpu", "stream"])
def test_no_other_share_gives_a_faster_layer(way: Any) -> None:
    """The linear program against all shares in steps of a hundredth; memory leaves the choice free."""
    system = build_system(SystemConfig(hardware="gh200", model="qwen2.5-32b", limits=Limits(max_seqs=512)))
    p = Problem.of(system.scheduler().view, system.cost, 1000, 300, 2, None)
    block, requests = _Block(replace(p, gpu_blocks=10**9, cpu_blocks=10**9)), 100
    share = block.best_share(requests, way)
    assert share is not None
    best = min(block.seconds(requests, i / 100, way) for i in range(101))
    assert block.seconds(requests, share, way) <= 1.005 * best


def test_no_other_block_is_estimated_to_be_faster() -> None:
    p = problem(ToyCost(link=0.1, cpu=0.1))
    got, block = search(p), _Block(p)
    for way in ("cpu", "stream"):
        for requests in range(1, 65):
            share = block.best_share(requests, way)  # type: ignore[arg-type]
            if share is not None:
                rate = requests / block.seconds(requests, share, way)  # type: ignore[arg-type]
                assert rate <= 1.02 * got.requests / got.seconds


def test_searched_once_and_the_same_for_everybody() -> None:
    s = server()
    policy = s.policy
    first = policy.placement(s.view, s.cost)  # type: ignore[attr-defined]
    s.add(Request("a", 30, 2))
    assert policy.placement(s.view, s.cost) is first  # type: ignore[attr-defined]
    assert load_policy("flexgen", LENGTHS).placement(s.view, s.cost) == first  # type: ignore[attr-defined]


def test_scipy_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexgen, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs scipy: pip install 'neo-serve\[policies\]'"):
        load_policy("flexgen")
    assert importlib.util.find_spec("scipy")


# -- blocks -----------------------------------------------------------------------------------------------


def placed(requests: int, host: float, attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexgen, "search", lambda p: Placement(requests, host, attention, 1.0))


def run(s: Scheduler, most: int = 400) -> list[StepPlan]:
    plans = []
    while s.unfinished:
        planned = s.plan_step(float(len(plans)))
        assert planned is not None
        plans.append(planned.plan)
        s.finish_step(planned, StepResult(len(plans) + 1.0))
        assert len(plans) < most
    return plans


@pytest.mark.parametrize("attention", ["cpu", "stream"])
def test_a_block_is_filled_then_decoded_to_its_end_and_only_then_the_next(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed(3, 0.5, attention, monkeypatch)
    s = server(gpu=60)
    for i in range(5):
        s.add(Request(f"r{i}", 9, 3 + i))
    plans = run(s)
    roles = [
        (len(b.prefill), len(b.gpu_decode), len(b.cpu_decode) + len(b.stream_decode))
        for p in plans
        for b in p.batches
    ]
    one = [(3, 0, 0), (0, 2, 1), (0, 2, 1), (0, 1, 1), (0, 1, 0)]
    two = [(2, 0, 0), *[(0, 1, 1)] * 5, (0, 0, 1)]
    assert roles == one + two
    first = plans[0].batches[0].prefill
    assert [c.dst for c in first] == [GPU, CPU, GPU], "half of the blocks, in order of arrival"
    streamed = any(b.stream_decode for p in plans for b in p.batches)
    assert streamed is (attention == "stream")
    assert all(
        p.ring == (2 if p.batches[0].stream_decode else int(bool(p.batches[0].prefill))) for p in plans
    )


def test_who_does_not_fit_into_the_share_goes_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    placed(8, 0.0, "cpu", monkeypatch)
    s = server(gpu=7, cpu=40)  # one request of 4 blocks, and staging
    for i in range(4):
        s.add(Request(f"r{i}", 9, 8))
    chunks = s.policy.plan(s.view, s.cost).batches[0].prefill
    assert [c.dst for c in chunks] == [GPU, CPU, CPU, CPU]


def test_nobody_is_ever_preempted_for_all_have_room_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    placed(64, 0.7, "stream", monkeypatch)
    drive = Drive(server(gpu=8, cpu=20))
    for i in range(20):
        drive.add(3 + i % 9, 1 + 3 * i % 23)
    drive.drain(1000)
    drive.check_end()
    assert all(r.preemptions == 0 for r in drive.submitted)


def test_what_fits_nowhere_is_rejected_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    placed(4, 0.5, "stream", monkeypatch)
    s = server(gpu=4, cpu=100)
    s.add(Request("long", 200, 300))  # 125 blocks
    s.add(Request("wide", 30, 200))  # 58 blocks, twice in the ring: 116 of 32 layer-blocks
    s.add(Request("fits", 8, 8))
    plan = s.policy.plan(s.view, s.cost)
    assert [(x.request.id, x.reason.split(" KV")[0].split(" blocks of")[0]) for x in plan.reject] == [
        ("long", "125"),
        ("wide", "needs 116"),
    ]
    assert [c.request.id for c in plan.batches[0].prefill] == ["fits"]

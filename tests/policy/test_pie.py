"""What ``pie`` decides, and what the core needed for it: rings of a step's own, moves of scattered layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Drive, Fixed, ToyCost, decoding, make_scheduler, run_plan, toy_model

from neo.core.errors import InputError, PlanError
from neo.core.graph import OpKind
from neo.core.growth import repeats_fit
from neo.core.pipeline import compile
from neo.core.plan import KVMove, MoveOrder, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.core.scheduler import Scheduler
from neo.core.timing import durations, step_seconds
from neo.core.validate import check
from neo.core.view import Limits
from neo.policy.pie import Pie, PieOptions
from neo.policy.pie_hiding import Decode, seconds_streamed
from neo.policy.pie_layers import levels, masks, ranges
from neo.policy.registry import load_policy
from neo.sim.setup import SystemConfig, build_system, simulation
from neo.workload import synthetic

CPU, GPU = Tier.CPU, Tier.GPU
FAST, SLOW = ToyCost(link=1e-6), ToyCost(link=1e4)
LAYERS = 8


def system(policy: Any, gpu: int = 10, cpu: int = 60, cost: ToyCost = FAST, **limits: int) -> Scheduler:
    return make_scheduler(policy, gpu=gpu, cpu=cpu, model=toy_model(LAYERS), cost=cost, **limits)


# -- levels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3, 31, 32, 40, 80])
def test_levels_lie_within_each_other_and_layer_0_stays_longest(layers: int) -> None:
    found = masks(layers)
    assert [m.bit_count() for m in found] == list(range(layers))
    assert all(a & b == a for a, b in pairwise(found))
    assert not any(m & 1 for m in found)


def test_host_layers_are_spread_evenly() -> None:
    assert ranges(masks(32)[4]) == ((7, 8), (15, 16), (23, 24), (31, 32))
    assert levels(8, 2) == (0, 3, 4, 5, 6, 7), "fewer than the ring takes would free nothing"
    assert levels(2, 2) == (0,)


@given(st.integers(0, 2**40))
def test_ranges_are_the_mask(mask: int) -> None:
    assert sum(((1 << (b - a)) - 1) << a for a, b in ranges(mask)) == mask
    assert all(b < c for (_, b), (c, _) in pairwise(ranges(mask)))


@given(
    mask=st.integers(1, 2**12 - 1),
    ring=st.integers(1, 12),
    link=st.sampled_from([1e-3, 1.0, 30.0, 3000.0]),
)
def test_the_estimate_is_the_step_graph_s(mask: int, ring: int, link: float) -> None:
    """Of what lies in the layers: planning, embedding and sampling are no part of it."""
    model, cost = toy_model(12), ToyCost(link=link)
    for kind in (OpKind.SCHEDULE, OpKind.EMBED, OpKind.HEAD):
        cost.base[kind] = 0.0
    cost.base[OpKind.SWAP_OUT] = 0.0
    r = Request("r", 20, 9, computed=19, generated=0, host_layers=mask)
    graph = compile(StepPlan((SubBatch(stream_decode=(r,)),), ring=ring), model, 4)
    prices = durations(graph, cost)
    one = dict(zip(graph.template.kinds, prices, strict=True))
    step = Decode(one[OpKind.PRE], one[OpKind.GPU_ATTN], one[OpKind.POST], one[OpKind.STREAM])
    outside = sum(one[k] for k in (OpKind.SCHEDULE, OpKind.HEAD))
    got = seconds_streamed(step, mask, 12, ring)
    real = step_seconds(graph.template, prices) - outside
    # Transfers run beside the embedding, and the new token's way out is not in the estimate.
    assert got - 1e-9 <= real <= got + one[OpKind.EMBED] + 12 * one[OpKind.SWAP_OUT] + 1e-9


# -- decisions --------------------------------------------------------------------------------------------


def pressed(cost: ToyCost, **sizes: int) -> tuple[Scheduler, Pie]:
    """Three decodes on a GPU that is nearly full, and one that waits."""
    policy = Pie(PieOptions(watermark=0.0))
    s = system(Fixed(), cost=cost, **sizes)
    for name in "abc":
        decoding(s, name, 9, 20)
    s.add(Request("w", 12, 4))
    return s, policy


def test_it_expands_where_memory_is_short_and_the_link_hides_it() -> None:
    s, policy = pressed(FAST)
    plan = policy.plan(s.view, s.cost)
    check(s.view, plan)
    assert {m.order for m in plan.moves} == {MoveOrder.AFTER}
    by_request = {name: [m.layers for m in plan.moves if m.request.id == name] for name in "abc"}
    assert by_request["a"] == list(ranges(masks(LAYERS)[3])), "the oldest first, to the first level"
    assert [r.id for r in plan.batches[0].gpu_decode] == ["a", "b", "c"]
    assert not plan.evict
    assert plan.repeat == 0


def test_streamed_layers_are_fetched_ahead_and_new_kv_goes_back() -> None:
    s, policy = pressed(FAST)
    s.policy = policy
    drive = Drive(s)
    drive.step()
    assert s.view.split_decodes
    old = s.view.split_decodes[0]
    planned = s.plan_step(1.0)
    assert planned is not None
    assert old in planned.plan.batches[0].stream_decode
    assert planned.plan.ring == 2
    ops = list(planned.graph.expand())
    host = [layer for layer in range(LAYERS) if old.host_layers >> layer & 1]
    assert [op.layer for op in ops if op.kind is OpKind.STREAM] == host
    assert sum(op.kind is OpKind.SWAP_OUT for op in ops) == LAYERS


@pytest.mark.parametrize(
    ("cost", "sizes"),
    [(SLOW, {}), (FAST, {"cpu": 0})],
    ids=["slow link", "no host memory"],
)
def test_it_refuses_where_the_link_cannot_hide_it(cost: ToyCost, sizes: dict[str, int]) -> None:
    s, policy = pressed(cost, **sizes)
    assert policy.plan(s.view, s.cost) == load_policy("gpu-only", {"watermark": "0"}).plan(s.view, s.cost)


def test_it_contracts_when_all_would_fit_with_less() -> None:
    s, policy = pressed(FAST)
    s.policy = policy
    drive = Drive(s)
    drive.submitted += list(s.view.requests.values())
    while not s.view.split_decodes:
        drive.step()
    for r in list(s.view.requests.values()):
        if r is not s.view.split_decodes[0]:
            drive.abort(r)
    (left,) = s.view.split_decodes
    plan = policy.plan(s.view, s.cost)
    check(s.view, plan)
    assert {(m.request, m.dst, m.order) for m in plan.moves} == {(left, GPU, MoveOrder.BEFORE)}
    assert plan.batches[0].gpu_decode == (left,)
    assert plan.ring == 0


def test_it_contracts_when_transfers_stall_the_step() -> None:
    s, policy = pressed(FAST, gpu=30)
    a = s.view.gpu_decodes[0]
    wanted = masks(LAYERS)[4]
    moves = tuple(KVMove(a, CPU, part, MoveOrder.AFTER) for part in ranges(wanted))
    run_plan(s, StepPlan((SubBatch(gpu_decode=s.view.gpu_decodes),), moves))
    assert a.host_layers == wanted
    plan = policy.plan(s.view, SLOW)
    assert {(m.request, m.dst) for m in plan.moves} == {(a, GPU)}
    assert sum(b - c for c, b in (m.layers for m in plan.moves)) == 1, "one level at a time"


def test_between_expanding_and_contracting_it_stays_where_it_is() -> None:
    """Hysteresis: a load that would just fit at the lower level changes nothing."""
    s = system(Fixed(), gpu=14, cost=FAST)
    policy = Pie(PieOptions(watermark=0.0, hysteresis=0.5))
    for name in "abc":
        decoding(s, name, 9, 20)
    for r in s.view.gpu_decodes:
        moves = tuple(KVMove(r, CPU, part, MoveOrder.AFTER) for part in ranges(masks(LAYERS)[3]))
        run_plan(s, StepPlan((SubBatch(gpu_decode=(r,)),), moves))
    assert not policy.plan(s.view, s.cost).moves
    eager = Pie(PieOptions(watermark=0.0, hysteresis=0.0))
    assert eager.plan(s.view, s.cost).moves


def test_the_last_request_comes_back_where_host_memory_is_full() -> None:
    s, policy = pressed(FAST, cpu=4)
    s.policy = policy
    drive = Drive(s)
    drive.submitted += list(s.view.requests.values())
    drive.drain(300)
    drive.check_end()


@pytest.mark.parametrize(
    ("hardware", "model", "blocks", "gains"),
    [
        ("gh200", "qwen2.5-32b", 2000, True),
        ("g5.16xlarge", "llama-3.1-8b", None, False),
        ("h100", "llama-3.1-8b", 2000, False),
    ],
)
def test_more_throughput_over_nvlink_and_exactly_gpu_only_over_pcie(
    hardware: str, model: str, blocks: int | None, gains: bool
) -> None:
    done = {}
    for policy in ("gpu-only", "pie"):
        built = build_system(
            SystemConfig(
                policy=policy,
                hardware=hardware,
                model=model,
                kv_gpu_blocks=blocks,
                limits=Limits(max_seqs=512),
            )
        )
        load = synthetic("around:800:0.1", "around:100:0.1", n=120, seed=3)
        record = simulation(built, load).run()
        done[policy] = record.end_s
        moved = record.bytes_h2d
    if gains:
        assert done["pie"] < 0.85 * done["gpu-only"]
        assert moved > 0
    else:
        assert done["pie"] == pytest.approx(done["gpu-only"], rel=0.01)
        assert moved == 0


def test_options_have_ranges() -> None:
    with pytest.raises(InputError, match="contract_stall must be at least"):
        load_policy("pie", {"expand_stall": "0.5"})
    with pytest.raises(InputError, match="ring"):
        load_policy("pie", {"ring": "0"})


# -- the core: a step's own ring, moves of scattered layers -------------------------------------------------


def streaming(gpu: int = 20, ring: int = 0) -> tuple[Scheduler, Request, StepPlan]:
    """A decode with layers 1 and 3 of 4 on the host, and the step that streams them."""
    s = make_scheduler(Fixed(), gpu=gpu, cpu=20)
    r = decoding(s, "a", 9, 30)
    moves = tuple(KVMove(r, CPU, (layer, layer + 1), MoveOrder.AFTER) for layer in (1, 3))
    run_plan(s, StepPlan((SubBatch(gpu_decode=(r,)),), moves))
    return s, r, StepPlan((SubBatch(stream_decode=(r,)),), ring=ring)


def test_layers_that_are_no_range_move_in_one_step() -> None:
    s, r, _ = streaming()
    assert r.host_layers == 0b1010
    assert s.view.pools[CPU].held("a") == 2 * 3
    assert s.view.pools[GPU].held("a") == 2 * 3
    back = tuple(KVMove(r, GPU, (layer, layer + 1)) for layer in (3, 1))
    assert StepPlan(moves=back).host_layers_at_use(4) == {"a": 0}
    run_plan(s, StepPlan((SubBatch(gpu_decode=(r,)),), back))
    assert r.host_layers == 0
    assert s.view.pools[CPU].used == 0


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"layers": (0, 1)}, "moved twice"),
        ({"layers": (2, 3), "order": MoveOrder.BEFORE}, "two orders"),
    ],
)
def test_a_layer_moves_once_and_all_the_same_way(second: dict[str, Any], said: str) -> None:
    s = make_scheduler(Fixed(), gpu=20, cpu=20)
    r = decoding(s, "a", 9, 30)
    first = KVMove(r, CPU, (0, 2), MoveOrder.AFTER)
    with pytest.raises(PlanError, match=said):
        check(s.view, StepPlan((SubBatch(gpu_decode=(r,)),), (first, replace(first, **second))))


def test_a_ring_takes_free_blocks_while_the_step_runs() -> None:
    s, _, plan = streaming()
    with pytest.raises(PlanError, match="declares no staging_layers"):
        check(s.view, plan)
    check(s.view, replace(plan, ring=2))
    with pytest.raises(PlanError, match="5 buffers for 4 layers"):
        check(s.view, replace(plan, ring=5))
    before = s.view.pools[GPU].used
    run_plan(s, replace(plan, ring=2))
    assert s.view.pools[GPU].used == before, "given back"


@pytest.mark.parametrize(("free", "fits"), [(6, True), (5, False)])
def test_a_ring_must_fit_beside_all_else(free: int, fits: bool) -> None:
    """Eleven tokens are three blocks of four: two buffers take six layer-blocks."""
    s, _, plan = streaming(ring=2)
    s.view.pools[GPU].take("other", s.view.pools[GPU].free - free)
    if fits:
        check(s.view, plan)
        return
    with pytest.raises(PlanError, match="ring of 2 for 3 blocks needs 6 layer-blocks, 5 are free"):
        check(s.view, plan)


@pytest.mark.parametrize(("free", "fits"), [(12, True), (11, False)])
def test_a_ring_does_not_use_blocks_that_arriving_kv_takes(free: int, fits: bool) -> None:
    s, _, plan = streaming(ring=2)
    b = decoding(s, "b", 9, 30)
    layers = ((1, 2), (3, 4))
    run_plan(
        s, StepPlan((SubBatch(gpu_decode=(b,)),), tuple(KVMove(b, CPU, x, MoveOrder.AFTER) for x in layers))
    )
    s.view.pools[GPU].take("other", s.view.pools[GPU].free - free)
    plan = replace(plan, moves=tuple(KVMove(b, GPU, x) for x in layers))
    if fits:
        check(s.view, plan)
        return
    with pytest.raises(PlanError, match="moves bring 6 layer-blocks, 5 of 80 are free"):
        check(s.view, plan)


@pytest.mark.parametrize("free", [6, 8, 10, 12, 30])
def test_repeated_steps_leave_room_for_a_ring_that_grows(free: int) -> None:
    """Stepping and repeating agree on how long the blocks last."""

    def set_up() -> tuple[Scheduler, StepPlan]:
        s, _, plan = streaming(ring=2)
        s.view.pools[GPU].take("other", s.view.pools[GPU].free - free)
        return s, replace(plan, repeat=100)

    s, plan = set_up()
    s.policy = Fixed(plan)
    planned = s.plan_step(0.0)
    assert planned is not None
    many = max(n for n in range(1, 12) if repeats_fit(s.view, planned.plan, n))
    s, plan = set_up()
    single = 0
    try:
        while single < 11:
            run_plan(s, plan)
            single += 1
    except PlanError:
        pass
    assert many == single


def test_what_streams_and_write_backs_share_is_counted_over_the_step() -> None:
    """Two layers of four are streamed: the copies out meet half of a stream per layer, not both."""
    s, _, plan = streaming(ring=2)
    graph = compile(plan, s.view.model, 4)
    works = dict(zip(graph.template.kinds, graph.works, strict=True))
    assert works[OpKind.SWAP_OUT].beside_bytes == works[OpKind.STREAM].bytes // 2
    assert works[OpKind.STREAM].beside_bytes == 2 * works[OpKind.SWAP_OUT].bytes

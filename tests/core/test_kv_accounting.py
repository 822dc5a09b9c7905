"""Where KV lives and when its blocks are held: on the GPU, on the CPU, by layers on both, and on its way.

Throughout: 4 layers, blocks of 4 tokens; a request with 9 tokens of KV has 3 blocks, 12 layer-blocks.
"""

from __future__ import annotations

import pytest
from support import (
    Fixed,
    check_integrity,
    decoding,
    make_scheduler,
    run_plan,
    snapshot,
    spread,
    start_plan,
    toy_model,
)

from neo.core.errors import PlanError
from neo.core.graph import NO_BATCH, OpKind, StepGraph
from neo.core.pipeline import compile
from neo.core.plan import Evict, EvictMode, KVMove, MoveOrder, PrefillChunk, StepPlan, SubBatch
from neo.core.request import Request, State, Tier
from neo.core.scheduler import Scheduler, StepResult

CPU, GPU = Tier.CPU, Tier.GPU


def scheduler(gpu: int = 20, cpu: int = 20) -> Scheduler:
    return make_scheduler(Fixed(staging_layers=1), gpu=gpu, cpu=cpu)


def held(s: Scheduler, r: Request) -> tuple[int, int]:
    """Layer-blocks on (GPU, CPU)."""
    return s.view.pools[GPU].held(r.id), s.view.pools[CPU].held(r.id)


def gpu(*requests: Request) -> StepPlan:
    return StepPlan((SubBatch(gpu_decode=requests),))


def test_wholly_on_the_gpu() -> None:
    s = scheduler()
    r = decoding(s, "r", 7)
    assert (held(s, r), r.tier, r.host_layers) == ((8, 0), GPU, 0)
    run_plan(s, gpu(r))
    assert held(s, r) == (8, 0), "token 8 fits in block 2"
    planned = start_plan(s, gpu(r))
    assert held(s, r) == (12, 0), "a block for token 9, from the start of the step"
    s.finish_step(planned, StepResult(1.0))
    check_integrity(s)


def test_wholly_on_the_cpu() -> None:
    s = scheduler()
    r = decoding(s, "r", 7, tier=CPU)
    assert (held(s, r), r.tier, r.host_layers) == ((0, 8), CPU, 0b1111)
    run_plan(s, StepPlan((SubBatch(cpu_decode=(r,)),)))
    run_plan(s, StepPlan((SubBatch(cpu_decode=(r,)),)))
    assert held(s, r) == (0, 12)
    assert r.cpu_steps == 2
    check_integrity(s)


@pytest.mark.parametrize(
    ("layers", "mask"), [((0, 1), 0b0001), ((1, 3), 0b0110), ((3, 4), 0b1000), ((0, 3), 0b0111)]
)
def test_split_by_layers_and_streamed(layers: tuple[int, int], mask: int) -> None:
    s = scheduler()
    r = decoding(s, "r", 7)
    n = layers[1] - layers[0]
    spread(s, r, layers)
    assert (r.tier, r.host_layers) == (None, mask)
    assert held(s, r) == (2 * (4 - n), 2 * n)
    assert s.view.split_decodes == (r,)
    assert (s.view.gpu_decodes, s.view.cpu_decodes) == ((), ())
    check_integrity(s)
    run_plan(s, StepPlan((SubBatch(stream_decode=(r,)),)))
    assert held(s, r) == (3 * (4 - n), 3 * n), "each tier grows by its own layers"
    assert r.cpu_steps == 0, "streaming is GPU attention"
    check_integrity(s)
    run_plan(s, StepPlan((SubBatch(gpu_decode=(r,)),), (KVMove(r, GPU, layers),)))
    assert (held(s, r), r.tier) == ((12, 0), GPU)
    assert s.view.gpu_decodes == (r,)
    check_integrity(s)


def test_streamed_wholly_from_the_cpu() -> None:
    s = scheduler()
    r = decoding(s, "r", 8, tier=CPU)
    run_plan(s, StepPlan((SubBatch(stream_decode=(r,)),)))
    assert (held(s, r), r.tier, r.cpu_steps) == ((0, 12), CPU, 0)
    check_integrity(s)


def test_layers_are_moved_one_range_after_the_other() -> None:
    s = scheduler()
    r = decoding(s, "r", 8, 20)
    for layers, mask in (((2, 4), 0b1100), ((0, 1), 0b1101), ((1, 2), 0b1111)):
        spread(s, r, layers)
        assert r.host_layers == mask
        check_integrity(s)
    assert (r.tier, r.cpu_steps) == (CPU, 0)
    assert s.view.cpu_decodes == (r,)


def test_swap_out_frees_gpu_blocks_for_new_kv_of_the_same_step() -> None:
    s = scheduler(gpu=5)  # 4 blocks and one layer of them for staging
    old, new = decoding(s, "old", 8), Request("new", 16, 2)
    s.add(new)
    plan = StepPlan((SubBatch((PrefillChunk(new, 0, 16),), cpu_decode=(old,)),), (KVMove(old, CPU),))
    planned = start_plan(s, plan)
    assert (held(s, old), held(s, new)) == ((0, 12), (16, 0))
    assert s.view.pools[GPU].free == 0
    assert_gpu_work_waits_for(planned.graph, OpKind.SWAP_OUT)
    s.finish_step(planned, StepResult(1.0))
    check_integrity(s)


def assert_gpu_work_waits_for(graph: StepGraph, kind: OpKind) -> None:
    """In every layer, PRE of every sub-batch, which writes new KV, comes after this layer's copy."""
    ops = list(graph.expand())
    behind: list[set[int]] = []  # all that must have ended before each operation starts
    last_on: dict[str, int] = {}
    for op in ops:
        direct = [*op.deps, *([last_on[op.resource]] if op.resource in last_on else [])]
        behind.append(set(direct).union(*(behind[d] for d in direct)))
        last_on[op.resource] = op.index
    copies = {op.layer: op.index for op in ops if op.kind is kind and op.batch == NO_BATCH}
    writers = [op for op in ops if op.kind is OpKind.PRE]
    assert sorted(copies) == sorted({op.layer for op in writers})
    for op in writers:
        assert copies[op.layer] in behind[op.index], op


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("mode", ["move", "evict"])
def test_every_layer_of_new_kv_is_ordered_behind_its_swap_out(pipelined: bool, mode: str) -> None:
    s = scheduler()
    a, b, c, d = decoding(s, "a"), decoding(s, "b"), decoding(s, "c", tier=CPU), decoding(s, "d", tier=CPU)
    batches: tuple[SubBatch, ...] = (SubBatch(gpu_decode=(a,), cpu_decode=(c,)),)
    if pipelined:
        batches += (SubBatch(cpu_decode=(d,)),)
    leave = {"moves": (KVMove(b, CPU),)} if mode == "move" else {"evict": (Evict(b, EvictMode.SWAP),)}
    planned = start_plan(s, StepPlan(batches, **leave))  # type: ignore[arg-type]
    assert_gpu_work_waits_for(planned.graph, OpKind.SWAP_OUT)


@pytest.mark.parametrize("pipelined", [False, True])
def test_attention_reads_only_what_has_arrived(pipelined: bool) -> None:
    """GPU_ATTN waits for its layer's SWAP_IN and STREAM, CPU_ATTN for its SWAP_OUT and its rows."""
    s = scheduler()
    a, b, c, d = (decoding(s, x, tier=t) for x, t in (("a", CPU), ("b", CPU), ("c", GPU), ("d", CPU)))
    batches: tuple[SubBatch, ...] = (SubBatch(gpu_decode=(a,), stream_decode=(b,), cpu_decode=(c,)),)
    if pipelined:
        batches += (SubBatch(cpu_decode=(d,)),)
    planned = start_plan(s, StepPlan(batches, (KVMove(a, GPU), KVMove(c, CPU))))
    ops = list(planned.graph.expand())
    at = {(op.kind, op.batch, op.layer): op.index for op in ops}
    behind: list[set[int]] = []
    last_on: dict[str, int] = {}
    for op in ops:
        direct = [*op.deps, *([last_on[op.resource]] if op.resource in last_on else [])]
        behind.append(set(direct).union(*(behind[x] for x in direct)))
        last_on[op.resource] = op.index
    for layer in range(4):
        gpu_attention = at[OpKind.GPU_ATTN, 0, layer]
        assert at[OpKind.SWAP_IN, NO_BATCH, layer] in behind[gpu_attention]
        assert at[OpKind.STREAM, 0, layer] in behind[gpu_attention]
        assert at[OpKind.PRE, 0, layer] in behind[gpu_attention]
        for batch in range(len(batches)):
            cpu_attention = at[OpKind.CPU_ATTN, batch, layer]
            assert at[OpKind.SEND, batch, layer] in behind[cpu_attention]
            assert at[OpKind.SWAP_OUT, NO_BATCH, layer] in behind[cpu_attention]
            assert at[OpKind.RECV, batch, layer] in behind[at[OpKind.POST, batch, layer]]
        assert gpu_attention in behind[at[OpKind.POST, 0, layer]]


def test_swap_in_keeps_its_cpu_blocks_until_the_step_ends() -> None:
    s = scheduler()
    r = decoding(s, "r", 8, tier=CPU)
    planned = start_plan(s, StepPlan((SubBatch(gpu_decode=(r,)),), (KVMove(r, GPU),)))
    assert held(s, r) == (12, 8), "2 blocks arrive and a third is needed; the source is held meanwhile"
    s.finish_step(planned, StepResult(1.0))
    assert held(s, r) == (12, 0)
    check_integrity(s)


def test_swap_in_that_nobody_uses_yet() -> None:
    s = scheduler()
    a, r = decoding(s, "a"), decoding(s, "r", 8, tier=CPU)
    planned = start_plan(s, StepPlan((SubBatch(gpu_decode=(a,)),), (KVMove(r, GPU, (0, 3)),)))
    assert held(s, r) == (6, 8)
    s.abort("r", 0.5)
    s.finish_step(planned, StepResult(1.0))
    assert held(s, r) == (0, 0)
    assert r.state is State.ABORTED
    check_integrity(s)


@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_trailing_moves_take_the_new_token_along(layers: tuple[int, int] | None) -> None:
    s = scheduler()
    r = decoding(s, "r", 8)
    move = KVMove(r, CPU, layers, MoveOrder.AFTER)
    n = 4 if layers is None else 2
    planned = start_plan(s, StepPlan((SubBatch(gpu_decode=(r,)),), (move,)))
    assert held(s, r) == (12, 3 * n), "both, with the third block"
    assert (r.tier, r.host_layers) == (GPU, 0), "it still decodes on the GPU"
    assert s.view.gpu_decodes == (r,)
    s.finish_step(planned, StepResult(1.0))
    assert held(s, r) == (12 - 3 * n, 3 * n)
    assert r.host_layers == (0b1111 if layers is None else 0b0110)
    assert (s.view.cpu_decodes, s.view.split_decodes) == (((r,), ()) if layers is None else ((), (r,)))
    check_integrity(s)


def test_trailing_move_of_a_request_that_ends_or_is_aborted_leaves_nothing() -> None:
    for last in (True, False):
        s = scheduler()
        r = decoding(s, "r", 8, max_tokens=2 if last else 9)
        planned = start_plan(
            s, StepPlan((SubBatch(gpu_decode=(r,)),), (KVMove(r, CPU, None, MoveOrder.AFTER),))
        )
        if not last:
            s.abort("r", 0.5)
        s.finish_step(planned, StepResult(1.0))
        assert held(s, r) == (0, 0)
        assert s.unfinished == 0
        check_integrity(s)


def test_evict_and_recompute_drops_both_tiers_at_once() -> None:
    s = scheduler()
    a, r = decoding(s, "a"), decoding(s, "r", 8)
    spread(s, r, (0, 1))
    planned = start_plan(s, StepPlan((SubBatch(gpu_decode=(a,)),), evict=(Evict(r),)))
    assert held(s, r) == (0, 0)
    assert (r.state, r.tier, r.host_layers) == (State.WAITING, None, 0)
    s.finish_step(planned, StepResult(1.0))
    check_integrity(s)


@pytest.mark.parametrize("state", ["decode", "prefill", "split"])
def test_evict_and_swap_sends_what_is_on_the_gpu(state: str) -> None:
    s = scheduler()
    a = decoding(s, "a")
    r = decoding(s, "r", 8, chunk=6 if state == "prefill" else 0)
    if state == "split":
        spread(s, r, (0, 1))
    planned = start_plan(s, StepPlan((SubBatch(gpu_decode=(a,)),), evict=(Evict(r, EvictMode.SWAP),)))
    blocks = -(-r.computed // 4)
    # What leaves in some layers only makes no room for new KV of the step: it is there until the step ends.
    assert held(s, r) == (3 * blocks if state == "split" else 0, 4 * blocks)
    assert (r.tier, r.host_layers, r.preemptions) == (CPU, 0b1111, 1)
    (out,) = (
        w
        for k, w in zip(planned.graph.template.kinds, planned.graph.works, strict=True)
        if k is OpKind.SWAP_OUT
    )
    moved = blocks * (3 if state == "split" else 4)  # layer-blocks
    assert 4 * out.bytes == moved * 4 * toy_model().kv_bytes_per_token_layer, (
        "only what was on the GPU is copied"
    )
    s.finish_step(planned, StepResult(1.0))
    assert (s.view.cpu_decodes == (r,)) is (state != "prefill")
    check_integrity(s)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_of_a_dropped_request_can_take_in_a_swapped_one_in_any_order(order: tuple[int, int]) -> None:
    s = scheduler(cpu=3)
    a, out, dropped = decoding(s, "a"), decoding(s, "out", 8), decoding(s, "dropped", 8, tier=CPU)
    evictions = (Evict(out, EvictMode.SWAP), Evict(dropped))
    run_plan(s, StepPlan((SubBatch(gpu_decode=(a,)),), evict=tuple(evictions[i] for i in order)))
    assert (held(s, out), held(s, dropped)) == ((0, 8), (0, 0))
    check_integrity(s)


def test_chunks_on_the_cpu_stream_their_prefix_back() -> None:
    s = scheduler()
    r = Request("r", 12, 4)
    s.add(r)
    first = run_plan(s, StepPlan((SubBatch((PrefillChunk(r, 0, 5, CPU),)),)))
    second = run_plan(s, StepPlan((SubBatch((PrefillChunk(r, 5, 7, CPU),)),)))
    token = toy_model().kv_bytes_per_token_layer

    def bytes_of(graph: StepGraph) -> dict[OpKind, int]:
        return {k: w.bytes for k, w in zip(graph.template.kinds, graph.works, strict=True) if w.bytes}

    assert bytes_of(first.graph) == {OpKind.SWAP_OUT: 5 * token}
    assert bytes_of(second.graph) == {OpKind.SWAP_OUT: 7 * token, OpKind.STREAM: 5 * token}
    assert (held(s, r), s.view.cpu_decodes) == ((0, 12), (r,))
    check_integrity(s)


def test_a_prefill_under_way_moves_with_its_next_chunk() -> None:
    s = scheduler()
    r = decoding(s, "r", 12, chunk=5)
    with pytest.raises(PlanError, match="cannot be streamed"):
        start_plan(s, StepPlan((SubBatch((PrefillChunk(r, 5, 3, CPU),)),), (KVMove(r, CPU),)))
    run_plan(s, StepPlan((SubBatch(gpu_decode=(decoding(s, "a"),)),), (KVMove(r, CPU),)))
    run_plan(s, StepPlan((SubBatch((PrefillChunk(r, 5, 3, CPU),)),)))
    assert (held(s, r), r.tier, r.state) == ((0, 8), CPU, State.PREFILL)
    check_integrity(s)
    run_plan(s, StepPlan((SubBatch((PrefillChunk(r, 8, 4),)),), (KVMove(r, GPU),)))
    assert (held(s, r), r.tier, r.state) == ((12, 0), GPU, State.DECODE)
    check_integrity(s)


def test_compiling_changes_nothing() -> None:
    s = scheduler()
    r = decoding(s, "r", 8)
    before = snapshot(s)
    plan = StepPlan((SubBatch(cpu_decode=(r,)),), (KVMove(r, CPU),))
    alone = compile(plan, s.view.model, 4, 1)
    assert snapshot(s) == before
    planned = start_plan(s, plan)
    assert alone.template is planned.graph.template, "templates are shared"
    assert alone.works == planned.graph.works


def test_blocks_that_leave_in_some_layers_make_no_room_for_the_same_step() -> None:
    """A layer's copy ends before that layer's PRE, which may be too late for the new KV of an earlier one."""
    for layers, fits in (((0, 4), True), (None, True), ((1, 4), False)):
        s = scheduler(gpu=5)  # of which staging takes one
        out, grows = decoding(s, "out", 8), decoding(s, "grows", 8)
        gpu = s.view.pools[GPU]
        assert gpu.free == 0
        assert grows.computed % 4 == 0, "its next token needs a block in each layer"
        plan = StepPlan((SubBatch(gpu_decode=(grows,)),), (KVMove(out, CPU, layers),))
        if fits:
            run_plan(s, plan)
            check_integrity(s)
        else:
            with pytest.raises(PlanError, match="gpu-blocks"):
                start_plan(s, plan)

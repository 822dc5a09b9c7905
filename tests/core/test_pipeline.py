"""compile: which operations a step has, in which order, behind which others, and how large they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from graphs import assert_same_graph, batch_ops, by_kind, chaotic_steps, costed, general
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Fixed, decoding, make_scheduler, start_plan, toy_model

from neo.core.graph import NO_BATCH, RESOURCE_OF, OpKind, Resource, Section, StepGraph
from neo.core.pipeline import bytes_moved, compile, kv_read, recv_bytes, sampled_rows, send_bytes
from neo.core.plan import KVMove, MoveOrder, PrefillChunk, StepPlan, SubBatch
from neo.core.request import Request, State, Tier
from neo.core.scheduler import Planned
from neo.core.timing import busy_seconds, durations

CPU, GPU = Tier.CPU, Tier.GPU


def request(name: str, computed: int, tier: Tier | None = GPU, host_layers: int = 0) -> Request:
    """A decode of which ``computed`` tokens have KV."""
    return Request(
        name,
        computed,
        100,
        state=State.DECODE,
        computed=computed,
        generated=1,
        tier=tier,
        host_layers=host_layers,
    )


def two_batches(layers: int, tp: int = 1) -> StepGraph:
    """Prefill, GPU and CPU decodes in sub-batch 0, CPU decodes in sub-batch 1."""
    chunk = PrefillChunk(Request("p", 30, 5), 0, 30)
    first = SubBatch((chunk,), (request("g", 20),), (request("c", 16, CPU),))
    return compile(
        StepPlan((first, SubBatch(cpu_decode=(request("d", 40, CPU), request("e", 8, CPU))))),
        toy_model(layers, tp),
        4,
    )


@pytest.mark.parametrize("layers", [1, 2, 3, 32])
def test_the_gpu_runs_two_batches_in_the_order_of_neo(layers: int) -> None:
    """PR0, PR1, GA0, then L-1 times PO0, PR0', PO1, PR1', GA0', and PO0, PO1 at the end."""
    ops = [op for op in two_batches(layers).expand() if op.resource is Resource.GPU]
    got = [(op.kind, op.batch, op.layer) for op in ops]
    assert got.pop(0) == (OpKind.EMBED, NO_BATCH, None)
    assert got.pop() == (OpKind.HEAD, NO_BATCH, None)
    pre, attention, post = OpKind.PRE, OpKind.GPU_ATTN, OpKind.POST
    expected: list[tuple[OpKind, int, int]] = [(pre, 0, 0), (pre, 1, 0), (attention, 0, 0)]
    for i in range(1, layers):
        expected += [(post, 0, i - 1), (pre, 0, i), (post, 1, i - 1), (pre, 1, i), (attention, 0, i)]
    expected += [(post, 0, layers - 1), (post, 1, layers - 1)]
    assert got == expected


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_cpu_and_the_links_of_two_batches(layers: int) -> None:
    ops = list(two_batches(layers).expand())
    order = {r: [(op.kind, op.batch, op.layer) for op in ops if op.resource is r] for r in Resource}
    attention = [(OpKind.CPU_ATTN, b, i) for i in range(layers) for b in (0, 1)]
    assert order[Resource.CPU] == attention, "CA0 beside PR1 and GA0; CA1 beside PO0 and PR0'"
    assert order[Resource.D2H] == [(OpKind.SEND, b, i) for _, b, i in attention]
    assert order[Resource.H2D] == [(OpKind.RECV, b, i) for _, b, i in attention]
    assert order[Resource.HOST] == [(OpKind.SCHEDULE, NO_BATCH, None)]
    assert order[Resource.LINK] == []


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("layers", [1, 2, 6])
def test_dependencies_are_those_of_the_model(layers: int, tp: int) -> None:
    ops = list(two_batches(layers, tp).expand())
    at = {(op.kind, op.batch, op.layer): op.index for op in ops}
    end = OpKind.POST if tp == 1 else OpKind.ALLREDUCE
    embed = at[OpKind.EMBED, NO_BATCH, None]
    for layer in range(layers):
        for b in (0, 1):
            previous = {at[end, b, layer - 1]} if layer else set()
            assert set(ops[at[OpKind.PRE, b, layer]].deps) == {embed} | previous
            assert set(ops[at[OpKind.SEND, b, layer]].deps) == {at[OpKind.PRE, b, layer]}
            assert set(ops[at[OpKind.CPU_ATTN, b, layer]].deps) == {at[OpKind.SEND, b, layer]}
            assert set(ops[at[OpKind.RECV, b, layer]].deps) == {at[OpKind.CPU_ATTN, b, layer]}
            attention = {at[OpKind.RECV, b, layer]} | ({at[OpKind.GPU_ATTN, 0, layer]} if b == 0 else set())
            assert set(ops[at[OpKind.POST, b, layer]].deps) == {at[OpKind.PRE, b, layer]} | attention
            if tp > 1:
                assert set(ops[at[OpKind.ALLREDUCE, b, layer]].deps) == {at[OpKind.POST, b, layer]}
        assert set(ops[at[OpKind.GPU_ATTN, 0, layer]].deps) == {at[OpKind.PRE, 0, layer]}
    assert set(ops[at[OpKind.HEAD, NO_BATCH, None]].deps) == {at[end, b, layers - 1] for b in (0, 1)}
    assert ops[embed].deps == (at[OpKind.SCHEDULE, NO_BATCH, None],)


def test_one_sequential_layer_is_as_drawn() -> None:
    graph = compile(
        StepPlan((SubBatch(gpu_decode=(request("g", 20),), cpu_decode=(request("c", 16, CPU),)),)),
        toy_model(2),
        4,
    )
    layer = [(op.kind, op.layer) for op in graph.expand() if op.layer == 1]
    assert sorted(layer) == sorted(
        (kind, 1)
        for kind in (OpKind.PRE, OpKind.SEND, OpKind.CPU_ATTN, OpKind.GPU_ATTN, OpKind.RECV, OpKind.POST)
    )
    gpu = [op.kind for op in graph.expand() if op.resource is Resource.GPU]
    assert gpu == [OpKind.EMBED, *(OpKind.PRE, OpKind.GPU_ATTN, OpKind.POST) * 2, OpKind.HEAD]


def test_new_kv_for_the_cpu_leaves_behind_its_pre_and_frees_the_staging_layer_for_the_next() -> None:
    chunk = PrefillChunk(Request("p", 30, 5), 0, 30, CPU)
    ops = list(compile(StepPlan((SubBatch((chunk,)),)), toy_model(3), 4).expand())
    at = {(op.kind, op.layer): op.index for op in ops}
    for layer in range(3):
        assert at[OpKind.PRE, layer] in ops[at[OpKind.SWAP_OUT, layer]].deps
        if layer:
            assert at[OpKind.SWAP_OUT, layer - 1] in ops[at[OpKind.PRE, layer]].deps


@pytest.mark.parametrize("ring", [1, 2, 3])
def test_a_streamed_layer_waits_for_its_staging_buffer(ring: int) -> None:
    """Of n buffers, a layer takes the one that the n-th streamed layer before it has been read from."""
    stream = request("s", 20, None, 0b110111)
    ops = list(compile(StepPlan((SubBatch(stream_decode=(stream,)),)), toy_model(6), 4, ring).expand())
    at = {(op.kind, op.layer): op.index for op in ops}
    streamed = [0, 1, 2, 4, 5]
    assert sorted(layer for kind, layer in at if kind is OpKind.STREAM) == streamed
    for i, layer in enumerate(streamed):
        deps = ops[at[OpKind.STREAM, layer]].deps
        before = [d for d in deps if ops[d].kind is OpKind.GPU_ATTN]
        assert before == ([at[OpKind.GPU_ATTN, streamed[i - ring]]] if i >= ring else [])
        assert at[OpKind.STREAM, layer] in ops[at[OpKind.GPU_ATTN, layer]].deps


def test_works_hold_the_numbers_of_the_step() -> None:
    model = toy_model(4)
    graph = two_batches(4)
    token = 2 * 2 * 16 * 2  # K and V, 2 KV heads of 16, 2 bytes
    assert model.kv_bytes_per_token_layer == token
    works = batch_ops(graph)
    assert works[OpKind.SCHEDULE, NO_BATCH][:2] == (34, 5)
    assert works[OpKind.EMBED, NO_BATCH].tokens == 34
    assert works[OpKind.HEAD, NO_BATCH][:2] == (5, 5), "the prompt is complete: 5 tokens are sampled"
    assert (works[OpKind.PRE, 0].tokens, works[OpKind.POST, 1].tokens) == (32, 2)
    attention = works[OpKind.GPU_ATTN, 0]
    assert (attention.tokens, attention.sequences, attention.kv_tokens, attention.chunks) == (
        32,
        1,
        21,
        ((0, 30),),
    )
    assert works[OpKind.CPU_ATTN, 0][:3] == (1, 1, 17)
    assert works[OpKind.CPU_ATTN, 1][:3] == (2, 2, 50)
    assert works[OpKind.SEND, 1].bytes == send_bytes(2, model) == 2 * 16 * (4 + 2 * 2) * 2
    assert works[OpKind.RECV, 1].bytes == recv_bytes(2, model) == 2 * 16 * 4 * 2
    into, out = 3 * recv_bytes(1, model), 3 * send_bytes(1, model)
    assert works[OpKind.SEND, 1].beside_bytes == into * 2 // 3
    assert works[OpKind.RECV, 0].beside_bytes == out // 3
    assert works[OpKind.CPU_ATTN, 1].beside_bytes == (into + out) * 50 // 67


def test_an_unfinished_prompt_samples_nothing_and_has_no_head() -> None:
    chunk = PrefillChunk(Request("p", 30, 5), 0, 29)
    assert sampled_rows(SubBatch((chunk,)), 2) == 0
    assert sampled_rows(SubBatch((replace(chunk, length=30),)), 2) == 1
    kinds = {op.kind for op in compile(StepPlan((SubBatch((chunk,)),)), toy_model(), 4).expand()}
    assert kinds == {OpKind.SCHEDULE, OpKind.EMBED, OpKind.PRE, OpKind.GPU_ATTN, OpKind.POST}
    assert kv_read(()) == 0


@pytest.mark.parametrize("layers", [1, 8, 80])
def test_the_graph_stays_small_however_deep_the_model(layers: int) -> None:
    s = make_scheduler(Fixed(staging_layers=1), gpu=40, cpu=40, model=toy_model(layers, 2))
    a, b, c, d, e = (decoding(s, x, tier=CPU if x in "cde" else GPU) for x in "abcde")
    p = Request("p", 12, 4)
    s.add(p)
    batches = (SubBatch((PrefillChunk(p, 0, 12, CPU),), (a, e), (c,)), SubBatch(cpu_decode=(d,)))
    planned = start_plan(s, StepPlan(batches, (KVMove(b, CPU), KVMove(e, GPU))))
    template = planned.graph.template
    assert len(planned.graph.works) <= 20
    assert sum(len(section.ops) for section in template.sections) <= 50
    expanded = sum(1 for _ in planned.graph.expand())
    assert expanded == sum(template.counts) == sum(len(x.ops) * x.repeat for x in template.sections)
    assert expanded >= 14 * layers


def test_steps_of_one_shape_share_their_template() -> None:
    plans = [
        StepPlan((SubBatch(gpu_decode=(request("g", n),), cpu_decode=(request("c", n, CPU),)),))
        for n in (5, 50)
    ]
    first, second = (compile(plan, toy_model(), 4) for plan in plans)
    assert first.template is second.template
    assert first.works != second.works


@given(st.data())
@settings(max_examples=150)
def test_the_short_way_for_gpu_only_steps_compiles_the_same_graph(data: st.DataObject) -> None:
    model = toy_model(data.draw(st.integers(1, 80)), data.draw(st.sampled_from([1, 2])))
    chunks = []
    for i in range(data.draw(st.integers(0, 3))):
        prompt = data.draw(st.integers(1, 50))
        start = data.draw(st.integers(0, prompt - 1))
        chunks.append(
            PrefillChunk(
                Request(f"p{i}", prompt, 5, computed=start), start, data.draw(st.integers(1, prompt - start))
            )
        )
    lengths = data.draw(st.lists(st.integers(1, 99), min_size=0 if chunks else 1, max_size=5))
    batch = SubBatch(tuple(chunks), tuple(request(f"g{i}", n) for i, n in enumerate(lengths)))
    plan = StepPlan((batch,))
    assert_same_graph(compile(plan, model, 4), general(plan, model, 4))


@given(steps=chaotic_steps())
@settings(max_examples=150)
def test_every_step_is_a_sound_graph(steps: list[Planned]) -> None:
    """Of plans of every kind: layers in order, dependencies backwards, every layer of every stage once."""
    for plan, graph in steps:
        ops = list(graph.expand())
        assert [op.index for op in ops] == list(range(len(ops)))
        model_layers = max(op.layer for op in ops if op.layer is not None) + 1
        for op in ops:
            assert op.resource is RESOURCE_OF[op.kind]
            assert all(d < op.index for d in op.deps)
            assert graph.template.kinds[op.work] is op.kind
        counts = Counter(op.work for op in ops)
        assert [counts[i] for i in range(len(graph.works))] == list(graph.template.counts)
        for (kind, batch), found in by_kind(ops).items():
            layers = [op.layer for op in found]
            if kind in (OpKind.SCHEDULE, OpKind.EMBED, OpKind.HEAD):
                assert layers == [None]
            elif kind is OpKind.STREAM:
                assert layers == sorted(set(layers))
            else:
                assert layers == list(range(model_layers)), (kind, batch)
        kinds = {op.kind for op in ops}
        assert (OpKind.HEAD in kinds) is any(sampled_rows(b, model_layers) for b in plan.batches)
        assert (OpKind.CPU_ATTN in kinds) is any(
            b.cpu_decode or any(r.relay_layers for r in b.relay_decode) for b in plan.batches
        )
        first = plan.batches[0]
        assert (OpKind.GPU_ATTN in kinds) is bool(first.prefill or first.gpu_decode or first.stream_decode)
        assert (OpKind.SWAP_IN in kinds) is any(m.dst is GPU for m in plan.moves)


@given(steps=chaotic_steps())
@settings(max_examples=100)
def test_sums_over_the_compact_graph_are_sums_over_its_operations(steps: list[Planned]) -> None:
    for _, graph in steps:
        seconds = durations(graph, costed())
        busy: dict[Any, float] = {}
        into = out = 0
        for op in graph.expand():
            busy[op.resource] = busy.get(op.resource, 0.0) + seconds[op.work]
            if op.kind in (OpKind.RECV, OpKind.SWAP_IN, OpKind.STREAM):
                into += graph.works[op.work].bytes
            elif op.kind in (OpKind.SEND, OpKind.SWAP_OUT):
                out += graph.works[op.work].bytes
        assert bytes_moved(graph) == (into, out)
        assert busy_seconds(graph.template, seconds) == pytest.approx(busy, rel=1e-12)


@given(steps=chaotic_steps())
@settings(max_examples=100)
def test_copies_carry_the_bytes_that_the_plan_moves(steps: list[Planned]) -> None:
    """Up to rounding of the per-layer average, and for swapped-out evictions (see test_kv_accounting)."""
    for plan, graph in steps:
        if plan.evict:
            continue
        layers = sum(section.repeat for section in _layer_sections(graph))
        model = toy_model(layers)
        block = 4 * model.kv_bytes_per_token_layer
        into = out = 0
        for m in plan.moves:
            start, stop = m.layers or (0, layers)
            tokens = m.request.computed + (m.order is MoveOrder.AFTER)
            size = -(-tokens // 4) * block * (stop - start)
            into, out = (into, out + size) if m.dst is CPU else (into + size, out)
        works = batch_ops(graph)
        token = model.kv_bytes_per_token_layer
        for batch in plan.batches:
            for c in batch.prefill:
                if c.dst is CPU:
                    out += c.length * token * layers
            out += sum(r.host_layers.bit_count() for r in batch.stream_decode) * token
        got_in = works[OpKind.SWAP_IN, NO_BATCH].bytes * layers if (OpKind.SWAP_IN, NO_BATCH) in works else 0
        got_out = (
            sum(works[OpKind.SWAP_OUT, b].bytes for b in (0, NO_BATCH) if (OpKind.SWAP_OUT, b) in works)
            * layers
        )
        slack = layers * (2 + len(plan.moves))
        assert abs(got_in - into) <= slack
        assert abs(got_out - out) <= slack


def _layer_sections(graph: StepGraph) -> list[Section]:
    """One entry per layer that PRE of the first sub-batch runs in."""
    return [s for s in graph.template.sections if any(op.kind is OpKind.PRE for op in s.ops)]

"""Relayed decodes: a token in layers + 1 steps, its block, its end, its graph, its record."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from graphs import batch_ops, costed, op_level
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Chaos, Drive, Fixed, check_integrity, decoding, make_scheduler, run_plan, toy_model

from neo.core.errors import InputError
from neo.core.graph import NO_BATCH, RELAY, Op, OpKind, Resource
from neo.core.pipeline import compile, kv_read, recv_bytes, sampled_rows, send_bytes
from neo.core.plan import Evict, PrefillChunk, StepPlan, SubBatch
from neo.core.record import Mode, RunRecord
from neo.core.recorder import Recorder, mode_of
from neo.core.request import FinishReason, Request, State, Tier
from neo.core.scheduler import Scheduler, StepResult
from neo.core.timing import durations, step_seconds

CPU, GPU = Tier.CPU, Tier.GPU
LAYERS = 4


def relay(*requests: Request, chunks: Any = (), gpu: Any = (), **plan: Any) -> StepPlan:
    return StepPlan((SubBatch(tuple(chunks), tuple(gpu), relay_decode=requests),), **plan)


def hosted(layers: int = LAYERS, count: int = 2, prompt: int = 8) -> tuple[Scheduler, list[Request]]:
    s = make_scheduler(gpu=30, cpu=30, model=toy_model(layers))
    return s, [decoding(s, f"c{i}", prompt, tier=CPU) for i in range(count)]


# -- a token's life -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_a_token_takes_a_step_more_than_there_are_layers(layers: int) -> None:
    s, (r, _) = hosted(layers)
    for step in range(1, layers + 1):
        run_plan(s, relay(r), end_s=10.0 + step)
        assert (r.relay_layers, r.generated, r.computed, r.cpu_steps) == (step, 1, 8, 0)
        assert (r.last_token_s, s.view.relaying) == (1.0, 1)
        check_integrity(s)
    run_plan(s, relay(r), end_s=20.0)
    assert (r.relay_layers, r.generated, r.computed, r.cpu_steps) == (0, 2, 9, 1)
    assert (r.first_token_s, r.last_token_s, s.view.relaying) == (1.0, 20.0, 0)
    check_integrity(s)


@pytest.mark.parametrize(("prompt", "blocks"), [(7, 0), (8, LAYERS), (9, 0)])
def test_a_token_takes_its_block_when_it_begins(prompt: int, blocks: int) -> None:
    s, (r, _) = hosted(prompt=prompt)
    pool = s.view.pools[CPU]
    before = pool.held(r.id)
    for _ in range(LAYERS + 1):
        run_plan(s, relay(r))
        assert pool.held(r.id) == before + blocks


def test_a_request_ends_with_its_last_token() -> None:
    s, _ = hosted()
    r = decoding(s, "short", 8, 2, tier=CPU)
    for step in range(LAYERS + 1):
        assert not r.done
        run_plan(s, relay(r), end_s=2.0 + step)
    assert (r.state, r.finish_reason, r.finish_s) == (State.FINISHED, FinishReason.LENGTH, 2.0 + LAYERS)
    assert (r.generated, r.last_token_s, s.view.relaying) == (2, 2.0 + LAYERS, 0)
    assert s.view.pools[CPU].held("short") == 0
    assert r in s.ended


@pytest.mark.parametrize("running", [False, True])
def test_an_abort_within_a_token_leaves_nothing(running: bool) -> None:
    s, (r, other) = hosted()
    run_plan(s, relay(r, other))
    if running:
        s.policy = Fixed(relay(r, other))
        planned = s.plan_step(1.0)
        assert planned is not None
        s.abort(r.id, 1.5)
        assert s.view.relaying == 2
        s.finish_step(planned, StepResult(2.0))
    else:
        s.abort(r.id, 1.5)
    assert (r.state, r.relay_layers, r.generated) == (State.ABORTED, 0, 1)
    assert s.view.relaying == 1
    check_integrity(s)
    run_plan(s, relay(other))


def test_an_eviction_within_a_token_drops_it_and_the_token_comes_out_of_a_prefill() -> None:
    s, (r, other) = hosted()
    run_plan(s, relay(r, other))
    run_plan(s, relay(other, evict=(Evict(r),)))
    assert (r.state, r.computed, r.relay_layers, r.generated) == (State.WAITING, 0, 0, 1)
    assert s.view.relaying == 1
    check_integrity(s)
    run_plan(s, relay(other, chunks=[PrefillChunk(r, 0, 9)]))
    assert (r.state, r.computed, r.generated) == (State.DECODE, 9, 2)


def test_planned_ahead_the_next_step_knows_the_layer() -> None:
    s, (r, _) = hosted()
    s.policy = Fixed(*[lambda view: relay(r)] * (LAYERS + 2))
    running = s.plan_step(0.0)
    for step in range(LAYERS + 1):
        assert running is not None
        s.commit_step(running)
        following = s.plan_step(0.0)
        s.finish_step(running, StepResult(2.0 + step))
        running = following
        assert r.last_token_s == (1.0 if step < LAYERS else 2.0 + LAYERS)
    assert (r.generated, r.relay_layers, s.view.relaying) == (2, 0, 0)


def test_a_request_that_stops_while_the_next_token_has_begun_keeps_its_tokens() -> None:
    s, (r, _) = hosted(layers=1)
    run_plan(s, relay(r))
    s.policy = Fixed(*[lambda view: relay(r)] * 2)
    last = s.plan_step(1.0)
    assert last is not None
    s.commit_step(last)
    ahead = s.plan_step(1.0)
    assert ahead is not None
    s.finish_step(last, StepResult(2.0, stopped={r.id: FinishReason.STOP}))
    s.commit_step(ahead)
    assert (r.state, r.generated, r.relay_layers, s.view.relaying) == (State.FINISHED, 2, 0, 0)
    s.finish_step(ahead, StepResult(3.0))
    assert (r.finish_s, r.last_token_s) == (2.0, 2.0)
    check_integrity(s)


# Whatever else is planned beside them: that ``view.relaying`` counts right is part of check_integrity.
@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 4), aborts=st.sampled_from([0.0, 0.1]))
@settings(max_examples=60)
def test_random_plans_with_relayed_decodes_keep_the_accounts(seed: int, layers: int, aborts: float) -> None:
    drive = Drive(make_scheduler(Chaos(seed), gpu=14, cpu=24, model=toy_model(layers)))
    random = Random(seed)
    for _ in range(60):
        if len(drive.submitted) < 8 and random.random() < 0.3:
            drive.add(random.randint(1, 20), random.randint(1, 6))
        if drive.start():
            for r in drive.submitted:
                if not r.done and r.id not in drive.aborted and random.random() < aborts:
                    drive.abort(r)
            drive.finish()
    for r in drive.submitted:
        if not r.done and r.id not in drive.aborted:
            drive.abort(r)
    drive.check_end()
    assert drive.scheduler.view.relaying == 0


def test_the_random_plans_of_these_tests_do_relay() -> None:
    drive = Drive(make_scheduler(Chaos(3), gpu=14, cpu=24, model=toy_model(2)))
    for _ in range(5):
        drive.add(5, 6)
    modes = set()
    for _ in range(200):
        if drive.start():
            modes.add(mode_of(drive.planned.plan))
            drive.finish()
    assert Mode.RELAYED in modes
    assert any(r.cpu_steps for r in drive.submitted)


def test_rows_cannot_be_fewer_than_none() -> None:
    with pytest.raises(InputError, match="relay_rows must be at least 0, got -1"):
        make_scheduler(relay_rows=-1)


# -- the graph ----------------------------------------------------------------------------------------------


def at_layers(*behind: int) -> tuple[Request, ...]:
    """CPU decodes with 10 tokens of KV, so many layers into a token."""
    mask = (1 << LAYERS) - 1
    return tuple(
        Request(f"c{i}", 10, 9, state=State.DECODE, computed=10, generated=1, tier=CPU, host_layers=mask,
                relay_layers=n)
        for i, n in enumerate(behind)
    )  # fmt: skip


def gpu_decode() -> Request:
    return Request("g", 20, 9, state=State.DECODE, computed=20, generated=1, tier=GPU)


def test_works_of_a_relayed_step() -> None:
    """Rows: of the fullest layer in the GPU's work, of all layers on average in copies and CPU attention."""
    model = toy_model(LAYERS)
    members = at_layers(0, 0, 1, 2, 4, 4, 4)
    batch = SubBatch(gpu_decode=(gpu_decode(),), relay_decode=members)
    assert (batch.tokens, batch.sequences) == (1 + 3, 1)
    assert sampled_rows(batch, LAYERS) == 1 + 3, "three have all their layers behind them"
    works = batch_ops(compile(StepPlan((batch,)), model, 4))
    assert works[OpKind.SCHEDULE, NO_BATCH][:2] == (4, 8)
    assert works[OpKind.HEAD, NO_BATCH][:2] == (4, 4)
    assert works[OpKind.PRE, 0].tokens == works[OpKind.POST, 0].tokens == 4
    assert works[OpKind.GPU_ATTN, 0][1:3] == (1, 21)
    assert works[OpKind.SEND, RELAY][:4] == (1, 1, 0, send_bytes(1, model)), "4 go to some PRE"
    assert works[OpKind.RECV, RELAY][:4] == (2, 2, 0, recv_bytes(2, model)), "5 come to some POST"
    coming = tuple(r for r in members if r.relay_layers)
    assert works[OpKind.CPU_ATTN, RELAY][:3] == (2, 2, -(-kv_read(coming) // LAYERS)) == (2, 2, 14)


@pytest.mark.parametrize(
    ("behind", "kinds"),
    [
        ((0, 0), {OpKind.SEND}),
        ((2, 0), {OpKind.SEND, OpKind.CPU_ATTN, OpKind.RECV}),
        ((LAYERS,), {OpKind.CPU_ATTN, OpKind.RECV}),
    ],
)
def test_what_begins_only_leaves_and_what_ends_only_comes(behind: Any, kinds: set[OpKind]) -> None:
    graph = compile(relay(*at_layers(*behind)), toy_model(LAYERS), 4)
    assert {op.kind for op in graph.expand() if op.batch == RELAY} == kinds
    assert (OpKind.HEAD in graph.template.kinds) is (LAYERS in behind)
    assert not graph.template.serial


def test_relayed_attention_waits_for_planning_alone_and_the_layer_waits_for_it() -> None:
    graph = compile(relay(*at_layers(1, 2, 0), gpu=[gpu_decode()]), toy_model(LAYERS), 4)
    ops = list(graph.expand())
    at = {(op.kind, op.batch, op.layer): op for op in ops}
    plan = at[OpKind.SCHEDULE, NO_BATCH, None].index
    for layer in range(LAYERS):

        def one(kind: OpKind, batch: int = 0, layer: int = layer) -> Op:
            return at[kind, batch, layer]

        assert one(OpKind.CPU_ATTN, RELAY).deps == (plan,)
        attended = one(OpKind.CPU_ATTN, RELAY).index
        assert set(one(OpKind.RECV, RELAY).deps) == {attended, one(OpKind.PRE).index}
        assert one(OpKind.SEND, RELAY).deps == (one(OpKind.PRE).index,)
        needed = {one(OpKind.RECV, RELAY).index, one(OpKind.PRE).index, one(OpKind.GPU_ATTN).index}
        assert set(one(OpKind.POST).deps) == needed
    assert [op.layer for op in ops if op.resource is Resource.CPU] == list(range(LAYERS))


@given(
    behind=st.lists(st.integers(0, LAYERS), min_size=1, max_size=9),
    chunk=st.integers(0, 20),
    dst=st.sampled_from(list(Tier)),
    gpu=st.booleans(),
)
@settings(max_examples=80)
def test_both_levels_agree_on_relayed_steps(behind: list[int], chunk: int, dst: Tier, gpu: bool) -> None:
    chunks = [PrefillChunk(Request("p", 20, 4), 0, chunk, dst)] if chunk else []
    plan = relay(*at_layers(*behind), chunks=chunks, gpu=[gpu_decode()] * gpu)
    graph = compile(plan, toy_model(LAYERS), 4)
    seconds = durations(graph, costed())
    assert step_seconds(graph.template, seconds) == pytest.approx(op_level(graph, seconds), rel=1e-9)


# -- the record ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", [False, True])
def test_the_gap_before_a_relayed_token_is_counted_once_it_is_there(measured: bool) -> None:
    s, (r, _) = hosted()
    record = RunRecord(requests=[r])
    recorder = Recorder(record, s)
    for step in range(LAYERS + 1):
        assert list(record.itl_values) == []
        s.policy = Fixed(relay(r))
        planned = s.plan_step(0.0)
        assert planned is not None
        start, end = 2.0 + step, 3.0 + step
        if measured:
            begun = recorder.begin(planned)
            s.commit_step(planned)
            recorder.observe_measured(begun, {}, start, end)
        else:
            recorder.observe(planned, durations(planned.graph, s.cost), start, [end])
        s.finish_step(planned, StepResult(end))
    assert (list(record.itl_values), list(record.itl_counts)) == ([3.0 + LAYERS - 1.0], [1])
    assert list(record.columns.mode) == [Mode.RELAYED] * (LAYERS + 1)
    assert list(record.columns.cpu_decodes) == [0] * LAYERS + [1], "as many as tokens come"
    assert record.bytes_d2h == LAYERS * LAYERS * send_bytes(1, s.view.model)
    assert record.bytes_h2d == LAYERS * LAYERS * recv_bytes(1, s.view.model)

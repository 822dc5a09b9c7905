"""Bubbles: idle time adds up, and has the right cause."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.core.bubbles import BUSY, CAUSES, Bubbles, Ran, attribute, step_bubbles
from neo.core.graph import OpKind, Resource, StepGraph
from neo.core.record import Slice
from neo.core.templates import Shape, template_for
from neo.core.timing import busy_seconds, step_seconds
from neo.report.bubbles import bubble_table, plot_bubbles, waits
from neo.sim.setup import SystemConfig, build_system, simulation
from neo.workload import apply_arrivals, synthetic

SHAPES = [
    Shape(40),
    Shape(40, cpu0=True),
    Shape(40, relay_out=True, relay_in=True),
    Shape(40, attention=False, relay_in=True, spill=True),
    Shape(24, relay_out=True, relay_in=True, swap_in=True, swap_out=True, allreduce=True),
    Shape(40, cpu0=True, spill=True, swap_out=True),
    Shape(40, pipelined=True, cpu0=True, cpu1=True),
    Shape(32, pipelined=True, cpu1=True, spill=True, swap_in=True, allreduce=True),
    Shape(20, streams=((7, True), (13, False)), ring=2),
    Shape(3, pipelined=True, cpu1=True),
]


def test_a_wait_goes_to_what_ran_meanwhile() -> None:
    ran = [
        Ran(Resource.HOST, 0, 1, -1),
        Ran(Resource.GPU, 1, 3, 0),
        Ran(Resource.D2H, 3, 4, 1),
        Ran(Resource.CPU, 4, 9, 2),
        Ran(Resource.H2D, 9, 10, 3),
        Ran(Resource.GPU, 10, 12, 4),
    ]
    length, idle = attribute(ran)
    assert length == 12
    assert idle[Resource.GPU, "scheduling"] == 1
    assert idle[Resource.GPU, "cpu_attention"] == 5
    assert idle[Resource.GPU, "copy"] == 2
    assert {c: v for (r, c), v in idle.items() if r is Resource.CPU} == {
        "scheduling": 1, "gpu": 4, "copy": 2,
    }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(data=st.data())
@settings(max_examples=15)
def test_busy_and_idle_fill_the_step(shape: Shape, data: st.DataObject) -> None:
    template, keys = template_for(shape)
    times = st.floats(1e-6, 1.0)
    seconds = [data.draw(times) for _ in keys]
    length = step_seconds(template, seconds)
    busy, idle = busy_seconds(template, seconds), step_bubbles(template, seconds)
    for resource in {r for r, _ in idle}:
        total = busy[resource] + sum(v for (r, _), v in idle.items() if r is resource)
        assert total == pytest.approx(length, rel=1e-9)
    bubbles = Bubbles()
    bubbles.add(template, seconds, 5.0, [5.0 + length])
    for resource, parts in bubbles.summary(7.0 + length).items():
        assert sum(parts.values()) == pytest.approx(7.0 + length, rel=1e-9), resource
        assert min(parts.values()) >= -1e-9 * length
        assert parts["no_work"] >= 7.0 - 1e-9


def test_the_gpu_waits_for_relayed_attention_only_where_the_cpu_is_slower() -> None:
    """It begins with the step and goes ahead of the GPU: only the step's planning comes before."""
    template, keys = template_for(Shape(30, relay_out=True, relay_in=True))
    before_last_post = 0.001 + 29 * 0.006 + 2 * 0.002  # EMBED, 29 layers, and PRE and GPU_ATTN of the last
    for attention, idle_s in ((0.001, 0.0), (0.009, 30 * 0.009 - before_last_post)):
        price = {OpKind.CPU_ATTN: attention, OpKind.SEND: 0.0, OpKind.RECV: 0.0, OpKind.EMBED: 0.001}
        price |= {OpKind.HEAD: 0.002, OpKind.SCHEDULE: 0.004}
        idle = step_bubbles(template, [price.get(kind, 0.002) for kind, _, _ in keys])
        assert idle.get((Resource.GPU, "scheduling")) == pytest.approx(0.004)
        assert idle.get((Resource.GPU, "cpu_attention"), 0.0) == pytest.approx(idle_s)
        assert idle.get((Resource.CPU, "scheduling")) == pytest.approx(0.004)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_extrapolated_layers_give_what_all_layers_give(shape: Shape) -> None:
    """The operations one by one, as the graph expands them, without a shortcut."""
    template, keys = template_for(shape)
    price = {OpKind.CPU_ATTN: 0.005, OpKind.STREAM: 0.003, OpKind.SWAP_OUT: 0.0015, OpKind.POST: 0.002}
    seconds = [price.get(kind, 0.001) * (1 + batch / 7) for kind, batch, _ in keys]
    ran: list[Ran] = []
    last: dict[Resource, int] = {}
    for op in StepGraph(template, ()).expand():
        before = [i for i in (last.get(op.resource), *op.deps) if i is not None]
        bound = max(before, key=lambda i: ran[i].end, default=-1)
        start = ran[bound].end if bound >= 0 else 0.0
        ran.append(Ran(op.resource, start, start + seconds[op.work], bound))
        last[op.resource] = op.index
    length, expected = attribute(ran)
    found = step_bubbles(template, seconds)
    assert length == pytest.approx(float(step_seconds(template, seconds)), rel=1e-12)
    for resource in {r for r, _ in expected}:
        for cause in CAUSES:
            key = (resource, cause)
            assert found.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), abs=1e-9 * length), key


@pytest.mark.parametrize("policy", ["gpu-only", "neo", "fastdecode"])
def test_a_run_adds_up_and_the_busy_time_is_the_record_s(policy: str, tmp_path: Path) -> None:
    system = build_system(SystemConfig(policy=policy, kv_gpu_blocks=60, kv_cpu_bytes=10**9))
    workload = apply_arrivals(synthetic("uniform:10:400", "uniform:1:60", 60), "poisson", rate=3.0)
    sim = simulation(system, workload)
    bubbles = Bubbles(sim.record.start_s)
    observe = sim._recorder.observe

    def observed(planned, steps, start, ends):  # type: ignore[no-untyped-def]
        bubbles.add(planned.graph.template, steps, start, ends)
        observe(planned, steps, start, ends)

    sim._recorder.observe = observed  # type: ignore[method-assign]
    record = sim.run()
    summary = bubbles.summary(record.end_s)
    for resource, parts in summary.items():
        assert sum(parts.values()) == pytest.approx(record.end_s - record.start_s, rel=1e-9)
        assert parts[BUSY] == pytest.approx(record.busy.get(resource, 0.0), rel=1e-9)
    if policy == "fastdecode":
        assert summary["gpu"]["cpu_attention"] > 0
    if policy == "gpu-only":
        assert summary["gpu"]["cpu_attention"] == summary["gpu"]["copy"] == 0
    assert bubble_table({policy: summary}).row_count == 4
    paths = plot_bubbles({policy: summary, "again": summary}, tmp_path / "bubbles")
    assert [p.name for p in paths] == ["bubbles.svg", "bubbles.png"]


def test_waits_of_a_timeline_name_their_cause() -> None:
    slices = [
        Slice(0, "gpu", "PRE", 0, 0, 0.0, 1.0),
        Slice(0, "d2h", "SEND", 0, 0, 1.0, 1.5),
        Slice(0, "cpu", "CPU_ATTN", 0, 0, 1.5, 5.0),
        Slice(0, "h2d", "RECV", 0, 0, 5.0, 5.5),
        Slice(0, "gpu", "POST", 0, 0, 5.5, 6.0),
    ]
    assert waits(slices) == [Slice(0, "gpu", "WAIT cpu_attention", None, -1, 1.0, 5.5)]

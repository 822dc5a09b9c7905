"""How long a step takes: the recurrence against events, and against NEO's formula in its regime."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from graphs import chaotic_steps, op_level, priced_shapes, seconds_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ToyCost, costs, make_scheduler

from neo.core.graph import NO_BATCH, OpKind, StepGraph, Work
from neo.core.plan import PrefillChunk, StepPlan, SubBatch
from neo.core.request import Request
from neo.core.scheduler import Planned
from neo.core.templates import Shape, template_for
from neo.core.timing import busy_seconds, durations, step_seconds


@given(priced_shapes())
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
def test_the_recurrence_is_what_events_give(priced: tuple[StepGraph, list[float]]) -> None:
    graph, seconds = priced
    assert step_seconds(graph.template, seconds) == pytest.approx(op_level(graph, seconds), rel=1e-9, abs=0.0)


@given(steps=chaotic_steps(), cost=costs, data=st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_and_so_it_is_for_steps_of_random_plans(
    steps: list[Planned], cost: ToyCost, data: st.DataObject
) -> None:
    for _, graph in steps:
        for seconds in (durations(graph, cost), data.draw(seconds_for(len(graph.works)))):
            expected = op_level(graph, seconds)
            assert step_seconds(graph.template, seconds) == pytest.approx(expected, rel=1e-9, abs=0.0)


@given(priced_shapes(), st.data())
@settings(max_examples=150)
def test_a_step_is_no_shorter_than_its_busiest_resource_and_no_longer_than_all(
    priced: tuple[StepGraph, list[float]], data: st.DataObject
) -> None:
    graph, seconds = priced
    length = step_seconds(graph.template, seconds)
    busy = busy_seconds(graph.template, seconds)
    assert max(busy.values()) <= length * (1 + 1e-9)
    assert length <= sum(busy.values()) * (1 + 1e-9)
    which = data.draw(st.integers(0, len(seconds) - 1))
    longer = [s + 0.5 if i == which else s for i, s in enumerate(seconds)]
    assert step_seconds(graph.template, longer) >= length * (1 - 1e-9), "slower operations, no faster step"


@given(layers=st.integers(1, 80), tp=st.booleans(), head=st.booleans(), data=st.data())
@settings(max_examples=60)
def test_a_serial_step_is_the_sum_of_its_operations_and_takes_arrays(
    layers: int, tp: bool, head: bool, data: st.DataObject
) -> None:
    template, keys = template_for(Shape(layers, allreduce=tp, head=head))
    assert template.serial
    seconds = data.draw(seconds_for(len(keys)))
    which = next(i for i, kind in enumerate(template.kinds) if kind is OpKind.GPU_ATTN)
    many = np.array([seconds[which] + 0.1 * i for i in range(5)])
    lengths = step_seconds(template, [many if i == which else s for i, s in enumerate(seconds)])
    for i, value in enumerate(many.tolist()):
        single = [value if j == which else s for j, s in enumerate(seconds)]
        assert lengths[i] == step_seconds(template, single), "bit for bit"
    graph = StepGraph(template, tuple(Work() for _ in keys))
    assert step_seconds(template, seconds) == pytest.approx(op_level(graph, seconds), rel=1e-12)


@pytest.mark.parametrize("feature", ["pipelined", "cpu0", "swap_out", "swap_in", "spill", "streams"])
def test_what_overlaps_is_not_serial(feature: str) -> None:
    shape = Shape(4, **{feature: ((4, True),) if feature == "streams" else True})
    if feature == "pipelined":
        shape = shape._replace(cpu1=True)
    assert not template_for(shape)[0].serial


def test_durations_ask_once_per_kind_of_operation_not_once_per_layer() -> None:
    class Counting(ToyCost):
        asked = 0

        def seconds(self, kind: OpKind, work: Work) -> float:
            Counting.asked += 1
            return float(super().seconds(kind, work))

    scheduler = make_scheduler(gpu=20)
    r = Request("r", 9, 4)
    scheduler.add(r)

    class Once:
        def plan(self, view: object, cost: object) -> StepPlan:
            return StepPlan((SubBatch((PrefillChunk(r, 0, 9),)),))

    scheduler.policy = Once()
    planned = scheduler.plan_step(0.0)
    assert planned is not None
    assert durations(planned.graph, Counting()) == durations(planned.graph, ToyCost())
    assert Counting.asked == 6


# -- NEO's step time ------------------------------------------------------------------------------------


class Stages(NamedTuple):
    """Stage times per layer, named as in the paper."""

    pr0: float
    po0: float
    pr1: float
    po1: float
    ga0: float
    ca0: float
    ca1: float

    @property
    def formula(self) -> float:
        """max(Tl0, Tca1) + max(Tl1 + Tga0, Tca0), per layer."""
        return max(self.pr0 + self.po0, self.ca1) + max(self.pr1 + self.po1 + self.ga0, self.ca0)

    @property
    def edge(self) -> float:
        """What start-up and tail can add: every stage once."""
        return sum(self)


def neo_step(stages: Stages, layers: int) -> float:
    """Length of the pipelined step; transfers, planning and all that is outside the layers are free."""
    template, keys = template_for(Shape(layers, pipelined=True, cpu0=True, cpu1=True))
    price = {
        (OpKind.PRE, 0): stages.pr0,
        (OpKind.POST, 0): stages.po0,
        (OpKind.PRE, 1): stages.pr1,
        (OpKind.POST, 1): stages.po1,
        (OpKind.GPU_ATTN, 0): stages.ga0,
        (OpKind.CPU_ATTN, 0): stages.ca0,
        (OpKind.CPU_ATTN, 1): stages.ca1,
    }
    return float(step_seconds(template, [price.get((kind, batch), 0.0) for kind, batch, _ in keys]))


times = st.floats(0.01, 1.0)


@given(pr0=times, po0=times, pr1=times, po1=times, ga0=times, part0=st.floats(0, 1), part1=st.floats(0, 1))
@settings(max_examples=300)
def test_neo_formula_where_the_cpu_is_hidden(
    pr0: float, po0: float, pr1: float, po1: float, ga0: float, part0: float, part1: float
) -> None:
    """Tca1 <= Tl0 and Tca0 <= Tl1 + Tga0: the GPU never waits in the loop, T = L * (Tl0 + Tl1 + Tga0)."""
    layers = 64
    stages = Stages(pr0, po0, pr1, po1, ga0, part0 * (pr1 + po1 + ga0), part1 * (pr0 + po0))
    gpu = pr0 + po0 + pr1 + po1 + ga0
    assert stages.formula == pytest.approx(gpu)
    step = neo_step(stages, layers)
    assert layers * gpu * (1 - 1e-12) <= step <= layers * gpu + stages.edge
    assert step / (layers * stages.formula) == pytest.approx(1, abs=stages.edge / gpu / layers + 1e-9)


@given(pr0=times, po0=times, pr1=times, po1=times, ga0=times, more0=st.floats(1, 5), more1=st.floats(1, 5))
@settings(max_examples=300)
def test_neo_formula_where_the_cpu_bounds_both_stages(
    pr0: float, po0: float, pr1: float, po1: float, ga0: float, more0: float, more1: float
) -> None:
    """Tca1 >= Tl0 and Tca0 >= Tl1 + Tga0: the CPU never waits in the loop, T = L * (Tca0 + Tca1)."""
    layers = 64
    stages = Stages(pr0, po0, pr1, po1, ga0, more0 * (pr1 + po1 + ga0), more1 * (pr0 + po0))
    cpu = stages.ca0 + stages.ca1
    assert stages.formula == pytest.approx(cpu)
    step = neo_step(stages, layers)
    assert layers * cpu * (1 - 1e-12) <= step <= layers * cpu + stages.edge


@given(stages=st.builds(Stages, *[times] * 7), layers=st.integers(1, 80))
@settings(max_examples=500)
def test_neo_formula_is_an_upper_bound_elsewhere(stages: Stages, layers: int) -> None:
    """With barriers between the two stages the formula is exact; without them a step is never slower."""
    gpu = stages.pr0 + stages.po0 + stages.pr1 + stages.po1 + stages.ga0
    step = neo_step(stages, layers)
    assert step <= layers * stages.formula + stages.edge
    assert step >= layers * max(gpu, stages.ca0 + stages.ca1) * (1 - 1e-12)


def test_two_balanced_batches_nearly_halve_a_cpu_bound_step() -> None:
    """What the pipeline is for: CPU attention of one sub-batch behind the dense work of the other."""
    stages = Stages(0.5, 0.5, 0.25, 0.25, 0.5, 0.75, 1.0)
    one_after_the_other = 64 * sum(stages)
    assert neo_step(stages, 64) == pytest.approx(one_after_the_other * 2.0 / 3.75, rel=0.03)


def test_the_unnamed_sub_batch_is_none_of_the_two() -> None:
    assert NO_BATCH not in (0, 1)

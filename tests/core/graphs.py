"""Graphs for the tests of compilation and timing: steps of random plans, random shapes and durations."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import simpy
from hypothesis import strategies as st
from support import Chaos, ToyCost, make_scheduler, toy_model

from neo.core.graph import Op, OpKind, StepGraph, Work
from neo.core.pipeline import _Compiler
from neo.core.plan import StepPlan
from neo.core.request import Request
from neo.core.scheduler import Planned, StepResult
from neo.core.specs import ModelSpec
from neo.core.templates import Shape, template_for
from neo.sim.oplevel import run_operations


def general(plan: StepPlan, model: ModelSpec, block_size: int) -> StepGraph:
    """``compile`` without its short way."""
    return _Compiler(plan, model, block_size, 1).graph()


def assert_same_graph(one: StepGraph, other: StepGraph) -> None:
    assert list(one.expand()) == list(other.expand())
    assert one.works == other.works
    assert one.template is other.template


def by_kind(ops: Iterable[Op]) -> dict[tuple[OpKind, int], list[Op]]:
    found: dict[tuple[OpKind, int], list[Op]] = {}
    for op in ops:
        found.setdefault((op.kind, op.batch), []).append(op)
    return found


def batch_ops(graph: StepGraph) -> dict[tuple[OpKind, int], Work]:
    """The work of each (kind, sub-batch); of streams, the last run's."""
    return {(op.kind, op.batch): graph.works[op.work] for op in graph.expand()}


def costed() -> ToyCost:
    return ToyCost()


def op_level(graph: StepGraph, seconds: list[float]) -> float:
    """Length of a step whose every operation is an event."""
    env = simpy.Environment()
    env.run(env.process(run_operations(env, graph, seconds, [], None)))
    return float(env.now)


@st.composite
def chaotic_steps(draw: st.DrawFn) -> list[Planned]:
    """A running step of a random policy that uses everything a plan can say; none if it found nothing to do.

    Only the last of several steps, as a plan's numbers are those of its requests while it runs.
    """
    seed = draw(st.integers(0, 2**32 - 1))
    rnd = Random(seed)
    layers = draw(st.one_of(st.integers(1, 6), st.integers(1, 80)))
    model = toy_model(layers, draw(st.sampled_from([1, 2])))
    scheduler = make_scheduler(Chaos(seed, draw(st.integers(1, 3))), gpu=40, cpu=40, model=model)
    for i in range(draw(st.integers(1, 7))):
        scheduler.add(Request(f"r{i}", rnd.randint(1, 20), rnd.randint(2, 12)))
    planned = scheduler.plan_step(0.0)
    for _ in range(draw(st.integers(0, 9))):
        if planned is None or scheduler.unfinished == 0:
            break
        scheduler.finish_step(planned, StepResult(1.0))
        planned = scheduler.plan_step(1.0) or planned
        if scheduler.view.in_flight is None:
            return []
    return [planned] if planned else []


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Any shape a plan can have."""
    layers = draw(st.one_of(st.integers(1, 4), st.integers(1, 80)))
    pipelined = draw(st.booleans())
    cpu0 = draw(st.booleans())
    attention = draw(st.booleans()) or not cpu0
    streams: tuple[tuple[int, bool], ...] = ()
    if attention and draw(st.booleans()):
        runs, left, on = [], layers, draw(st.booleans())
        while left:
            n = min(left, draw(st.one_of(st.integers(1, 2), st.integers(1, 40))))
            runs.append((n, on))
            left -= n
            on = not on or draw(st.booleans())
        streams = tuple(runs) if any(on for _, on in runs) else ()
    return Shape(
        layers,
        pipelined,
        attention,
        cpu0,
        cpu1=pipelined,
        relay_out=not (pipelined or cpu0) and draw(st.booleans()),
        relay_in=not (pipelined or cpu0) and draw(st.booleans()),
        swap_out=draw(st.booleans()),
        swap_in=attention and draw(st.booleans()),
        spill=draw(st.booleans()),
        streams=streams,
        ring=draw(st.integers(1, 3)),
        allreduce=draw(st.booleans()),
        head=draw(st.booleans()),
    )


def seconds_for(count: int) -> st.SearchStrategy[list[float]]:
    """Durations: zeros, small integers (many ties), and magnitudes far apart."""
    spread = st.builds(lambda x, e: x * 10.0**e, st.floats(0.5, 2), st.integers(-9, 0))
    one = st.one_of(st.just(0.0), st.integers(0, 3).map(float), st.floats(0.1, 1.0), spread)
    return st.lists(one, min_size=count, max_size=count)


@st.composite
def priced_shapes(draw: st.DrawFn) -> tuple[StepGraph, list[float]]:
    template, keys = template_for(draw(shapes()))
    return StepGraph(template, tuple(Work() for _ in keys)), draw(seconds_for(len(keys)))

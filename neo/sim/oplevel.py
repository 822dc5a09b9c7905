"""The ``op`` level: every operation of a step is an event on a SimPy resource."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import simpy

from neo.core.graph import Op, Resource, StepGraph
from neo.core.record import Slice


def run_operations(
    env: simpy.Environment,
    graph: StepGraph,
    seconds: list[float],
    slices: list[Slice],
    step: int | None,
) -> Generator[simpy.Event, Any, None]:
    """Run a step; ends when its last operation has ended.

    Each operation queues for its resource in program order and holds it while it waits for its
    dependencies, as a stream does. With ``step`` given, slices of all operations are appended.
    """
    resources = {r: simpy.Resource(env) for r in Resource}
    done: list[simpy.Process] = []

    def run(op: Op) -> Generator[simpy.Event, Any, None]:
        with resources[op.resource].request() as turn:
            yield turn
            waiting = [done[d] for d in op.deps if done[d].is_alive]
            if waiting:
                yield simpy.AllOf(env, waiting)
            start = env.now
            yield env.timeout(float(seconds[op.work]))
        if step is not None:
            slices.append(Slice(step, op.resource, op.kind, op.layer, op.batch, start, env.now))

    done.extend(env.process(run(op)) for op in graph.expand())
    yield simpy.AllOf(env, done)

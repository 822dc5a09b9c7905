"""How long a StepGraph takes: the max-plus recurrence over its operations, without events.

Every operation starts when its resource is free and its dependencies have ended. Layers are alike, so after
a few of them all end times grow by the same amount per layer; the rest is then extrapolated exactly
(Baccelli et al., "Synchronization and Linearity", 1992, theorem 3.28 on the cyclicity of max-plus systems:
once one iteration shifts the whole state by a constant, every further one does).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from neo.core.graph import RESOURCE_OF, OpKind, Resource, StepGraph, Template, Work

_RESOURCES = tuple(Resource)
_ROUNDING = 1e-13  # relative difference between two growths that counts as rounding


class Prices(Protocol):
    """What core needs of a cost model; ``neo.cost.interface.CostModel`` is the full contract."""

    def seconds(self, kind: OpKind, work: Work) -> Any:
        """Seconds of one operation."""
        ...


class _Step(NamedTuple):
    resource: int
    work: int
    deps: tuple[int, ...]
    slot: int
    shadows: tuple[tuple[int, int], ...]  # (to, from): older end times kept for lagged dependencies


class _Program(NamedTuple):
    slots: int
    sections: tuple[tuple[int, tuple[_Step, ...], tuple[int, ...]], ...]  # repeat, steps, state indices


def durations(graph: StepGraph, cost: Prices) -> list[Any]:
    """Seconds of one operation of each work entry of the graph."""
    seconds = cost.seconds
    return [seconds(kind, work) for kind, work in zip(graph.template.kinds, graph.works, strict=True)]


def step_seconds(template: Template, seconds: list[Any]) -> Any:
    """Length of a step, from the seconds of each work entry.

    For a serial template the entries may be arrays (one value per repeated step), and so is the result.
    """
    if template.serial:
        total = 0.0
        for count, value in zip(template.counts, seconds, strict=True):
            total = total + count * value
        return total
    return _recurrence(_program(template), seconds)


def busy_seconds(template: Template, seconds: list[Any]) -> dict[Resource, Any]:
    """Seconds each resource works during the step."""
    busy: dict[Resource, Any] = {}
    for resource, indices in _by_resource(template):
        total = 0.0
        for count, i in indices:
            total = total + count * seconds[i]
        busy[resource] = total
    return busy


@lru_cache(maxsize=4096)
def _by_resource(template: Template) -> tuple[tuple[Resource, tuple[tuple[int, int], ...]], ...]:
    """Per resource, (count, index) of its work entries."""
    found: dict[Resource, list[tuple[int, int]]] = {}
    for i, (kind, count) in enumerate(zip(template.kinds, template.counts, strict=True)):
        found.setdefault(RESOURCE_OF[kind], []).append((count, i))
    return tuple((r, tuple(ix)) for r, ix in found.items())


@lru_cache(maxsize=4096)
def _program(template: Template) -> _Program:
    """The template by indices: resource clocks first, then a slot per (kind, batch, lag)."""
    depth: dict[tuple[OpKind, int], int] = {}
    for section in template.sections:
        for op in section.ops:
            depth.setdefault((op.kind, op.batch), 0)
            for dep in op.deps:
                key = (dep.kind, dep.batch)
                depth[key] = max(depth.get(key, 0), dep.lag)
    slot: dict[tuple[OpKind, int, int], int] = {}
    for (kind, batch), deepest in depth.items():
        for lag in range(deepest + 1):
            slot[kind, batch, lag] = len(_RESOURCES) + len(slot)
    sections = []
    for section in template.sections:
        steps = []
        for op in section.ops:
            shadows = tuple(
                (slot[op.kind, op.batch, lag], slot[op.kind, op.batch, lag - 1])
                for lag in range(depth[op.kind, op.batch], 0, -1)
            )
            deps = tuple(slot[d.kind, d.batch, d.lag] for d in op.deps)
            steps.append(
                _Step(_RESOURCES.index(op.resource), op.work, deps, slot[op.kind, op.batch, 0], shadows)
            )
        state = sorted(
            {s.resource for s in steps} | {s.slot for s in steps} | {to for s in steps for to, _ in s.shadows}
        )
        sections.append((section.repeat, tuple(steps), tuple(state)))
    return _Program(len(_RESOURCES) + len(slot), tuple(sections))


def _recurrence(program: _Program, seconds: list[float]) -> float:
    end = [0.0] * program.slots
    for repeat, steps, state in program.sections:
        before: list[float] | None = None
        settled = 0
        for iteration in range(repeat):
            for resource, work, deps, slot, shadows in steps:
                at = end[resource]
                for dep in deps:
                    if end[dep] > at:
                        at = end[dep]
                at += seconds[work]
                for to, source in shadows:
                    end[to] = end[source]
                end[resource] = at
                end[slot] = at
            left = repeat - 1 - iteration
            if left == 0:
                break
            after = [end[i] for i in state]
            if before is not None:
                growth = after[0] - before[0]
                slack = _ROUNDING * after[0]
                if all(abs(a - b - growth) <= slack for a, b in zip(after, before, strict=True)):
                    settled += 1
                    # Twice, because an end time outside this section's state may bind by coincidence once.
                    if settled == 2:
                        for i in state:
                            end[i] += growth * left
                        break
                else:
                    settled = 0
            before = after
    return max(end)

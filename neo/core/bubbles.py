"""Bubbles: for how long, and for what, each resource of a step waits.

A resource of a step is busy, or idle for a cause. Between two of its operations the cause is read off the
critical path: the operation that starts late was bound by one that ended just then, which ran until then, and
was bound by another before that; the gap is shared out over the operations on that path, each for the time in
which it ran. What follows a resource's last operation is read off the path to the step's end. A resource
without any operation in a step had no work. Per resource, busy time and causes add up to the step's length.

(The same binding argument that gives a max-plus system its critical circuit: Baccelli et al.,
"Synchronization and Linearity", 1992, section 2.5.)
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from neo.core.graph import OpKind, Resource, Template, TemplateOp
from neo.core.timing import busy_seconds, step_seconds

NO_WORK = "no_work"  # nothing for this resource: between steps, or in the whole step
SCHEDULING = "scheduling"  # waits for the step's planning
CPU_ATTENTION = "cpu_attention"  # waits for attention on the CPU
COPY = "copy"  # waits for bytes on their way between host and GPU
GPU = "gpu"  # waits for the GPU's computation
LINK = "link"  # waits for the ranks to exchange partial sums
OTHER = "other"  # between operations for no reason that the graph names: launches, in measured runs
CAUSES = (NO_WORK, SCHEDULING, CPU_ATTENTION, COPY, GPU, LINK, OTHER)
BUSY = "busy"
RESOURCES = (Resource.GPU, Resource.CPU, Resource.H2D, Resource.D2H)

_CAUSE_OF = {
    Resource.HOST: SCHEDULING,
    Resource.GPU: GPU,
    Resource.CPU: CPU_ATTENTION,
    Resource.H2D: COPY,
    Resource.D2H: COPY,
    Resource.LINK: LINK,
}
_FEW = 6  # layers that are timed one by one before the rest is extrapolated
_ROUNDING = 1e-9  # relative difference up to which the extrapolation is believed

Idle = dict[tuple[Resource, str], float]


class Ran(NamedTuple):
    """An operation that ran: times in seconds, and the index of the operation that it had to wait for."""

    resource: Resource
    start: float
    end: float
    bound: int  # -1: by none


def attribute(ran: Sequence[Ran]) -> tuple[float, Idle]:
    """The length of a step and the idle seconds of each resource that works in it, by cause.

    Args:
        ran: operations in program order, the first starting at 0.
    """
    idle: Idle = {}
    last: dict[Resource, int] = {}
    for i, op in enumerate(ran):
        free = ran[last[op.resource]].end if op.resource in last else 0.0
        if op.start > free:
            share_out(ran, op.bound, free, op.start, op.resource, idle)
        last[op.resource] = i
    if not ran:
        return 0.0, idle
    final = max(range(len(ran)), key=lambda i: ran[i].end)
    length = ran[final].end
    for resource, i in last.items():
        if ran[i].end < length:
            share_out(ran, final, ran[i].end, length, resource, idle)
    return length, idle


def share_out(ran: Sequence[Ran], at: int, low: float, high: float, waits: Resource, idle: Idle) -> None:
    """Add to ``idle`` the gap ``low``..``high`` of a resource, over the critical path that ends at ``at``."""
    while high > low:
        if at < 0:
            idle[waits, OTHER] = idle.get((waits, OTHER), 0.0) + high - low
            return
        op = ran[at]
        if op.end < high:  # held up by nothing that the graph knows of
            until = max(op.end, low)
            idle[waits, OTHER] = idle.get((waits, OTHER), 0.0) + high - until
            high = until
            continue
        since = max(op.start, low)
        if since < high:
            cause = _CAUSE_OF[op.resource]
            idle[waits, cause] = idle.get((waits, cause), 0.0) + high - since
            high = since
        at = op.bound


def bound_by_last(operations: Iterable[tuple[Resource, float, float]]) -> list[Ran]:
    """Operations that were only watched, (resource, start, end) in order of start, as ``Ran``.

    What each had to wait for is not known: it is taken to be the last that had ended when it began.
    """
    ran: list[Ran] = []
    ends: list[tuple[float, int]] = []
    for resource, start, end in operations:
        at = bisect_right(ends, (start, len(ran)))
        ran.append(Ran(resource, start, end, ends[at - 1][1] if at else -1))
        insort(ends, (end, len(ran) - 1))
    return ran


# -- steps that are priced -----------------------------------------------------------------------------


class _Step(NamedTuple):
    resource: Resource
    work: int
    key: tuple[OpKind, int]
    deps: tuple[tuple[tuple[OpKind, int], int], ...]  # (kind and sub-batch, lag)


def _step(op: TemplateOp) -> _Step:
    deps = tuple(((d.kind, d.batch), d.lag) for d in op.deps)
    return _Step(op.resource, op.work, (op.kind, op.batch), deps)


@lru_cache(maxsize=1024)
def _steps(template: Template) -> tuple[tuple[int, tuple[_Step, ...]], ...]:
    """Per section, its repetitions and its operations."""
    return tuple(
        (
            section.repeat,
            tuple(_step(op) for op in section.ops),
        )
        for section in template.sections
    )


def _run(
    sections: Sequence[tuple[int, Sequence[_Step]]], seconds: Sequence[float], most: int | None
) -> list[Ran]:
    """Every operation with its times; at most ``most`` repetitions of a section."""
    ran: list[Ran] = []
    last: dict[Resource, int] = {}
    latest: dict[tuple[OpKind, int], list[int]] = {}
    for repeat, steps in sections:
        for _ in range(repeat if most is None else min(repeat, most)):
            for step in steps:
                bound = last.get(step.resource, -1)
                start = ran[bound].end if bound >= 0 else 0.0
                for key, lag in step.deps:
                    before = latest.get(key, ())
                    if len(before) > lag and ran[before[-1 - lag]].end > start:
                        bound = before[-1 - lag]
                        start = ran[bound].end
                latest.setdefault(step.key, []).append(len(ran))
                last[step.resource] = len(ran)
                ran.append(Ran(step.resource, start, start + seconds[step.work], bound))
    return ran


def step_bubbles(template: Template, seconds: Sequence[Any]) -> Idle:
    """Idle seconds of one step by (resource, cause), of resources that work in it.

    Layers are alike: after a few of them each adds the same, and the rest is extrapolated. That is checked,
    and every operation timed where it does not hold.

    Args:
        seconds: of one operation of each work entry, numbers.
    """
    sections = _steps(template)
    long = [repeat for repeat, _ in sections if repeat > 2 * _FEW]
    if len(long) == 1:
        three = [attribute(_run(sections, seconds, n)) for n in (_FEW - 2, _FEW - 1, _FEW)]
        lengths, idles = [t for t, _ in three], [i for _, i in three]
        left = long[0] - _FEW
        growth = lengths[2] - lengths[1]
        whole = float(step_seconds(template, list(seconds)))
        near = _ROUNDING * whole
        if (
            abs(growth - (lengths[1] - lengths[0])) <= near
            and abs(lengths[2] + growth * left - whole) <= near
        ):
            keys = {key: None for idle in idles for key in idle}
            rise = {k: idles[2].get(k, 0.0) - idles[1].get(k, 0.0) for k in keys}
            steady = all(abs(rise[k] - (idles[1].get(k, 0.0) - idles[0].get(k, 0.0))) <= near for k in keys)
            found = {k: idles[2].get(k, 0.0) + rise[k] * left for k in keys}
            # What shrinks with every layer (a head start, say) ends; from there it goes another way.
            if steady and min(found.values(), default=0.0) >= -near:
                return {k: max(0.0, value) for k, value in found.items()}
    return attribute(_run(sections, seconds, None))[1]


@dataclass(slots=True)
class Bubbles:
    """Adds up busy and idle seconds of a run, step by step.

    ``idle`` is by resource and cause; between steps everything is idle for want of work.
    """

    start_s: float = 0.0
    end_s: float | None = None
    busy: dict[Resource, float] = field(default_factory=lambda: dict.fromkeys(RESOURCES, 0.0))
    idle: Idle = field(default_factory=dict)

    def add(self, template: Template, seconds: Sequence[Any], start: float, ends: Sequence[float]) -> None:
        """Note a priced step, or its repetitions.

        Args:
            seconds: per work entry, seconds of one operation: a number, or an array with one entry per
                repetition (of a serial template).
            start: when the first repetition began.
            ends: when each repetition ended.
        """
        self._begin(start)
        steps, span = len(ends), ends[-1] - start
        busy = {r: _sum(s, steps) for r, s in busy_seconds(template, list(seconds)).items()}
        if template.serial:
            idle = _serial(busy)
        else:
            idle = {key: value * steps for key, value in step_bubbles(template, seconds).items()}
        for resource in RESOURCES:
            self._settle(resource, span, busy.get(resource, 0.0), idle)
        self.end_s = ends[-1]

    def add_operations(
        self, operations: Iterable[tuple[Resource, float, float]], start: float, end: float
    ) -> None:
        """Note a step that was measured.

        Args:
            operations: (resource, start, end) in order of start; what each waited for is taken to be the last
                that had ended when it began, what follows the last of all is ``OTHER``.
            start: when the step began.
            end: when it ended.
        """
        self._begin(start)
        ran = bound_by_last((r, low - start, high - start) for r, low, high in operations)
        length, idle = attribute(ran)
        busy: dict[Resource, float] = {}
        for op in ran:
            busy[op.resource] = busy.get(op.resource, 0.0) + op.end - op.start
        for resource in busy:
            idle[resource, OTHER] = idle.get((resource, OTHER), 0.0) + max(0.0, end - start - length)
        for resource in RESOURCES:
            self._settle(resource, end - start, busy.get(resource, 0.0), idle)
        self.end_s = end

    def _begin(self, start: float) -> None:
        """Since the last step everything was idle."""
        if self.end_s is None:
            self.end_s = self.start_s
        if start > self.end_s:
            self._all_idle(start - self.end_s)

    def _settle(self, resource: Resource, span: float, busy: float, idle: Mapping[Any, float]) -> None:
        """Add one resource's share of a step, so that it fills the step to the last rounding."""
        found = {cause: value for (r, cause), value in idle.items() if r is resource}
        if not found:
            found = {NO_WORK: max(0.0, span - busy)}
        rest = span - busy - sum(found.values())  # rounding, and what a clock adds to it
        largest = max(found, key=lambda cause: found[cause])
        found[largest] += rest
        self.busy[resource] += busy
        for cause, value in found.items():
            self.idle[resource, cause] = self.idle.get((resource, cause), 0.0) + value

    def _all_idle(self, seconds: float) -> None:
        for resource in RESOURCES:
            self.idle[resource, NO_WORK] = self.idle.get((resource, NO_WORK), 0.0) + seconds

    def summary(self, end_s: float | None = None) -> dict[str, dict[str, float]]:
        """Seconds by resource: ``{"gpu": {"busy": .., "no_work": .., "scheduling": .., ..}, "cpu": ..}``.

        Args:
            end_s: when the run ended, if later than its last step.
        """
        last = self.start_s if self.end_s is None else self.end_s
        after = max(0.0, (last if end_s is None else end_s) - last)
        return {
            str(r): {
                BUSY: self.busy[r],
                **{c: self.idle.get((r, c), 0.0) + (after if c == NO_WORK else 0.0) for c in CAUSES},
            }
            for r in RESOURCES
        }


def _sum(value: Any, steps: int) -> float:
    return float(value.sum()) if hasattr(value, "sum") else float(value) * steps


def _serial(busy: Mapping[Resource, float]) -> Idle:
    """Where one operation follows another, a resource waits for the work of all others."""
    idle: Idle = {}
    for resource in RESOURCES:
        if busy.get(resource):
            for other, value in busy.items():
                if other is not resource:
                    cause = _CAUSE_OF[other]
                    idle[resource, cause] = idle.get((resource, cause), 0.0) + value
    return idle

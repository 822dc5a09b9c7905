"""The bubble report for people: a table, a picture, and waits on a timeline. Definitions: docs/bubbles.md."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo.core.bubbles import (
    BUSY,
    CAUSES,
    COPY,
    CPU_ATTENTION,
    GPU,
    LINK,
    NO_WORK,
    OTHER,
    SCHEDULING,
    Idle,
    Ran,
    share_out,
)
from neo.core.graph import Resource
from neo.core.record import Slice
from neo.report import style
from neo.report.tables import format_seconds

if TYPE_CHECKING:
    from rich.table import Table

NAMES = {
    BUSY: "busy",
    NO_WORK: "no work",
    SCHEDULING: "scheduling",
    CPU_ATTENTION: "CPU attention",
    COPY: "a copy",
    GPU: "the GPU",
    LINK: "other ranks",
    OTHER: "launch, other",
}
RESOURCE_NAMES = {"gpu": "GPU", "cpu": "CPU attention", "h2d": "host to GPU", "d2h": "GPU to host"}
COLORS = {
    BUSY: style.BLUE,
    NO_WORK: "#E5E7EB",
    SCHEDULING: style.BLACK,
    CPU_ATTENTION: style.VERMILLION,
    COPY: style.GREEN,
    GPU: style.SKY,
    LINK: style.PURPLE,
    OTHER: style.YELLOW,
}
WAIT = "WAIT"  # the operation name of a wait on a timeline


def bubble_table(summaries: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Where the time of each resource went, in percent of the run, one block of rows a run.

    Args:
        summaries: run's name -> the ``bubbles`` of its metrics (seconds by resource and cause).
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    causes = [c for c in (BUSY, *CAUSES) if any(r.get(c) for s in summaries.values() for r in s.values())]
    table = Table(title="Where the time went (% of the run)", title_justify="left", box=box.SIMPLE)
    table.add_column("run")
    table.add_column("resource")
    for cause in causes:
        heading = NAMES[cause] if cause in (BUSY, NO_WORK, OTHER) else f"waits: {NAMES[cause]}"
        table.add_column(heading, justify="right")
    table.add_column("duration", justify="right")
    for name, summary in summaries.items():
        for resource, seconds in summary.items():
            total = sum(seconds.values())
            shares = [f"{100 * seconds.get(c, 0.0) / total:.1f}" if total else "" for c in causes]
            shown = [escape(name), RESOURCE_NAMES.get(resource, resource), *shares, format_seconds(total)]
            table.add_row(*shown, end_section=resource == list(summary)[-1])
    return table


def plot_bubbles(
    summaries: Mapping[str, Mapping[str, Mapping[str, float]]], stem: str | Path, subtitle: str = ""
) -> list[Path]:
    """A stacked bar per run and resource, in percent of the run: ``stem``.svg and ``stem``.png.

    Raises:
        InputError: matplotlib is missing, or the files cannot be written.
    """
    rows = [(run, r, s) for run, summary in summaries.items() for r, s in summary.items()]
    with style.drawing():
        title = "Where the time went"
        figure = style.new_figure(9.5, 1.8 + 0.42 * len(rows), title, subtitle)
        axes: Any = figure.subplots()
        left = [0.0] * len(rows)
        for cause in (BUSY, *CAUSES):
            shares = [100 * s.get(cause, 0.0) / (sum(s.values()) or 1.0) for _, _, s in rows]
            if any(shares):
                axes.barh(range(len(rows)), shares, left=left, color=COLORS[cause], label=NAMES[cause])
                left = [a + b for a, b in zip(left, shares, strict=True)]
        several = len(summaries) > 1
        labels = [
            f"{run} · {RESOURCE_NAMES.get(r, r)}" if several else RESOURCE_NAMES.get(r, r)
            for run, r, _ in rows
        ]
        axes.set_yticks(range(len(rows)), labels)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the run (%)")
        style.legend_outside(axes, title="busy, or idle for")
        return style.save(figure, Path(stem))


def waits(slices: Sequence[Slice]) -> list[Slice]:
    """The waits between the operations of a timeline, as slices named ``WAIT`` and the main cause.

    What an operation had to wait for is not in a timeline: it is taken to be what ended when it began. On a
    simulated timeline that is exact, on a measured one the last to end before.

    Args:
        slices: operations of one step or several, as ``RunRecord.slices`` holds them.
    """
    found: list[Slice] = []
    for step, group in groupby(sorted(slices, key=lambda s: s.step), key=lambda s: s.step):
        found += _step_waits(step, sorted(group, key=lambda s: (s.start_s, s.end_s)))
    return found


def _step_waits(step: int, ordered: list[Slice]) -> list[Slice]:
    ran: list[Ran] = []
    free: dict[str, float] = {}
    ends: list[tuple[float, int]] = []
    found = []
    for op in ordered:
        resource = Resource(op.resource)
        at = bisect_right(ends, (op.start_s, len(ordered)))
        bound = ends[at - 1][1] if at else -1
        low = free.get(op.resource)
        if low is not None and op.start_s > low:
            idle: Idle = {}
            share_out(ran, bound, low, op.start_s, resource, idle)
            _, cause = max(idle, key=lambda key: idle[key])
            found.append(Slice(step, op.resource, f"{WAIT} {cause}", None, -1, low, op.start_s))
        insort(ends, (op.end_s, len(ran)))
        ran.append(Ran(resource, op.start_s, op.end_s, bound))
        free[op.resource] = op.end_s
    return found

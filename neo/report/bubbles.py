"""The bubble report for people: a table, a picture, and waits on a timeline. Definitions: docs/bubbles.md."""

from __future__ import annotations

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
    bound_by_last,
    share_out,
)
from neo.core.graph import Resource
from neo.core.record import Slice
from neo.report import style

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
RESOURCE_NAMES = {"gpu": "GPU", "cpu": "CPU", "h2d": "H2D", "d2h": "D2H"}
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
    title = "Where the time went (% of the run): busy, or idle for"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("run", no_wrap=True)
    table.add_column("", no_wrap=True)
    for cause in causes:
        table.add_column(NAMES[cause], justify="right", min_width=max(map(len, NAMES[cause].split())))
    for name, summary in summaries.items():
        for i, (resource, seconds) in enumerate(summary.items()):
            total = sum(seconds.values())
            shares = [f"{100 * seconds.get(c, 0.0) / total:.1f}" if total else "" for c in causes]
            shown = [RESOURCE_NAMES.get(resource, resource), *shares]
            table.add_row("" if i else escape(name), *shown, end_section=i == len(summary) - 1)
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
    ran = bound_by_last((Resource(s.resource), s.start_s, s.end_s) for s in ordered)
    free: dict[Resource, float] = {}
    found = []
    for op in ran:
        low = free.get(op.resource)
        if low is not None and op.start > low:
            idle: Idle = {}
            share_out(ran, op.bound, low, op.start, op.resource, idle)
            _, cause = max(idle, key=lambda key: idle[key])
            found.append(Slice(step, op.resource, f"{WAIT} {cause}", None, -1, low, op.start))
        free[op.resource] = op.end
    return found

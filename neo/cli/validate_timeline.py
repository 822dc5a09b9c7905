"""Timelines of ``neo validate``: the operations of a run's first steps, measured and predicted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neo.cli.runner import try_plot
from neo.core.errors import InputError
from neo.core.record import Slice
from neo.core.replayed import Replay

TIMELINE_FILE = "timeline.json"
_NAME = "timelines"  # of what is written: a run may be validated into its own directory
Checked = tuple[str, Mapping[str, Any], Replay, Sequence[Slice]]
"""A run's name, its validation, its replay, and the operations that it noted itself."""


class View:
    """Which step and layers are drawn.

    Args:
        step: from 0; None for one with much to see.
        layers: as ``10-12`` or ``10``; None for all.

    Raises:
        InputError: ``layers`` is nothing of the kind.
    """

    def __init__(self, step: int | None, layers: str | None) -> None:
        self.step = step
        self.layers: tuple[int, int] | None = None
        if layers is not None:
            found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", layers)
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
            if last < first:
                raise InputError(f"--layers {layers}: expected layers, as 10-12 or 3")
            self.layers = first, last


def timeline_of(run: Path) -> list[Slice]:
    """The operations in a run's ``timeline.json``; none if it has no such file."""
    from neo.report.timelines import read_timeline

    path = run / TIMELINE_FILE
    return read_timeline(path) if path.exists() else []


def write_timelines(out: Path, checked: Sequence[Checked], view: View, plots: bool) -> None:
    """``timelines.json`` and the picture of a step, both sides, of the first run that noted its operations.

    Raises:
        InputError: a step or layers were asked for that no timeline has.
    """
    found = next(((n, r, p, s) for n, r, p, s in checked if s and p.slices), None)
    if found is None:
        if view.step is not None or view.layers is not None:
            raise InputError(f"--step, --layers: no run has a {TIMELINE_FILE} (neo bench --timeline N)")
        return
    from neo.report.timeline import write_trace
    from neo.report.timelines import plot_timelines, telling_step

    name, result, replay, measured = found
    kind = str(result["kind"])
    sides = {kind if kind == "measured" else "simulated": measured, "predicted": replay.slices}
    write_trace(sides, out / f"{_NAME}.json")
    if not plots:
        return
    step = telling_step(replay.slices) if view.step is None else view.step
    about = f"{result['policy']} on {result['hardware']} · {result['cost_model']}"
    title = f"Operations of one step · {name}: {about}"
    if view.step is not None or view.layers is not None:  # what was asked for by name is not passed over
        plot_timelines(sides, out / _NAME, step, view.layers, title)
    else:
        try_plot(lambda: plot_timelines(sides, out / _NAME, step, None, title))

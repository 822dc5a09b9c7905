"""The picture of a validation: predicted against measured step times, and the error of each operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neo.core.replayed import Replay
from neo.report import style
from neo.report.validation import Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_DOTS = 4000  # of each run; more draw the same cloud
BAND = 0.10  # the grey band: errors up to 10%


def plot_validation(runs: Sequence[Validation], replays: Sequence[Replay], out_dir: str | Path) -> list[Path]:
    """Draw ``validation`` as .svg and .png into ``out_dir``; the second panel needs measured operations.

    Args:
        runs: what ``neo.report.validation.validation`` gave for each run.
        replays: of the same runs, in the same order.

    Raises:
        InputError: matplotlib is missing, or ``out_dir`` cannot be written.
    """
    with style.drawing():
        ops = _op_rows(runs)
        first = runs[0]
        subtitle = f"{first['model']} on {first['hardware']} · {first['cost_model']}"
        title = f"Simulator against run · {first['policy']}"
        figure = style.new_figure(12 if ops else 7.5, 5.6, title, subtitle)
        panels: Any = figure.subplots(1, 2 if ops else 1, squeeze=False)
        _scatter(panels[0, 0], runs, replays)
        if ops:
            _bars(panels[0, 1], ops)
        return style.save(figure, Path(out_dir) / "validation")


def _scatter(axes: Axes, runs: Sequence[Validation], replays: Sequence[Replay]) -> None:
    axes.set_title("Length of each step")
    axes.set_ylabel("predicted")
    low, high = np.inf, 0.0
    for i, (run, replay) in enumerate(zip(runs, replays, strict=True)):
        predicted, measured = np.array(replay.steps.predicted), np.array(replay.steps.measured)
        some = (predicted > 0) & (measured > 0)
        predicted, measured = predicted[some], measured[some]
        if not len(measured):
            continue
        every = -(-len(measured) // MAX_DOTS)
        axes.plot(
            measured[::every], predicted[::every], ".", color=style.CYCLE[i % len(style.CYCLE)], alpha=0.5,
            markersize=4, markeredgewidth=0, rasterized=True, label=str(run["run"]),
        )  # fmt: skip
        low = min(low, float(measured.min()), float(predicted.min()))
        high = max(high, float(measured.max()), float(predicted.max()))
    if high == 0.0:
        axes.text(0.5, 0.5, "no steps", transform=axes.transAxes, ha="center", color=style.GREY)
        axes.set_xlabel("measured")
        return
    ends = np.array([low / 1.2, high * 1.2])
    axes.fill_between(
        ends,
        ends * (1 - BAND),
        ends * (1 + BAND),
        color=style.GREY,
        alpha=0.2,
        linewidth=0,
        label=f"±{BAND:.0%}",
    )
    axes.plot(ends, ends, color=style.BLACK, linewidth=1)
    values = np.array([low, high])
    for axis, label in (("x", "measured"), ("y", "predicted")):
        style.latency_axis(axes, values, label, axis)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _log_ticks(axes)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_aspect("equal")
    axes.legend(loc="upper left", markerscale=2)


def _log_ticks(axes: Axes) -> None:
    """Few ticks, in seconds, whatever the span: two axes of equal scale need equal ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = (float(x) for x in (axes.dataLim.x0, axes.dataLim.x1))
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0) if high > 3 * low else (1, 1.5, 2, 3, 5, 7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_major_formatter(FuncFormatter(style.tick_seconds))
        axis.set_minor_formatter(NullFormatter())


def _op_rows(runs: Sequence[Validation]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs' rows of each operation kind and sub-batch, longest first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        for row in run["ops"]:
            batch = "" if row["sub_batch"] is None else f" b{row['sub_batch']}"
            found.setdefault(f"{row['op']}{batch}", []).append(row)
    return dict(sorted(found.items(), key=lambda item: -sum(row["measured_s"] for row in item[1])))


def _bars(axes: Axes, ops: Mapping[str, list[Mapping[str, Any]]]) -> None:
    """Error of the total as a bar, mean absolute error of single steps as a mark; means over the runs."""
    axes.set_title("Operations")
    names = list(ops)
    at = np.arange(len(names))
    totals = np.array([_mean(rows, "total_error") for rows in ops.values()]) * 100
    single = np.array([_mean(rows, "mean_error") for rows in ops.values()]) * 100
    axes.axvspan(-100 * BAND, 100 * BAND, color=style.GREY, alpha=0.2, linewidth=0)
    axes.barh(at, totals, color=style.BLUE, height=0.6, label="error of the total")
    axes.plot(single, at, "D", color=style.VERMILLION, markersize=5, label="mean |error| of a step")
    axes.axvline(0, color=style.BLACK, linewidth=1)
    axes.set_yticks(at, names)
    axes.invert_yaxis()
    axes.set_xlabel("predicted / measured - 1 (%)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    known = [row[key] for row in rows if row[key] is not None]
    return sum(known) / len(known) if known else 0.0

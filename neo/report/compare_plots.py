"""The pictures of a study: load-latency curves, gains, distributions, with published points laid over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neo.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PANELS = 12  # of one picture; more coordinates are in the CSV file
_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Curve:
    """One system's line: values over the labels of the x axis, None where nothing was measured."""

    label: str
    x: tuple[str, ...]
    y: tuple[float | None, ...]
    published: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that share their axes, and where they are among the study's other coordinates."""

    title: str
    curves: tuple[Curve, ...]


def axis_numbers(labels: Sequence[str]) -> list[float] | None:
    """Labels as numbers; None if one of them is none."""
    try:
        return [float(label) for label in labels]
    except ValueError:
        return None


def plot_curves(
    panels: Sequence[Panel],
    stem: str | Path,
    *,
    title: str,
    subtitle: str = "",
    x: str = "",
    y: str = "",
    limit: float | None = None,
    reference: float | None = None,
    logarithmic: bool = False,
) -> list[Path]:
    """Lines over a numeric axis, bars over labels; published points as hollow markers.

    Args:
        panels: at most ``MAX_PANELS`` are drawn.
        stem: files written are ``stem``.svg and ``stem``.png.
        limit: a dashed line, e.g. the latency limit of a sustained rate.
        reference: a thin line, e.g. the gain 1.
        logarithmic: scale of the y axis.

    Raises:
        InputError: matplotlib is missing, or the files cannot be written.
    """
    shown = list(panels[:MAX_PANELS])
    columns = min(_COLUMNS, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    with style.drawing():
        width, height = 3.2 + 4.2 * columns, 1.5 + 3.2 * rows
        figure = style.new_figure(width, height, title, subtitle)
        grid: Any = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, shown, strict=False):
            _panel(axes, panel, logarithmic)
            axes.set_title(panel.title)
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            if limit is not None:
                axes.axhline(limit, color=style.GREY, linestyle="--", linewidth=1, label=f"limit {limit:g}")
            if reference is not None:
                axes.axhline(reference, color=style.GREY, linewidth=0.8)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(
            list(unique.values()), list(unique), loc="outside lower center", ncols=min(len(unique) or 1, 4)
        )
        return style.save(figure, Path(stem))


def _panel(axes: Axes, panel: Panel, logarithmic: bool) -> None:
    labels = list(dict.fromkeys(label for curve in panel.curves for label in curve.x))
    labels += [p for c in panel.curves for p, _ in c.published if p not in labels and axis_numbers([p])]
    numbers = axis_numbers(labels)
    at = dict(zip(labels, numbers if numbers is not None else range(len(labels)), strict=True))
    for i, curve in enumerate(panel.curves):
        color = style.CYCLE[i % len(style.CYCLE)]
        known = [(at[x], y) for x, y in zip(curve.x, curve.y, strict=True) if y is not None]
        if numbers is None:
            width = 0.8 / len(panel.curves)
            offset = (i - (len(panel.curves) - 1) / 2) * width
            axes.bar([x + offset for x, _ in known], [y for _, y in known], width * 0.92, color=color,
                     label=curve.label)  # fmt: skip
        else:
            offset = 0.0
            known.sort()
            axes.plot(
                [x for x, _ in known],
                [y for _, y in known],
                "o-",
                color=color,
                label=curve.label,
                markersize=4,
            )
        told = sorted((at[x] + offset, y) for x, y in curve.published if x in at)
        if told:
            axes.plot(
                [x for x, _ in told], [y for _, y in told], linestyle=":" if numbers is not None else "none",
                marker="D", markersize=6, markerfacecolor="white",
                color=color if numbers is not None else style.BLACK, label=f"{curve.label}, published",
            )  # fmt: skip
    if numbers is None:
        axes.set_xticks(range(len(labels)), labels)
        axes.grid(False, axis="x")
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def plot_distributions(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    stem: str | Path,
    *,
    title: str,
    subtitle: str = "",
    x: str = "latency per output token",
) -> list[Path]:
    """Cumulative distributions: per line its label, values in seconds ascending, and their percentiles."""
    with style.drawing():
        figure = style.new_figure(8.5, 5, title, subtitle)
        axes = figure.subplots()
        for i, (label, values, percents) in enumerate(lines):
            color = style.CYCLE[i % len(style.CYCLE)]
            axes.plot(values, percents, color=color, label=label)
        every = np.concatenate([np.asarray(v, dtype=np.float64) for _, v, _ in lines] or [np.zeros(0)])
        style.latency_axis(axes, every, x)
        axes.set_ylabel("requests (%)")
        axes.set_ylim(0, 101)
        if lines:
            style.legend_outside(axes)
        return style.save(figure, Path(stem))

"""How every picture looks: palette, fonts, units on axes, and writing it as SVG and PNG.

matplotlib is imported when a picture is made, not before, and only its object interface is used: no
global figure, no backend to choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neo.core.errors import InputError
from neo.report.columns import Floats
from neo.report.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, distinguishable with any colour vision: https://jfly.uni-koeln.de/color/
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#6B7280"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
RESOURCE_COLORS = {"gpu": BLUE, "cpu": VERMILLION, "h2d": GREEN, "d2h": PURPLE, "host": GREY, "link": ORANGE}

PNG_DPI = 144
RC: Any = {  # matplotlib.typing.RcKeyType exists in new versions only
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": "#374151",
    "axes.edgecolor": "#9CA3AF",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#6B7280",
    "ytick.color": "#6B7280",
    "xtick.labelcolor": "#374151",
    "ytick.labelcolor": "#374151",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.6,
    "savefig.facecolor": "white",
    "svg.hashsalt": "neo",  # without it, ids in the SVG are random
}


@contextmanager
def drawing() -> Iterator[None]:
    """neo's look for what is drawn and saved inside the block; matplotlib's settings are as before after it.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise InputError("plots need matplotlib: pip install 'neo-serve[plots]'") from e
    with matplotlib.rc_context(RC):
        yield


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty figure (inches) with a bold title, and what the run was beneath it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    pad = 0.08  # inches
    top = 1 - 0.56 / height  # room for the two lines of the title
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, 0, 1, top), w_pad=pad, h_pad=pad)  # type: ignore[call-arg]
    left = 0.12 / width
    figure.text(left, 1 - 0.1 / height, title, fontsize=13, fontweight="bold", va="top")
    figure.text(left, 1 - 0.36 / height, subtitle, fontsize=10, color=GREY, va="top")
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem``.svg and ``stem``.png, each atomically; equal pictures are equal bytes."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once is enough: half of the time goes there
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("svg", "png")]
    for path, metadata in zip(paths, ({"Date": None}, {"Software": None}), strict=True):
        with atomic(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=PNG_DPI, metadata=metadata)
    return paths


def time_unit(seconds: float) -> tuple[float, str]:
    """Unit for an axis that spans ``seconds``: what to divide by, and its name."""
    for limit, scale, name in (
        (2e-3, 1e-6, "µs"),
        (1.0, 1e-3, "ms"),
        (900.0, 1.0, "s"),
        (1.5e4, 60.0, "min"),
    ):
        if seconds < limit:
            return scale, name
    return 3600.0, "h"


def legend_outside(axes: Axes, **options: Any) -> None:
    """The legend to the right of ``axes``, top aligned."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), borderaxespad=0.0, **options)


def layers(axes: Axes, edges: Floats, parts: Sequence[tuple[str, str, Floats]]) -> None:
    """Stack ``parts`` (label, colour, one value per bin) over the bins; all-zero parts are left out."""
    base = np.zeros(len(edges) - 1)
    for label, color, values in parts:
        if values.any():
            axes.stairs(base + values, edges, baseline=base, fill=True, color=color, label=label, linewidth=0)
            base = base + values
    axes.set_ylim(bottom=0)


def cdf(axes: Axes, values: Floats, color: str, label: str | None = None) -> None:
    """The share of ``values`` (no NaN) at or below each value, in percent."""
    if not len(values):
        return
    ordered = np.sort(values)
    # a thousand points draw the same line as all of them
    at = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), 1000)).round().astype(int))
    x = np.concatenate([ordered[:1], ordered[at]])
    y = np.concatenate([[0.0], 100.0 * (at + 1) / len(ordered)])
    axes.plot(x, y, color=color, label=label, drawstyle="steps-post")


def latency_axis(axes: Axes, values: Floats, label: str, axis: str = "x") -> None:
    """Logarithmic if ``values`` (seconds) span more than a factor of 30; ticks read ``200 ms``, ``5 s``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    positive = values[values > 0]
    target = axes.xaxis if axis == "x" else axes.yaxis
    wide = len(positive) > 1 and float(np.percentile(positive, 99)) > 30 * float(np.percentile(positive, 1))
    (axes.set_xscale if axis == "x" else axes.set_yscale)("log" if wide else "linear")
    if wide:
        decades = float(np.log10(positive.max() / positive.min()))
        subs = (1.0,) if decades > 2.5 else (1.0, 3.0) if axis == "x" else (1.0, 2.0, 5.0)
        target.set_major_locator(LogLocator(subs=subs, numticks=12))
        target.set_minor_formatter(NullFormatter())
    elif axis == "x":
        axes.set_xlim(left=0)
        target.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    else:
        axes.set_ylim(bottom=0)
    target.set_major_formatter(FuncFormatter(tick_seconds))
    (axes.set_xlabel if axis == "x" else axes.set_ylabel)(label)


def tick_seconds(value: float, _position: int | None = None) -> str:
    """A tick label for ``value`` seconds."""
    if value == 0:
        return "0"
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (0.9999, 1e3, "ms"), (600.0, 1.0, "s")):
        if abs(value) < limit:
            return f"{value * scale:.4g} {unit}"
    return f"{value / 60:.4g} min" if abs(value) < 36_000 else f"{value / 3600:.4g} h"

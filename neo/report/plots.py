"""The pictures of a run, and of several runs beside each other, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neo.core.record import Mode, RunRecord
from neo.report import style
from neo.report.columns import Bins, Floats, request_columns, spread, step_columns
from neo.report.files import RunMeta, RunResult, kv_capacity
from neo.report.metrics import PERCENTILES
from neo.report.tables import describe_run, digits, format_change, relative_change, run_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BINS = 240  # along the time axis: about three pixels each
WINDOWS = 120  # points of a moving percentile
MAX_DOTS = 4000  # of the scatter behind it
PERCENTILE_COLORS = (style.BLUE, style.ORANGE, style.VERMILLION)
UTILIZATION = (("gpu", "GPU"), ("cpu", "CPU attention"), ("h2d", "Host to GPU"), ("d2h", "GPU to host"))
MODES = (
    (Mode.GPU_ONLY, "GPU only", style.SKY),
    (Mode.CPU_SEQUENTIAL, "CPU sequential", style.ORANGE),
    (Mode.PIPELINED, "pipelined", style.VERMILLION),
    (Mode.STREAMED, "streamed", style.GREEN),
    (Mode.RELAYED, "relayed", style.PURPLE),
)


def plot_run(record: RunRecord, meta: RunMeta, out_dir: str | Path) -> list[Path]:
    """Draw one run: ``latency``, ``kv``, ``batch`` and ``utilization``, each as .svg and .png in ``out_dir``.

    Of a run without step rows (a server's, seen from outside) only ``latency`` can be drawn.

    Raises:
        InputError: matplotlib is missing, or ``out_dir`` cannot be written.
    """
    out = Path(out_dir)
    with style.drawing():
        figures = {"latency": _latency(record, meta)}
        if not record.columns.steps:
            return style.save(figures["latency"], out / "latency")
        bins, scale, unit = _time_bins(record)
        rows = step_columns(record)
        figures["kv"] = _kv(record, meta, bins, rows)
        figures["batch"] = _batch(meta, bins, rows, scale)
        figures["utilization"] = _utilization(meta, bins, rows, scale)
        for name, figure in figures.items():
            if name != "latency":
                figure.axes[-1].set_xlabel(f"time ({unit})")
                figure.align_ylabels()
                for axes in figure.axes:
                    axes.set_xlim(bins.edges[0], bins.edges[-1])
        return [path for name, figure in figures.items() for path in style.save(figure, out / name)]


def _subtitle(meta: RunMeta) -> str:
    name = str(meta.workload.get("name", "")) if meta.workload else ""
    model = f"{meta.model} (tp {meta.tensor_parallel})" if meta.tensor_parallel != 1 else meta.model
    return " · ".join(p for p in (f"{model} on {meta.hardware}", name, meta.kind) if p)


def _time_bins(record: RunRecord) -> tuple[Bins, float, str]:
    """The step rows over bins of the run's time; edges are in the unit returned, counted from the start."""
    start = np.array(record.columns.start_s, dtype=np.float64)
    end = np.array(record.columns.end_s, dtype=np.float64)
    first = min(record.start_s, float(start.min())) if len(start) else record.start_s
    last = max(record.end_s, float(end.max())) if len(end) else record.end_s
    length = last - first or 1.0
    scale, unit = style.time_unit(length)
    edges = np.linspace(0.0, length, min(MAX_BINS, max(20, len(start))) + 1) / scale
    return spread((start - first) / scale, (end - first) / scale, edges), scale, unit


def _latency(record: RunRecord, meta: RunMeta) -> Figure:
    columns = request_columns(record)
    figure = style.new_figure(11, 6.4, f"Latency of requests · {meta.policy}", _subtitle(meta))
    grid: Any = figure.subplots(2, 2, width_ratios=(2.1, 1))
    arrival = columns.arrival_s - record.start_s
    scale, unit = style.time_unit(float(arrival.max()) if len(arrival) else 0.0)
    lines = (
        ("time to first token", columns.ttft_s),
        ("per output token", columns.latency_per_output_token_s),
    )
    for (name, values), (over_time, distribution) in zip(lines, grid, strict=True):
        known = columns.finished & ~np.isnan(values)
        window = _moving(over_time, arrival[known] / scale, values[known])
        over_time.set_title(f"{name[0].upper()}{name[1:]} · percentiles of {window} requests in a row")
        style.latency_axis(over_time, values[known], "latency", axis="y")
        style.cdf(distribution, values[known], style.BLACK)
        for p, color in zip(PERCENTILES, PERCENTILE_COLORS, strict=True):
            if known.any():
                at = float(np.percentile(values[known], p))
                text = f"P{p:g}  {style.tick_seconds(float(f'{at:.3g}'))}"
                distribution.plot([at], [p], "o", color=color, label=text, markersize=6)
        distribution.set_title("Distribution")
        style.latency_axis(distribution, values[known], name)
        distribution.set_ylabel("requests (%)")
        distribution.set_ylim(0, 101)
        if known.any():
            style.legend_outside(distribution)
    grid[1, 0].set_xlabel(f"arrival ({unit})")
    return figure


def _moving(axes: Axes, x: Floats, values: Floats) -> int:
    """Requests as dots, and percentiles over a moving window of requests (x ascending); returns its size."""
    n = len(x)
    every = max(1, n // MAX_DOTS)
    axes.plot(
        x[::every], values[::every], ".", color=style.GREY, alpha=0.4, markersize=3.5, markeredgewidth=0,
        rasterized=True,
    )  # fmt: skip
    size = min(n, max(20, n // 40))
    starts = np.unique(np.linspace(0, n - size, WINDOWS).astype(int)) if n else np.array([], dtype=int)
    windows = [slice(int(s), int(s) + size) for s in starts]
    at = [float(np.median(x[w])) for w in windows]
    lines = np.array([np.percentile(values[w], PERCENTILES) for w in windows]).reshape(-1, len(PERCENTILES))
    for i, color in enumerate(PERCENTILE_COLORS):
        axes.plot(at, lines[:, i], color=color)
    return size


def _kv(record: RunRecord, meta: RunMeta, bins: Bins, rows: Mapping[str, Floats]) -> Figure:
    tiers = [t for t in ("gpu", "cpu") if record.kv_capacity.get(t)] or ["gpu"]
    figure = style.new_figure(10, 1.3 + 1.9 * len(tiers), f"KV cache use · {meta.policy}", _subtitle(meta))
    grid: Any = figure.subplots(len(tiers), 1, sharex=True, squeeze=False)
    capacities = kv_capacity(record, meta)
    names = {"gpu": "GPU memory", "cpu": "Host memory"}
    for axes, tier in zip(grid[:, 0], tiers, strict=True):
        capacity = record.kv_capacity.get(tier, 0)
        used = rows[f"kv_{tier}"] * (100.0 / capacity if capacity else 1.0)
        color = style.RESOURCE_COLORS[tier]
        axes.stairs(bins.mean(used), bins.edges, fill=True, color=color, alpha=0.45, label="mean")
        axes.stairs(bins.peak(used), bins.edges, color=color, linewidth=1.2, label="peak")
        size = ""
        if capacity:
            axes.axhline(100, color=style.BLACK, linestyle="--", linewidth=1, label="capacity")
            tokens = capacities[tier]["tokens"]
            size = f" · {tokens:,} tokens" if tokens else f" · {capacity:,} layer-blocks"
            axes.set_ylim(0, max(108.0, 1.05 * float(used.max(initial=0.0))))
        axes.set_title(names[tier] + size)
        axes.set_ylabel("used (%)" if capacity else "used (layer-blocks)")
        style.legend_outside(axes)
    return figure


def _batch(meta: RunMeta, bins: Bins, rows: Mapping[str, Floats], scale: float) -> Figure:
    figure = style.new_figure(10, 8.4, f"Batch composition · {meta.policy}", _subtitle(meta))
    axes: Any = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1.3, 1, 0.75))
    edges = bins.edges
    # a step is what counts here, not how long it took
    per_step = np.maximum(bins.total(rows["steps"]), 1e-300)

    def mean(name: str) -> Floats:
        return bins.total(rows[name] * rows["steps"]) / per_step

    axes[0].set_title("Prefill, mean of the steps")
    style.layers(axes[0], edges, [("prefill", style.ORANGE, mean("prefill_tokens"))])
    axes[0].set_ylabel("tokens per step")
    axes[1].set_title("Decodes by where their attention runs, mean of the steps")
    where = (
        ("gpu", "GPU", style.BLUE),
        ("cpu", "CPU", style.VERMILLION),
        ("stream", "GPU, streamed", style.GREEN),
    )
    style.layers(axes[1], edges, [(text, color, mean(f"{name}_decodes")) for name, text, color in where])
    axes[1].set_ylabel("requests per step")
    axes[2].set_title("Waiting requests")
    axes[2].stairs(bins.peak(rows["waiting"]), edges, color=style.BLACK, linewidth=1.2, label="peak")
    axes[2].stairs(bins.mean(rows["waiting"]), edges, fill=True, color=style.GREY, alpha=0.4, label="mean")
    axes[2].set_ylabel("requests")
    axes[2].set_ylim(bottom=0)
    axes[3].set_title("Time by mode")
    shares = [
        (text, color, 100 * bins.total((rows["mode"] == mode) * bins.length) / bins.width)
        for mode, text, color in MODES
    ]
    style.layers(axes[3], edges, shares)
    axes[3].set_ylabel("time (%)")
    axes[3].set_ylim(0, 100)
    axes[2].yaxis.get_major_locator().set_params(integer=True)
    for panel in axes[1:]:
        if panel.get_legend_handles_labels()[0]:
            style.legend_outside(panel)
    return figure


def _utilization(meta: RunMeta, bins: Bins, rows: Mapping[str, Floats], scale: float) -> Figure:
    figure = style.new_figure(10, 7.2, f"Utilisation · {meta.policy}", _subtitle(meta))
    grid: Any = figure.subplots(len(UTILIZATION), 1, sharex=True)
    duration = float(bins.edges[-1] - bins.edges[0])
    for axes, (name, title) in zip(grid, UTILIZATION, strict=True):
        busy = rows[f"busy_{name}"] / scale
        axes.stairs(
            100 * bins.total(busy) / bins.width,
            bins.edges,
            fill=True,
            color=style.RESOURCE_COLORS[name],
        )
        axes.set_title(f"{title} · {100 * float(busy.sum()) / duration:.1f}% of the run")
        axes.set_ylabel("busy (%)")
        axes.set_ylim(0, 102)
        axes.set_yticks((0, 50, 100))
    return figure


THROUGHPUT = (
    ("request_throughput", "Requests", "requests/s"),
    ("output_token_throughput", "Output tokens", "tokens/s"),
    ("total_token_throughput", "Input and output tokens", "tokens/s"),
)
GOODPUT = ("goodput", "Goodput (within the SLO)", "requests/s")
DISTRIBUTIONS = (
    ("ttft_s", "time to first token"),
    ("latency_per_output_token_s", "latency per output token"),
    ("e2e_s", "end-to-end latency"),
)


def plot_comparison(results: Sequence[RunResult], out_dir: str | Path) -> list[Path]:
    """Several runs in one picture, ``comparison.svg`` and ``comparison.png``: throughput and latency CDFs.

    Args:
        results: from ``run_result`` or ``read_run``; the first is the baseline of the changes on the bars.
        out_dir: made if missing.

    Raises:
        InputError: matplotlib is missing, or ``out_dir`` cannot be written.
    """
    summaries = [r.summary for r in results]
    labels = run_labels(summaries)
    colors = [style.CYCLE[i % len(style.CYCLE)] for i in range(len(results))]
    subjects = list(dict.fromkeys(describe_run(s) for s in summaries))
    with style.drawing():
        subtitle = " · ".join([*subjects[:3], *(["…"] if len(subjects) > 3 else [])])
        title = " vs ".join(labels) if len(labels) <= 4 else f"{len(labels)} runs"
        figure = style.new_figure(12, 7.4, title, subtitle)
        grid: Any = figure.subplots(2, 3, height_ratios=(0.85, 1))
        bars = list(THROUGHPUT)
        if any(s["metrics"].get("goodput") is not None for s in summaries):
            bars[2] = GOODPUT
        for axes, (name, text, unit) in zip(grid[0], bars, strict=True):
            _bars(axes, [s["metrics"].get(name) for s in summaries], labels, colors)
            axes.set_title(text)
            axes.set_xlabel(unit)
        for axes, (name, text) in zip(grid[1], DISTRIBUTIONS, strict=True):
            for result, label, color in zip(results, labels, colors, strict=True):
                style.cdf(axes, getattr(result, name), color, label)
            style.latency_axis(axes, np.concatenate([getattr(r, name) for r in results]), text)
            axes.set_title(text[0].upper() + text[1:])
            axes.set_ylabel("requests (%)")
            axes.set_ylim(0, 101)
        figure.legend(
            *grid[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(labels), 6)
        )
        return style.save(figure, Path(out_dir) / "comparison")


def _bars(axes: Axes, values: Sequence[float | None], labels: Sequence[str], colors: Sequence[str]) -> None:
    """One horizontal bar per run, the first on top, with its value and the change against the first."""
    heights = [v or 0.0 for v in values]
    axes.barh(range(len(heights)), heights, color=colors, height=0.68)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, max([*heights, 1e-9]) * 1.42)  # room for the text behind the longest bar
    for i, value in enumerate(values):
        change = relative_change(values[0], value) if i else None
        text = "–" if value is None else digits(value, 4 if value >= 1000 else 3)
        text += "" if change is None else f"  {format_change(change)}"
        axes.annotate(
            text, (heights[i], i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )

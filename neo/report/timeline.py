"""Timelines: operations of steps on their resources, as a Chrome/Perfetto trace or as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from neo.core.errors import InputError
from neo.core.graph import RELAY, OpKind, Resource
from neo.core.record import Slice
from neo.report import style
from neo.report.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRACKS = ("steps", *(r.value for r in Resource))
TRACK_NAMES = {
    "steps": "steps",
    "host": "host (scheduler)",
    "gpu": "GPU",
    "cpu": "CPU attention",
    "h2d": "host to GPU",
    "d2h": "GPU to host",
    "link": "GPU link",
}
OP_COLORS = {
    OpKind.SCHEDULE: style.GREY,
    OpKind.EMBED: style.GREY,
    OpKind.HEAD: style.GREY,
    OpKind.PRE: style.SKY,
    OpKind.POST: style.BLUE,
    OpKind.GPU_ATTN: style.ORANGE,
    OpKind.CPU_ATTN: style.VERMILLION,
    OpKind.SEND: style.PURPLE,
    OpKind.RECV: style.GREEN,
    OpKind.SWAP_OUT: style.YELLOW,
    OpKind.SWAP_IN: style.YELLOW,
    OpKind.STREAM: style.YELLOW,
    OpKind.ALLREDUCE: style.BLACK,
}

CHARACTER = 0.0064  # width of a character of a label, as a share of the picture's
CROWDED = 200  # slices from which on white borders would hide them
THIN = 0.005  # share of the picture's width up to which hatching would hide a slice


def write_timeline(slices: Iterable[Slice], path: str | Path) -> Path:
    """Write ``slices`` as a trace that ui.perfetto.dev and chrome://tracing open.

    One track per resource, always in the order steps, host, gpu, cpu, h2d, d2h, link; tracks without a
    slice are left out. Times are microseconds, to the nanosecond; slices that touch in time do so here.

    Raises:
        InputError: a slice names an unknown resource or ends before it starts, or the file cannot be written.
    """
    return write_trace({"neo": slices}, path)


def write_trace(processes: Mapping[str, Iterable[Slice]], path: str | Path) -> Path:
    """``write_timeline`` for several timelines, each as a process of the trace, in their order, by name."""
    path = Path(path)
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as f:
        f.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        events = (_events(s, pid, name) for pid, (name, s) in enumerate(processes.items(), start=1))
        f.writelines(_joined(chain.from_iterable(events)))
        f.write("\n]}\n")
    return path


def _joined(lines: Iterator[str]) -> Iterator[str]:
    for i, line in enumerate(lines):
        yield ",\n" + line if i else line


def _events(slices: Iterable[Slice], pid: int, process: str) -> Iterator[str]:
    """Every trace event as JSON text: slices as they come, then steps and the tracks' names."""
    yield _metadata("process_name", pid, 0, name=process)
    if pid > 1:
        yield _metadata("process_sort_index", pid, 0, sort_index=pid)
    tids = {name: tid for tid, name in enumerate(TRACKS, start=1)}
    used = {"steps"}
    steps: dict[int, tuple[int, int]] = {}
    for s in slices:
        tid = tids.get(s.resource)
        start, end = round(s.start_s * 1e9), round(s.end_s * 1e9)
        if tid is None or end < start:
            raise InputError(
                f"timeline: step {s.step}, {s.name}: resource '{s.resource}', {s.start_s}..{s.end_s} s"
            )
        used.add(s.resource)
        layer = "null" if s.layer is None else str(s.layer)
        label = str(s.name) if s.layer is None else f"{s.name} L{s.layer}"
        batch = "null"
        if s.batch >= 0:  # SCHEDULE, EMBED, HEAD and moves belong to no sub-batch
            label, batch = f"{label} {'relay' if s.batch == RELAY else f'b{s.batch}'}", str(s.batch)
        args = (
            f'{{"op": {json.dumps(str(s.name))}, "layer": {layer}, "sub_batch": {batch}, "step": {s.step}}}'
        )
        yield _slice(label, str(s.name), pid, tid, start, end, args)
        known = steps.get(s.step)
        steps[s.step] = (start, end) if known is None else (min(known[0], start), max(known[1], end))
    ordered = sorted(steps.items(), key=lambda item: (item[1][0], item[0]))
    for i, (step, (start, end)) in enumerate(ordered):
        # a step planned during the one before it would overlap it on this track: cut the earlier one
        end = min(end, ordered[i + 1][1][0]) if i + 1 < len(ordered) else end
        yield _slice(f"step {step}", "STEP", pid, tids["steps"], start, end, f'{{"step": {step}}}')
    for name in TRACKS:
        if name in used:
            yield _metadata("thread_name", pid, tids[name], name=TRACK_NAMES[name])
            yield _metadata("thread_sort_index", pid, tids[name], sort_index=tids[name])


def _slice(label: str, category: str, pid: int, tid: int, start_ns: int, end_ns: int, args: str) -> str:
    return (
        f'{{"name": {json.dumps(label)}, "cat": {json.dumps(category)}, "ph": "X", "pid": {pid}, '
        f'"tid": {tid}, "ts": {start_ns / 1000}, "dur": {(end_ns - start_ns) / 1000}, "args": {args}}}'
    )


def _metadata(kind: str, pid: int, tid: int, **args: str | int) -> str:
    return json.dumps({"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": args})


def plot_timeline(
    slices: Iterable[Slice],
    path: str | Path,
    step: int | None = None,
    layers: tuple[int, int] | None = None,
    title: str = "",
) -> list[Path]:
    """Draw one step as a Gantt picture: a lane per resource, colour by operation.

    Sub-batch 1 is hatched, and so is what is done for relayed decodes alone.

    Args:
        slices: of one step or several.
        path: the files written are this with .svg and with .png for its suffix.
        step: which step; by default the first in ``slices``.
        layers: show the time from when the first until when the second of these layers is worked on
            (neighbouring layers reach into it); by default the whole step.
        title: what is written above; by default the step's number.

    Raises:
        InputError: there is nothing to show, matplotlib is missing, or the files cannot be written.
    """
    chosen = list(slices)
    if chosen:
        step = chosen[0].step if step is None else step
        chosen = [s for s in chosen if s.step == step]
    if layers is not None:
        chosen = window(chosen, layers)
    if not chosen:
        raise InputError(f"timeline: nothing to show of step {step}, layers {layers}")
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".svg", ".png") else path
    lanes = [r for r in TRACKS if any(s.resource == r for s in chosen)]
    subtitle = f"step {step} · {span(chosen)[1] * 1e3:.4g} ms"
    if layers is not None:
        subtitle += f" · layers {layers[0]} to {layers[1]}"
    with style.drawing():
        figure = style.new_figure(13, 1.6 + 0.62 * len(lanes), title or "Operations of one step", subtitle)
        axes = figure.subplots()
        gantt(axes, chosen, lanes, span(chosen)[1])
        legend(axes, chosen)
        return style.save(figure, stem)


def window(slices: Sequence[Slice], layers: tuple[int, int]) -> list[Slice]:
    """What runs while ``layers`` (first, last) are worked on, cut to that time."""
    inside = [s for s in slices if s.layer is not None and layers[0] <= s.layer <= layers[1]]
    if not inside:
        return []
    low, length = span(inside)
    high = low + length
    cut = (s._replace(start_s=max(s.start_s, low), end_s=min(s.end_s, high)) for s in slices)
    return [s for s in cut if s.end_s > s.start_s]


def gantt(axes: Axes, slices: Sequence[Slice], lanes: Sequence[str], length: float) -> None:
    """Draw slices on their lanes, from the first one's start over ``length`` seconds."""
    origin, _ = span(slices)
    crowded = len(slices) >= CROWDED
    scale, unit = style.time_unit(length)
    for s in slices:
        lane = lanes.index(s.resource)
        x, width = (s.start_s - origin) / scale, (s.end_s - s.start_s) / scale
        color = _op_color(s.name)
        axes.barh(
            lane, width, left=x, height=0.74, color=color, edgecolor=color if crowded else "white",
            linewidth=0.6,
        )  # fmt: skip
        if s.batch > 0 and width * scale > THIN * length:
            # hatching takes the colour of the edge: a second, empty bar
            axes.barh(
                lane, width, left=x, height=0.74, fill=False, hatch="////", edgecolor="white", linewidth=0
            )
        texts = (s.name,) if s.layer is None else (f"{s.name} {s.layer}", s.name)
        text = next((t for t in texts if width * scale > CHARACTER * (len(t) + 1) * length), "")
        if text:
            axes.text(
                x + width / 2, lane, text, ha="center", va="center", fontsize=7, clip_on=True,
                bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.7},
            )  # fmt: skip
    axes.set_yticks(range(len(lanes)), [TRACK_NAMES[r] for r in lanes])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, length / scale)
    axes.set_xlabel(f"time ({unit})")


def legend(axes: Axes, slices: Sequence[Slice]) -> None:
    """Say which operations the colours of these slices are, and which sub-batch is hatched."""
    from matplotlib.patches import Patch

    names = [k.value for k in OpKind if any(s.name == k.value for s in slices)]
    names += sorted({s.name for s in slices} - set(names))
    colors = dict.fromkeys(_op_color(n) for n in names)
    handles = [
        Patch(facecolor=color, label=", ".join(n for n in names if _op_color(n) == color)) for color in colors
    ]
    if any(s.batch > 0 for s in slices):
        other = "relayed decodes" if any(s.batch == RELAY for s in slices) else "sub-batch 1"
        handles.append(Patch(facecolor="white", edgecolor=style.GREY, label="sub-batch 0"))
        handles.append(Patch(facecolor="white", edgecolor=style.GREY, hatch="////", label=other))
    style.legend_outside(axes, handles=handles)


def span(slices: Sequence[Slice]) -> tuple[float, float]:
    """Start and length of ``slices``, seconds; the length is never 0."""
    origin = min(s.start_s for s in slices)
    return origin, max(s.end_s for s in slices) - origin or 1e-9


def _op_color(name: str) -> str:
    return OP_COLORS[OpKind(name)] if name in OpKind.__members__ else style.GREY

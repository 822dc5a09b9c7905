"""Two timelines of the same steps side by side: as they were measured, and as a cost model has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neo.core.errors import InputError
from neo.core.graph import OpKind
from neo.core.record import Slice
from neo.report import style
from neo.report.timeline import TRACKS, gantt, legend, span, window

Sides = Mapping[str, Sequence[Slice]]
"""Slices by what they are (``measured``, ``predicted``), in the order in which they are shown."""

_NS = 1e-9


def read_timeline(path: Path) -> list[Slice]:
    """The operations that ``neo.report.timeline.write_timeline`` wrote; waits between them are left out.

    Raises:
        InputError: the file cannot be read, or is not of that form.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        found = [_slice(e) for e in events if e["ph"] == "X" and e["cat"] in OpKind.__members__]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: no timeline of neo ({type(error).__name__}: {error})") from error
    return found


def _slice(event: Mapping[str, Any]) -> Slice:
    about, start = event["args"], round(event["ts"] * 1000)
    layer, batch = about["layer"], about["sub_batch"]
    return Slice(
        int(about["step"]),
        TRACKS[event["tid"] - 1],
        OpKind(about["op"]),
        None if layer is None else int(layer),
        -1 if batch is None else int(batch),
        start * _NS,
        (start + round(event["dur"] * 1000)) * _NS,
    )


def telling_step(slices: Sequence[Slice]) -> int:
    """The step with most to see: two sub-batches, else most resources; of equals, the last (it is warm)."""
    about: dict[int, tuple[set[int], set[str]]] = {}
    for s in slices:
        batches, resources = about.setdefault(s.step, (set(), set()))
        batches.add(s.batch)
        resources.add(s.resource)
    return max(about, key=lambda step: (len(about[step][0]), len(about[step][1]), step))


def plot_timelines(
    sides: Sides,
    path: str | Path,
    step: int,
    layers: tuple[int, int] | None = None,
    title: str = "Operations of one step",
) -> list[Path]:
    """Draw a step's timelines below each other, on one scale of time from the step's start.

    Args:
        sides: see ``Sides``.
        path: the files written are this with .svg and with .png behind it.
        step: which step.
        layers: only the time in which these layers (first, last) are worked on, each side from its own start.
        title: what is written above.

    Raises:
        InputError: a side has nothing to show, matplotlib is missing, or the files cannot be written.
    """
    chosen = {name: [s for s in slices if s.step == step] for name, slices in sides.items()}
    if layers is not None:
        chosen = {name: window(slices, layers) for name, slices in chosen.items()}
    if empty := [name for name, slices in chosen.items() if not slices]:
        which = "" if layers is None else f" in layers {layers[0]} to {layers[1]}"
        raise InputError(f"no timeline of step {step}{which} ({empty[0]})")
    together = [s for slices in chosen.values() for s in slices]
    lanes = [r for r in TRACKS if any(s.resource == r for s in together)]
    lengths = {name: span(slices)[1] for name, slices in chosen.items()}
    parts = [f"step {step}", *(f"{name} {length * 1e3:.4g} ms" for name, length in lengths.items())]
    if layers is not None:
        parts.insert(1, f"layers {layers[0]} to {layers[1]}")
    with style.drawing():
        height = 1.6 + (0.5 + 0.5 * len(lanes)) * len(chosen)
        figure = style.new_figure(13, height, title, " · ".join(parts))
        panels: Any = figure.subplots(len(chosen), 1, squeeze=False)
        for axes, (name, slices) in zip(panels[:, 0], chosen.items(), strict=True):
            gantt(axes, slices, lanes, max(lengths.values()))
            axes.set_ylim(len(lanes) - 0.5, -0.5)  # a side may have nothing on the last lane
            axes.set_title(name)
            if axes is not panels[-1, 0]:
                axes.set_xlabel("")
        legend(panels[0, 0], together)
        return style.save(figure, Path(path))

"""Published points beside which results are laid. The file's format: docs/studies.md."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neo.core.errors import InputError

PublishedPoint = tuple[str | float, Annotated[float, Field(gt=0)]]


class Series(BaseModel):
    """One published curve, or row of figures.

    ``points`` are (x, y): x is a number or the label of a case, y is the metric of the figure, with ``gain``
    the ratio to the first system. With ``sustained``, the paper says which rate (y) is sustained at a limit
    (x), and nothing is read off the system's curve.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    figure: str
    system: str
    kind: Literal["metric", "gain", "sustained"] = "metric"
    points: tuple[PublishedPoint, ...] = Field(min_length=1)

    def at(self, label: str) -> float | None:
        """The published value at an axis label."""
        return next((y for x, y in self.points if x_label(x) == label), None)


class PublishedFile(BaseModel):
    """Published points of one paper, with their source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    note: str = ""
    series: tuple[Series, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """One published figure beside its prediction.

    ``error`` is relative; for gains it is the difference of the ratios, so that 0.1 is ten percentage points.
    """

    what: str
    system: str
    x: str
    published: float
    predicted: float | None
    gain: bool = False
    extrapolated: bool = False

    @property
    def error(self) -> float | None:
        """How far the prediction is off; None where there is none."""
        if self.predicted is None:
            return None
        off = self.predicted - self.published
        return off if self.gain else off / self.published


def x_label(x: str | float) -> str:
    """How an x is called on an axis."""
    return x if isinstance(x, str) else f"{x:g}"


def read_published(path: str | Path, figure: str) -> tuple[Series, ...]:
    """The series of one figure. InputError naming file and field if they cannot be had."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        file = PublishedFile.model_validate(data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    found = tuple(s for s in file.series if s.figure == figure)
    if not found:
        figures = ", ".join(dict.fromkeys(s.figure for s in file.series))
        raise InputError(f"{path}: no figure '{figure}'; there are {figures}")
    return found


def crossing(points: Sequence[tuple[float, float]], limit: float) -> tuple[float, bool]:
    """Where a rising curve reaches ``limit``: x, and whether it lies beyond the curve's points.

    Linear between points; beyond the last one with the slope of the last two.
    """
    ordered = sorted(points)
    if len(ordered) < 2:
        return (ordered[0][0] if ordered else 0.0), True
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if y0 <= limit <= y1 and y1 > y0:
            return x0 + (limit - y0) * (x1 - x0) / (y1 - y0), False
    (x0, y0), (x1, y1) = ordered[-2:]
    return (x1 if y1 <= y0 else x1 + (limit - y1) * (x1 - x0) / (y1 - y0)), True

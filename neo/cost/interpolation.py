"""Monotone interpolation over measured grids: piecewise linear, isotonic, and honest about extrapolation.

Scalars and arrays go through the same arithmetic in the same order, so that they agree bit for bit.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Outside:
    """Counts look-ups beyond a grid's edges on one axis."""

    __slots__ = ("axis", "count", "first", "highest", "last", "lowest", "table")

    def __init__(self, table: str, axis: str, grid: list[float]) -> None:
        self.table, self.axis = table, axis
        self.first, self.last = grid[0], grid[-1]
        self.count = 0
        self.lowest, self.highest = self.first, self.last

    def add(self, value: float) -> None:
        """Note one value if it lies outside."""
        if value > self.last:
            self.count += 1
            self.highest = max(self.highest, float(value))
        elif value < self.first:
            self.count += 1
            self.lowest = min(self.lowest, float(value))

    def add_array(self, values: Array) -> None:
        """Note every entry that lies outside."""
        outside = int(((values > self.last) | (values < self.first)).sum())
        if outside:
            self.count += outside
            self.highest = max(self.highest, float(values.max()))
            self.lowest = min(self.lowest, float(values.min()))

    def warnings(self) -> list[str]:
        """One line if anything lay outside: table, axis, grid edge, farthest value, number of look-ups."""
        if not self.count:
            return []
        ends = []
        if self.highest > self.last:
            ends.append(f"above the grid's last value {self.last:g}, up to {self.highest:g}")
        if self.lowest < self.first:
            ends.append(f"below the grid's first value {self.first:g}, down to {self.lowest:g}")
        return [f"table '{self.table}', {self.axis}: {self.count} look-ups extrapolated {' and '.join(ends)}"]


def isotonic(values: Array, table: str) -> tuple[Array, list[str]]:
    """The running maximum along every axis, and a warning that says how much it changed."""
    fixed = values
    for axis in range(values.ndim):
        fixed = np.maximum.accumulate(fixed, axis=axis)
    changed = fixed > values
    count = int(changed.sum())
    if not count:
        return fixed, []
    worst = float(((fixed - values)[changed] / fixed[changed]).max())
    return fixed, [
        f"table '{table}': {count} of {values.size} entries were below a smaller amount of work "
        f"and were raised to it (by at most {worst:.1%})"
    ]


class Curve:
    """Seconds over one axis.

    Inside the grid: linear. Above: the last segment's slope (never negative, so never below the edge value).
    Below: the first value.
    """

    __slots__ = ("outside", "slopes", "warnings", "xs", "ys")

    def __init__(self, table: str, axis: str, xs: list[int], ys: list[float]) -> None:
        fixed, self.warnings = isotonic(np.asarray(ys, dtype=np.float64), table)
        self.xs = [float(x) for x in xs]
        self.ys = [float(y) for y in fixed]
        self.slopes = _slopes(self.xs, self.ys)
        self.outside = Outside(table, axis, self.xs)

    def at(self, x: float) -> float:
        """Seconds at ``x``."""
        xs = self.xs
        if x < xs[0] or x > xs[-1]:
            self.outside.add(x)
            if x < xs[0]:
                return self.ys[0]
            return self.ys[-1] + (x - xs[-1]) * self.slopes[-1]
        i = min(bisect_right(xs, x), len(xs) - 1) - 1
        y = self.ys[i] + (x - xs[i]) * self.slopes[i]
        edge = self.ys[i + 1]
        return y if y < edge else edge


class Surface:
    """Seconds over two axes, ``x`` (outer) and ``y`` (inner): bilinear inside, linear beyond the last values.

    Beyond an edge the last segment's slope is used, its running maximum along the edge, and beyond both the
    last cell's cross term if it is positive: so the surface stays monotone and never falls below its edge.
    Below the first value of an axis the first value counts.
    """

    __slots__ = (
        "array",
        "cross",
        "outside_x",
        "outside_y",
        "over_x",
        "over_y",
        "values",
        "warnings",
        "xs",
        "ys",
        "ys_array",
    )

    def __init__(
        self, table: str, axes: tuple[str, str], xs: list[int], ys: list[int], values: list[list[float]]
    ) -> None:
        fixed, self.warnings = isotonic(np.asarray(values, dtype=np.float64), table)
        self.xs = [float(x) for x in xs]
        self.ys = [float(y) for y in ys]
        self.ys_array = np.asarray(self.ys)
        self.array = fixed
        self.values: list[list[float]] = fixed.tolist()
        dx, dy = self.xs[-1] - self.xs[-2], self.ys[-1] - self.ys[-2]
        over_x = np.maximum.accumulate((fixed[-1] - fixed[-2]) / dx)  # slope in x beyond the last x, per y
        over_y = np.maximum.accumulate((fixed[:, -1] - fixed[:, -2]) / dy)
        self.over_x: list[float] = over_x.tolist()
        self.over_y: list[float] = over_y.tolist()
        corner = fixed[-1, -1] - fixed[-2, -1] - fixed[-1, -2] + fixed[-2, -2]
        self.cross = max(0.0, float(corner)) / dx / dy
        self.outside_x = Outside(table, axes[0], self.xs)
        self.outside_y = Outside(table, axes[1], self.ys)

    def at(self, x: float, y: float) -> float:
        """Seconds at ``(x, y)``."""
        self.outside_x.add(x)
        self.outside_y.add(y)
        i, t, beyond_x = _locate(self.xs, x)
        j, u, beyond_y = _locate(self.ys, y)
        low, high = self.values[i], self.values[i + 1]
        left = (1.0 - t) * low[j] + t * high[j]
        right = (1.0 - t) * low[j + 1] + t * high[j + 1]
        result = (1.0 - u) * left + u * right
        if beyond_x > 0.0:
            result = result + beyond_x * ((1.0 - u) * self.over_x[j] + u * self.over_x[j + 1])
        if beyond_y > 0.0:
            slope = (1.0 - t) * self.over_y[i] + t * self.over_y[i + 1]
            result = result + beyond_y * (slope + beyond_x * self.cross)
        return result

    def at_array(self, x: float, y: Array) -> Array:
        """Seconds at ``(x, y[k])`` for every k: what ``at`` gives, bit for bit."""
        self.outside_x.add(x)
        self.outside_y.add_array(y)
        i, t, beyond_x = _locate(self.xs, x)
        grid = self.ys_array
        inside = np.clip(y, grid[0], grid[-1])
        j = np.minimum(np.searchsorted(grid, inside, side="right"), len(grid) - 1) - 1
        u = (inside - grid[j]) / (grid[j + 1] - grid[j])
        low, high = self.array[i], self.array[i + 1]
        left = (1.0 - t) * low[j] + t * high[j]
        right = (1.0 - t) * low[j + 1] + t * high[j + 1]
        result: Array = (1.0 - u) * left + u * right
        if beyond_x > 0.0:
            over = np.asarray(self.over_x)
            result = result + beyond_x * ((1.0 - u) * over[j] + u * over[j + 1])
        beyond_y = np.maximum(y - grid[-1], 0.0)
        slope = (1.0 - t) * self.over_y[i] + t * self.over_y[i + 1]
        return np.where(beyond_y > 0.0, result + beyond_y * (slope + beyond_x * self.cross), result)


def _locate(grid: list[float], x: float) -> tuple[int, float, float]:
    """Segment, position in it (0 to 1) and distance beyond the last grid value."""
    if x <= grid[0]:
        return 0, 0.0, 0.0
    if x >= grid[-1]:
        return len(grid) - 2, 1.0, x - grid[-1]
    i = bisect_right(grid, x) - 1
    return i, (x - grid[i]) / (grid[i + 1] - grid[i]), 0.0


def _slopes(xs: list[float], ys: list[float]) -> list[float]:
    return [(ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i]) for i in range(len(xs) - 1)]


def warnings_of(parts: list[Any]) -> list[str]:
    """Corrections and extrapolations of curves and surfaces, in order."""
    lines: list[str] = []
    for part in parts:
        lines += part.warnings
        for outside in (part.outside,) if isinstance(part, Curve) else (part.outside_x, part.outside_y):
            lines += outside.warnings()
    return lines

"""What ``neo profile`` measured, by table and size, and the tables that become of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from neo.cost.interpolation import isotonic


def typical(seconds: Sequence[float]) -> float:
    """The mean without the least and the largest.

    What operations take in a run adds up, and so do means, not medians: on a machine with two speeds a median
    is that of the speed it has more often. A hiccup that meets one measurement of a few is left out.
    """
    ordered = sorted(seconds)
    return statistics.fmean(ordered[1:-1] if len(ordered) > 2 else ordered)


class Samples:
    """Seconds by table and coordinates.

    What was measured of replayed steps counts alone where there is any. More work never takes less time in a
    table: where measurements say so they meet half way, and ``raised`` is the largest share of a table's
    value by which it is above what was measured.
    """

    def __init__(self) -> None:
        self._found: dict[str, dict[tuple[int, ...], list[float]]] = {}
        self._replayed: set[tuple[str, tuple[int, ...]]] = set()
        self.raised = 0.0

    def add(self, table: str, at: tuple[int, ...], seconds: float, replayed: bool = False) -> None:
        """Note what was measured; ``replayed``: of a step that ran in one piece."""
        entries = self._found.setdefault(table, {})
        if replayed and (table, at) not in self._replayed:
            self._replayed.add((table, at))
            entries.pop(at, None)
        if replayed or (table, at) not in self._replayed:
            entries.setdefault(at, []).append(seconds)

    def at(self, table: str, at: tuple[int, ...]) -> float:
        """What it typically took there."""
        return typical(self._found[table][at])

    def points(self, table: str) -> set[tuple[int, ...]]:
        """Where it was measured."""
        return set(self._found.get(table, ()))

    def sizes(self, table: str) -> list[int]:
        """Sizes at which a one-axis table was measured."""
        return sorted(at[0] for at in self._found.get(table, ()))

    def curve(self, table: str, axis: str, padded: Sequence[int] = ()) -> dict[str, Any]:
        """A one-axis table.

        ``padded``: sizes that replayed steps are padded to, ascending. As far as such were measured, all
        sizes from one to the next take what the next does.
        """
        sizes = self.sizes(table)
        seconds = [self.at(table, (n,)) for n in sizes]
        if len(sizes) == 1:  # budgets leave no choice, and the format wants two: nothing takes no time
            sizes, seconds = [0, *sizes], [0.0, *seconds]
        seconds = self._ascending(seconds)
        last = max([at[0] for name, at in self._replayed if name == table], default=0)
        steps = [(a, b) for a, b in pairwise(padded) if sizes[0] <= a and b <= last]
        if steps:
            found = dict(zip(sizes, seconds, strict=True))
            for a, b in steps:  # what was measured within a step was padded, too, but for noise
                inside = [n for n in sizes if a < n < b]
                level = float(np.interp(b, sizes, seconds))
                found |= dict.fromkeys((a + 1, *inside, b), level)
            sizes = sorted(found)
            seconds = [found[n] for n in sizes]
        return {"axes": {axis: sizes}, "seconds": seconds}

    def _ascending(self, seconds: Any) -> Any:
        """The table nearest to what was measured, by its largest error, of those in which no axis falls.

        Half way between the least such table above the measured one and the largest one below it.
        """
        measured = np.asarray(seconds, dtype=np.float64)
        above, _ = isotonic(measured, "")
        below = measured
        for axis in range(measured.ndim):
            below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
        fixed = 0.5 * (above + below)
        shares = np.divide(fixed - measured, fixed, out=np.zeros_like(fixed), where=fixed > 0)
        self.raised = max(self.raised, float(shares.max()))
        return fixed.tolist()

    def surface(self, table: str, axes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """A two-axis table; what does not fit in memory is continued with the differences of its neighbours.

        No step looks there, but interpolation in the cells beside it does.
        """
        first, second = axes.values()
        rows: list[list[float]] = []
        for x in first:
            row: list[float] = []
            for j, y in enumerate(second):
                if (x, y) in self._found[table]:
                    row.append(self.at(table, (x, y)))
                else:
                    up, left, corner = rows[-1][j], row[-1], rows[-1][j - 1]
                    row.append(max(up, left, up + left - corner))
            rows.append(row)
        lists = {name: list(values) for name, values in axes.items()}
        return {"axes": lists, "seconds": self._ascending(rows)}

    def spread(self) -> float:
        """Median over everything measured of (third quartile - first) / median."""
        found = []
        for entries in self._found.values():
            for seconds in entries.values():
                middle = statistics.median(seconds)
                low, high = np.quantile(seconds, (0.25, 0.75))
                if middle > 0 and len(seconds) > 2:
                    found.append(float(high - low) / middle)
        return statistics.median(found) if found else 0.0

"""Statistics of a workload: what ``neo trace describe`` prints.

Plain Python: importing numpy would cost more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from neo.core.errors import InputError
from neo.workload.base import Workload

if TYPE_CHECKING:
    from rich.table import Table

PEAK_WINDOW_S = 60.0


def describe(workload: Workload) -> dict[str, Any]:
    """Statistics of a workload, JSON-able. Seconds, requests/s, tokens.

    Returns:
        ``name``, ``format``, ``requests``, ``has_arrivals``, ``duration_s`` (first to last arrival),
        ``mean_rate`` (inverse of the mean interarrival time), ``interarrival_cv`` (population standard
        deviation over mean), ``peak_requests_per_minute`` (most requests in any 60 s, the end excluded), and
        ``prompt_tokens`` and ``output_tokens``, each ``{"total", "mean", "p50", "p90", "p99", "max"}``
        (percentiles linear between ranks, as numpy's default). What needs arrival times is None without them,
        and rate and CV are None when all requests arrive at once.
    """
    if not workload.requests:
        raise InputError(f"workload '{workload.name}' has no requests")
    times = [request.arrival_s for request in workload.requests]
    timed = workload.has_arrivals
    return {
        "name": workload.name,
        "format": workload.source.get("format"),
        "requests": len(workload),
        "has_arrivals": timed,
        "duration_s": workload.span_s if timed else None,
        "mean_rate": workload.mean_rate if timed else None,
        "interarrival_cv": _interarrival_cv(times) if timed else None,
        "peak_requests_per_minute": _peak(times, PEAK_WINDOW_S) if timed else None,
        "prompt_tokens": _summary([request.prompt_tokens for request in workload.requests]),
        "output_tokens": _summary([request.output_tokens for request in workload.requests]),
    }


def _summary(values: Sequence[int]) -> dict[str, float]:
    ordered = sorted(values)
    total = sum(ordered)
    return {
        "total": total,
        "mean": total / len(ordered),
        "p50": _percentile(ordered, 50),
        "p90": _percentile(ordered, 90),
        "p99": _percentile(ordered, 99),
        "max": ordered[-1],
    }


def _percentile(ordered: Sequence[int], percent: int) -> float:
    below, part = divmod((len(ordered) - 1) * percent, 100)
    low = ordered[below]
    return low + (ordered[below + 1] - low) * part / 100 if part else float(low)


def _interarrival_cv(times: Sequence[float]) -> float | None:
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = math.fsum(gaps) / len(gaps) if gaps else 0.0
    if mean <= 0:
        return None
    return math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean


def _peak(times: Sequence[float], window: float) -> int:
    first = peak = 0
    for last, time in enumerate(times):
        while times[first] <= time - window:
            first += 1
        peak = max(peak, last - first + 1)
    return peak


def render(stats: Mapping[str, Any]) -> Table:
    """The statistics of :func:`describe` as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(_title(stats)), caption=Text(_caption(stats)), caption_justify="left")
    columns = {"total": 0, "mean": 1, "p50": 0, "p90": 0, "p99": 0, "max": 0}  # and their digits
    table.add_column("tokens")
    for name in columns:
        table.add_column(name, justify="right")
    for kind in ("prompt", "output"):
        numbers = stats[f"{kind}_tokens"]
        table.add_row(kind, *(f"{numbers[name]:,.{digits}f}" for name, digits in columns.items()))
    return table


def _title(stats: Mapping[str, Any]) -> str:
    form = f" ({stats['format']})" if stats["format"] else ""
    return f"{stats['name']}{form}: {stats['requests']:,} requests"


def _caption(stats: Mapping[str, Any]) -> str:
    if not stats["has_arrivals"]:
        return "lengths only: no arrival times"
    parts = [f"duration {stats['duration_s']:,.1f} s"]
    if stats["mean_rate"] is not None:
        parts.append(f"mean rate {stats['mean_rate']:.3g} requests/s")
    if stats["interarrival_cv"] is not None:
        parts.append(f"interarrival CV {stats['interarrival_cv']:.2f}")
    parts.append(f"peak {stats['peak_requests_per_minute']:,} requests in one minute")
    return "\n".join(parts)

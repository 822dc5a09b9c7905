"""What a workload is: requests with their lengths, arrival times, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

from neo.core.errors import InputError


class TraceRequest(NamedTuple):
    """One request of a workload. Times are in seconds, lengths in tokens.

    ``arrival_s`` counts from the workload's own zero. ``timeout_s`` (how long the client waits at most) and
    ``abort_s`` (when the client disconnects, finished or not) count from the arrival.

    A named tuple, not a dataclass: a trace has tens of thousands of rows, and this is cheaper to build.
    """

    id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    timeout_s: float | None = None
    abort_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, and how they were made.

    Attributes:
        name: short name for tables and plots, e.g. the trace's file name without its extension.
        requests: in order of arrival; never empty when it comes from this package.
        source: JSON-able description of how it was made (format, file, limit, arrivals, seed...).
        has_arrivals: False if the source gives lengths only. Every ``arrival_s`` is then 0 (all at once)
            until :func:`neo.workload.apply_arrivals` chooses an arrival process.
    """

    name: str
    requests: tuple[TraceRequest, ...]
    source: Mapping[str, Any]
    has_arrivals: bool = True

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def mean_rate(self) -> float | None:
        """Requests per second: the inverse of the mean interarrival time; None if all arrive at once."""
        return (len(self.requests) - 1) / self.span_s if self.span_s > 0 else None


def whole_number(what: str, value: object, least: int = 1) -> int:
    """The value as an int, numpy's integers included; InputError if it is not one or below ``least``."""
    try:
        number = -1 if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < least:
        kind = "positive" if least else "non-negative"
        raise InputError(f"{what}: expected a {kind} integer, got {value!r}")
    return number

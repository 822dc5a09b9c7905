"""Arrival processes: when the requests of a workload come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from neo.core.errors import InputError
from neo.workload.base import Workload, whole_number

ARRIVALS: dict[str, tuple[str, ...]] = {
    "recorded": (),
    "poisson": ("rate",),
    "gamma": ("rate", "cv"),
    "constant": ("rate",),
    "all-at-once": (),
}
"""Each process and the numbers it needs; ``recorded`` takes ``speedup`` or ``rate`` besides."""

MIN_CV, MAX_CV = 0.01, 100.0
"""Range of gamma's coefficient of variation: beyond, the draws degenerate to constants or to zeros."""


def apply_arrivals(
    workload: Workload,
    kind: str,
    rate: float | None = None,
    speedup: float | None = None,
    cv: float | None = None,
    seed: int = 0,
) -> Workload:
    """The same requests, with ids and order kept, arriving according to a process.

    ================ ==========================================================================
    ``recorded``     as in the trace; times divided by ``speedup``, or so that the mean is ``rate``
    ``poisson``      exponential interarrival times, mean 1/rate
    ``gamma``        gamma interarrival times, mean 1/rate, coefficient of variation ``cv``
    ``constant``     one request every 1/rate seconds
    ``all-at-once``  every request at 0
    ================ ==========================================================================

    In the generated processes the first request arrives at 0, and the n-1 interarrival times are drawn from
    ``numpy.random.Generator(PCG64(seed))``. Timeouts and aborts stay as they are: they belong to the client.

    Gamma: shape ``k = 1/cv**2``, scale ``theta = cv**2/rate``; the mean is ``k*theta = 1/rate``, the
    standard deviation over the mean ``1/sqrt(k) = cv``. ``cv = 1`` is Poisson, larger is burstier. (The gamma
    distribution's moments; as a model of request arrivals in serving: Li et al., "AlpaServe", OSDI 2023.)

    Args:
        workload: where the requests come from.
        kind: a name from ``ARRIVALS``.
        rate: mean rate in requests/s.
        speedup: factor by which recorded time runs faster; 2.0 halves every arrival time.
        cv: coefficient of variation of the interarrival times, dimensionless.
        seed: of ``poisson`` and ``gamma``.

    Raises:
        InputError: for an unknown process, or a number that is wrong, missing, or not used by it.
    """
    numbers = _numbers(kind, {"rate": rate, "speedup": speedup, "cv": cv})
    seed = whole_number("seed", seed, 0)
    made: dict[str, Any] = {"kind": kind, **numbers}
    n = len(workload)
    if kind == "recorded":
        times = _recorded(workload, numbers)
    elif kind in ("poisson", "gamma"):
        times = _gamma(n, numbers["rate"], numbers.get("cv", 1.0), seed)
        made["seed"] = seed
    elif kind == "constant":
        times = [number / numbers["rate"] for number in range(n)]
    else:
        times = [0.0] * n
    if times and not math.isfinite(times[-1]):
        raise InputError(f"arrivals '{kind}': the times overflow with these numbers; choose a larger rate")
    requests = tuple(
        request._replace(arrival_s=time) for request, time in zip(workload.requests, times, strict=True)
    )
    return Workload(workload.name, requests, dict(workload.source) | {"arrivals": made})


def _numbers(kind: str, given: Mapping[str, float | None]) -> dict[str, float]:
    """The numbers given for a process, each checked and used by it."""
    if kind not in ARRIVALS:
        raise InputError(f"unknown arrivals {kind!r}; known: {', '.join(ARRIVALS)}")
    for name in ARRIVALS[kind]:
        if given[name] is None:
            raise InputError(f"arrivals '{kind}' needs a {name}")
    used = ("rate", "speedup") if kind == "recorded" else ARRIVALS[kind]
    numbers: dict[str, float] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in used:
            raise InputError(f"arrivals '{kind}' takes no {name}, got {value!r}")
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        if not 0 < number < math.inf:
            raise InputError(f"{name}: expected a number above zero, got {value!r}")
        if name == "cv" and not MIN_CV <= number <= MAX_CV:
            raise InputError(f"cv: expected a number from {MIN_CV:g} to {MAX_CV:g}, got {value!r}")
        numbers[name] = number
    if "speedup" in numbers and "rate" in numbers:
        raise InputError(f"arrivals '{kind}' takes a rate or a speedup, not both")
    return numbers


def _recorded(workload: Workload, numbers: Mapping[str, float]) -> Sequence[float]:
    if not workload.has_arrivals:
        others = ", ".join(kind for kind in ARRIVALS if kind != "recorded")
        raise InputError(f"workload '{workload.name}' has no arrival times; choose arrivals from: {others}")
    times = [request.arrival_s for request in workload.requests]
    speedup = numbers.get("speedup", 1.0)
    if "rate" in numbers:
        mean_rate = workload.mean_rate
        if mean_rate is None:
            raise InputError(
                f"workload '{workload.name}': every request arrives at the same time, so no speedup gives "
                f"{numbers['rate']:g} requests/s; choose generated arrivals, e.g. 'poisson'"
            )
        speedup = numbers["rate"] / mean_rate
    return [time / speedup for time in times] if speedup > 0 else [math.inf] * len(times)  # underflow


def _gamma(n: int, rate: float, cv: float, seed: int) -> Sequence[float]:
    import numpy as np

    gaps = np.zeros(n)
    draw = np.random.Generator(np.random.PCG64(seed)).standard_gamma(1 / cv**2, size=max(n - 1, 0))
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is reported by the caller
        gaps[1:] = draw * (cv**2 / rate)
        times: list[float] = np.cumsum(gaps).tolist()
    return times

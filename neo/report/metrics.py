"""The metrics of a run, as ``summary.json`` gives them. Definitions: docs/results-format.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neo.core.errors import InputError
from neo.core.record import Mode, RunRecord
from neo.report.columns import Floats, Ints, RequestColumns, request_columns

PERCENTILES = (50.0, 90.0, 99.0)
LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s", "latency_per_output_token_s")
RESOURCES = ("gpu", "cpu", "h2d", "d2h")

# Below this number of completions, the paper's 30-70% completion throughput says nothing.
MIN_COMPLETIONS = 10


@dataclass(frozen=True, slots=True)
class SLO:
    """Service-level objective: a request is good if it finished within every limit given (seconds)."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> SLO:
        """Read the form ``ttft=2,tpot=100ms`` (seconds unless a unit, s or ms, is given).

        Raises:
            InputError: an unknown or repeated name, or a limit that is not a positive number.
        """
        limits: dict[str, float] = {}
        names = [f.name.removesuffix("_s") for f in fields(cls)]
        for part in text.split(","):
            name, equals, value = (p.strip() for p in part.partition("="))
            if not equals or name not in names:
                raise InputError(
                    f"SLO '{text}': expected name=seconds with {' or '.join(names)}, got '{part.strip()}'"
                )
            if f"{name}_s" in limits:
                raise InputError(f"SLO '{text}': {name} is given twice")
            limits[f"{name}_s"] = _seconds(text, name, value)
        return cls(**limits)

    def to_dict(self) -> dict[str, float]:
        """The limits that were given, by field name."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def met(self, columns: RequestColumns) -> NDArray[np.bool_]:
        """Per request, whether it finished within the limits. One token has no TPOT, and meets any."""
        good = columns.finished.copy()
        for name, limit in self.to_dict().items():
            good &= ~(getattr(columns, name) > limit)
        return good


def _seconds(text: str, name: str, value: str) -> float:
    scale = 1e-3 if value.endswith("ms") else 1.0
    try:
        seconds = float(value.removesuffix("ms").removesuffix("s")) * scale
    except ValueError:
        seconds = math.nan
    if not (0 < seconds < math.inf):
        raise InputError(f"SLO '{text}': {name} must be a positive number of seconds, got '{value}'")
    return seconds


def weighted_percentiles(values: Floats, counts: Ints, percents: Sequence[float]) -> list[float]:
    """Percentiles of ``np.repeat(values, counts)``, numpy's 'linear' definition, without expanding.

    Equal to ``np.percentile(np.repeat(values, counts), percents)`` in every bit: the same virtual index and
    the same interpolation formula are used.

    Args:
        values: shape (n,), any order.
        counts: shape (n,), how often each value occurs; at least one is positive.
        percents: 0..100.
    """
    order = np.argsort(values)
    ordered = values[order]
    cumulative = np.cumsum(counts[order])
    total = int(cumulative[-1])
    virtual = (total - 1) * (np.asarray(percents, dtype=np.float64) / 100.0)
    low = np.floor(virtual).astype(np.int64)
    t = virtual - low
    a = ordered[np.searchsorted(cumulative, low, side="right")]
    b = ordered[np.searchsorted(cumulative, np.minimum(low + 1, total - 1), side="right")]
    step = b - a
    result: list[float] = np.where(t >= 0.5, b - step * (1.0 - t), a + step * t).tolist()
    return result


def _statistics(mean: float | None, percentiles: Sequence[float | None]) -> dict[str, float | None]:
    return {"mean": mean, **{f"p{p:g}": v for p, v in zip(PERCENTILES, percentiles, strict=True)}}


def _summarize(values: Floats) -> dict[str, float | None]:
    """Mean and percentiles of the entries that are numbers; all None if there are none."""
    values = values[~np.isnan(values)]
    if not len(values):
        return _statistics(None, [None] * len(PERCENTILES))
    return _statistics(float(values.mean()), np.percentile(values, PERCENTILES).tolist())


def _summarize_itl(record: RunRecord) -> dict[str, float | None]:
    """Statistics of the gaps between tokens, each weighted by how many requests saw it."""
    gaps, seen_by = record.gaps()
    values, counts = np.array(gaps, dtype=np.float64), np.array(seen_by, dtype=np.int64)
    total = int(counts.sum())
    if total == 0:
        return _statistics(None, [None] * len(PERCENTILES))
    mean = float((values * counts).sum()) / total
    return _statistics(mean, weighted_percentiles(values, counts, PERCENTILES))


def completion_throughput(finish_s: Floats) -> float | None:
    """The NEO paper's offline throughput: 1 / mean gap of completions between their 30th and 70th percentile.

    Args:
        finish_s: when each completed request finished, seconds, any order.

    Returns:
        Requests per second; None below 10 completions or if those all fell on one instant.
    """
    n = len(finish_s)
    if n < MIN_COMPLETIONS:
        return None
    times = np.sort(finish_s)
    low, high = 3 * (n - 1) // 10, 7 * (n - 1) // 10
    seconds = float(times[high] - times[low])
    return (high - low) / seconds if seconds > 0 else None


def count_decisions(record: RunRecord) -> dict[str, int]:
    """Steps by mode: ``{"gpu-only": n, "cpu-sequential": n, "pipelined": n, "streamed": n, ...}``."""
    mode = np.array(record.columns.mode, dtype=np.int64)
    steps = np.array(record.columns.steps, dtype=np.int64)
    return {m.name.lower().replace("_", "-"): int(steps[mode == m].sum()) for m in Mode}


def count_requests(record: RunRecord) -> dict[str, int]:
    """``{"submitted", "completed", "rejected", "aborted"}``; what is missing to submitted never ended."""
    states = [r.state.value for r in record.requests]
    return {
        "submitted": len(states),
        "completed": states.count("finished"),
        "rejected": states.count("rejected"),
        "aborted": states.count("aborted"),
    }


def compute_metrics(
    record: RunRecord,
    slo: SLO | None = None,
    drop_first: float = 0.0,
    columns: RequestColumns | None = None,
) -> dict[str, Any]:
    """The ``metrics`` object of ``summary.json``: plain Python values, None where nothing was measured.

    Only requests that finished count, in throughput and latency alike.

    Args:
        record: the run.
        slo: adds ``goodput`` (requests/s), ``goodput_fraction`` (of the submitted) and ``slo``.
        drop_first: share (0..1) of the requests, by arrival, left out of the request latencies, as warm-up.
            ITL is recorded per step and keeps the whole run; throughput and goodput do too.
        columns: ``request_columns(record)``, if the caller has it already.

    Raises:
        InputError: ``drop_first`` is not in [0, 1).
    """
    if not 0.0 <= drop_first < 1.0:
        raise InputError(f"drop_first must be at least 0 and below 1, got {drop_first:g}")
    columns = columns if columns is not None else request_columns(record)
    done = columns.finished
    duration = record.end_s - record.start_s
    decisions = count_decisions(record)
    measured = done.copy()
    measured[: int(drop_first * len(done))] = False

    metrics: dict[str, Any] = {"duration_s": float(duration), **_throughput(columns, duration)}
    for name in LATENCIES:
        metrics[name] = (
            _summarize_itl(record) if name == "itl_s" else _summarize(getattr(columns, name)[measured])
        )
    metrics |= {
        "preemptions": int(record.preemptions),
        "steps": sum(decisions.values()),
        "steps_pipelined": decisions["pipelined"],
        "steps_relayed": decisions["relayed"],
        "bytes_h2d": int(record.bytes_h2d),
        "bytes_d2h": int(record.bytes_d2h),
        "utilization": _utilization(record, duration),
        "decisions": decisions,
        "completion_throughput_30_70": completion_throughput(columns.finish_s[done]),
    }
    if record.bubbles is not None:
        metrics["bubbles"] = {resource: dict(causes) for resource, causes in record.bubbles.items()}
    if drop_first:
        metrics["drop_first"] = float(drop_first)
    if slo is not None:
        good = int(slo.met(columns).sum())
        metrics["goodput"] = good / duration if duration > 0 else None
        metrics["goodput_fraction"] = good / len(done) if len(done) else None
        metrics["slo"] = slo.to_dict()
    return metrics


def _throughput(columns: RequestColumns, duration: float) -> dict[str, float | None]:
    done = columns.finished
    inputs, outputs = int(columns.prompt_tokens[done].sum()), int(columns.generated[done].sum())
    amounts = {
        "request_throughput": int(done.sum()),
        "input_token_throughput": inputs,
        "output_token_throughput": outputs,
        "total_token_throughput": inputs + outputs,
    }
    return {name: amount / duration if duration > 0 else None for name, amount in amounts.items()}


def _utilization(record: RunRecord, duration: float) -> Mapping[str, float | None]:
    """Share of the run's duration in which each resource worked."""
    busy = {name: float(np.array(getattr(record.columns, f"busy_{name}")).sum()) for name in RESOURCES}
    return {name: seconds / duration if duration > 0 else None for name, seconds in busy.items()}

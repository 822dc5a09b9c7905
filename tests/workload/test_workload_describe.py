"""Statistics of workloads."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from neo.core.errors import InputError
from neo.workload import TraceRequest, Workload, describe, read_trace, render, synthetic


def _workload(times: list[float], lengths: list[int] | None = None) -> Workload:
    lengths = lengths or [10] * len(times)
    rows = zip(times, lengths, strict=True)
    return Workload(
        "w[bold]", tuple(TraceRequest(str(i), t, k, 2 * k) for i, (t, k) in enumerate(rows)), {"format": "x"}
    )


def _shown(workload: Workload) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(render(describe(workload)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_small_workload_by_hand() -> None:
    stats = describe(_workload([0.0, 10.0, 30.0, 60.0, 69.0], [1, 2, 3, 4, 10]))
    assert stats == {
        "name": "w[bold]",
        "format": "x",
        "requests": 5,
        "has_arrivals": True,
        "duration_s": 69.0,
        "mean_rate": pytest.approx(4 / 69),
        "interarrival_cv": pytest.approx(np.std([10, 20, 30, 9]) / 17.25),
        "peak_requests_per_minute": 4,
        "prompt_tokens": {"total": 20, "mean": 4.0, "p50": 3, "p90": 7.6, "p99": 9.76, "max": 10},
        "output_tokens": {"total": 40, "mean": 8.0, "p50": 6, "p90": 15.2, "p99": 19.52, "max": 20},
    }
    json.dumps(stats)


_halves = st.integers(0, 2000).map(lambda half: half / 2)  # so that sums of times are exact


@given(st.lists(st.tuples(_halves, st.integers(1, 10**7)), min_size=1, max_size=60))
def test_statistics_agree_with_numpy(rows: list[tuple[float, int]]) -> None:
    times, lengths = sorted(time for time, _ in rows), [length for _, length in rows]
    stats = describe(_workload(times, lengths))
    for percent in (50, 90, 99):
        assert stats["prompt_tokens"][f"p{percent}"] == pytest.approx(np.percentile(lengths, percent))
    assert stats["prompt_tokens"]["mean"] == pytest.approx(np.mean(lengths))
    peak = max(sum(start <= time < start + 60 for time in times) for start in times)
    assert stats["peak_requests_per_minute"] == peak
    gaps = np.diff(times)
    if times[-1] > times[0]:
        assert stats["mean_rate"] == pytest.approx(1 / gaps.mean())
        assert stats["interarrival_cv"] == pytest.approx(gaps.std() / gaps.mean())
    json.dumps(stats, allow_nan=False)


def test_all_at_once_has_no_rate() -> None:
    stats = describe(_workload([2.0, 2.0]))
    assert (stats["duration_s"], stats["mean_rate"], stats["interarrival_cv"]) == (0.0, None, None)
    assert stats["peak_requests_per_minute"] == 2
    assert "peak 2 requests in one minute" in _shown(_workload([2.0, 2.0]))


def test_lengths_only_says_so() -> None:
    workload = synthetic("fixed:5", "fixed:6", 3)
    stats = describe(workload)
    assert [stats[key] for key in ("duration_s", "mean_rate", "interarrival_cv")] == [None] * 3
    assert stats["peak_requests_per_minute"] is None
    assert "lengths only: no arrival times" in _shown(workload)


def test_the_table_shows_the_numbers_and_no_markup() -> None:
    shown = _shown(_workload([0.0, 10.0, 20.0], [1000, 2000, 3000]))
    for part in (
        "w[bold] (x): 3 requests",
        "6,000",
        "12,000",
        "2,000.0",
        "mean rate 0.1 requests/s",
        "CV 0.00",
    ):
        assert part in shown


def test_no_requests_is_an_error() -> None:
    with pytest.raises(InputError, match="workload 'none' has no requests"):
        describe(Workload("none", (), {}))


@pytest.mark.traces
def test_the_azure_conversation_trace(traces_dir: Path) -> None:
    stats = describe(read_trace(traces_dir / "AzureLLMInferenceTrace_conv.csv"))
    assert stats["requests"] == 19366
    assert stats["duration_s"] == pytest.approx(3501.721937)
    assert stats["prompt_tokens"]["p50"] == 1020
    assert stats["output_tokens"]["max"] == 1000

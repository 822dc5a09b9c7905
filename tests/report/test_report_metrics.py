from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_builders import add_row, make_request, synthetic_run

from neo.core.errors import InputError
from neo.core.record import Mode, RunRecord
from neo.core.request import FinishReason, State
from neo.report.columns import spread
from neo.report.metrics import LATENCIES, SLO, completion_throughput, compute_metrics, weighted_percentiles

FIELDS = [
    "duration_s",
    "request_throughput",
    "input_token_throughput",
    "output_token_throughput",
    "total_token_throughput",
    "ttft_s",
    "tpot_s",
    "itl_s",
    "e2e_s",
    "latency_per_output_token_s",
    "preemptions",
    "steps",
    "steps_pipelined",
    "steps_relayed",
    "bytes_h2d",
    "bytes_d2h",
    "utilization",
    "decisions",
    "completion_throughput_30_70",
]


@given(
    pairs=st.lists(
        st.tuples(
            st.one_of(st.floats(0, 1e3), st.sampled_from([0.0, 0.1, 0.25])),
            st.integers(0, 50),
        ),
        min_size=1,
        max_size=60,
    ).filter(lambda pairs: any(count for _, count in pairs)),
    percents=st.lists(st.floats(0, 100), min_size=1, max_size=5),
)
def test_weighted_percentiles_equal_the_expanded_ones_in_every_bit(
    pairs: list[tuple[float, int]], percents: list[float]
) -> None:
    values = np.array([v for v, _ in pairs])
    counts = np.array([c for _, c in pairs])
    wanted = np.percentile(np.repeat(values, counts), percents).tolist()
    assert weighted_percentiles(values, counts, percents) == wanted


def percentile(values: list[float], p: float) -> float:
    """The 'linear' definition, written out."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * p / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def check_statistics(found: dict[str, float], values: list[float]) -> None:
    assert list(found) == ["mean", "p50", "p90", "p99"]
    assert found["mean"] == pytest.approx(sum(values) / len(values))
    for p in (50, 90, 99):
        assert found[f"p{p}"] == pytest.approx(percentile(values, p), rel=1e-12)


def test_against_the_definitions() -> None:
    record = synthetic_run(300, seed=3)
    record.requests[7].state = State.ABORTED
    record.requests[9].generated = 1
    record.requests[9].last_token_s = record.requests[9].first_token_s
    record.preemptions, record.bytes_h2d = 5, 77
    metrics = compute_metrics(record)
    assert list(metrics) == FIELDS
    done = [r for r in record.requests if r.state is State.FINISHED]
    assert len(done) == 299
    duration = record.end_s - record.start_s
    prompt, output = sum(r.prompt_tokens for r in done), sum(r.generated for r in done)
    assert metrics["duration_s"] == duration
    assert metrics["request_throughput"] == pytest.approx(299 / duration)
    assert metrics["input_token_throughput"] == pytest.approx(prompt / duration)
    assert metrics["output_token_throughput"] == pytest.approx(output / duration)
    assert metrics["total_token_throughput"] == pytest.approx((prompt + output) / duration)
    check_statistics(metrics["ttft_s"], [r.first_token_s - r.arrival_s for r in done])
    several = [r for r in done if r.generated >= 2]
    assert len(several) < len(done)
    check_statistics(
        metrics["tpot_s"], [(r.last_token_s - r.first_token_s) / (r.generated - 1) for r in several]
    )
    check_statistics(metrics["e2e_s"], [r.finish_s - r.arrival_s for r in done])
    check_statistics(
        metrics["latency_per_output_token_s"], [(r.finish_s - r.arrival_s) / r.generated for r in done]
    )
    gaps = np.repeat(record.itl_values, record.itl_counts).tolist()
    check_statistics(metrics["itl_s"], gaps)
    columns = record.columns
    assert metrics["steps"] == sum(columns.steps) == sum(metrics["decisions"].values())
    pipelined = sum(n for n, mode in zip(columns.steps, columns.mode, strict=True) if mode == Mode.PIPELINED)
    assert metrics["steps_pipelined"] == metrics["decisions"]["pipelined"] == pipelined > 0
    relayed = sum(n for n, mode in zip(columns.steps, columns.mode, strict=True) if mode == Mode.RELAYED)
    assert metrics["steps_relayed"] == metrics["decisions"]["relayed"] == relayed
    assert list(metrics["decisions"]) == ["gpu-only", "cpu-sequential", "pipelined", "streamed", "relayed"]
    assert list(metrics["utilization"]) == ["gpu", "cpu", "h2d", "d2h"]
    for name, share in metrics["utilization"].items():
        assert share == pytest.approx(sum(getattr(columns, f"busy_{name}")) / duration)
    assert metrics["preemptions"] == 5
    assert metrics["bytes_h2d"] == 77
    json.dumps(metrics, allow_nan=False)


def test_nothing_to_measure_is_null() -> None:
    metrics = compute_metrics(RunRecord(), SLO(ttft_s=1.0))
    nothing = {"mean": None, "p50": None, "p90": None, "p99": None}
    for name in LATENCIES:
        assert metrics[name] == nothing
    assert metrics["request_throughput"] is None
    assert metrics["utilization"] == {"gpu": None, "cpu": None, "h2d": None, "d2h": None}
    assert metrics["completion_throughput_30_70"] is None
    assert metrics["goodput"] is None
    assert metrics["goodput_fraction"] is None


def test_a_request_of_one_token_has_no_tpot() -> None:
    record = RunRecord(requests=[make_request(0, tokens=1)], end_s=1.0)
    metrics = compute_metrics(record)
    assert metrics["tpot_s"]["mean"] is None
    assert metrics["ttft_s"]["mean"] == metrics["e2e_s"]["p99"] == 0.5


def test_requests_that_did_not_finish_count_nowhere() -> None:
    rejected = make_request(1, tokens=0, state=State.REJECTED, finish_reason=FinishReason.REJECTED)
    aborted = make_request(2, arrival=5.0, tokens=50, state=State.ABORTED)
    running = make_request(3, tokens=4, state=State.DECODE, finish_s=None)
    alone = RunRecord(requests=[make_request(0)], end_s=10.0)
    together = RunRecord(requests=[*alone.requests, rejected, aborted, running], end_s=10.0)
    assert compute_metrics(together) == compute_metrics(alone)


def test_drop_first_goes_by_arrival() -> None:
    requests = [make_request(i, arrival=10.0 - i) for i in range(10)]
    for r in requests[7:]:  # the earliest three
        r.first_token_s = r.arrival_s + 100.0
    record = RunRecord(requests=requests, end_s=200.0)
    assert compute_metrics(record)["ttft_s"]["p99"] > 99
    metrics = compute_metrics(record, SLO(e2e_s=50.0), drop_first=0.3)
    assert metrics["ttft_s"]["p99"] == pytest.approx(0.5)
    assert metrics["drop_first"] == 0.3
    assert metrics["request_throughput"] == 10 / 200.0  # latencies only
    assert metrics["goodput"] == 10 / 200.0
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match="drop_first"):
            compute_metrics(record, drop_first=bad)


def test_goodput_needs_every_limit() -> None:
    good = make_request(0, tokens=11)  # TTFT 0.5, TPOT 0.1, E2E 1.5
    slow = make_request(1, tokens=11, first_token_s=1.2)
    single = make_request(2, tokens=1)
    aborted = make_request(3, state=State.ABORTED)
    record = RunRecord(requests=[good, slow, single, aborted], end_s=4.0)
    metrics = compute_metrics(record, SLO(ttft_s=1.0, tpot_s=0.11, e2e_s=2.0))
    assert metrics["goodput"] == 2 / 4.0
    assert metrics["goodput_fraction"] == 2 / 4
    assert metrics["slo"] == {"ttft_s": 1.0, "tpot_s": 0.11, "e2e_s": 2.0}
    assert compute_metrics(record, SLO(tpot_s=0.05))["goodput"] == 2 / 4.0  # slow's TPOT is 0.03
    assert "goodput" not in compute_metrics(record)


def test_completion_throughput_of_the_middle() -> None:
    times = [0.0] * 30 + [float(i) / 4 for i in range(41)] + [1000.0] * 30
    rng = np.random.default_rng(0)
    assert completion_throughput(rng.permutation(times)) == pytest.approx(4.0)
    assert completion_throughput(np.arange(9.0)) is None
    assert completion_throughput(np.arange(10.0)) == pytest.approx(1.0)
    assert completion_throughput(np.zeros(50)) is None


def test_slo_is_parsed() -> None:
    assert SLO.parse("ttft=2,tpot=0.1") == SLO(ttft_s=2.0, tpot_s=0.1)
    assert SLO.parse(" tpot = 50ms , e2e=30s") == SLO(tpot_s=0.05, e2e_s=30.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "ttft or tpot or e2e"),
        ("ttft", "got 'ttft'"),
        ("itl=1", "got 'itl=1'"),
        ("ttft=1,,tpot=1", "got ''"),
        ("ttft=1,ttft=2", "given twice"),
        ("ttft=fast", "positive number of seconds, got 'fast'"),
        ("ttft=-1", "positive"),
        ("ttft=0", "positive"),
        ("ttft=nan", "positive"),
        ("ttft=inf", "positive"),
    ],
)
def test_a_bad_slo_is_one_clear_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as e:
        SLO.parse(text)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


rows = st.lists(
    st.tuples(st.floats(0, 100), st.sampled_from([0.0, 1e-9, 0.3, 7.0, 55.5]) | st.floats(0, 40)),
    min_size=1,
    max_size=40,
)


@given(rows=rows, bins=st.integers(1, 60))
def test_bins_conserve_what_they_share_out(rows: list[tuple[float, float]], bins: int) -> None:
    start = np.array([s for s, _ in rows])
    end = start + np.array([d for _, d in rows])
    busy = np.arange(1.0, len(rows) + 1)
    edges = np.linspace(start.min(), max(end.max(), start.min() + 1), bins + 1)
    shared = spread(start, end, edges)
    total = shared.total(busy)
    assert total.sum() == pytest.approx(busy.sum(), rel=1e-6)
    for b in range(bins):  # the definition, one bin and one row at a time
        seconds = 0.0
        for s, e, v in zip(start, end, busy, strict=True):
            if e > s:
                seconds += v * max(0.0, min(e, edges[b + 1]) - max(s, edges[b])) / (e - s)
        instants = busy[
            (start == end) & (np.clip(np.searchsorted(edges, start, "right") - 1, 0, bins - 1) == b)
        ]
        assert total[b] == pytest.approx(seconds + instants.sum(), abs=1e-6)


def test_bins_of_a_row_that_spans_them() -> None:
    edges = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    shared = spread(np.array([0.5]), np.array([3.0]), edges)
    assert shared.total(np.array([5.0])).tolist() == [1.0, 2.0, 2.0, 0.0]
    assert shared.occupied().tolist() == [0.5, 1.0, 1.0, 0.0]
    assert shared.mean(np.array([5.0])).tolist() == [5.0, 5.0, 5.0, 0.0]
    assert shared.peak(np.array([5.0])).tolist() == [5.0, 5.0, 5.0, 0.0]


def test_bins_without_rows() -> None:
    shared = spread(np.array([]), np.array([]), np.linspace(0, 1, 4))
    assert shared.total(np.array([])).tolist() == [0.0] * 3
    assert shared.peak(np.array([])).tolist() == [0.0] * 3


def test_add_row_fills_every_column() -> None:
    record = RunRecord()
    add_row(record, 0.0, 1.0, steps=3, mode=Mode.STREAMED)
    assert compute_metrics(record)["decisions"]["streamed"] == 3

"""Errors of a simulator against a run: recomputed here from a few numbers; limits and the picture."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest

from neo.core.errors import InputError
from neo.core.logreader import RequestRow, read_requests
from neo.core.record import RunRecord
from neo.core.replayed import Divergence, Replay
from neo.core.request import FinishReason, Request, State
from neo.report.validation import (
    errors_of,
    exceeded,
    labels,
    measured_metrics,
    op_errors,
    parse_limits,
    relative_error,
    spread_of,
    step_errors,
    validation,
    validation_tables,
)
from neo.report.validation_plots import plot_validation

SUMMARY = {
    "kind": "measured",
    "policy": "neo",
    "model": "llama-3.1-8b",
    "hardware": "g5.16xlarge",
    "metrics": {"duration_s": 10.0},
    "interrupted": None,
}


def replay(factor: float = 1.1, divergence: Divergence | None = None) -> Replay:
    found = Replay(equal=3, logged=4, divergence=divergence)
    for seconds in (0.1, 0.2, 0.4):
        found.steps.add(seconds * factor, seconds)
    found.ops = {("PRE", 0): type(found.steps)(), ("HEAD", -1): type(found.steps)()}
    found.ops["PRE", 0].add(1.0, 2.0)
    found.ops["PRE", 0].add(4.0, 2.0)
    found.ops["HEAD", -1].add(0.5, 0.0)
    return found


def rows() -> dict[str, RequestRow]:
    reason = FinishReason.LENGTH
    done = [
        RequestRow(2, "a", 1.0, 5, 3, 0.5, 0.25, 1.0, reason),
        RequestRow(3, "b", 2.0, 5, 1, 1.5, None, 8.0, reason),
    ]
    aborted = RequestRow(4, "c", 3.0, 5, 2, 9.0, 9.0, None, FinishReason.ABORT)
    return {r.id: r for r in (*done, aborted)}


def record(scale: float = 1.0) -> RunRecord:
    """The requests of ``rows`` with every time after the arrival ``scale`` times as long."""
    requests = []
    for row in rows().values():
        if row.e2e_s is None:
            continue
        first = row.arrival_s + scale * (row.ttft_s or 0.0)
        last = first + scale * (row.tpot_s or 0.0) * (row.output_tokens - 1)
        r = Request(row.id, row.prompt_tokens, row.output_tokens, row.arrival_s, state=State.FINISHED)
        r.generated, r.first_token_s, r.last_token_s = row.output_tokens, first, last
        r.finish_s = row.arrival_s + scale * row.e2e_s
        requests.append(r)
    return RunRecord(requests=requests, start_s=1.0, end_s=1.0 + 10.0 * scale)


def result(name: str = "run", factor: float = 1.1, scale: float = 1.0, **more: Any) -> dict[str, Any]:
    return validation(name, SUMMARY, "roofline", replay(factor, **more), rows(), 0, record(scale))


def test_step_errors_are_relative_to_what_was_measured() -> None:
    found = step_errors(replay(1.1).steps)
    assert found["median"] == found["p90"] == pytest.approx(0.1)
    assert found["mean"] == found["total"] == pytest.approx(0.1)
    assert found["measured_s"] == pytest.approx(0.7)
    mixed = Replay().steps
    for predicted, measured in ((1.5, 1.0), (0.5, 1.0), (3.0, 0.0)):
        mixed.add(predicted, measured)
    found = step_errors(mixed)
    assert (found["median"], found["mean"], found["total"]) == (0.5, 0.0, 1.5)
    assert step_errors(Replay().steps)["median"] is None


def test_operations_have_an_error_of_their_total_and_one_of_their_steps() -> None:
    head, pre = op_errors(replay().ops)
    assert (pre["op"], pre["sub_batch"], pre["predicted_s"], pre["measured_s"]) == ("PRE", 0, 5.0, 4.0)
    assert (pre["total_error"], pre["mean_error"]) == (0.25, 0.75)
    assert (head["sub_batch"], head["mean_error"], head["total_error"]) == (None, None, None)


def test_relative_error_says_nothing_where_nothing_was_measured() -> None:
    assert relative_error(1.0, 0.0) is None
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(None, 1.0) is relative_error(1.0, None) is None


def test_measured_metrics_count_completed_requests_only() -> None:
    found = measured_metrics(rows(), 10.0)
    assert found["request_throughput"] == 0.2
    assert found["output_token_throughput"] == 0.4
    assert found["ttft_s"]["mean"] == 1.0
    assert found["tpot_s"] == {"mean": 0.25, "p50": 0.25, "p99": 0.25}
    assert measured_metrics(rows(), None)["duration_s"] == 9.0, "first arrival to last completion"
    assert measured_metrics({}, None)["request_throughput"] is None


def test_equal_runs_have_no_error_and_longer_ones_theirs() -> None:
    errors = errors_of(result(factor=1.0))
    assert {name for name, e in errors.items() if e != 0} == set()
    errors = errors_of(result(scale=2.0))
    for name in ("ttft_mean", "ttft_p99", "tpot_mean", "e2e_p99", "duration"):
        assert errors[name] == pytest.approx(1.0), name
    assert errors["request_throughput"] == errors["output_throughput"] == pytest.approx(-0.5)


def test_repeats_have_a_mean_and_a_spread() -> None:
    assert spread_of([result()]) == {}
    found = spread_of([result(factor=1.1), result(factor=1.3)])["step_total"]
    assert found["mean"] == pytest.approx(0.2)
    assert found["stdev"] == pytest.approx(math.sqrt(0.02))
    assert (found["min"], found["max"]) == (pytest.approx(0.1), pytest.approx(0.3))


def test_limits_hold_for_each_run_and_either_sign() -> None:
    limits = parse_limits("throughput=0.4, ttft=1.5,step_p90=0.2")
    assert limits == {"throughput": 0.4, "ttft": 1.5, "step_p90": 0.2}
    assert exceeded([result()], limits) == []
    lines = exceeded([result("one"), result("two", scale=2.0)], limits)
    assert [line.split(" is ")[0] for line in lines] == ["two: request_throughput", "two: output_throughput"]
    assert "-50.0%, more than 40.0%" in lines[0]
    nothing = validation("none", SUMMARY, "roofline", Replay(), {}, 3, None)
    assert exceeded([nothing], {"tpot": 9.0}) == ["none: tpot_mean could not be compared (limit 900.0%)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("thruput=0.1", "expected name=share, got 'thruput=0.1', did you mean 'throughput'"),
        ("ttft", "expected name=share, got 'ttft'"),
        ("ttft=much", "ttft must be a share such as 0.1, got 'much'"),
        ("ttft=-1", "ttft must be a share"),
        ("ttft=nan", "ttft must be a share"),
        ("ttft=1,ttft=2", "ttft is given twice"),
        ("", "expected name=share"),
    ],
)
def test_limits_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_limits(text)


def test_tables_show_errors_divergence_and_operations() -> None:
    from rich.console import Console

    console = Console(width=140, record=True, file=io.StringIO())
    runs = [result("one"), result("two", divergence=Divergence(4, 9, "x"))]
    for part in validation_tables(runs):
        console.print(part)
    text = console.export_text()
    assert "3 of 4, then diverged" in text
    assert "+10.0%" in text
    assert "PRE" in text
    assert "+25.0%" in text


def test_labels_hold_no_absolute_path_and_tell_runs_apart() -> None:
    assert labels(["out/a", "/somewhere/b"]) == ["a", "b"]
    assert labels(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert labels(["/x/run", "/y/run"]) == ["run #1", "run #2"]


@pytest.mark.parametrize("runs", [1, 2])
def test_the_plot_is_drawn_the_same_way_twice(tmp_path: Path, runs: int) -> None:
    pytest.importorskip("matplotlib")
    results, replays = [result(f"r{i}") for i in range(runs)], [replay(1 + 0.1 * i) for i in range(runs)]
    paths = plot_validation(results, replays, tmp_path / "a")
    assert [p.name for p in paths] == ["validation.svg", "validation.png"]
    for path, again in zip(paths, plot_validation(results, replays, tmp_path / "b"), strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert path.stat().st_size > 5000


def test_a_plot_of_nothing_is_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nothing = validation("none", SUMMARY, "roofline", Replay(), {}, 3, None)
    assert all(p.stat().st_size for p in plot_validation([nothing], [Replay()], tmp_path))


HEADER = "request_id,arrival_s,prompt_tokens,output_tokens,ttft_s,tpot_s,e2e_s,finish_reason\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("request_id,arrival_s\n", r"requests\.csv:1: columns missing: prompt_tokens"),
        (HEADER + "a,0,1,1,,,,length\na,0,1,1,,,,length\n", r":3: .*'a' was in line 2 already"),
        (HEADER + "a,soon,1,1,,,,length\n", r":2: malformed row .*soon"),
        (HEADER + "a,0,1,1,,,,tired\n", r":2: .*expected one of length, .*'tired'"),
        (HEADER + "a,0,1,1,,,inf,length\n", r":2: .*inf is not a time"),
        (HEADER + "a,0\n", r":2: malformed row"),
    ],
)
def test_malformed_requests_are_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "requests.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_requests(path)
    assert "\n" not in str(caught.value)

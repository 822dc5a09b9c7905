from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from report_builders import LAYERS, make_request, meta, synthetic_run

from neo import __version__
from neo.core.errors import InputError
from neo.core.record import RunRecord
from neo.core.request import FinishReason, State
from neo.report.files import (
    REQUEST_FIELDS,
    build_summary,
    portable_command,
    read_run,
    read_summary,
    run_result,
    write_run,
)
from neo.report.metrics import SLO, compute_metrics

SUMMARY = {
    "neo": str,
    "kind": str,
    "policy": str,
    "policy_options": dict,
    "model": str,
    "hardware": str,
    "workload": dict,
    "seed": int,
    "requests": dict,
    "metrics": dict,
    "tensor_parallel": int,
    "cost_model": str,
    "limits": dict,
    "kv_capacity": dict,
    "warnings": list,
    "interrupted": type(None),
    "command": list,
    "wall_time_s": float,
}


def test_summary_field_by_field(tmp_path: Path) -> None:
    record = synthetic_run(60)
    about = meta(
        cost_model="roofline",
        policy_options={"b": 2, "a": float("inf")},
        warnings=("extrapolated",),
        command=("simulate", "--trace", "/data/azure.csv", "--out", "/tmp/x", "--policy=neo"),
        wall_time_s=1.5,
    )
    returned = write_run(tmp_path / "new" / "dir", record, about, SLO(ttft_s=1.0))
    summary = read_summary(tmp_path / "new" / "dir")
    assert summary == returned == json.loads((tmp_path / "new" / "dir" / "summary.json").read_text("utf-8"))
    assert {k: type(v) for k, v in summary.items()} == SUMMARY
    assert list(summary) == list(SUMMARY)
    assert summary["neo"] == __version__
    assert summary["kind"] == "simulated"
    assert list(summary["policy_options"].items()) == [("a", None), ("b", 2)]
    assert summary["requests"] == {"submitted": 60, "completed": 60, "rejected": 0, "aborted": 0}
    assert summary["metrics"] == compute_metrics(record, SLO(ttft_s=1.0))
    assert summary["kv_capacity"] == {
        "gpu": {"layer_blocks": 600 * LAYERS, "tokens": 9600},
        "cpu": {"layer_blocks": 3000 * LAYERS, "tokens": 48000},
    }
    assert summary["command"] == ["simulate", "--trace", "azure.csv", "--policy=neo"]
    assert sorted(p.name for p in (tmp_path / "new" / "dir").iterdir()) == ["requests.csv", "summary.json"]


def test_a_measured_run_says_what_ran_it(tmp_path: Path) -> None:
    engine = {"executor": "cpu", "library": "/opt/lib/libneo_cpu.so", "kv_bytes": {"gpu": np.int64(7)}}
    summary = write_run(tmp_path, synthetic_run(5), meta(kind="measured", engine=engine))
    assert summary["kind"] == "measured"
    assert summary["engine"] == {"executor": "cpu", "library": "libneo_cpu.so", "kv_bytes": {"gpu": 7}}
    assert "engine" not in build_summary(synthetic_run(5), meta())


def test_requests_csv(tmp_path: Path) -> None:
    odd = make_request(2, arrival=0.5, tokens=3, preemptions=2, cpu_steps=1)
    odd.id = 'a,"b"'
    rejected = make_request(
        1, arrival=1.0, tokens=0, state=State.REJECTED, finish_reason=FinishReason.REJECTED,
        first_token_s=None, last_token_s=None, finish_s=1.0,
    )  # fmt: skip
    running = make_request(3, arrival=1.5, tokens=2, state=State.DECODE, finish_reason=None, finish_s=None)
    single = make_request(0, arrival=2.0, tokens=1)
    record = RunRecord(requests=[single, running, rejected, odd], end_s=9.0, interrupted="Ctrl-C")
    summary = write_run(tmp_path, record, meta())
    assert summary["interrupted"] == "Ctrl-C"
    assert summary["requests"] == {"submitted": 4, "completed": 2, "rejected": 1, "aborted": 0}
    with (tmp_path / "requests.csv").open(newline="") as f:
        header, *lines = list(csv.reader(f))
    assert tuple(header) == REQUEST_FIELDS
    assert [line[0] for line in lines] == ['a,"b"', "r1", "r3", "r0"]  # by arrival
    assert lines[0] == [
        'a,"b"', "0.5", "10", "3", "0.5", repr((1.0 + 0.1 * 2 - 1.0) / 2), repr(1.2 - 0.5), "length",
        "2", "1",
    ]  # fmt: skip
    assert lines[1] == ["r1", "1.0", "10", "0", "", "", "", "rejected", "0", "0"]
    assert lines[2][4:8] == ["0.5", repr(lines_tpot(running)), "", ""]
    assert lines[3][3:8] == ["1", "0.5", "", "0.5", "length"]


def lines_tpot(request) -> float:  # type: ignore[no-untyped-def]
    return (request.last_token_s - request.first_token_s) / (request.generated - 1)


def test_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    for name, seconds in (("a", 1.25), ("b", 99.0)):
        about = meta(wall_time_s=seconds, command=("simulate", "--out", name, f"--out={tmp_path}"))
        write_run(tmp_path / name, synthetic_run(80, seed=5), about, SLO(ttft_s=1))
    assert (tmp_path / "a/requests.csv").read_bytes() == (tmp_path / "b/requests.csv").read_bytes()
    a, b = ((tmp_path / n / "summary.json").read_bytes() for n in "ab")
    assert a != b
    assert a.replace(b'"wall_time_s": 1.25', b'"wall_time_s": 99.0') == b


def test_no_absolute_path_and_no_numpy_value_gets_in(tmp_path: Path) -> None:
    workload = {
        "name": "/data/t.csv",
        "n": np.int64(3),
        "set": {2, 1},
        "x": np.float64("nan"),
        "path": tmp_path,
    }
    summary = build_summary(RunRecord(), meta(workload=workload, model="/models/m/config.json"))
    assert summary["model"] == "config.json"
    assert summary["workload"] == {"name": "t.csv", "n": 3, "set": [1, 2], "x": None, "path": tmp_path.name}
    assert portable_command(["a", "--out"]) == ["a"]
    assert portable_command(["--model=/x/y.json", "/z"]) == ["--model=y.json", "z"]
    json.dumps(summary, allow_nan=False)


def test_numbers_that_are_none_are_written_as_null(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    described = {"a": [1.5, nan, {"b": -inf}], nan: np.float32("inf"), "l": np.longdouble("nan"), "t": (inf,)}
    record = synthetic_run(5)
    record.end_s = inf
    about = meta(cost_model=described, limits={"x": nan}, workload={"rate": inf}, wall_time_s=nan)
    summary = write_run(tmp_path, record, about)
    assert read_summary(tmp_path) == summary
    assert summary["cost_model"] == {"a": [1.5, None, {"b": None}], "nan": None, "l": None, "t": [None]}
    assert (summary["limits"], summary["workload"]) == ({"x": None}, {"rate": None})
    assert summary["wall_time_s"] is None
    assert summary["metrics"]["duration_s"] is None


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    record = synthetic_run(70)
    record.requests[3].state = State.ABORTED
    write_run(tmp_path, record, meta())
    read, made = read_run(tmp_path), run_result(record, meta())
    assert read.summary == made.summary
    assert len(made.e2e_s) == 69
    for name in ("ttft_s", "e2e_s", "latency_per_output_token_s"):
        assert getattr(read, name).tolist() == getattr(made, name).tolist()


def test_an_empty_run_is_written_and_read_back(tmp_path: Path) -> None:
    write_run(tmp_path, RunRecord(), meta())
    assert len(read_run(tmp_path).ttft_s) == 0


def test_unreadable_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*summary\.json"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(InputError, match="lacks neo, kind"):
        read_summary(tmp_path / "summary.json")
    write_run(tmp_path, synthetic_run(5), meta())
    path = tmp_path / "requests.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3].replace(lines[3].split(",")[4], "soon"), ""]))
    with pytest.raises(InputError, match=r"requests\.csv, line 4: malformed"):
        read_run(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*requests\.csv"):
        read_run(tmp_path)


def test_a_directory_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write") as e:
        write_run(tmp_path / "file", RunRecord(), meta())
    assert "\n" not in str(e.value)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_run(tmp_path, synthetic_run(5), meta())
    before = (tmp_path / "summary.json").read_bytes()
    with pytest.raises(TypeError):
        write_run(tmp_path, synthetic_run(5), meta(seed=object()))
    assert (tmp_path / "summary.json").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]

"""``neo validate`` draws steps twice: as they were measured, and as the cost model has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("torch", reason="the engine needs torch")

from tiny_toml import TINY_TOML

from neo.cli.bench import bench
from neo.cli.simulate import simulate
from neo.cli.validate import validate
from neo.core.errors import InputError
from neo.report.timelines import read_timeline, telling_step

LOAD = ["--prompt-lengths", "uniform:4:60", "--output-lengths", "fixed:6", "--requests", "6"]
KV = ["--kv-gpu-blocks", "40", "--kv-cpu-blocks", "90", "--max-seqs", "16", "--hardware", "g4dn.4xlarge"]
STEPS = 5
NOTHING = ("SEND", "RECV")  # both tiers are host memory: the engine on a processor moves nothing

app = typer.Typer(pretty_exceptions_enable=False)
for command in (bench, simulate, validate):
    app.command(command.__name__)(command)


def neo(*arguments: str | Path) -> str:
    found = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "140"})
    if isinstance(found.exception, InputError):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured, with every operation of its first steps, CPU attention among them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.toml").write_text(TINY_TOML.replace("layers = 2", "layers = 3"))
    start = ["bench", "--model", folder / "tiny.toml", *LOAD, *KV, "--quiet", "--no-plots", "--device", "cpu"]
    neo(*start, "-p", "fastdecode", "--timeline", str(STEPS), "--out", folder / "run")
    return folder / "run"


def operations(trace: Mapping[str, Any], pid: int) -> list[tuple[int, str, Any, Any]]:
    """(step, kind, layer, sub-batch) of each operation of a process."""
    events = [e["args"] for e in trace["traceEvents"] if e["pid"] == pid and "op" in e["args"]]
    return sorted((a["step"], a["op"], a["layer"] or -1, a["sub_batch"] or -1) for a in events)


def test_both_sides_have_the_same_operations(run: Path, tmp_path: Path) -> None:
    neo("validate", run, "--out", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("validation.json", "validation.svg", "validation.png"),
        *("timelines.json", "timelines.svg", "timelines.png"),
    }
    trace = json.loads((tmp_path / "timelines.json").read_text())
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert names == {1: "measured", 2: "predicted"}
    measured, predicted = (operations(trace, pid) for pid in names)
    assert measured == [op for op in predicted if op[1] not in NOTHING]
    assert {step for step, *_ in measured} == set(range(STEPS))
    assert "CPU_ATTN" in {kind for _, kind, *_ in measured}
    tracks = [
        {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name" and e["pid"] == pid}
        for pid in names
    ]
    assert {"steps", "GPU", "CPU attention", "host (scheduler)"} <= tracks[0] <= tracks[1]
    steps = {(e["pid"], e["name"]): e["ts"] for e in trace["traceEvents"] if e.get("cat") == "STEP"}
    for i in range(STEPS):  # each step is predicted from when it began
        assert steps[2, f"step {i}"] == pytest.approx(steps[1, f"step {i}"], abs=2e3)
    picture = (tmp_path / "timelines.svg").read_text()
    for word in ("measured", "predicted", "CPU attention", "fastdecode"):
        assert word in picture


def test_a_predicted_step_is_as_long_as_it_is_said_to_be(run: Path, tmp_path: Path) -> None:
    neo("validate", run, "--out", tmp_path, "--no-plots")
    assert {p.name for p in tmp_path.iterdir()} == {"validation.json", "timelines.json"}
    events = json.loads((tmp_path / "timelines.json").read_text())["traceEvents"]
    predicted = [e["dur"] * 1e-6 for e in events if e["pid"] == 2 and e.get("cat") == "STEP"]
    assert len(predicted) == STEPS
    total = json.loads((tmp_path / "validation.json").read_text())["runs"][0]["steps"]
    assert 0 < sum(predicted) < total["predicted_s"]


def test_a_step_and_layers_of_ones_choice(run: Path, tmp_path: Path) -> None:
    neo("validate", run, "--out", tmp_path, "--step", "2", "--layers", "1-2")
    picture = (tmp_path / "timelines.svg").read_text()
    assert "step 2 · layers 1 to 2 · measured" in picture
    for arguments, words in (
        (["--step", "7"], r"no timeline of step 7 \(measured\)"),
        (["--step", "2", "--layers", "8"], "no timeline of step 2 in layers 8 to 8"),
        (["--layers", "2-1"], "--layers 2-1: expected layers, as 10-12 or 3"),
        (["--layers", "a"], "--layers a: expected layers"),
    ):
        with pytest.raises(InputError, match=words):
            neo("validate", run, "--out", tmp_path, *arguments)
    with pytest.raises(InputError, match="what is drawn into --out"):
        neo("validate", run, "--step", "2")


def test_a_simulation_is_predicted_exactly(tmp_path: Path) -> None:
    start = ["simulate", *LOAD, *KV, "--model", "stories42m", "--quiet", "--no-plots", "-p", "fastdecode"]
    neo(*start, "--timeline", "3", "--out", tmp_path / "run")
    neo("validate", tmp_path / "run", "--out", tmp_path / "run", "--no-plots")
    mine, theirs = (
        [[e[k] for k in ("name", "ts", "dur", "tid")] for e in trace if e["ph"] == "X" and e["pid"] == pid]
        for trace in [json.loads((tmp_path / "run" / "timelines.json").read_text())["traceEvents"]]
        for pid in (1, 2)
    )
    assert mine == theirs
    assert len(mine) > 100
    before = read_timeline(tmp_path / "run" / "timeline.json")
    assert telling_step(before) in {0, 1, 2}


def test_runs_without_a_timeline(tmp_path: Path) -> None:
    start = ["simulate", *LOAD, *KV, "--model", "stories42m", "--quiet", "--no-plots", "-p", "gpu-only"]
    neo(*start, "--out", tmp_path / "run")
    neo("validate", tmp_path / "run", "--out", tmp_path / "out", "--no-plots")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"validation.json"}
    with pytest.raises(InputError, match=r"no run has a timeline\.json"):
        neo("validate", tmp_path / "run", "--out", tmp_path / "out", "--step", "0")
    for text in ("", "[]", "{}", '{"traceEvents": 3}', '{"traceEvents": [{"ph": "X"}]}', "\x00"):
        (tmp_path / "run" / "timeline.json").write_text(text)
        with pytest.raises(InputError, match=r"timeline\.json: no timeline of neo"):
            neo("validate", tmp_path / "run", "--out", tmp_path / "out")
    event = '{"ph": "X", "cat": "PRE", "args": {"op": "PRE", "step": 0, "layer": 0, "sub_batch": 0}'
    for more in ("", ', "ts": "a"', ', "ts": 1, "dur": 1, "tid": 99', ', "ts": 1e999, "dur": 1, "tid": 1'):
        (tmp_path / "run" / "timeline.json").write_text(f'{{"traceEvents": [{event}{more}}}]}}')
        with pytest.raises(InputError, match=r"timeline\.json: no timeline of neo"):
            neo("validate", tmp_path / "run", "--out", tmp_path / "out")

"""``neo validate`` on runs of ``neo simulate``: no divergence, no error; and of anything else: why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from neo.cli.simulate import simulate
from neo.cli.validate import validate
from neo.core.errors import InputError
from neo.core.logreader import LogReader
from neo.sim.header import systems_of
from neo.sim.replay import replay_log

app = typer.Typer(pretty_exceptions_enable=False)
app.command("simulate")(simulate)
app.command("validate")(validate)

WORKLOAD = [
    "--prompt-lengths",
    "uniform:4:300",
    "--output-lengths",
    "uniform:1:60",
    "--requests",
    "25",
    "--rate",
    "5",
]
SYSTEM = ["--kv-gpu-blocks", "60", "--kv-cpu-blocks", "90", "--max-seqs", "16"]


def neo(*arguments: str | Path, code: int = 0) -> str:
    """Standard output of a command; an InputError passes through."""
    found = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "140"})
    if isinstance(found.exception, InputError):
        raise found.exception
    assert found.exit_code == code, found.output
    return found.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("one", ["--seed", "1", "--timeout", "4"]), ("two", ["--seed", "2"])):
        neo("simulate", "-q", "--no-plots", "--out", folder / name, *WORKLOAD, *SYSTEM, *more)
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A run to spoil."""
    return Path(shutil.copytree(runs / "one", tmp_path / "run"))


def report(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(neo("validate", "--json", *arguments, code=code))
    return found


def test_simulations_validate_without_divergence_and_without_error(runs: Path) -> None:
    found = report(
        runs / "one", runs / "two", "--max-error", "throughput=0,ttft=0,tpot=0,e2e=0,step=0,step_total=0"
    )
    assert found["failures"] == []
    for run in found["runs"]:
        assert run["decisions"]["divergence"] is None
        assert run["decisions"]["equal"] == run["decisions"]["logged"] > 20
        assert run["requests"] == {"compared": 25, "left_out": 0}
        assert run["notes"] == []
        for metric in run["end_to_end"].values():
            assert metric["error"] == 0.0
            assert metric["predicted"] == metric["measured"]
        assert (run["steps"]["p90"], run["steps"]["total"]) == (0.0, 0.0)
    assert found["spread"]["ttft_p99"] == {"mean": 0.0, "stdev": 0.0, "min": 0.0, "max": 0.0}


def test_every_policy_and_level_validates(tmp_path: Path) -> None:
    policies = ["-p", "gpu-only", "-p", "fastdecode", "-p", "neo"]
    neo("simulate", "-q", "--no-plots", "--level", "op", "--out", tmp_path, *policies, *WORKLOAD, *SYSTEM)
    found = report(*sorted(tmp_path.iterdir()))
    assert [run["decisions"]["divergence"] for run in found["runs"]] == [None] * 3
    for run in found["runs"]:
        assert abs(run["end_to_end"]["e2e_p99"]["error"]) < 1e-9, "both levels agree"


def test_the_tables_and_files(runs: Path, tmp_path: Path) -> None:
    text = neo("validate", runs / "one", "--out", tmp_path / "a", "--no-plots")
    assert "no decision diverges" in text
    assert "TTFT mean" in text
    neo("validate", runs / "one", "--out", tmp_path / "b", "--no-plots")
    first, second = ((tmp_path / x / "validation.json").read_bytes() for x in "ab")
    assert first == second
    assert str(tmp_path).encode() not in first
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["validation.json"]


def test_the_plot_is_written(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    neo("validate", runs / "one", runs / "two", "--out", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"validation.json", "validation.svg", "validation.png"}


def test_a_slower_cost_model_is_off_and_exceeds_a_limit(runs: Path) -> None:
    slow = ["--cost", "roofline", "--cost-opt", "matmul_efficiency=0.2"]
    found = report(runs / "two", *slow)
    errors = found["runs"][0]["end_to_end"]
    assert errors["tpot_mean"]["error"] > 0.2
    assert errors["request_throughput"]["error"] < 0
    assert found["runs"][0]["decisions"]["divergence"] is None, "decisions keep the run's own cost model"
    found = report(runs / "two", *slow, "--max-error", "tpot=0.1", code=1)
    assert len(found["failures"]) == 1
    assert found["failures"][0].startswith("two: tpot_mean is off by +")


def test_a_diverging_decision_is_told_and_exits_with_1(run: Path) -> None:
    lines = (run / "steps.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"steps":1,' in line and i > 20 and '"prefill"' in line)
    record = json.loads(lines[at])
    batch = next(b for b in record["batches"] if "prefill" in b)
    batch["prefill"][0][2] += 1
    lines[at] = json.dumps(record)
    (run / "steps.jsonl").write_text("\n".join(lines) + "\n")
    text = neo("validate", run, code=1)
    assert "then diverged" in text
    assert f"(run/steps.jsonl:{at + 1})" in " ".join(text.split())
    found = report(run, code=1)["runs"][0]
    assert found["decisions"]["divergence"]["line"] == at + 1
    assert found["end_to_end"]["ttft_mean"]["error"] == 0.0, "the free simulation asks no log"


def test_an_interrupted_run_validates_as_far_as_it_goes(run: Path) -> None:
    lines = (run / "steps.jsonl").read_text().splitlines(keepends=True)
    text = "".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20]
    (run / "steps.jsonl").write_text(text)
    ended = _ended_in(run / "steps.jsonl")
    rows = (run / "requests.csv").read_text().splitlines()
    kept = [
        r if r.split(",")[0] in ended else ",".join((*r.split(",")[:4], "", "", "", "", "0", "0"))
        for r in rows[1:]
    ]
    (run / "requests.csv").write_text("\n".join([rows[0], *kept]) + "\n")
    with pytest.raises(InputError, match=r"steps\.jsonl:\d+: the log is cut off in this line"):
        neo("validate", run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"interrupted": "terminated"}))
    found = report(run)["runs"][0]
    assert found["decisions"]["divergence"] is None
    assert found["requests"] == {"compared": len(ended), "left_out": 25 - len(ended)}
    assert (
        "the run was interrupted (terminated): validated up to there; the log is cut off" in found["notes"][0]
    )
    assert "had not ended; they are left out" in found["notes"][1]


def _ended_in(log: Path) -> set[str]:
    """Requests that a replay of this beginning of a log ends."""
    reader = LogReader(log)
    decided, _, _ = systems_of(reader.header, "log:1", log.parent)
    _, journal = replay_log(reader, decided, decided.cost, {})
    return {r.id for r in journal.requests.values() if r.done}


def test_a_log_that_ends_too_early_is_an_error(run: Path) -> None:
    lines = (run / "steps.jsonl").read_text().splitlines(keepends=True)
    (run / "steps.jsonl").write_text("".join(lines[:-3]))
    with pytest.raises(InputError, match=rf"steps\.jsonl:{len(lines) - 3}: the log ends here, and request"):
        neo("validate", run)


@pytest.mark.parametrize("name", ["summary.json", "requests.csv", "steps.jsonl"])
def test_a_missing_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        neo("validate", run)


@pytest.mark.parametrize("kept", [0, 12])
def test_a_cut_off_requests_file_is_refused(run: Path, kept: int) -> None:
    path = run / "requests.csv"
    path.write_text("\n".join(path.read_text().splitlines()[: 1 + kept]) + "\n")
    with pytest.raises(InputError, match=r"requests\.csv: holds no request '.*', .*the file is cut off"):
        neo("validate", run)


def test_requests_of_another_run_are_refused(run: Path, runs: Path) -> None:
    shutil.copy(runs / "two" / "requests.csv", run)
    with pytest.raises(InputError, match=r"requests\.csv:\d+: request '\d+' (has|ended)"):
        neo("validate", run)


def test_no_directory_and_a_cost_option_without_a_cost_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        neo("validate", tmp_path / "nothing")
    with pytest.raises(InputError, match="--cost-opt needs --cost"):
        neo("validate", tmp_path, "--cost-opt", "a=1")

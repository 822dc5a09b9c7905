"""``--cost calibrated:BASE``: it learns in the engine, its log replays, and the simulator refuses it."""

from __future__ import annotations

import json
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
from neo.cost.calibrated import PARTS
from neo.cost.loading import load_cost_model
from neo.cost.presets import load_hardware, load_model
from neo.cost.tabulate import tabulate
from neo.report.files import read_run

JUMPY = '''
from neo.policy.gpu_only import GpuOnly, GpuOnlyOptions
from neo.core.graph import OpKind, Work


class Jumpy:
    """Its budget of tokens hangs on the last digits of a price: no other price gives the same plans."""

    def plan(self, view, cost):
        digits = int(cost.seconds(OpKind.PRE, Work(64)) * 1e12)
        return GpuOnly(GpuOnlyOptions("chunked", 24 + digits % 41)).plan(view, cost)
'''
LOAD = ["--prompt-lengths", "uniform:4:90", "--output-lengths", "uniform:1:30", "--requests", "40"]
KV = ["--kv-gpu-blocks", "40", "--kv-cpu-blocks", "90", "--max-seqs", "16", "--hardware", "g4dn.4xlarge"]

app = typer.Typer(pretty_exceptions_enable=False)
for command in (bench, simulate, validate):
    app.command(command.__name__)(command)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "tiny.toml").write_text(TINY_TOML)
    (folder / "jumpy.py").write_text(JUMPY)
    model = load_model(str(folder / "tiny.toml"))
    base = load_cost_model("roofline", model, load_hardware("g4dn.4xlarge"))
    (folder / "table.json").write_text(json.dumps(tabulate(base, model)))
    return folder


def neo(*arguments: str | Path, code: int = 0) -> str:
    found = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "140"})
    if isinstance(found.exception, InputError):
        raise found.exception
    assert found.exit_code == code, found.output
    return found.stdout


def measured(files: Path, out: Path, cost: str, *arguments: str) -> list[dict[str, Any]]:
    """The lines of the log of a run on the engine."""
    start = ["bench", "--model", files / "tiny.toml", *LOAD, *KV, "--quiet", "--no-plots", "--device", "cpu"]
    neo(*start, "--cost", cost, "--out", out, *arguments)
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def validated(run: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(neo("validate", "--json", run, *arguments, code=code))["runs"][0]
    return found


@pytest.mark.parametrize("ahead", ["--ahead", "--no-ahead"])
@pytest.mark.parametrize("policy", ["neo", "fastdecode", "jumpy"])
def test_decisions_replay_with_the_factors_that_they_were_made_with(
    files: Path, tmp_path: Path, policy: str, ahead: str
) -> None:
    spec = f"{files / 'jumpy.py'}:Jumpy" if policy == "jumpy" else policy
    log = measured(files, tmp_path / "run", "calibrated:roofline", "-p", spec, ahead)
    changes = [line["cost"] for line in log if "cost" in line]
    assert len(changes) > 2
    assert set(changes[-1]) == set(PARTS)
    described = read_run(tmp_path / "run").summary["cost_model"]
    assert described["factors"] == changes[-1]
    assert described["base"]["cost_model"] == "roofline"
    where = ["--policy", spec] if policy == "jumpy" else []
    found = validated(tmp_path / "run", *where)
    assert found["decisions"]["divergence"] is None
    assert found["decisions"]["equal"] == found["decisions"]["logged"] > 10
    assert any("factors at the end: host" in note for note in found["notes"])
    if policy == "jumpy":  # without the factors in the log it could not be replayed
        bare = [json.dumps({k: v for k, v in line.items() if k != "cost"}) for line in log]
        (tmp_path / "run" / "steps.jsonl").write_text("\n".join(bare) + "\n")
        assert validated(tmp_path / "run", *where, code=1)["decisions"]["divergence"] is not None


def test_a_run_can_be_held_against_a_corrected_model_afterwards(files: Path, tmp_path: Path) -> None:
    """It learns from the log as the run would have; how well it then predicts is tested in tests/cost."""
    table = files / "table.json"
    measured(files, tmp_path / "run", f"profiled:{table}", "-p", "fastdecode")
    corrected = validated(tmp_path / "run", "--cost", f"calibrated:profiled:{table}")
    assert corrected["decisions"]["divergence"] is None
    assert corrected["cost_model"] == "calibrated:profiled:table.json"
    assert corrected["steps"]["count"] > 10


def test_the_table_stays_with_the_run(files: Path, tmp_path: Path) -> None:
    log = measured(files, tmp_path / "run", f"calibrated:profiled:{files / 'table.json'}", "-p", "neo")
    assert log[0]["cost_model"] == "calibrated:profiled:table.json"
    assert (tmp_path / "run" / "table.json").exists()
    assert validated(tmp_path / "run")["decisions"]["divergence"] is None


def test_a_log_with_other_factors_is_refused(files: Path, tmp_path: Path) -> None:
    log = measured(files, tmp_path / "run", "calibrated:roofline", "-p", "gpu-only")
    at = next(i for i, line in enumerate(log) if "cost" in line)
    for cost, words in (
        ({"gpu": 1.0}, "unknown part 'gpu'"),
        ({"cpu": 0}, "cost, cpu: expected a factor, got 0"),
        ({"cpu": "fast"}, "expected a factor"),
        ([1.0], "cost: expected an object"),
    ):
        lines = [json.dumps({**line, "cost": cost} if i == at else line) for i, line in enumerate(log)]
        (tmp_path / "run" / "steps.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(InputError, match=rf"steps\.jsonl:{at + 1}: .*{words}"):
            validated(tmp_path / "run")


def test_the_simulator_has_nothing_to_learn_from(tmp_path: Path) -> None:
    start = ["simulate", "--requests", "2", "--prompt-lengths", "fixed:9", "--output-lengths", "fixed:2"]
    with pytest.raises(InputError, match=r"a simulation has not; use --cost profiled:t\.json"):
        neo(*start, "--cost", "calibrated:profiled:t.json")
    with pytest.raises(InputError, match=r"use --cost roofline"):
        neo(*start, "--cost", "calibrated")

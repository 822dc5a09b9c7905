"""``neo bench`` as a user meets it: its files, its errors, and that its decisions are the simulator's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("torch", reason="the engine needs torch")

from tiny_toml import TINY_TOML

from neo.cli.bench import bench
from neo.cli.engine_options import cores_of
from neo.cli.validate import validate
from neo.core.errors import InputError, NeoError
from neo.policy.registry import policy_names
from neo.report.files import read_run

KV = ["--kv-gpu-blocks", "40", "--kv-cpu-blocks", "90", "--max-seqs", "24"]
SMALL = ["--prompt-lengths", "uniform:4:100", "--output-lengths", "uniform:1:20", "--requests", "16"]

app = typer.Typer(pretty_exceptions_enable=False)
app.command("bench")(bench)
app.command("validate")(validate)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.toml"
    path.write_text(TINY_TOML)
    return str(path)


def neo(*arguments: str | Path, code: int = 0) -> str:
    """Standard output of a command; an error meant for people passes through."""
    found = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "140"})
    if isinstance(found.exception, NeoError):
        raise found.exception
    assert found.exit_code == code, found.output
    return found.stdout


def run(model: str, *arguments: str | Path) -> str:
    return neo("bench", "--model", model, *KV, "--quiet", "--no-plots", *arguments)


def summaries(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def mixed_trace(path: Path) -> Path:
    """Requests that overlap, some of whose clients give up at once or soon, and one that is too long."""
    rows: list[dict[str, Any]] = []
    for i in range(40):
        row = {
            "id": f"r{i}",
            "arrival_s": i * 0.003,
            "prompt_tokens": 3 + 37 * i % 110,
            "output_tokens": 1 + i,
        }
        if i % 9 == 3:
            row["timeout_s"] = 0.02
        if i % 11 == 5:
            row["abort_s"] = 0.0
        rows.append(row)
    rows.append({"id": "long", "arrival_s": 0.121, "prompt_tokens": 5000, "output_tokens": 5})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_it_writes_what_simulate_writes(model: str, tmp_path: Path) -> None:
    out = tmp_path / "o"
    shown = neo(
        *("bench", "--model", model, *KV, *SMALL, "-p", "gpu-only", "-p", "neo", "--rate", "200"),
        *("--timeline", "2", "--slo", "ttft=60", "--drop-first", "0.25", "--out", out),
    )
    assert "gpu-only" in shown
    assert "goodput" in shown
    for policy in ("gpu-only", "neo"):
        names = {p.name for p in (out / policy).iterdir()}
        assert {
            "summary.json",
            "requests.csv",
            "steps.jsonl",
            "timeline.json",
            "latency.svg",
            "kv.png",
        } <= names
        summary = read_run(out / policy).summary
        assert summary["kind"] == "measured"
        assert summary["requests"] == {"submitted": 16, "completed": 16, "rejected": 0, "aborted": 0}
        assert summary["hardware"].startswith("cpu-")
        assert summary["engine"]["executor"] == "cpu"
        assert summary["engine"]["load_format"] == "dummy"
        assert summary["metrics"]["goodput_fraction"] == 1.0
        assert any("neo profile" in w for w in summary["warnings"])
        header = json.loads((out / policy / "steps.jsonl").read_text().partition("\n")[0])
        assert header["zero"] == 0
        assert header["engine"]["dtype"] == "float32"
        assert header["max_model_len"] == 128
        events = json.loads((out / policy / "timeline.json").read_text())["traceEvents"]
        assert {e["args"]["step"] for e in events if "op" in e.get("args", {})} == {0, 1}
    assert (out / "comparison.svg").exists()


@pytest.mark.parametrize("ahead", ["--ahead", "--no-ahead"])
@pytest.mark.parametrize("policy", policy_names())
def test_no_decision_differs_from_the_simulators(model: str, tmp_path: Path, policy: str, ahead: str) -> None:
    trace = mixed_trace(tmp_path / "t.jsonl")
    run(model, "--trace", trace, "-p", policy, ahead, "--max-model-len", "200", "--out", tmp_path / "o")
    report = json.loads(neo("validate", "--json", tmp_path / "o"))
    (found,) = report["runs"]
    assert report["failures"] == []
    assert found["decisions"]["divergence"] is None
    assert found["decisions"]["equal"] == found["decisions"]["logged"] > 10
    rows = dict(line.split(",", 1) for line in (tmp_path / "o" / "requests.csv").read_text().splitlines())
    assert rows["long"].split(",")[6] == "rejected"
    assert {rows[f"r{i}"].split(",")[6] for i in (5, 16, 27, 38)} == {"abort"}
    ended = {row.split(",")[6] for row in rows.values()}
    assert ended <= {"finish_reason", "length", "abort", "timeout", "rejected"}
    warnings = read_run(tmp_path / "o").summary["warnings"]
    assert "1 requests rejected: longer than --max-model-len 200" in warnings


def test_random_weights_take_the_longest_request(model: str) -> None:
    (summary,) = summaries(
        run(
            model, "--prompt-lengths", "fixed:300", "--output-lengths", "fixed:5", "--requests", "2", "--json"
        )
    )
    assert summary["requests"]["completed"] == 2
    assert summary["engine"]["max_model_len"] == 305


def test_torch_alone_is_said_to_be_slow(model: str) -> None:
    arguments = ["bench", "--model", model, *KV, *SMALL, "--backend", "torch", "--json", "--no-warmup"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "note: attention on the CPU is done by torch, slowly" in found.stderr
    (summary,) = summaries(found.stdout)
    assert any("slowly" in w for w in summary["warnings"])
    assert summary["engine"]["backend"]["kind"] == "torch"
    assert summary["engine"]["warmup"] is False


def test_token_ids_of_the_trace(model: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    row = {"prompt_tokens": 3, "output_tokens": 2, "prompt_token_ids": [1, 2, 255]}
    path.write_text(json.dumps(row) + "\n")
    (summary,) = summaries(run(model, "--trace", path, "--token-ids", "trace", "--json"))
    assert summary["engine"]["token_ids"] == "trace"
    path.write_text(json.dumps(row | {"prompt_token_ids": [1, 2, 256]}) + "\n")
    with pytest.raises(InputError, match=r"t\.jsonl:1: .* 256 is no token of a vocabulary of 256"):
        run(model, "--trace", path, "--token-ids", "trace")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no workload"),
        ([*SMALL, "--model", "stories42"], "stories42"),
        ([*SMALL, "--dtype", "int9"], "dtype 'int9' is not one of"),
        ([*SMALL, "--load-format", "safetensors"], "tiny.toml"),
        ([*SMALL, "-p", "ne"], "unknown policy 'ne'"),
        ([*SMALL, "--hardware", "nope"], "unknown hardware 'nope'"),
        ([*SMALL, "--cost", "profiled:none.json"], "none.json"),
        ([*SMALL, "--kv-gpu-blocks", "40000000"], r"GiB .* are available"),
        ([*SMALL, "--kv-gpu-bytes", "1GB"], "give one"),
        ([*SMALL, "--block-size", "12"], "--block-size 12: the kernels take 8, 16, 32"),
        ([*SMALL, "--cpu-cores", "0-"], "expected core numbers"),
        ([*SMALL, "--cpu-cores", "0", "--cpu-threads", "2"], "1 given for 2 threads"),
        ([*SMALL, "--timeline", "3"], "--out"),
        ([*SMALL, "--slo", "ttft=fast"], "ttft=fast"),
        ([*SMALL, "--timeout", "-1"], "--timeout -1"),
        ([*SMALL, "--token-ids", "trace"], "needs --trace"),
    ],
)
def test_bad_input_is_told_in_one_line(model: str, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        run(model, *arguments)
    assert "\n" not in str(told.value)


def test_core_lists() -> None:
    assert cores_of("0") == (0,)
    for wrong in ("", "a", "0,0", "1-0", "0-99999999", "-1", "999999"):
        with pytest.raises(InputError, match="--cpu-cores"):
            cores_of(wrong)


def test_what_ran_before_a_broken_plan_is_kept(model: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from neo.core.plan import StepPlan, SubBatch\n"
        "from neo.policy.gpu_only import GpuOnly\n"
        "class Breaks(GpuOnly):\n"
        "    def plan(self, view, cost):\n"
        "        if any(r.generated > 5 for r in view.gpu_decodes):\n"
        "            return StepPlan((SubBatch(cpu_decode=view.gpu_decodes),))\n"
        "        return super().plan(view, cost)\n"
    )
    with pytest.raises(NeoError, match="rule 'residency'"):
        run(model, *SMALL, "-p", f"{tmp_path}/mine.py:Breaks", "--out", tmp_path / "o")
    summary = read_run(tmp_path / "o").summary
    assert "residency" in summary["interrupted"]
    assert summary["requests"]["submitted"] == 16 > summary["requests"]["completed"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_partial_results(
    model: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    endless = ["--prompt-lengths", "fixed:20", "--output-lengths", "uniform:1:40", "--requests", "100000"]
    command = [sys.executable, "-m", "neo", "bench", "--model", model, *KV, *endless, "--rate", "200"]
    process = subprocess.Popen(
        [*command, "--quiet", "--no-plots", "--out", "o"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    log = tmp_path / "o" / "steps.jsonl"
    for _ in range(1200):
        if log.exists():
            break
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "partial results" in errors
    assert "Traceback" not in errors
    summary = read_run(tmp_path / "o").summary
    assert summary["interrupted"]
    assert summary["requests"]["submitted"] == 100000
    assert 0 < summary["requests"]["completed"] < 100000
    report = json.loads(neo("validate", "--json", tmp_path / "o"))  # what there is of the log is whole
    assert report["runs"][0]["decisions"]["divergence"] is None

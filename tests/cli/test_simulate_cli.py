"""``neo simulate`` as a user meets it: real processes, real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    "--prompt-lengths",
    "uniform:10:400",
    "--output-lengths",
    "uniform:1:60",
    "--requests",
    "60",
    "--rate",
    "4",
]
POLICY = """
from neo.core.plan import PrefillChunk, StepPlan, SubBatch

class TooManyTokens:
    def plan(self, view, cost):
        return StepPlan((SubBatch(tuple(PrefillChunk(r, 0, r.known + 1) for r in view.waiting)),))

class Raises:
    def plan(self, view, cost):
        return StepPlan() if view.now < 1 else 1 / 0

class Lazy:
    def plan(self, view, cost):
        return StepPlan()

class NoPlan:
    pass
"""


def neo(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "neo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def test_comparison_writes_everything_it_promises(tmp_path: Path) -> None:
    done = neo(
        "simulate", *SMALL, "-p", "gpu-only", "-p", "neo", "--kv-gpu-blocks", 60, "--out", "o", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "gpu-only" in done.stdout
    assert "neo" in done.stdout
    for policy in ("gpu-only", "neo"):
        names = {p.name for p in (tmp_path / "o" / policy).iterdir()}
        assert {"summary.json", "requests.csv", "steps.jsonl", "latency.svg", "kv.png", "batch.svg"} <= names
        summary = json.loads((tmp_path / "o" / policy / "summary.json").read_text())
        assert summary["requests"] == {"submitted": 60, "completed": 60, "rejected": 0, "aborted": 0}
        assert summary["kind"] == "simulated"
    assert (tmp_path / "o" / "comparison.svg").exists()


def test_two_runs_are_byte_identical(tmp_path: Path) -> None:
    for out in ("a", "b"):
        done = neo("simulate", *SMALL, "--seed", 7, "--kv-gpu-blocks", 60, "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for path in sorted((tmp_path / "a").iterdir()):
        one, two = path.read_bytes(), (tmp_path / "b" / path.name).read_bytes()
        if path.name == "summary.json":
            one, two = (b"\n".join(x for x in t.split(b"\n") if b"wall_time_s" not in x) for t in (one, two))
        assert one == two, path.name


def test_timeline_has_every_operation_with_its_layer_and_sub_batch(tmp_path: Path) -> None:
    done = neo(
        "simulate", *SMALL, "--kv-gpu-blocks", 60, "--timeline", 3, "--no-plots", "-o", "o", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "o" / "timeline.json").read_text())["traceEvents"]
    ops = [e for e in events if e.get("ph") == "X" and "op" in e.get("args", {})]
    posts = [e for e in ops if e["args"]["op"] == "POST"]
    assert {e["args"]["layer"] for e in posts} == set(range(32))
    assert {e["args"]["step"] for e in ops} == {0, 1, 2}


def test_json_and_python_m(tmp_path: Path) -> None:
    done = neo("simulate", *SMALL, "--json", "--slo", "ttft=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["goodput"] > 0


def test_repeating_steps_changes_nothing_but_time(tmp_path: Path) -> None:
    for flag in ("--repeat", "--no-repeat"):
        done = neo("simulate", *SMALL, flag, "--no-plots", "-o", flag.strip("-"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / d / "requests.csv").read_bytes() for d in ("repeat", "no-repeat"))
    assert one == two
    metrics = [
        json.loads((tmp_path / d / "summary.json").read_text())["metrics"] for d in ("repeat", "no-repeat")
    ]
    assert metrics[0] == metrics[1]


def test_rejected_and_timed_out_requests_are_reported(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [
        {"id": "fits", "arrival_s": 0, "prompt_tokens": 100, "output_tokens": 5},
        {"id": "too-long", "arrival_s": 0.1, "prompt_tokens": 5000, "output_tokens": 5},
        {"id": "gives-up", "arrival_s": 0.2, "prompt_tokens": 100, "output_tokens": 800, "timeout_s": 0.5},
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    done = neo(
        "simulate",
        "--trace",
        trace,
        "-p",
        "gpu-only",
        "--kv-gpu-blocks",
        100,
        "-o",
        "o",
        "--no-plots",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "o" / "requests.csv").read_text().splitlines()
    assert [line.split(",")[7] for line in table[1:]] == ["length", "rejected", "timeout"]
    log = [json.loads(line) for line in (tmp_path / "o" / "steps.jsonl").read_text().splitlines()]
    assert {r["id"]: r["reason"] for r in log if r["type"] == "end"} == {
        "too-long": "rejected",
        "gives-up": "timeout",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no workload"),
        (["--trace", "missing.csv"], "missing.csv"),
        (["--trace", "bad.csv"], "bad.csv:3: field ContextTokens"),
        ([*SMALL, "-p", "ne"], "unknown policy 'ne', did you mean"),
        ([*SMALL, "--hardware", "h10"], "did you mean 'h100'"),
        ([*SMALL, "--model", "llama-3-8b"], "did you mean"),
        ([*SMALL, "--cost", "rooflin"], "did you mean 'roofline'"),
        ([*SMALL, "--cost-opt", "matmul_eficiency=0.5"], "did you mean 'matmul_efficiency'"),
        ([*SMALL, "--policy-opt", "token_buget=5"], "did you mean 'token_budget'"),
        ([*SMALL, "--policy-opt", "token_budget=five"], "token_budget=five"),
        ([*SMALL, "--policy-opt", "prefill=half"], "prefill=half"),
        ([*SMALL, "--policy-opt", "nonsense"], "expected key=value"),
        ([*SMALL, "--kv-gpu-bytes", "lots"], "expected a size"),
        ([*SMALL, "--kv-gpu-bytes", "1kB"], "holds 0 blocks"),
        ([*SMALL, "--kv-gpu-bytes", "1GB", "--kv-gpu-blocks", "3"], "give one"),
        ([*SMALL, "--rate", "-1"], "rate"),
        ([*SMALL, "--slo", "ttft=fast"], "ttft=fast"),
        ([*SMALL, "--tp", "2"], "GPU"),
        ([*SMALL, "--model", "llama-3.1-70b", "--hardware", "g4dn.4xlarge"], "does not fit"),
        ([*SMALL, "--timeline", "3"], "--out"),
        ([*SMALL, "--out", "a-file/x"], "a-file"),
        ([*SMALL, "-p", "nowhere.py:P"], "nowhere.py"),
        ([*SMALL, "-p", "syntax.py:P"], "syntax.py"),
        ([*SMALL, "-p", "mine.py:Laz"], "did you mean 'Lazy'"),
        ([*SMALL, "-p", "mine.py:NoPlan"], "plan(view, cost)"),
        ([*SMALL, "-p", "mine.py:Lazy"], "rule 'progress'"),
        ([*SMALL, "-p", "mine.py:TooManyTokens"], "rule 'chunk' (request"),
        ([*SMALL, "-p", "mine.py:Raises"], "Raises raised ZeroDivisionError"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,5,5\n2023-11-16 18:17:04,x,5\n"
    )
    (tmp_path / "mine.py").write_text(POLICY)
    (tmp_path / "syntax.py").write_text("def (:\n")
    (tmp_path / "a-file").write_text("")
    done = neo("simulate", *arguments, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_what_ran_before_a_broken_plan_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from neo.core.plan import StepPlan, SubBatch\n"
        "from neo.policy.gpu_only import GpuOnly\n"
        "class Breaks(GpuOnly):\n"
        "    def plan(self, view, cost):\n"
        "        if view.now > 5 and view.gpu_decodes:\n"
        "            return StepPlan((SubBatch(cpu_decode=view.gpu_decodes),))\n"
        "        return super().plan(view, cost)\n"
    )
    done = neo("simulate", *SMALL, "-p", "mine.py:Breaks", "-o", "o", "--no-plots", cwd=tmp_path)
    assert done.returncode == 2
    assert "rule 'residency' (request" in done.stderr
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert "residency" in summary["interrupted"]
    assert 0 < summary["requests"]["completed"] < 60
    lines = (tmp_path / "o" / "requests.csv").read_text().splitlines()
    assert sum(",length," in line for line in lines) == summary["requests"]["completed"]


def test_options_of_one_policy_among_several(tmp_path: Path) -> None:
    arguments = [
        "-p",
        "gpu-only",
        "-p",
        "neo",
        "--policy-opt",
        "neo.token_budget=256",
        "--policy-opt",
        "worth=tokens",
    ]
    done = neo("simulate", *SMALL, *arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    options = [json.loads(line)["policy_options"] for line in done.stdout.splitlines()]
    assert options == [{}, {"token_budget": "256", "worth": "tokens"}]


@pytest.mark.parametrize("command", ["policies", "hardware", "models"])
def test_listings(tmp_path: Path, command: str) -> None:
    names = {"policies": "fastdecode", "hardware": "h200-16c", "models": "llama-3.1-70b"}
    listed = neo(command, cwd=tmp_path)
    assert listed.returncode == 0
    assert names[command] in listed.stdout
    shown = neo(command, names[command], cwd=tmp_path)
    assert shown.returncode == 0
    assert len(shown.stdout.splitlines()) > 5
    unknown = neo(command, "nope", cwd=tmp_path)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: ")


def test_trace_describe_and_convert(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,10,5\n1.5,20,6\n")
    described = neo("trace", "describe", "v.csv", cwd=tmp_path)
    assert described.returncode == 0
    assert "vidur" in described.stdout
    assert neo("trace", "convert", "v.csv", "n.jsonl", cwd=tmp_path).returncode == 0
    done = neo("simulate", "--trace", "n.jsonl", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["requests"]["completed"] == 2

"""Careless and hostile use: one line, exit code 2, nothing lost, no figure that is silently wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
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
COMMAND = [sys.executable, "-m", "neo", "simulate", "--quiet", "--no-plots"]
CODE = """
import math
from neo.core.plan import PrefillChunk, StepPlan, SubBatch
from neo.policy.gpu_only import GpuOnly

class Later(GpuOnly):
    calls = 0
    def plan(self, view, cost):
        self.calls += 1
        return super().plan(view, cost) if self.calls < 30 else self.bad(view)

class Exits(Later):
    def bad(self, view): raise SystemExit(0)

class Junk(Later):
    def bad(self, view): return StepPlan(("a",))

class Generates(Later):
    def bad(self, view): return StepPlan((SubBatch(gpu_decode=(r for r in view.gpu_decodes)),))

class Shortens(Later):
    def bad(self, view):
        for r in view.gpu_decodes:
            r.max_tokens = r.generated + 1
        return GpuOnly.plan(self, view, None)

class Delays(Later):
    def bad(self, view):
        for r in view.waiting:
            r.arrival_s += 1e6
        return GpuOnly.plan(self, view, None)

class Robs(Later):
    def bad(self, view): view.pools["gpu"] = None

class Leaves(Later):
    def bad(self, view): raise GeneratorExit

class Empty(Later):
    def bad(self, view): raise StopIteration

class Halves(GpuOnly):
    def plan(self, view, cost):
        r = next(iter(view.waiting))
        return StepPlan((SubBatch((PrefillChunk(r, 0, r.remaining_prefill / 1),)),))

class Colours(Later):
    def bad(self, view): raise ValueError("\\x1b[31mred\\0")

class Stages(GpuOnly):
    staging_layers = 10**6

class Cost:
    value = 1e-4
    def __init__(self, model, hardware): self.calls = 0
    def describe(self): return {"what": "test"}
    def seconds(self, kind, work):
        self.calls += 1
        return 1e-4 if self.calls < 500 else self.value

class Nan(Cost): value = math.nan
class Inf(Cost): value = math.inf
class Negative(Cost): value = -1.0
class Text(Cost): value = "soon"
class Nothing(Cost): value = None
class Huge(Cost): value = 10**400
class Mute(Cost):
    def describe(self): return None
class Raises(Cost):
    @property
    def value(self): return 1 / 0
class WrongShape(Cost):
    vectorized = True
    @property
    def value(self): return [1e-4]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "bad.py").write_text(CODE)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, cwd=folder, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "bad.py:Exits"], "Exits raised SystemExit at bad.py:13"),
        (["-p", "bad.py:Junk"], "malformed plan"),
        (["-p", "bad.py:Generates"], "generator instead of a tuple"),
        (["-p", "bad.py:Shortens"], "changed request"),
        (["-p", "bad.py:Delays"], "changed request"),
        (["-p", "bad.py:Robs"], "Robs raised TypeError at bad.py:"),
        (["-p", "bad.py:Leaves"], "Leaves raised GeneratorExit at bad.py:37\n"),
        (["-p", "bad.py:Empty"], "Empty raised StopIteration at bad.py:40\n"),
        (["-p", "bad.py:Halves"], "(request 0): start 0, length "),
        (["-p", "bad.py:Colours"], "at bad.py:48: \ufffd[31mred\ufffd\n"),
        (["-p", "bad.py:Stages"], "staging_layers is 1000000"),
        *[
            (["--cost", f"bad.py:{c}", "-p", "gpu-only"], c)
            for c in ("Nan", "Inf", "Negative", "Text", "Nothing")
        ],
        *[(["--cost", f"bad.py:{c}", "-p", "neo"], c) for c in ("Huge", "Mute", "Raises")],
        (["--cost", "bad.py:WrongShape", "-p", "gpu-only"], "WrongShape"),
        (["--cost", "bad.py:Inf", "-p", "gpu-only", "--level", "op"], "Inf"),
        (["--timeout", "nan"], "--timeout"),
        (["--timeout", "-1"], "--timeout"),
        (["--limit", "3"], "--limit is for traces"),
        (["--speedup", "2"], "--speedup"),
        (["--slo", ""], "SLO"),
        (["--policy-opt", "token_budget=0"], "at least 1"),
        (["--policy-opt", "watermark=nan"], "watermark"),
        (["--policy-opt", "patience_s=-1"], "patience_s"),
        (["--rate", "1e-300"], "request 1"),
    ],
)
def test_one_line_exit_2_and_what_was_done_is_kept(folder: Path, arguments: list[str], message: str) -> None:
    done = run(folder, *SMALL, *arguments, "--out", "o")
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    if (folder / "o" / "summary.json").exists():
        text = (folder / "o" / "summary.json").read_text()
        assert json.loads(text)["interrupted"]
        assert "NaN" not in text
        assert "Infinity" not in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_partial_results(folder: Path, number: signal.Signals, code: int) -> None:
    long = [
        "--prompt-lengths",
        "fixed:200",
        "--output-lengths",
        "fixed:500",
        "--requests",
        "20000",
        "--rate",
        "2",
    ]
    process = subprocess.Popen(
        [*COMMAND, *long, "--no-repeat", "-p", "gpu-only", "--out", f"s{code}"],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    log = folder / f"s{code}" / "steps.jsonl"
    for _ in range(600):
        if log.exists() and log.stat().st_size > 1 << 20:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "partial results" in errors
    summary = json.loads((folder / f"s{code}" / "summary.json").read_text())
    assert summary["interrupted"]
    assert 0 < summary["requests"]["completed"] < 20000
    assert summary["metrics"]["utilization"]["gpu"] <= 1.0


READER = """
from neo.workload import TraceRequest, trace_format

@trace_format("mine", "text", lambda source: False)
def read(source):
    for line in source.lines():
        yield TraceRequest("0", 0.0, int(line), 4)
"""


@pytest.mark.parametrize("command", [["simulate"], ["compare", "--quiet"], ["trace", "describe"]])
def test_a_reader_that_fails_is_named_by_every_command(folder: Path, command: list[str]) -> None:
    (folder / "reader.py").write_text(READER)
    (folder / "t.txt").write_text("5\nx\n")
    trace = ["t.txt"] if command[0] == "trace" else ["--trace", "t.txt", "--rate", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "neo", *command, *trace, "--format", "reader.py:read"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1
    assert "t.txt:2: reader 'mine' raised ValueError at reader.py:7: invalid literal" in done.stderr


def test_files_of_an_earlier_run_do_not_stay(folder: Path) -> None:
    assert run(folder, *SMALL, "--timeline", "2", "--out", "again").returncode == 0
    assert (folder / "again" / "timeline.json").exists()
    assert run(folder, *SMALL, "-p", "bad.py:Exits", "--out", "again").returncode == 2
    assert not (folder / "again" / "timeline.json").exists()


def test_policies_before_the_one_that_fails_are_shown(folder: Path) -> None:
    done = run(folder, *SMALL, "-p", "gpu-only", "-p", "bad.py:Exits")
    assert done.returncode == 2
    assert "gpu-only" in done.stdout
    assert "completed" in done.stdout


def test_a_policy_may_import_what_lies_beside_it(folder: Path) -> None:
    (folder / "beside.py").write_text("from neo.policy.gpu_only import GpuOnly\n")
    (folder / "imports.py").write_text("from beside import GpuOnly\nclass Mine(GpuOnly):\n    pass\n")
    assert run(folder, *SMALL, "-p", "imports.py:Mine").returncode == 0


def test_output_that_cannot_show_a_dash_is_no_reason_to_fail(folder: Path) -> None:
    command = [sys.executable, "-m", "neo", "hardware", "g5.16xlarge"]
    done = subprocess.run(
        command, capture_output=True, env={"PYTHONIOENCODING": "ascii"}, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr

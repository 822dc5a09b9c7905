"""``neo compare`` as a user meets it: real processes, real files."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = [
    *("--prompt-lengths", "uniform:10:400", "--output-lengths", "uniform:1:60", "--requests", "60"),
    *("--kv-gpu-blocks", "60", "--kv-cpu-bytes", "1GB"),
]
CODE = """
import neo.cli
from neo.cli.compare import compare
if __name__ == "__main__":
    if "compare" not in [c.name for c in neo.cli.app.registered_commands]:
        neo.cli.app.command("compare")(compare)
    neo.cli.main()
"""


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", CODE, "compare", *map(str, arguments)]


def compare(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_a_study_from_flags_leaves_everything_it_promises(tmp_path: Path) -> None:
    done = compare(*SMALL, "--vary", "rate=2,4", "--sustained", "0.15", "--tolerance", "0.2", "--out", "o",
                   cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Sustained rate" in done.stdout
    table = rows(tmp_path / "o/results.csv")
    grid = [r for r in table if r["searched"] == "no"]
    assert [(r["system"], r["rate"]) for r in grid] == [
        *(("gpu-only", "2"), ("gpu-only", "4"), ("neo", "2"), ("neo", "4"))
    ]
    assert all(r["completed"] == "60" and float(r["ttft_s_p99"]) > 0 for r in table)
    assert {r["gain"] for r in grid if r["system"] == "gpu-only"} == {"1.0"}
    sustained = {r["system"]: float(r["rate"]) for r in rows(tmp_path / "o/sustained.csv")}
    for system, rate in sustained.items():  # the rate keeps the limit, and one within the tolerance does not
        own = [(float(r["rate"]), float(r["latency_per_output_token_s_mean"])) for r in table
               if r["system"] == system]  # fmt: skip
        assert max(value for at, value in own if at <= rate) <= 0.15
        assert any(rate < at <= 1.2 * rate and value > 0.15 for at, value in own)
    said = (tmp_path / "o/command.txt").read_text()
    assert said.startswith("neo compare --prompt-lengths uniform:10:400")
    assert "--out o" not in said
    assert {"curves.svg", "curves.png", "gain.svg", "gain.png"} <= {
        p.name for p in (tmp_path / "o").iterdir()
    }


def test_an_interrupted_study_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    study = [*SMALL, "--vary", "rate=1,2,3,4", "--sustained", "0.5", "--tolerance", "0.1"]
    assert compare(*study, "-o", "a", cwd=tmp_path).returncode == 0
    whole = (tmp_path / "a/points.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    # what a killed process leaves: some points, in the order they came, and one half written
    (tmp_path / "b/points.jsonl").write_text("".join([whole[5], whole[2], whole[7][:40]]))
    assert compare(*study, "-o", "b", "--jobs", "1", cwd=tmp_path).returncode == 0
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    first["command.txt"] = second["command.txt"] = b""
    assert first == second


def test_results_of_an_earlier_run_are_used_and_forgotten_when_told(tmp_path: Path) -> None:
    study = [*SMALL, "-p", "gpu-only", "--vary", "rate=2", "--no-plots", "-o", "o"]
    assert compare(*study, cwd=tmp_path).returncode == 0
    path = tmp_path / "o/points.jsonl"
    record = json.loads(path.read_text())
    record["row"]["duration_s"] = 12345.0
    path.write_text(json.dumps(record) + "\n")
    assert compare(*study, cwd=tmp_path).returncode == 0
    assert rows(tmp_path / "o/results.csv")[0]["duration_s"] == "12345.0"
    assert compare(*study, "--fresh", cwd=tmp_path).returncode == 0
    assert rows(tmp_path / "o/results.csv")[0]["duration_s"] != "12345.0"


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    study = ["--prompt-lengths", "azure-conv", "--output-lengths", "azure-conv", "--requests", "3000",
             "--vary", "rate=" + ",".join(f"{1 + i / 100}" for i in range(40)), "-o", "o"]  # fmt: skip
    process = subprocess.Popen(command(*study), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "o/points.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; what is done is kept in o" in errors
    assert "Traceback" not in errors
    assert 1 <= len(path.read_text().splitlines()) < 80


def test_flags_replace_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'title = "mine"\n[settings]\nprompt-lengths = "fixed:100"\noutput-lengths = "fixed:9"\n'
        "requests = 500\n"
        '[[system]]\nlabel = "A"\npolicy = "gpu-only"\n[vary]\nrate = [1, 2]\n'
    )
    done = compare("s.toml", "--requests", "7", "--vary", "rate=3", "--no-plots", "-o", "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(r["rate"], r["completed"]) for r in rows(tmp_path / "o/results.csv")] == [("3", "7")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.toml"], "cannot read study gone.toml"),
        (["bad.toml"], "study bad.toml: not valid TOML"),
        (["typo.toml"], "typo.toml: [settings] hardwear: not a flag of a study, did you mean 'hardware'"),
        ([*SMALL, "--vary", "rate"], "--vary rate: expected key=value"),
        ([*SMALL, "--vary", "rate=1,"], "expected FLAG=VALUE,VALUE"),
        ([*SMALL, "--metric", "ttft_s_p9"], "metric 'ttft_s_p9': no such metric, did you mean"),
        ([*SMALL, "--arrivals", "all-at-once", "--sustained", "1"], "has no rate to search for"),
        ([*SMALL, "-p", "ne"], "unknown policy 'ne'"),
        ([*SMALL, "--vary", "hardware=h10"], "gpu-only, hardware h10: unknown hardware"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "bad.toml").write_text("title =\n")
    (tmp_path / "typo.toml").write_text(
        'title = "t"\n[settings]\nhardwear = "h100"\n[[system]]\npolicy = "neo"\n'
    )
    done = compare(*arguments, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1

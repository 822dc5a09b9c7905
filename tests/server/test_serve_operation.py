"""What operators do: the first run, budgets and policies, recording a run, examples."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from enum import Enum
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from serving import DEVICE, MODEL, Served, serving
from typer.testing import CliRunner

from neo.cli import app as neo_app
from neo.cli.validate import validate
from neo.core.logreader import LogReader
from neo.report.files import read_run

ROOT = Path(__file__).resolve().parents[2]
FCFS = ROOT / "docs/examples/fcfs.py"


def validated(run: Path, *arguments: str) -> dict[str, Any]:
    """What ``neo validate`` says of a run; it must find no divergence."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(validate)
    found = CliRunner().invoke(app, [str(run), "--json", *arguments])
    assert found.exit_code == 0, found.output
    report: dict[str, Any] = json.loads(found.stdout)["runs"][0]
    return report


def mixed_load(served: Served, clients: int = 6, each: int = 8) -> None:
    """Requests of every kind and end at once: lengths, stops, several choices, vanished and late clients."""

    def client(number: int) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=served.url, timeout=120, verify=False) as http:
            for _ in range(each):
                body = {
                    "prompt": "ab" * draw.randrange(1, 60),
                    "max_tokens": draw.randrange(1, 60),
                    "n": draw.choice((1, 1, 1, 3)),
                    "temperature": draw.choice((0.0, 1.5)),
                    "stop": draw.choice((None, "e")),
                    "ignore_eos": draw.random() < 0.5,
                    "stream": draw.random() < 0.7,
                }
                if draw.random() < 0.2:  # leaves after a few bytes
                    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                        next(stream.iter_bytes(), None)
                else:
                    assert http.post("/v1/completions", json=body).status_code in (
                        200,
                        400,
                    )  # 400: too large for its KV

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("policy", ["neo", "file"])
def test_a_recorded_run_validates_without_divergence(tmp_path: Path, policy: str) -> None:
    run = tmp_path / "run"
    options = ["--policy", f"{FCFS}:FCFS" if policy == "file" else policy, "--record", str(run)]
    options += ["--kv-gpu-blocks", "24", "--kv-cpu-blocks", "0" if policy == "file" else "60"]
    options += ["--max-num-seqs", "12", "--max-num-batched-tokens", "128", "--block-size", "8"]
    options += ["--hardware", "g5.16xlarge", "--request-timeout", "20", "--max-model-len", "150"]
    options += [] if policy == "file" else ["--cost", "calibrated:roofline"]
    with serving(tmp_path, *options) as served:
        mixed_load(served)
        served.wait_until_empty()
        found = served.metrics()
        steps = [found[f"neo:step_time_{kind}seconds_count"] for kind in ("", "predicted_")]
        assert steps[0] == steps[1]
        corrections = {k: v for k, v in found.items() if k.startswith("neo:cost_correction")}
        corrected = [k for k, v in corrections.items() if v != 1.0]
        assert corrected if policy == "neo" else not corrected
        assert served.end() == 0
    summary = read_run(run).summary
    if policy == "neo":
        factors = summary["cost_model"]["factors"]
        assert corrections == {f'neo:cost_correction{{part="{part}"}}': f for part, f in factors.items()}
    assert summary["kind"] == "measured"
    assert summary["hardware"] == "g5.16xlarge"
    assert summary["interrupted"] is None
    assert summary["engine"]["executor"] == DEVICE
    assert summary["limits"]["max_seqs"] == 12
    assert summary["requests"]["completed"] > 20
    header = LogReader(run / "steps.jsonl").header
    assert (header["gpu_blocks"], header["max_model_len"]) == (24, 150)
    report = validated(run, *(["--policy", f"{FCFS}:FCFS"] if policy == "file" else []))
    assert report["decisions"]["divergence"] is None
    assert report["decisions"]["equal"] == report["decisions"]["logged"] > 50


def test_a_run_whose_http_process_died_is_recorded_up_to_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    body = {"prompt": "a", "max_tokens": 2000, "stream": True, "ignore_eos": True}
    with (
        serving(tmp_path, "--record", str(run)) as served,
        served.http.stream("POST", "/v1/completions", json=body) as stream,
    ):
        next(stream.iter_bytes())
        served.process.kill()
        served.process.wait()
        while not (run / "summary.json").exists():  # a test that hangs here has found that it is not written
            pass
    assert "HTTP process" in read_run(run).summary["interrupted"]
    assert validated(run)["decisions"]["divergence"] is None


def test_the_first_run_prints_a_line_that_works(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "neo", "serve", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=tmp_path
    ) as process:
        try:
            assert process.stdout is not None
            first, line = process.stdout.readline(), process.stdout.readline()
            assert re.fullmatch(rf"neo serves {MODEL} at http://127\.0\.0\.1:\d+\n", first)
            assert line.startswith("Try: curl ")
            done = subprocess.run(
                ["sh", "-c", line.removeprefix("Try: ")],
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
            answer = json.loads(done.stdout)
            assert answer["choices"][0]["message"]["content"].startswith("A KV cache holds")
        finally:
            process.terminate()
        assert process.wait(60) == 0


def test_with_a_key_the_printed_line_says_what_to_set_and_then_works(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    with serving(tmp_path, "--api-key", "it's secret") as served:
        assert served.process.stdout is not None
        line = served.process.stdout.readline()
        assert line.startswith("Try, with the key in the shell's variable (export NEO_API_KEY=...): curl ")
        assert "secret" not in line
        command = line.partition("): ")[2]
        bare = {k: v for k, v in os.environ.items() if k != "NEO_API_KEY"}
        for key, found in (({"NEO_API_KEY": "it's secret"}, "choices"), ({}, "error")):
            done = subprocess.run(
                ["sh", "-c", command], capture_output=True, timeout=120, check=True, env={**bare, **key}
            )
            assert found in json.loads(done.stdout)


def test_the_example_client_talks_to_it(server: Served) -> None:
    pytest.importorskip("openai")
    command = [sys.executable, str(ROOT / "examples/chat.py"), "What is a KV cache?", "--url", server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("A KV cache holds")
    assert done.stderr.startswith(f"{MODEL}: 22 + ")


def test_the_example_policy_serves_the_urgent_first(tmp_path: Path) -> None:
    policy = ROOT / "examples/urgent_first.py"
    with serving(tmp_path, "--policy", f"{policy}:UrgentFirst", "--max-num-seqs", "1") as served:
        ended: list[int] = []

        def client(priority: int, tokens: int) -> None:
            body = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True, "priority": priority}
            assert httpx.post(f"{served.url}/v1/completions", json=body, timeout=120).status_code == 200
            ended.append(priority)

        threads = [threading.Thread(target=client, args=(0, 600))]
        threads[0].start()
        served.wait_for(num_requests_running=1)
        for priority in (1, 3, 2):
            threads.append(threading.Thread(target=client, args=(priority, 20)))
            threads[-1].start()
        served.wait_for(num_requests_waiting=3)
        for thread in threads:
            thread.join()
        assert ended == [0, 3, 2, 1]
        served.wait_until_empty()


def test_the_flags_are_those_of_the_documentation() -> None:
    page = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| `--.+", page, re.MULTILINE)]
    shown = {tuple(re.findall(r"`([^`]+)`", flags)): default for _, flags, default, *_ in rows}
    command = typer.main.get_command(neo_app).commands["serve"]  # type: ignore[attr-defined]
    made = {}
    for parameter in command.params:
        default = parameter.default
        plain = default.value if isinstance(default, Enum) else default
        if isinstance(plain, float):
            plain = f"{plain:g}"
        none = plain is None or plain is False
        made[(*parameter.opts, *parameter.secondary_opts)] = "" if none else f"`{plain}`"
    assert shown == made

"""What a server refuses, and how: keys, sizes, times, a full queue."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families
from serving import DEVICE, MODEL, Served, serving, stream_of
from typer.testing import CliRunner

from neo import __version__
from neo.cli.serve import serve
from neo.core.errors import InputError
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.server.bridge import Bridge, Inbox, Submission
from neo.runtime.server.errors import ApiError
from neo.runtime.server.messages import Ready, Update

KEY = "a secret"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Every limit as tight as it gets, a key from the environment, JSON logs."""
    arguments = ["--max-queued-requests", "2", "--max-num-seqs", "1", "--max-body-size", "20kB"]
    arguments += ["--request-timeout", "0.4", "--cors-origin", "https://pages.example"]
    arguments += ["--log-format", "json", "--log-prompts", "--served-model-name", "mine"]
    with serving(tmp_path_factory.mktemp("strict"), *arguments, NEO_API_KEY=KEY) as served:
        served.http.headers["authorization"] = f"Bearer {KEY}"
        yield served


def test_keys(strict: Served) -> None:
    with httpx.Client(base_url=strict.url) as stranger:
        for path in ("/v1/models", "/v1/models/mine"):
            assert stranger.get(path).status_code == 401
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
                answer = stranger.post(path, json={}, headers=header)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        odd = {b"authorization": b"Bearer \xff\xfe"}
        assert stranger.post("/tokenize", json={}, headers=odd).status_code == 401
        for path in ("/health", "/metrics", "/version"):
            assert stranger.get(path).status_code == 200
    assert strict.http.get("/v1/models").json()["data"][0]["id"] == "mine"


def test_large_bodies_are_refused_before_they_are_read(strict: Served) -> None:
    assert strict.post("/tokenize", prompt="a" * 30_000).status_code == 413
    with socket.create_connection(("127.0.0.1", strict.port)) as sock:
        head = f"POST /tokenize HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        sock.sendall(f"{head}content-length: 999999999999\r\n\r\n".encode())
        assert b" 413 " in sock.recv(1000)

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    assert strict.http.post("/tokenize", content=endless()).status_code == 413


def test_a_request_ends_after_its_time(strict: Served) -> None:
    long = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True}
    answer = strict.post("/v1/completions", **long)
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "timeout_error"
    with strict.http.stream("POST", "/v1/completions", json={**long, "stream": True}) as stream:
        assert stream.status_code == 200
        *_, last = [line for line in stream.iter_lines() if line]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"
    strict.wait_until_empty()


def test_a_full_queue_says_when_to_come_back(strict: Served) -> None:
    choices = strict.post("/v1/completions", prompt="a", n=4, max_tokens=2)
    assert choices.status_code == 503
    assert 1 <= int(choices.headers["retry-after"]) <= 60
    assert choices.json()["error"]["type"] == "overloaded_error"
    assert strict.post("/v1/completions", prompt="a", n=3, max_tokens=2).status_code == 200
    strict.wait_until_empty()


@pytest.mark.parametrize("running", [None, 0, 1, 4])
def test_a_full_queue_names_no_more_than_may_wait(running: int | None) -> None:
    """Requests on their way to a free seat do not wait, though the engine has not taken them yet."""
    bridge = Bridge(max_queued=3)
    bridge.ready = Ready("m", 256, 48, 1000, 4, (9, 9), {})
    if running is not None:
        bridge.last = Update([], [], [], 0, running, 0, (0, 0))
    for i in range(3 + 4 - (running or 0)):
        bridge.admit(1)
        bridge.submit([Submission(f"r{i}", [1], SamplingParams(4))], Inbox(9), 0.0)
    with pytest.raises(ApiError, match="3 requests wait, at most 3 may"):
        bridge.admit(1)


def test_other_pages_stay_out(strict: Served, server: Served) -> None:
    asked = {"origin": "https://pages.example", "access-control-request-method": "POST"}
    allowed = strict.http.options("/v1/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://pages.example"
    other = strict.http.options("/v1/completions", headers={**asked, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in server.http.get("/version", headers=asked).headers


def test_log_lines_are_json_and_hold_prompts_only_where_asked(strict: Served, server: Served) -> None:
    strict.complete(prompt="a rare prompt", max_tokens=2)
    server.complete(prompt="a rare prompt", max_tokens=2)
    lines = [json.loads(line) for line in strict.log_text().splitlines()]
    (line,) = [x for x in lines if x.get("prompt") == "a rare prompt"]
    assert line["status"] == 200
    assert line["prompt_tokens"] == 13
    assert line["output_tokens"] == 2
    assert line["finish"] == "length"
    assert line["path"] == "/v1/completions"
    assert "rare" not in server.log_text()
    assert KEY not in strict.log_text()


def test_errors_of_http_itself_have_the_same_shape(server: Served) -> None:
    for answer, status in (
        (server.http.get("/nothing"), 404),
        (server.http.get("/v1/completions"), 405),
        (server.http.post("/v1/completions", content=b"{"), 400),
        (server.http.post("/v1/completions", content=b"\xff"), 400),
        (server.http.post("/v1/completions", content=b"[" * 100_000), 400),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_health_and_version(server: Served) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/version").json()["version"] == __version__
    for path in ("/health", "/metrics", "/version"):
        probe = server.http.head(path)
        assert (probe.status_code, probe.content) == (200, b"")
    described = server.http.get("/openapi.json").json()
    assert "/v1/chat/completions" in described["paths"]


def test_the_server_says_what_serves(server: Served, record_property: Any) -> None:
    about = server.http.get("/version").json()
    assert set(about) == {"version", "device", "executor", "policy", "cost_model"}
    assert about["executor"] == DEVICE
    assert (about["policy"], about["cost_model"]) == ("neo", "roofline")
    assert about["device"].startswith("cpu-" if DEVICE == "cpu" else "NVIDIA ")
    page = server.http.get("/metrics").text
    (info,) = [f for f in text_string_to_metric_families(page) if f.name == "neo:engine_info"]
    (sample,) = info.samples
    assert sample.value == 1
    assert sample.labels == {**about, "model_name": MODEL}
    record_property("device", about["device"])


def test_metrics_count_what_happened(server: Served) -> None:
    before = server.metrics()
    answer = server.post("/v1/completions", prompt="abcde", max_tokens=7, ignore_eos=True, stream=True)
    assert len(stream_of(answer)) == 7
    server.wait_until_empty()
    after = server.metrics()
    change = {name: after[name] - before.get(name, 0.0) for name in after}
    assert change["neo:prompt_tokens_total"] == 5
    assert change["neo:generation_tokens_total"] == 7
    assert change["neo:time_to_first_token_seconds_count"] == 1
    assert change["neo:inter_token_latency_seconds_count"] == 6
    assert change["neo:e2e_request_latency_seconds_count"] == 1
    assert change["neo:request_queue_time_seconds_count"] == 1
    assert change['neo:request_success_total{finished_reason="length"}'] == 1
    assert sum(v for k, v in change.items() if k.startswith("neo:steps_total")) == 7
    assert change["neo:iteration_tokens_total_sum"] == 5 + 6
    assert change["neo:step_time_seconds_count"] == change["neo:step_time_predicted_seconds_count"] == 7
    assert sum(v for k, v in change.items() if k.startswith("neo:decode_tokens_total")) == 6


def test_wrong_options_end_in_one_line(tmp_path: Path) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(serve)
    for arguments, words in (
        (["--model", str(tmp_path)], "no usable tokenizer"),
        (["--policy", "nope"], "nope"),
        (["--host", "256.1.1.1"], "cannot listen"),
        (["--max-model-len", "4096"], "2048"),
        (["--kv-gpu-bytes", "900TB"], "give fewer blocks"),
        (["--record", "/dev/null/run"], "cannot write into --record"),
        (["--api-key", ""], "an empty key keeps nobody out"),
        (["--api-key", "good", "--api-key", " "], "an empty key keeps nobody out"),
    ):
        found = CliRunner().invoke(app, ["--port", "0", *arguments])
        assert isinstance(found.exception, InputError), (arguments, found.exception)
        assert words in str(found.exception)
        assert "\n" not in str(found.exception)


def test_a_server_that_cannot_begin_says_why_and_ends_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "neo", "serve", "--max-model-len", "4096", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert re.fullmatch("error: .*2048.*\n", done.stderr)
    assert done.stdout == ""


def test_the_model_name_may_be_left_out(server: Served) -> None:
    assert server.complete(prompt="a", max_tokens=1)["model"] == MODEL

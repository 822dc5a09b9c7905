"""``neo bench --url``: a workload against a server that runs, and against servers that do not behave."""

from __future__ import annotations

import asyncio
import csv
import json
import socketserver
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from serving import Served, serving
from typer.testing import CliRunner, Result

from neo.cli.bench import bench
from neo.cli.validate import validate
from neo.core.errors import InputError, NeoError
from neo.report.files import read_run
from neo.runtime.server.client import Target
from neo.runtime.server.load import Load
from neo.workload import TraceRequest

LENGTHS = ["--prompt-lengths", "uniform:4:60", "--output-lengths", "uniform:1:24"]
app = typer.Typer(pretty_exceptions_enable=False)
app.command("bench")(bench)
app.command("validate")(validate)


def invoked(*arguments: object) -> Result:
    """The command; an error meant for people passes through."""
    found = CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "140"})
    if isinstance(found.exception, NeoError):
        raise found.exception
    return found


def neo_bench(*arguments: object) -> str:
    """Standard output of a run in which no request failed."""
    found = invoked(*arguments)
    assert found.exit_code == 0, found.output
    assert "failed" not in found.stderr
    return found.stdout


def failing_bench(*arguments: object) -> str:
    """What is said in one line of a run in which some requests failed."""
    found = invoked(*arguments)
    assert found.exit_code == 1, found.output
    (line,) = [line for line in found.stderr.splitlines() if "the first:" in line]
    return line


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "requests.csv").open() as file:
        return list(csv.DictReader(file))


def test_open_loop_leaves_the_files_of_every_run(server: Served, tmp_path: Path) -> None:
    before = server.metrics()
    text = neo_bench("--url", server.url, *LENGTHS, "--requests", "40", "--rate", "80", "--out", tmp_path)
    assert "served · neo-tiny on a server · measured" in text
    server.wait_until_empty()
    after = server.metrics()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"summary.json", "requests.csv", "latency.svg", "latency.png"}
    summary = read_run(tmp_path).summary
    assert summary["kind"] == "measured"
    assert summary["model"] == "neo-tiny"
    assert summary["requests"] == {"submitted": 40, "completed": 40, "rejected": 0, "aborted": 0}
    assert summary["engine"]["loop"] == "open"
    assert summary["engine"]["errors"] == {}
    assert summary["warnings"] == []
    rows = rows_of(tmp_path)
    assert {row["finish_reason"] for row in rows} == {"length"}
    for name, counter in (("prompt_tokens", "prompt_tokens"), ("output_tokens", "generation_tokens")):
        counted = after[f"neo:{counter}_total"] - before[f"neo:{counter}_total"]
        assert sum(int(row[name]) for row in rows) == counted
    arrivals = [float(row["arrival_s"]) for row in rows]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0.0
    assert len(set(arrivals)) == 40
    for row in rows:
        assert 0.0 < float(row["ttft_s"]) <= float(row["e2e_s"])


def test_closed_loop_has_never_more_clients_than_told(server: Served, tmp_path: Path) -> None:
    neo_bench(
        *("--url", f"{server.url}/v1", "--concurrency", "3", "--endpoint", "chat", "--no-plots"),
        *("--prompt-lengths", "fixed:10", "--output-lengths", "fixed:6", "--requests", "12"),
        *("--slo", "ttft=60", "--out", tmp_path),
    )
    summary = read_run(tmp_path).summary
    assert summary["requests"]["completed"] == 12
    assert summary["engine"]["loop"] == "closed"
    assert summary["metrics"]["goodput_fraction"] == 1.0
    assert any("prompts have another number of tokens" in w for w in summary["warnings"])
    rows = rows_of(tmp_path)
    assert {row["prompt_tokens"] for row in rows} == {str(10 + 9 + 3)}  # spaces between, the chat's frame
    spans = [(float(r["arrival_s"]), float(r["arrival_s"]) + float(r["e2e_s"])) for r in rows]
    assert max(sum(a <= start < end for a, end in spans) for start, _ in spans) == 3


def test_the_same_prompts_for_the_same_seed_whatever_the_loop() -> None:
    load, other = Load(Target("http://a:1"), 3), Load(Target("http://a:1"), 4)
    request = TraceRequest("r", 0.0, 50, 7)
    prompts = [load.body(i, request)["prompt"] for i in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert other.body(0, request)["prompt"] != prompts[0]
    assert len(prompts[0]) == 50


def test_token_ids_of_a_trace_are_sent(server: Served, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    ids = list(b"Once upon a time")
    line = {"prompt_tokens": len(ids), "output_tokens": 9, "prompt_token_ids": ids}
    trace.write_text("".join(json.dumps({"id": str(i), **line}) + "\n" for i in range(3)))
    text = neo_bench("--url", server.url, "--trace", trace, "--token-ids", "trace", "--json")
    assert json.loads(text)["requests"]["completed"] == 3
    with pytest.raises(InputError, match="--endpoint chat sends text"):
        neo_bench("--url", server.url, "--trace", trace, "--token-ids", "trace", "--endpoint", "chat")


def test_clients_that_give_up_and_a_server_that_refuses(tmp_path: Path) -> None:
    arguments = ("--max-queued-requests", "0", "--max-num-seqs", "2", "--api-key", "k")
    with serving(tmp_path, *arguments) as served:
        load = ["--prompt-lengths", "fixed:4", "--output-lengths", "fixed:2000", "--requests", "8"]
        out = tmp_path / "out"
        keyed = ["--url", served.url, "--api-key", "k", *load]
        line = failing_bench(*keyed, "--timeout", "1", "--out", out, "--no-plots")
        assert line.startswith("6 of 8 requests failed; the first: HTTP 503: the queue is full")
        summary = json.loads((out / "summary.json").read_text())
        assert summary["requests"] == {"submitted": 8, "completed": 0, "rejected": 6, "aborted": 2}
        errors = summary["engine"]["errors"]  # one, or two that advise another time to wait
        assert sum(errors.values()) == summary["engine"]["failed"] == 6
        assert all(error.startswith("HTTP 503: the queue is full") for error in errors)
        assert summary["warnings"][0].startswith("6 of 8 requests failed: HTTP 503")
        assert [r["finish_reason"] for r in rows_of(out)].count("timeout") == 2
        assert '"k"' not in (out / "summary.json").read_text()
        with pytest.raises(InputError, match="no valid API key"):
            neo_bench("--url", served.url, *load)


@contextmanager
def odd_server(answers: Sequence[bytes]) -> Iterator[str]:
    """A server that answers each connection after /v1/models with the next of these bytes, and hangs up."""
    left = iter(answers)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            first = self.rfile.readline()
            length = 0
            while (line := self.rfile.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            self.rfile.read(length)
            if first.startswith(b"GET"):
                self.wfile.write(b'HTTP/1.0 200 OK\r\n\r\n{"data": [{"id": "odd"}]}')
            else:
                self.wfile.write(next(left))

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_address[1]}"
        finally:
            found.shutdown()
            thread.join()


def stream(*events: Any, head: bytes = b"") -> bytes:
    data = b"".join(
        b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events
    )
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + head + b"\r\n" + data


def token(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


WRONG = {
    "HTTP 500: broken": b'HTTP/1.1 500 No\r\n\r\n{"error": {"message": "broken"}}',
    "HTTP 502: <html>": b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 6\r\n\r\n<html>",
    "the server closed the connection": b"",
    "the server does not speak HTTP": b"hello\r\n\r\n",
    "an event of the stream is malformed": stream(token("a"), b"{"),
    "an event of the stream is malformed ": stream([1]),
    "ran out": stream(token("a"), {"error": {"message": "ran out"}}),
    "the stream ended without [DONE]": stream(token("a")),
    "the connection broke off": stream(token("a"), b"[DONE]", head=b"content-length: 9999\r\n"),
}


def test_errors_of_servers_are_counted_and_told_apart(tmp_path: Path) -> None:
    good = stream(token("a"), token("b", "stop"), b"[DONE]")
    answers = [*WRONG.values(), good]
    with odd_server(answers) as url:
        load = ["--prompt-lengths", "fixed:4", "--output-lengths", "fixed:2", "--concurrency", "1"]
        line = failing_bench("--url", url, *load, "--requests", len(answers), "--out", tmp_path, "--no-plots")
    assert line == "9 of 10 requests failed; the first: HTTP 500: broken"
    summary = read_run(tmp_path).summary
    assert summary["requests"] == {"submitted": 10, "completed": 1, "rejected": 5, "aborted": 4}
    errors = list(summary["engine"]["errors"])
    for words in WRONG:
        assert [e for e in errors if e.startswith(words.strip())], (words, errors)
    assert sum(summary["engine"]["errors"].values()) == summary["engine"]["failed"] == 9
    assert rows_of(tmp_path)[-1]["finish_reason"] == "stop"


def test_chunks_without_a_token_are_no_tokens() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    words = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in ("a", "", "b")]
    end = {"choices": [{"delta": {}, "finish_reason": "length"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
    own = [token("", None), token("a"), token("", "length"), usage]  # a token whose text is not whole yet
    answers = [
        stream(role, *words, end, usage, b"[DONE]"),
        stream(role, *words, end, b"[DONE]"),
        stream(*own, b"[DONE]"),
    ]
    request = TraceRequest("r", 0.0, 5, 3)
    with odd_server(answers) as url:
        load = Load(Target(url, "odd", "chat"))
        for _ in answers:
            served = asyncio.run(load.one(0, request))
            assert served.error is None
            assert served.tokens == len(served.token_times) == 3
            assert all(a <= b for a, b in pairwise(served.token_times))


def test_what_cannot_be_is_one_line(server: Served) -> None:
    load = ["--prompt-lengths", "fixed:4", "--output-lengths", "fixed:2", "--requests", "2"]
    for arguments, words in (
        (["--url", "127.0.0.1:8000"], "--url 127.0.0.1:8000: expected http://host:port"),
        (["--url", "http://127.0.0.1:9"], "--url http://127.0.0.1:9: "),
        (["--url", server.url, "--policy", "neo"], "--policy is not for --url"),
        (["--url", server.url, "--kv-gpu-bytes", "1GB"], "--kv-gpu-bytes is not for --url"),
        (["--url", server.url, "--device", "cpu"], "--device is not for --url"),
        (["--url", server.url, "--no-warmup"], "--warmup is not for --url"),
        (["--concurrency", "2"], "--concurrency needs --url"),
        (["--url", server.url, "--timeout", "-1"], "--timeout"),
        (
            ["--url", server.url, "--model", "another"],
            "every request failed; 2 of 2 requests failed: HTTP 404",
        ),
    ):
        with pytest.raises(InputError) as caught:
            neo_bench(*load, *arguments)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

"""Real processes, real sockets, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import failing_policy
import httpx
import pytest
from serving import MODEL, QUEUE, Served, events_of, is_alive, serving

from neo.runtime.server.client import HttpError, Target, events
from neo.runtime.server.open_files import raise_file_limit

HERE = Path(__file__).parent
ENDLESS = {"prompt": "Once upon", "max_tokens": 2000, "ignore_eos": True, "stream": True}


class Reader(threading.Thread):
    """A client that streams in the background; ``began`` is set with its first token."""

    def __init__(self, server: Served, **body: Any) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.body = {**ENDLESS, **body}
        self.began = threading.Event()
        self.lines: list[str] = []
        self.status = 0
        self.start()

    def run(self) -> None:
        with (
            suppress(httpx.HTTPError),  # tests see that the end is missing
            httpx.Client(timeout=120, verify=False) as client,
            client.stream("POST", f"{self.server.url}/v1/completions", json=self.body) as stream,
        ):
            self.status = stream.status_code
            for line in stream.iter_lines():
                if line:
                    self.lines.append(line)
                self.began.set()

    def result(self) -> list[dict[str, Any] | str]:
        """All events, once the stream has ended."""
        self.join(120)
        assert not self.is_alive(), "the stream hangs"
        found = [line.removeprefix("data: ") for line in self.lines]
        return [x if x == "[DONE]" else json.loads(x) for x in found]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Served]:
    """A server to break; its context is large enough for streams that go on."""
    with serving(tmp_path, "--linger", "60", "--grace", "60") as served:
        yield served


def test_two_thousand_streams_at_once(server: Served, record_property: Any) -> None:
    """More than may wait: they come again when they are told to, all end, and each gets its own tokens."""
    clients, target = 2000, Target(server.url, MODEL)
    words = ["Once upon a time", "San Francisco is", "To be, or not to", "The capital of France"]
    expected = [server.complete(prompt=w, temperature=0, max_tokens=8)["choices"][0]["text"] for w in words]
    assert len(set(expected)) == len(words)
    refused = longest = 0
    raise_file_limit()

    async def one(i: int) -> str:
        nonlocal refused
        body = {"model": MODEL, "prompt": words[i % 4], "temperature": 0, "max_tokens": 8, "stream": True}
        while True:
            try:
                found = [data async for data in events(target, "/v1/completions", body)]
            except HttpError as error:
                if error.status != 503:
                    raise
                refused += 1
                await asyncio.sleep(int(error.retry_after))
                continue
            assert found.pop() == b"[DONE]"
            return "".join([json.loads(data)["choices"][0]["text"] for data in found])

    async def watch() -> None:
        nonlocal longest
        while True:
            async for page in events(target, "/metrics", None, "GET"):
                waiting = re.search(rb"^neo:num_requests_waiting\S* (\S+)$", page, re.MULTILINE)
                assert waiting
                longest = max(longest, int(float(waiting.group(1))))
            await asyncio.sleep(0.1)

    async def everyone() -> list[str]:
        watcher = asyncio.ensure_future(watch())
        texts = await asyncio.gather(*(one(i) for i in range(clients)))
        watcher.cancel()
        return texts

    began = time.monotonic()
    texts = asyncio.run(everyone())
    record_property("streams/s", f"{clients / (time.monotonic() - began):.0f}")
    record_property("longest queue", longest)
    record_property("told to come again", refused)
    assert [i for i, text in enumerate(texts) if text != expected[i % 4]] == []
    assert refused > 0
    assert longest <= QUEUE  # how long it ever was is seen by chance: a fast engine has often taken them all
    server.wait_until_empty()


def test_clients_that_vanish_free_their_memory_at_once(server: Served) -> None:
    before = server.metrics()
    sockets = []
    for i in range(40):
        sock = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps({**ENDLESS, "n": 1 + i % 2, "stream": i % 4 != 3}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        sockets.append(sock)
    for i, sock in enumerate(sockets):
        if i % 4 != 3:
            assert b" 200 " in sock.recv(100)
    server.wait_for(num_requests_running=60)
    random.Random(0).shuffle(sockets)
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # reset, not a polite end
        sock.close()
    server.wait_until_empty()
    after = server.metrics()
    aborted = 'neo:request_success_total{finished_reason="abort"}'
    assert after[aborted] - before[aborted] == 60
    made = after["neo:generation_tokens_total"] - before["neo:generation_tokens_total"]
    assert made < 60 * 2000, "they did not run to their end"
    assert server.complete(prompt="a", max_tokens=1)


def test_a_client_that_is_killed(server: Served) -> None:
    script = (
        f"import httpx\nwith httpx.stream('POST', '{server.url}/v1/completions', json={ENDLESS!r}) as s:\n"
    )
    script += "    for line in s.iter_lines(): print(line, flush=True)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline()
        client.kill()
    server.wait_until_empty()


def test_a_client_that_does_not_read_harms_nobody(tmp_path: Path) -> None:
    with serving(tmp_path, "--stream-buffer", "16") as served:
        body = json.dumps({**ENDLESS, "n": 64, "logprobs": 20, "max_tokens": 1500}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", served.port))
            sock.sendall(head.encode() + body)
            served.wait_for(num_requests_running=64)
            assert served.complete(prompt="a", max_tokens=50)
            served.wait_until_empty()  # although nobody has read
            assert served.metrics()["neo:generation_tokens_total"] < 64 * 1500
            data = b""
            while part := sock.recv(1 << 16):  # the end is an error, behind whole events
                data += part
                if data.endswith(b"0\r\n\r\n"):
                    break
        assert b"reads too slowly" in data
        assert b"[DONE]" not in data


def test_the_engine_is_killed(own: Served) -> None:
    readers = [Reader(own) for _ in range(4)]
    whole = Reader(own, stream=False)
    for reader in readers:
        assert reader.began.wait(60)
    os.kill(own.engine_pid(), signal.SIGKILL)
    for reader in readers:
        *_, last = reader.result()
        assert isinstance(last, dict)
        assert "signal 9" in last["error"]["message"]
    whole.result()
    assert whole.status == 500
    health = own.http.get("/health")
    assert health.status_code == 503
    assert "the engine is gone" in health.json()["error"]["message"]
    assert own.post("/v1/completions", prompt="a").status_code == 503
    assert own.end() == 3
    assert "the engine is gone" in own.log_text()


def test_the_http_process_is_killed(own: Served) -> None:
    reader = Reader(own)
    assert reader.began.wait(60)
    engine = own.engine_pid()
    own.process.kill()
    own.process.wait()
    with pytest.raises((OSError, httpx.HTTPError)):
        httpx.get(f"{own.url}/health")
    while is_alive(engine):  # it ends by itself: a test that hangs here has found that it does not
        pass
    assert "the HTTP process is gone" in own.log_text()


def test_sigterm_loses_no_request_within_its_grace_time(own: Served) -> None:
    readers = [Reader(own, max_tokens=500) for _ in range(40)]
    for reader in readers:
        assert reader.began.wait(60)
    whole = [Reader(own, max_tokens=1900, stream=False) for _ in range(8)]
    own.wait_for(time_to_first_token_seconds_count=48)  # fast ones may have ended by now, these eight not
    assert own.metrics()["neo:num_requests_running"] >= 8
    own.process.send_signal(signal.SIGTERM)
    while own.http.get("/health").status_code == 200:
        pass
    refused = own.post("/v1/completions", prompt="a")
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    for reader in readers:
        *chunks, last = reader.result()
        assert last == "[DONE]"
        assert len(chunks) == 500
    for reader in whole:
        (answer,) = reader.result()
        assert isinstance(answer, dict)
        assert answer["usage"]["completion_tokens"] == 1900
    assert own.exit_code() == 0


def test_sigterm_cuts_off_what_takes_longer(tmp_path: Path) -> None:
    with serving(tmp_path, "--grace", "0.1", "--max-num-seqs", "1") as served:
        readers = [Reader(served) for _ in range(4)]
        served.wait_for(num_requests_running=1, num_requests_waiting=3)
        assert served.end() == 4
        ends = [reader.result()[-1] for reader in readers]
        assert sum(isinstance(e, dict) and "the server ended" in e["error"]["message"] for e in ends) == 4
        assert "cut off: 4 requests" in served.log_text()


def test_a_policy_that_fails_in_the_middle(tmp_path: Path) -> None:
    spec = f"{HERE / 'failing_policy.py'}:Failing"
    with serving(tmp_path, "--policy", spec) as served:
        bystander = Reader(served, max_tokens=1500)
        assert bystander.began.wait(60)
        broken = served.post("/v1/completions", prompt="a", priority=failing_policy.BREAKS_A_RULE)
        assert broken.status_code == 500
        assert broken.json()["error"]["type"] == "policy_error"
        assert "rule 'roles'" in broken.json()["error"]["message"]
        events_seen = bystander.result()
        assert events_seen[-1] == "[DONE]", "only the request that the rule names is ended"
        assert len(events_seen) == 1501

        bystander = Reader(served)
        assert bystander.began.wait(60)
        raised = served.post("/v1/completions", prompt="a", priority=failing_policy.RAISES)
        assert raised.status_code == 500
        assert "RuntimeError at failing_policy.py" in raised.json()["error"]["message"]
        *_, last = bystander.result()
        assert isinstance(last, dict)
        assert "thirteen is unlucky" in last["error"]["message"]

        served.wait_until_empty()
        assert served.http.get("/health").status_code == 200
        assert served.complete(prompt="Once upon", max_tokens=5, temperature=0)["choices"][0]["text"]
        assert served.end() == 0
        assert "thirteen is unlucky" in served.log_text()


def test_garbage_on_the_socket(server: Served) -> None:
    draw = random.Random(1)
    whole = b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 14\r\n\r\n{"prompt":"a"}'
    for i in range(400):
        data = draw.randbytes(draw.randrange(1, 400)) if i % 2 else _mutated(whole, draw)
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while part := sock.recv(1 << 16):
                answer += part
            assert not answer.startswith(b"HTTP/1.1 5"), (data, answer)
    server.wait_until_empty()
    assert server.complete(prompt="a", max_tokens=1)


def _mutated(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(changed))
        changed[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(4))
    return bytes(changed)


def test_the_load_client_reads_events_as_they_are(server: Served) -> None:
    body = {"prompt": "Once upon", "max_tokens": 3, "stream": True}
    answer = server.post("/v1/completions", **body)

    async def read(path: str, sent: dict[str, Any]) -> list[bytes]:
        return [data async for data in events(Target(server.url), path, sent)]

    seen = asyncio.run(read("/v1/completions", body))
    assert seen[-1] == b"[DONE]"
    assert len(seen) == len(events_of(answer.text)) + 1
    with pytest.raises(HttpError, match="HTTP 400: prompt"):
        asyncio.run(read("/v1/completions", {"prompt": 3}))

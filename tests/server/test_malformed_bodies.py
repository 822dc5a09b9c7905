"""Ten thousand bodies that no client would send: never a 500, never a dead server, no field unnamed."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from schema_bodies import Bodies
from serving import Served, serving

from neo.runtime.server.client import read_head, read_parts

COUNT, CONNECTIONS = 10_000, 8
ALLOWED = {200, 400, 404, 413}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose context is so short that what happens to be a good request soon ends."""
    folder = tmp_path_factory.mktemp("small")
    with serving(
        folder, "--max-model-len", "48", "--max-queued-requests", "100000", "--log-format", "none"
    ) as s:
        yield s


class Tried:
    """What came back, by status; and what should not have."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.params: Counter[str] = Counter()
        self.wrong: list[tuple[Any, ...]] = []

    def note(self, path: str, sent: bytes, status: int, answer: bytes) -> None:
        self.statuses[status] += 1
        if status not in ALLOWED:
            self.wrong.append((path, sent, status, answer))
        elif status != 200:
            error = json.loads(answer)["error"]
            if not error["message"] or error["type"] != "invalid_request_error":
                self.wrong.append((path, sent, status, answer))
            self.params[error["param"]] += 1
        elif b'"error"' in answer[-400:] and b"data: {" in answer:
            self.wrong.append((path, sent, status, answer))


async def send_all(server: Served, description: Any, seed: int, count: int, tried: Tried) -> None:
    """Send bodies over one connection that is kept, or opened again where the server closes it."""
    paths = [path for path, methods in description["paths"].items() if "post" in methods]
    assert len(paths) == 4
    schemas = {
        p: description["paths"][p]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for p in paths
    }
    bodies = Bodies(description, seed)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for i in range(count):
        path = paths[i % len(paths)]
        sent = bodies.body(schemas[path])
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(sent)}\r\n\r\n".encode() + sent
        )
        status, headers = await read_head(reader)
        answer = b"".join([part async for part in read_parts(reader, headers)])
        tried.note(path, sent, status, answer)
        if headers.get("connection") == "close":
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.close()


def test_ten_thousand_malformed_bodies(small: Served) -> None:
    description = small.http.get("/openapi.json").json()
    tried = Tried()

    async def everything() -> None:
        share = COUNT // CONNECTIONS
        await asyncio.gather(*(send_all(small, description, i, share, tried) for i in range(CONNECTIONS)))

    asyncio.run(everything())
    assert tried.wrong[:3] == []
    assert sum(tried.statuses.values()) == COUNT
    assert tried.statuses[400] > COUNT / 2, tried.statuses
    assert tried.statuses[200] > COUNT / 50, "some must be good, or only the first check was tried"
    assert {"prompt", "messages", "tokens", "temperature", "max_tokens", "stop", "n"} <= set(tried.params)
    small.wait_until_empty()
    assert small.http.get("/health").status_code == 200
    assert small.complete(prompt="a", max_tokens=1)
    assert "Traceback" not in small.log_text()


def test_the_generator_makes_good_and_bad_bodies() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    made = [Bodies({}, i).body(schema) for i in range(200)]
    assert len(set(made)) > 50
    parsed, broken = [], 0
    for data in made:
        try:
            parsed.append(json.loads(data))
        except ValueError:
            broken += 1
    assert broken > 5
    assert sum(isinstance(p, dict) and isinstance(p.get("a"), int) for p in parsed) > 100

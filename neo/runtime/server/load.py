"""Load on any OpenAI-compatible server: a workload's requests as streams, and when their tokens came.

A plain HTTP/1.1 client on asyncio, one connection a request: a library would be most of the processor time
with hundreds of streams on one core, and would show up as the server's latency.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from neo.core.errors import InputError
from neo.workload import TraceRequest

Endpoint = Literal["completions", "chat"]
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_LOW, _HIGH = 33, 127  # ids of prompts: printable bytes in byte-level vocabularies, ordinary tokens in others
_READ = 1 << 16
_CONNECT_S = 60.0
_HEAD = 1 << 16


@dataclass(frozen=True, slots=True)
class Target:
    """A server.

    Attributes:
        url: ``http(s)://host:port``, with or without ``/v1``.
        endpoint: ``completions`` sends token ids, so that prompts have exactly the workload's lengths;
            ``chat`` sends words, and the lengths are those that the server reports.
        extra: further fields of every body.
    """

    url: str
    model: str | None = None
    endpoint: Endpoint = "completions"
    api_key: str | None = None
    temperature: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise InputError(f"--url {self.url}: expected http://host:port")

    @property
    def base(self) -> str:
        """The path before ``/v1``."""
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1")


@dataclass(slots=True)
class Served:
    """What became of a request; times are seconds on the run's clock.

    ``token_times``: when each chunk with a choice came. ``tokens``: as the server counted them in ``usage``,
    else the number of these chunks. ``error``: why it failed; ``gave_up``: the client left.
    """

    request: TraceRequest
    start_s: float = 0.0
    end_s: float = 0.0
    token_times: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    gave_up: str | None = None
    text: list[str] = field(default_factory=list)


class HttpError(Exception):
    """The server answered with an error, or not as HTTP has it."""


async def events(
    target: Target, path: str, body: dict[str, Any] | None, method: str = "POST"
) -> AsyncIterator[bytes]:
    """The data of the server-sent events of an answer; of other answers the body. HttpError for an error."""
    parts = urlsplit(target.url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    context = ssl.create_default_context() if secure else None
    async with asyncio.timeout(_CONNECT_S):
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context, limit=_HEAD)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {target.base}{path} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            "Accept: text/event-stream, application/json",
            "Connection: close",
        ]
        if target.api_key is not None:
            lines.append(f"Authorization: Bearer {target.api_key}")
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        status, headers = await _head(reader)
        parts_of_body = _parts(reader, headers)
        if status >= 400:
            raise HttpError(f"HTTP {status}: {_message(b''.join([p async for p in parts_of_body]))}")
        if not headers.get("content-type", "").startswith("text/event-stream"):
            yield b"".join([p async for p in parts_of_body])
            return
        left = b""
        async for part in parts_of_body:
            *whole, left = (left + part).split(b"\n")
            for line in whole:
                if line.startswith(b"data:"):
                    yield line[5:].strip()
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers. HttpError if the server hangs up, or speaks something else."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError) as error:
        raise HttpError("the server closed the connection") from error
    except (ValueError, IndexError) as error:
        raise HttpError("the server does not speak HTTP") from error
    pairs = (line.partition(":") for line in lines if line)
    return status, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _parts(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes: chunked, of a length, or up to the end of the connection."""
    try:
        if "chunked" in headers.get("transfer-encoding", "").lower():
            while size := int((await reader.readline()).partition(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
        elif "content-length" in headers:
            yield await reader.readexactly(int(headers["content-length"]))
        else:
            while data := await reader.read(_READ):
                yield data
    except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
        raise HttpError("the connection broke off in the middle of an answer") from error


def _message(body: bytes) -> str:
    """The error of a body in OpenAI's shape, or its beginning."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"]["message"])
    return body[:200].decode("utf-8", "replace")


async def served_model(target: Target) -> str:
    """The first model that the server names. HttpError, OSError if it does not answer."""
    answer = b"".join([part async for part in events(target, "/v1/models", None, "GET")])
    try:
        return str(json.loads(answer)["data"][0]["id"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise HttpError("its /v1/models has no model") from error


class Load:
    """Sends requests and notes what comes.

    Args:
        target: the server; its model must be named.
        seed: of the prompts.
        keep_text: keep the answers.
        ended: called with every request that has ended.
    """

    def __init__(
        self,
        target: Target,
        seed: int = 0,
        *,
        keep_text: bool = False,
        ended: Callable[[Served], None] | None = None,
    ) -> None:
        self.target = target
        self.seed = seed
        self.keep_text = keep_text
        self.ended = ended
        self._zero = time.perf_counter()

    def clock(self) -> float:
        """Seconds since the run's zero."""
        return time.perf_counter() - self._zero

    async def open_loop(self, requests: Sequence[TraceRequest]) -> list[Served]:
        """Every request at its time, whatever became of those before it."""
        self._zero = time.perf_counter()
        first = requests[0].arrival_s if requests else 0.0

        async def at_its_time(position: int, request: TraceRequest) -> Served:
            await asyncio.sleep(max(0.0, request.arrival_s - first - self.clock()))
            return await self.one(position, request)

        return await asyncio.gather(*(at_its_time(i, r) for i, r in enumerate(requests)))

    async def closed_loop(self, requests: Sequence[TraceRequest], clients: int) -> list[Served]:
        """``clients`` at a time: each sends its next request when the one before has ended."""
        self._zero = time.perf_counter()
        waiting = iter(enumerate(requests))
        found: dict[int, Served] = {}

        async def client() -> None:
            for position, request in waiting:
                found[position] = await self.one(position, request)

        await asyncio.gather(*(client() for _ in range(clients)))
        return [found[i] for i in range(len(requests))]

    async def one(self, position: int, request: TraceRequest) -> Served:
        """Send one request and follow it to its end; errors are noted, not raised."""
        served = Served(request, start_s=self.clock(), prompt_tokens=request.prompt_tokens)
        patience = min((s for s in (request.timeout_s, request.abort_s) if s is not None), default=None)
        try:
            async with asyncio.timeout(patience):
                await self._follow(served, self.body(position, request))
        except TimeoutError:
            timed_out = patience is not None and patience == request.timeout_s
            served.gave_up = "timeout" if timed_out else "abort"
            if patience is None:
                served.gave_up, served.error = None, "no connection"
        except (HttpError, OSError) as error:
            served.error = str(error) or type(error).__name__
        served.end_s = self.clock()
        served.tokens = served.tokens or len(served.token_times)
        if self.ended is not None:
            self.ended(served)
        return served

    def body(self, position: int, request: TraceRequest) -> dict[str, Any]:
        """What is sent; a prompt depends on the seed and its place only."""
        draw = random.Random(self.seed * 1_000_003 + position)
        ids = [draw.randrange(_LOW, _HIGH) for _ in range(request.prompt_tokens)]
        body: dict[str, Any] = {
            "model": self.target.model,
            "stream": True,
            "temperature": self.target.temperature,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        if request.priority:
            body["priority"] = request.priority
        if self.target.endpoint == "chat":
            content = " ".join(chr(i) for i in ids)
            body |= {"messages": [{"role": "user", "content": content}]}
            body |= {"max_completion_tokens": request.output_tokens}
        else:
            body |= {"prompt": ids, "max_tokens": request.output_tokens}
        return body | self.target.extra

    async def _follow(self, served: Served, body: dict[str, Any]) -> None:
        done = False
        async for data in events(self.target, _PATHS[self.target.endpoint], body):
            now = self.clock()
            if data == b"[DONE]":
                done = True
                continue
            self._note(served, json.loads(data), now)
        if not done:
            raise HttpError("the stream ended without [DONE]")

    def _note(self, served: Served, chunk: dict[str, Any], now: float) -> None:
        if "error" in chunk:
            error = chunk["error"]
            raise HttpError(str(error.get("message", error) if isinstance(error, dict) else error))
        usage = chunk.get("usage")
        if usage:
            served.tokens = int(usage.get("completion_tokens") or 0)
            served.prompt_tokens = int(usage.get("prompt_tokens") or served.prompt_tokens)
        for choice in chunk.get("choices") or ():
            served.token_times.append(now)
            served.finish_reason = choice.get("finish_reason") or served.finish_reason
            if self.keep_text:
                delta = choice.get("delta") or {}
                served.text.append(choice.get("text") or delta.get("content") or "")

"""A client of OpenAI-compatible servers: plain HTTP/1.1 on asyncio, one connection a request.

A library would be most of the processor time with hundreds of streams on one core, and would show up as the
server's latency.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from neo.core.errors import InputError

Endpoint = Literal["completions", "chat"]
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


class HttpError(Exception):
    """The server answered with an error, or not as HTTP has it.

    Attributes:
        status: of the answer; None if there was none.
        retry_after: what its header ``Retry-After`` says; empty without one.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


async def events(
    target: Target, path: str, body: dict[str, Any] | None, method: str = "POST"
) -> AsyncIterator[bytes]:
    """The data of the server-sent events of an answer; of other answers the body. HttpError for an error."""
    parts = urlsplit(target.url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    context = ssl.create_default_context() if secure else None
    connecting = asyncio.open_connection(parts.hostname, port, ssl=context, limit=_HEAD)
    try:
        reader, writer = await asyncio.wait_for(connecting, _CONNECT_S)
    except TimeoutError as error:
        raise HttpError(f"no connection after {_CONNECT_S:g} s") from error
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
        status, headers = await read_head(reader)
        parts_of_body = read_parts(reader, headers)
        if status >= 400:
            why = _message(b"".join([p async for p in parts_of_body]))
            raise HttpError(f"HTTP {status}: {why}", status, headers.get("retry-after", ""))
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


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
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


async def read_parts(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes: chunked, of a length, or up to the end of the connection."""
    try:
        if "chunked" in headers.get("transfer-encoding", "").lower():
            while size := int((await reader.readline()).partition(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        elif "content-length" in headers:
            left = int(headers["content-length"])
            while left > 0:
                data = await reader.read(min(left, _READ))
                if not data:
                    raise ConnectionError
                left -= len(data)
                yield data
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

"""What a server takes at most, and the parts of the application that hold it to that."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from neo.runtime.server.errors import TOO_LARGE, ApiError

OPEN_PATHS = frozenset({"/health", "/metrics", "/version"})
"""What monitors read without an API key."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds of the HTTP process.

    Attributes:
        max_queued: requests that wait for the engine; more are refused with 503.
        max_body_bytes: of a request's body.
        body_timeout_s: a body must be there after this long.
        request_timeout_s: a request must have ended after this long; None for never.
        stream_buffer: tokens of a stream, or of each choice, that may wait for a slow client.
        grace_s: how long requests may go on after SIGTERM.
        linger_s: how long a server whose engine is gone still answers 503 before it ends.
    """

    max_queued: int = 1024
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    request_timeout_s: float | None = None
    stream_buffer: int = 1024
    grace_s: float = 30.0
    linger_s: float = 5.0


class Keys:
    """API keys; with none, everybody may enter."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def check(self, request: Request) -> None:
        """Raise the ApiError for a request without a valid key. Takes the same time for every wrong key."""
        if not self._keys or request.url.path in OPEN_PATHS or request.method == "OPTIONS":
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        key = given.strip().encode("utf-8", "surrogateescape")
        valid = [hmac.compare_digest(key, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(valid):
            raise ApiError(401, "no valid API key", "authentication_error", code="invalid_api_key")


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """The request's body. ApiError if it is too large, or not there in time."""
    most = limits.max_body_bytes
    too_large = ApiError(TOO_LARGE, f"the body is larger than {most} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        message = f"the body was not there after {limits.body_timeout_s:g} s"
        raise ApiError(408, message) from None
    except ClientDisconnect:
        raise ApiError(400, "the client closed the connection") from None
    return bytes(body)

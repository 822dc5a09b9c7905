"""Answers on the wire: events or whole JSON, both watching whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from neo.runtime.server.answers import Answers, encode, event
from neo.runtime.server.errors import ApiError
from neo.runtime.server.generation import Generation, Piece, Run

_DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies of the nginx kind would collect chunks otherwise
]


class JsonResponse(Response):
    """JSON by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return encode(content)


def error_response(error: ApiError) -> JsonResponse:
    """The answer that an ApiError is."""
    return JsonResponse(error.body(), error.status, error.headers())


@asynccontextmanager
async def _watching(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """While it lasts, a client that disconnects ends the generation at once."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.disconnect()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watcher.cancel()
        generation.close()


class GenerationResponse(Response):
    """Runs a generation and answers with it: as one JSON object, or as a stream of events.

    The head of a stream is sent with its first token, so that whatever ends a request before is an ordinary
    error answer. Behind that, an error is an event of its own, and the stream ends without ``[DONE]``.
    """

    def __init__(self, generation: Generation, answers: Answers, stream: bool) -> None:
        self.generation = generation
        self.answers = answers
        self.stream = stream
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        note = scope.setdefault("state", {}).setdefault("note", {})
        async with _watching(receive, self.generation):
            note["outcome"] = self.generation.outcome
            try:
                if self.stream:
                    await self._stream(send, note)
                else:
                    await self._whole(scope, receive, send)
            except ApiError as error:
                note["error"] = error.message
                await error_response(error)(scope, receive, send)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[list[Piece]] = [[] for _ in range(self.generation.choices)]
        async for batch in self.generation.batches():
            for part in batch:
                pieces[part.choice] += part.pieces() if isinstance(part, Run) else [part]
        await JsonResponse(self.answers.whole(pieces, self.generation))(scope, receive, send)

    async def _stream(self, send: Send, note: dict[str, Any]) -> None:
        generation, answers = self.generation, self.answers
        begun = False
        try:
            async for batch in generation.batches():
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    begun = True
                await _send(send, answers.events(batch, generation))
        except ApiError as error:
            if not begun:
                raise
            note["error"] = error.message
            await _send(send, event(error.body()), more=False)
            return
        last = answers.last_chunk(generation)
        await _send(send, (event(last) if last is not None else b"") + _DONE, more=False)


async def _send(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})

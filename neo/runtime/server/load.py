"""Load on any OpenAI-compatible server: a workload's requests as streams, and when their tokens came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from neo.runtime.server.client import HttpError, Target, events
from neo.workload import TraceRequest

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_LOW, _HIGH = 33, 127  # ids of prompts: printable bytes in byte-level vocabularies, ordinary tokens in others


class PromptIds(Protocol):
    """Token ids of the prompt at a position of the workload."""

    def __getitem__(self, position: int) -> list[int]: ...


@dataclass(slots=True)
class Served:
    """What became of a request; times are seconds on the run's clock.

    Attributes:
        start_s: when it was sent.
        end_s: when it had ended; None while it has not.
        token_times: when each token came.
        tokens: as the server counted them in ``usage``, else the number of chunks that brought one.
        error: why it failed.
        gave_up: ``timeout`` or ``abort``, if the client left.
    """

    request: TraceRequest
    start_s: float = 0.0
    end_s: float | None = None
    token_times: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    gave_up: str | None = None
    text: list[str] = field(default_factory=list)


class Load:
    """Sends requests and notes what comes.

    Args:
        target: the server; its model must be named.
        seed: of the prompts.
        prompts: their token ids, instead of drawn ones; only for ``completions``.
        keep_text: keep the answers.
        ended: called with the number of requests that have ended.

    Attributes:
        served: the requests that were sent so far, in that order.
    """

    def __init__(
        self,
        target: Target,
        seed: int = 0,
        *,
        prompts: PromptIds | None = None,
        keep_text: bool = False,
        ended: Callable[[int], None] | None = None,
    ) -> None:
        self.target = target
        self.seed = seed
        self.prompts = prompts
        self.keep_text = keep_text
        self.ended = ended
        self.served: list[Served] = []
        self._ended = 0
        self._zero = time.perf_counter()

    def clock(self) -> float:
        """Seconds since the run's zero."""
        return time.perf_counter() - self._zero

    async def open_loop(self, requests: Sequence[TraceRequest]) -> None:
        """Every request at its time, whatever became of those before it."""
        self._zero = time.perf_counter()
        first = requests[0].arrival_s if requests else 0.0
        async with asyncio.TaskGroup() as running:
            for position, request in enumerate(requests):
                if (early := request.arrival_s - first - self.clock()) > 0.0:
                    await asyncio.sleep(early)
                running.create_task(self.one(position, request))

    async def closed_loop(self, requests: Sequence[TraceRequest], clients: int) -> None:
        """``clients`` at a time: each sends its next request when the one before has ended."""
        self._zero = time.perf_counter()
        waiting = iter(enumerate(requests))

        async def client() -> None:
            for position, request in waiting:
                await self.one(position, request)

        async with asyncio.TaskGroup() as running:
            for _ in range(min(clients, len(requests))):
                running.create_task(client())

    async def one(self, position: int, request: TraceRequest) -> Served:
        """Send one request and follow it to its end; errors are noted, not raised."""
        served = Served(request, start_s=self.clock(), prompt_tokens=request.prompt_tokens)
        self.served.append(served)
        patience = min((s for s in (request.timeout_s, request.abort_s) if s is not None), default=None)
        try:
            async with asyncio.timeout(patience) as limit:
                await self._follow(served, self.body(position, request))
        except (HttpError, OSError) as error:
            if limit.expired():
                served.gave_up = "timeout" if patience == request.timeout_s else "abort"
            else:
                served.error = str(error) or type(error).__name__
        served.end_s = self.clock()
        self._ended += 1
        if self.ended is not None:
            self.ended(self._ended)
        return served

    def body(self, position: int, request: TraceRequest) -> dict[str, Any]:
        """What is sent; a drawn prompt depends on the seed and its place only."""
        if self.prompts is not None:
            ids = self.prompts[position]
        else:
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
        empty: list[int] = []  # chunks that only open or close the answer, if a token came with them or not
        done = False
        try:
            async for data in events(self.target, _PATHS[self.target.endpoint], body):
                now = self.clock()
                if data == b"[DONE]":
                    done = True
                elif not done:
                    self._note(served, data, now, empty)
        finally:
            _reconcile(served, empty)
        if not done:
            raise HttpError("the stream ended without [DONE]")

    def _note(self, served: Served, data: bytes, now: float, empty: list[int]) -> None:
        try:
            chunk = json.loads(data)
            usage, choices, error = chunk.get("usage"), chunk.get("choices") or (), chunk.get("error")
            if usage:
                served.tokens = int(usage.get("completion_tokens") or 0)
                served.prompt_tokens = int(usage.get("prompt_tokens") or served.prompt_tokens)
            for choice in choices:
                delta = choice.get("delta") or {}
                text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
                reason = choice.get("finish_reason")
                if not text and (reason or "role" in delta):
                    empty.append(len(served.token_times))
                served.token_times.append(now)
                served.finish_reason = reason or served.finish_reason
                if self.keep_text:
                    served.text.append(str(text))
        except (ValueError, TypeError, AttributeError) as wrong:
            raise HttpError(f"an event of the stream is malformed: {data[:80]!r}") from wrong
        if error:
            raise HttpError(str(error.get("message", error) if isinstance(error, dict) else error))


def _reconcile(served: Served, empty: list[int]) -> None:
    """Forget chunks without a token: servers differ in whether a role or an end has a chunk of its own.

    The server's own count says how many there are; without one, no token came with an empty text.
    """
    times = served.token_times
    excess = len(times) - served.tokens if served.tokens else len(empty)
    gone = set(empty[: max(0, excess)])
    served.token_times = [t for i, t in enumerate(times) if i not in gone]
    served.tokens = served.tokens or len(served.token_times)

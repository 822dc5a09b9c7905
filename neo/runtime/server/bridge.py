"""The HTTP process's side of the engine: sends requests, shares out what steps bring.

Everything here runs on the event loop's thread. A message of several steps is taken apart by request, not by
token: each request's tokens go on as one item.
"""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from neo.core.errors import InputError, NeoError
from neo.core.request import FinishReason
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.server.errors import ApiError, server_error
from neo.runtime.server.launch import Launch
from neo.runtime.server.messages import (
    Abort,
    Add,
    Event,
    Failed,
    Frames,
    FromEngine,
    Ready,
    Stop,
    Update,
    frame,
)
from neo.runtime.server.spawn import Child

_STOP_S = 10.0  # the engine's process gets this long to end by itself
_RATE_WINDOW = 64  # ended requests from which the rate for Retry-After is taken
_MOST_RETRY_S = 60


class Item(NamedTuple):
    """One thing that happened to a choice of an HTTP request: tokens, or an Event with more."""

    choice: int
    what: tuple[int, ...] | Event


class Inbox:
    """What the engine said of one HTTP request and nobody has taken yet. Bounded: see ``most``.

    Args:
        most: tokens and events that may wait. Beyond, ``overflowed`` is set and nothing more is taken.
    """

    def __init__(self, most: int) -> None:
        self._items: list[Item] = []
        self._held = 0  # tokens and events in them
        self._waiter: asyncio.Future[None] | None = None
        self._most = most
        self.error: ApiError | None = None
        self.overflowed = False

    def put(self, item: Item, size: int = 1) -> bool:
        """Append an item of ``size`` tokens or events; False if there is no room."""
        if self._held + size > self._most:
            self.overflowed = True
            return False
        self._held += size
        self._items.append(item)
        self._wake()
        return True

    def fail(self, error: ApiError) -> None:
        """Let the reader meet ``error`` once it has taken what is there; the first error counts."""
        if self.error is None:
            self.error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Item]:
        """All items that are there, at least one. Raises the ApiError if there is one behind them."""
        while not self._items:
            if self.error is not None:
                raise self.error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items, self._held = self._items, [], 0
        return items


@dataclass(slots=True)
class Live:
    """A request that the engine has."""

    inbox: Inbox
    index: int
    arrival_s: float
    prompt_tokens: int
    last_s: float = 0.0  # when its latest token came
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Submission:
    """One engine request."""

    id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0


class Observer:
    """What metrics want to know; does nothing by itself."""

    def update(self, update: Update) -> None:
        """A message of the engine."""

    def tokens(self, lives: Sequence[Live], ends: Sequence[float]) -> None:
        """Each of ``lives`` got a token at each of these times; they show the state before the first."""

    def queued(self, seconds: float) -> None:
        """A request was scheduled for the first time after that long."""

    def ended(self, live: Live, reason: str, now: float) -> None:
        """A request ended."""


def ends_of(update: Update, since: float, now: float) -> list[float]:
    """When each step of a message ended, if the last one did ``now`` and none before ``since``."""
    ends = [now] * len(update.tokens)
    if update.step is not None:
        for i in range(len(ends) - 1, 0, -1):
            ends[i - 1] = max(since, ends[i] - update.step.seconds[i])
    return ends


class Bridge(asyncio.Protocol):
    """See the module.

    Attributes:
        ready: what the engine said of itself.
        dead: why the engine is gone; None while it lives.
        gone: set when it is.
    """

    def __init__(self, max_queued: int, observer: Observer | None = None) -> None:
        self.ready: Ready | None = None
        self.dead: str | None = None
        self.gone = asyncio.Event()
        self.observer = observer or Observer()
        self.max_queued = max_queued
        self.last: Update | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._frames = Frames()
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._live: dict[int, Live] = {}
        self._next_key = 0
        self._sent = 0
        self._heard_s = 0.0  # when the latest message came
        self._stopping = False
        self._failure: Failed | None = None
        self._started: asyncio.Future[Ready] | None = None
        self._ends: deque[float] = deque(maxlen=_RATE_WINDOW)

    # -- the process --------------------------------------------------------------------------------------

    async def start(self, child: Child, launch: Launch) -> Ready:
        """Let the child run the launch, and wait until it can serve. NeoError if it cannot."""
        loop = asyncio.get_running_loop()
        self._process = child.process
        self._started = loop.create_future()
        transport, _ = await loop.create_connection(lambda: self, sock=child.sock)
        self._transport = transport
        data = pickle.dumps(launch)
        transport.write(len(data).to_bytes(8, "little") + data)
        self.ready = await self._started
        return self.ready

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid if self._process else 0

    async def stop(self) -> int:
        """End the engine's process, by force if need be; its exit code."""
        self._stopping = True
        if self._process is None:
            return 0
        if self.ready is None:
            self._process.kill()  # it loads a model, and hears nothing until it has
        self._send(Stop())
        try:
            return await asyncio.to_thread(self._process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)
        finally:
            if self._transport is not None:
                self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Bytes from the engine."""
        for payload in self._frames.feed(data):
            message = self._decode(payload)
            if isinstance(message, Update):
                self._update(message)
            elif isinstance(message, Ready):
                if self._started is not None and not self._started.done():
                    self._started.set_result(message)
            else:
                self._failure = message

    def connection_lost(self, _error: Exception | None) -> None:
        """The engine's process is gone: everyone who waits for it is told."""
        if self._stopping and self._failure is None and not self._live:
            self.gone.set()
            return
        why = self._failure.message if self._failure is not None else self._last_words()
        self.dead = why
        if self._started is not None and not self._started.done():
            given = self._failure is not None and self._failure.input_error
            self._started.set_exception((InputError if given else NeoError)(why))
        now = time.perf_counter()
        for live in self._live.values():
            live.inbox.fail(server_error(f"the engine is gone: {why}"))
            self.observer.ended(live, "error", now)
        self._live.clear()
        self.gone.set()

    def _last_words(self) -> str:
        if self._process is None:
            return "its process was never started"
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "its connection closed"
        return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with {code}"

    # -- requests -----------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    @property
    def queued(self) -> int:
        """Requests that the engine has not begun, as far as is known."""
        if self.last is None:
            return self._sent
        return self.last.waiting + self._sent - self.last.accepted

    def admit(self, count: int) -> None:
        """Raise the ApiError for ``count`` further requests that find no place in the queue.

        The queue may hold ``max_queued`` beyond what the engine has seats for; once requests wait in it, KV
        memory is what is short, and free seats count for nothing.
        """
        if self.dead is not None:
            raise server_error(f"the engine is gone: {self.dead}", 503)
        ready = self.ready
        seats = ready.max_seqs if ready is not None else 0
        if self.last is not None:
            seats = 0 if self.last.waiting else max(0, seats - self.last.running)
        waiting = max(0, self.queued - seats)  # a seat is kept for the others, though they have not taken it
        if self.queued + count > self.max_queued + seats:
            raise ApiError(
                503,
                f"the queue is full: {waiting} requests wait, at most {self.max_queued} may",
                "overloaded_error",
                retry_after_s=self.retry_after_s(),
            )

    def retry_after_s(self) -> int:
        """Whole seconds until as many requests as wait now have ended, at the rate of the latest ends.

        Only ends since the queue was last empty count: before, it was clients who set the rate.
        """
        if len(self._ends) < 2:
            return 1
        rate = (len(self._ends) - 1) / max(1e-3, self._ends[-1] - self._ends[0])
        return min(_MOST_RETRY_S, max(1, round(self.queued / rate)))

    def submit(self, requests: Sequence[Submission], inbox: Inbox, arrival_s: float) -> list[int]:
        """Send requests to the engine, choice by choice; their keys. Call ``admit`` before."""
        keys = []
        for index, request in enumerate(requests):
            key = self._next_key
            self._next_key += 1
            self._live[key] = Live(inbox, index, arrival_s, len(request.prompt))
            self._send(Add(key, request.id, request.prompt, request.params, arrival_s, request.priority))
            keys.append(key)
        self._sent += len(keys)
        return keys

    def abort(self, key: int, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request, if it has not ended; nothing more comes of it."""
        live = self._live.pop(key, None)
        if live is not None:
            self._send(Abort(key, str(reason)))
            self._note_end(live, str(reason), time.perf_counter())

    def _send(self, message: Add | Abort | Stop) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(self._encode(message)))

    # -- what steps bring ---------------------------------------------------------------------------------

    def _update(self, update: Update) -> None:
        now = time.perf_counter()
        self.last = update
        if update.tokens:
            self._tokens(update.keys, update.tokens, ends_of(update, self._heard_s, now))
        self._heard_s = now
        for event in update.events:
            self._event(event, now)
        self.observer.update(update)

    def _tokens(self, keys: list[int], steps: list[list[int]], ends: list[float]) -> None:
        live_of, count = self._live, len(steps)
        found = [
            (live_of.get(key), tokens) for key, tokens in zip(keys, zip(*steps, strict=True), strict=True)
        ]
        came = [(live, tokens) for live, tokens in found if live is not None]  # others: aborted meanwhile
        self.observer.tokens([live for live, _ in came], ends)
        for live, tokens in came:
            live.tokens += count
            live.last_s = ends[-1]
            if not live.inbox.put(Item(live.index, tokens), count):
                self._overflow(live.inbox)

    def _event(self, event: Event, now: float) -> None:
        live = self._live.get(event.key)
        if live is None:
            return
        if event.queued_s is not None:
            self.observer.queued(event.queued_s)
        if event.token is not None:
            self.observer.tokens((live,), (now,))
            live.tokens += 1
            live.last_s = now
        if event.reason is not None:
            del self._live[event.key]
            self._note_end(live, event.reason, now)
        if not live.inbox.put(Item(live.index, event)):
            self._overflow(live.inbox)

    def _note_end(self, live: Live, reason: str, now: float) -> None:
        if self.queued > 0:
            self._ends.append(now)
        else:
            self._ends.clear()
        self.observer.ended(live, reason, now)

    def _overflow(self, inbox: Inbox) -> None:
        """A client does not read: its requests end, so that neither memory nor others pay for it."""
        for key in [k for k, live in self._live.items() if live.inbox is inbox]:
            self.abort(key)
        inbox.fail(server_error("the client reads too slowly: the stream's buffer is full", 408))

"""One HTTP request's generation: from engine messages to pieces of text, for every choice.

A ``Generation`` is read as batches of ``Piece`` and ``Run``; each token gives one piece, or one text of a
run, also where it adds no text yet. Stop strings are met here: the engine is told, and what lies behind them
is never shown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from neo.core.request import FinishReason
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.server.bridge import Bridge, Inbox, Item, Submission
from neo.runtime.server.detokenize import Detokenizer, StopStrings
from neo.runtime.server.errors import TIMED_OUT, ApiError, bad, server_error
from neo.runtime.server.limits import ServerLimits
from neo.runtime.server.messages import Event, Logprobs
from neo.runtime.server.text import TextSide


class Piece(NamedTuple):
    """What a token brought to a choice. ``token`` is None for an end that came without one."""

    choice: int
    token: int | None
    text: str
    tokens: int  # of the choice so far
    logprobs: Logprobs | None = None
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | int | None = None  # the stop string or stop token


class Run(NamedTuple):
    """Tokens that brought a choice text and nothing else: what most are, kept apart for they are many."""

    choice: int
    ids: tuple[int, ...]
    texts: list[str]  # of each
    tokens: int  # of the choice so far, with these

    def pieces(self) -> list[Piece]:
        """The same as pieces."""
        before = self.tokens - len(self.ids)
        pairs = zip(self.ids, self.texts, strict=True)
        return [Piece(self.choice, t, text, before + i) for i, (t, text) in enumerate(pairs, 1)]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of the engine, once the body is understood.

    Attributes:
        prompts: token ids; each gives ``n`` choices.
        texts: the prompts' texts where they are to be echoed.
    """

    id: str
    prompts: list[list[int]]
    params: SamplingParams
    max_tokens: list[int]  # by prompt
    n: int = 1
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    priority: int = 0
    texts: list[str] | None = None


@dataclass(slots=True)
class _Choice:
    detokenizer: Detokenizer
    stops: StopStrings
    prompt_tokens: int
    tokens: int = 0
    ended: bool = False


@dataclass(slots=True)
class Outcome:
    """For the log line: how a generation went."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    first_s: float | None = None
    reasons: list[str] = field(default_factory=list)


class Generation:
    """See the module. Always ``close`` it: what still runs is aborted then.

    Args:
        among: the open generations; it puts itself there, and takes itself out when closed.
    """

    def __init__(
        self,
        bridge: Bridge,
        text: TextSide,
        wanted: Wanted,
        limits: ServerLimits,
        arrival_s: float,
        among: set[Generation],
    ) -> None:
        self.bridge = bridge
        self.wanted = wanted
        self.arrival_s = arrival_s
        submissions = [_submission(wanted, p, j) for p in range(len(wanted.prompts)) for j in range(wanted.n)]
        self._choices = [
            _Choice(
                Detokenizer(text.tokenizer, s.prompt, wanted.skip_special),
                StopStrings(wanted.stops, wanted.include_stop),
                len(s.prompt),
            )
            for s in submissions
        ]
        bridge.admit(len(submissions))
        self._inbox = Inbox(limits.stream_buffer * len(submissions))
        self._keys = bridge.submit(submissions, self._inbox, arrival_s)
        self._open = len(submissions)
        self._among = among
        among.add(self)
        self.outcome = Outcome(prompt_tokens=sum(map(len, wanted.prompts)))
        self._timer: asyncio.TimerHandle | None = None
        if limits.request_timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(limits.request_timeout_s, self._time_out, limits.request_timeout_s)

    @property
    def choices(self) -> int:
        """How many there are."""
        return len(self._choices)

    def prompt_tokens(self, index: int) -> int:
        """Of a choice's prompt."""
        return self._choices[index].prompt_tokens

    def tokens(self, index: int) -> int:
        """That a choice has generated."""
        return self._choices[index].tokens

    async def batches(self) -> AsyncIterator[list[Piece | Run]]:
        """What comes as it comes, until every choice has ended. ApiError where the request fails."""
        while self._open:
            yield [part for item in await self._inbox.take() for part in self._parts(item)]

    def disconnect(self) -> None:
        """The client is gone: free everything now, and let the reader know."""
        self._abort(FinishReason.ABORT)
        self._inbox.fail(ApiError(499, "the client closed the connection", "aborted"))

    def fail(self, error: ApiError) -> None:
        """End it from outside."""
        self._abort(FinishReason.ABORT)
        self._inbox.fail(error)

    def close(self) -> None:
        """Abort what still runs."""
        if self._timer is not None:
            self._timer.cancel()
        self._abort(FinishReason.ABORT)
        self._among.discard(self)

    def _abort(self, reason: FinishReason) -> None:
        for key in self._keys:
            self.bridge.abort(key, reason)

    def _time_out(self, seconds: float) -> None:
        self._abort(FinishReason.TIMEOUT)
        self._inbox.fail(
            ApiError(TIMED_OUT, f"the request has not ended after {seconds:g} s", "timeout_error")
        )

    def _parts(self, item: Item) -> Iterator[Piece | Run]:
        """What an item brought; behind a stop string nothing does."""
        if self.outcome.first_s is None:
            self.outcome.first_s = time.perf_counter() - self.arrival_s
        index, what = item
        choice = self._choices[index]
        if isinstance(what, Event):
            if not choice.ended:
                yield self._of_event(index, what)
        elif self.wanted.stops:
            for token in what:
                if not choice.ended:
                    yield self._of_token(index, token, None, None)
        elif not choice.ended:
            choice.tokens += len(what)
            self.outcome.output_tokens += len(what)
            yield Run(index, what, choice.detokenizer.push_all(what), choice.tokens)

    def _of_event(self, index: int, event: Event) -> Piece:
        if event.reason is not None and event.reason not in (FinishReason.LENGTH, FinishReason.STOP):
            raise _failure(event)
        if event.token is None:
            choice = self._choices[index]
            text, met = self._rest(choice)
            reason = event.reason if met is None else "stop"
            return self._end(Piece(index, None, text, choice.tokens, None, reason, met))
        return self._of_token(index, event.token, event.logprobs, event.reason)

    def _of_token(self, index: int, token: int, logprobs: Logprobs | None, reason: str | None) -> Piece:
        choice = self._choices[index]
        choice.tokens += 1
        self.outcome.output_tokens += 1
        text, met = "", None
        if reason != FinishReason.STOP or self.wanted.include_stop:  # else it is an end token, and no text
            text = choice.detokenizer.push(token)
            if choice.tokens >= self.wanted.params.min_tokens:
                text, met = choice.stops.push(text)
        if reason is not None and met is None:
            rest, met = self._rest(choice)
            text += rest
        if met is not None:
            self.bridge.abort(self._keys[index], FinishReason.STOP)
            return self._end(Piece(index, token, text, choice.tokens, logprobs, "stop", met))
        if reason is None:
            return Piece(index, token, text, choice.tokens, logprobs)
        own = token if reason == FinishReason.STOP and token in self.wanted.params.stop_token_ids else None
        return self._end(Piece(index, token, text, choice.tokens, logprobs, reason, own))

    def _rest(self, choice: _Choice) -> tuple[str, str | None]:
        """What was held back of a choice that ends, and the stop string that is met in it."""
        text, met = choice.stops.push(choice.detokenizer.flush())
        return (text, met) if met is not None else (text + choice.stops.flush(), None)

    def _end(self, piece: Piece) -> Piece:
        self._choices[piece.choice].ended = True
        self._open -= 1
        self.outcome.reasons.append(piece.finish_reason or "")
        return piece


def _submission(wanted: Wanted, prompt: int, choice: int) -> Submission:
    """The engine request of one choice; seeds of further choices follow the first one's."""
    given = wanted.params
    changes: dict[str, object] = {"max_tokens": wanted.max_tokens[prompt]}
    if given.seed is not None and choice:
        changes["seed"] = (given.seed + choice) % 2**63
    if given.max_tokens != wanted.max_tokens[prompt] or len(changes) > 1:
        given = _replaced(given, changes)
    index = prompt * wanted.n + choice
    return Submission(f"{wanted.id}-{index}", wanted.prompts[prompt], given, wanted.priority)


def _replaced(params: SamplingParams, changes: dict[str, object]) -> SamplingParams:
    fields = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
    return SamplingParams(**{**fields, **changes})


def _failure(event: Event) -> ApiError:
    """The answer to a request that the engine ended without an output."""
    if event.reason in ("invalid", FinishReason.REJECTED):
        return bad(None, event.detail or "the engine refused the request")
    if event.reason == "policy":
        return ApiError(500, event.detail, "policy_error")
    return server_error(event.detail or f"the request was ended: {event.reason}")


def collected(pieces: Sequence[Piece]) -> tuple[str, Piece]:
    """The text of a choice's pieces, and the last of them."""
    return "".join([piece.text for piece in pieces]), pieces[-1]

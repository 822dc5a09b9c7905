"""Pieces of text as OpenAI's JSON: chunks of a stream, and whole answers; completions and chat."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from neo.runtime.server.generation import Generation, Piece, Run, Wanted, collected
from neo.runtime.server.messages import Logprobs
from neo.runtime.server.schemas import ChatRequest, CompletionRequest
from neo.runtime.server.text import TextSide

encode = msgspec.json.Encoder().encode

_PLACE = b"\0"  # of a text in an event: JSON has no such byte
_LEAST_LOGPROB = -9999.0  # what stands for -inf, which JSON does not have; as other servers give it

Json = dict[str, Any]


class Answers:
    """The answers to one completion request."""

    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(
        self, body: CompletionRequest | ChatRequest, wanted: Wanted, model: str, text: TextSide
    ) -> None:
        options = body.stream_options
        self.usage_at_end = bool(options and options.include_usage)
        self.usage_always = bool(options and options.continuous_usage_stats)
        self.wanted = wanted
        self.text = text
        self._common = {"id": wanted.id, "created": int(time.time()), "model": model}
        self._shown = [0] * (len(wanted.prompts) * wanted.n)  # characters so far, by choice
        self._begun: set[int] = set()
        self._around: dict[int, tuple[bytes, bytes]] = {}  # the text of a choice's events

    # -- streams ------------------------------------------------------------------------------------------

    def events(self, parts: Sequence[Piece | Run], generation: Generation) -> bytes:
        """The events of a stream, one for each token."""
        found = []
        for part in parts:
            if isinstance(part, Piece):
                found.append(event(self.chunk(part, generation)))
            elif self.usage_always or part.choice not in self._begun:
                found += [event(self.chunk(piece, generation)) for piece in part.pieces()]
            else:
                found.append(self._run(part, generation))
        return b"".join(found)

    def _run(self, run: Run, generation: Generation) -> bytes:
        """The events of a run. They differ in their text alone: what is around it is encoded once."""
        around = self._around.get(run.choice)
        if around is None:
            place: Any = msgspec.Raw(_PLACE)
            whole = event(self.chunk(Piece(run.choice, None, place, 0), generation))
            before, _, behind = whole.partition(_PLACE)
            around = self._around[run.choice] = (before, behind)
        before, behind = around
        return before + (behind + before).join(map(encode, run.texts)) + behind

    def chunk(self, piece: Piece, generation: Generation) -> Json:
        """The chunk of one piece."""
        first = piece.choice not in self._begun
        self._begun.add(piece.choice)
        found = {
            **self._common,
            "object": self.chunk_object,
            "choices": [self.chunk_choice(piece, first)],
        }
        if self.usage_always:
            found["usage"] = _usage(generation.prompt_tokens(piece.choice), piece.tokens)
        elif self.usage_at_end:
            found["usage"] = None
        return found

    def last_chunk(self, generation: Generation) -> Json | None:
        """The chunk with the usage of all choices and without any, where asked for."""
        if not self.usage_at_end:
            return None
        usage = self._total(generation)
        return {**self._common, "object": self.chunk_object, "choices": [], "usage": usage}

    def chunk_choice(self, piece: Piece, first: bool) -> Json:
        """``choices[0]`` of a chunk."""
        text = piece.text
        if first:
            text = self._echo(piece.choice) + text
        return {
            "index": piece.choice,
            "text": text,
            "logprobs": self.logprobs([piece]),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    # -- whole answers ------------------------------------------------------------------------------------

    def whole(self, pieces: Sequence[Sequence[Piece]], generation: Generation) -> Json:
        """The answer, from the pieces of each choice."""
        choices = [self.whole_choice(i, of_one) for i, of_one in enumerate(pieces)]
        usage = self._total(generation)
        return {**self._common, "object": self.whole_object, "choices": choices, "usage": usage}

    def whole_choice(self, choice: int, pieces: Sequence[Piece]) -> Json:
        """One of ``choices``."""
        text, last = collected(pieces)
        return {
            "index": choice,
            "text": self._echo(choice) + text,
            "logprobs": self.logprobs(pieces),
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }

    def logprobs(self, pieces: Sequence[Piece]) -> Json | None:
        """Log-probabilities in the completions' form, if there are any."""
        given = [(p, p.logprobs) for p in pieces if p.token is not None and p.logprobs is not None]
        if not given:
            return None
        tokens, offsets = [], []
        for piece, _ in given:
            tokens.append(self.text.token(piece.token or 0))
            offsets.append(self._shown[piece.choice])
            self._shown[piece.choice] += len(piece.text)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(found.token_logprob) for _, found in given],
            "top_logprobs": [self._by_text(found) if found.top else None for _, found in given],
            "text_offset": offsets,
        }

    def _by_text(self, found: Logprobs) -> Json:
        """The most likely tokens by their text; of tokens with the same text, the likeliest."""
        pairs = [(self.text.token(token), _finite(logprob)) for token, logprob in found.top]
        return dict(reversed(pairs))

    def _echo(self, choice: int) -> str:
        return self.wanted.texts[choice // self.wanted.n] if self.wanted.texts else ""

    def _total(self, generation: Generation) -> Json:
        prompt = sum(map(len, self.wanted.prompts))
        return _usage(prompt, sum(generation.tokens(i) for i in range(generation.choices)))


class ChatAnswers(Answers):
    """The answers to one chat request."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def chunk_choice(self, piece: Piece, first: bool) -> Json:
        """``choices[0]`` of a chunk; the first one names the role."""
        delta = {"role": "assistant", "content": piece.text} if first else {"content": piece.text}
        return {
            "index": piece.choice,
            "delta": delta,
            "logprobs": self.logprobs([piece]),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def whole_choice(self, choice: int, pieces: Sequence[Piece]) -> Json:
        """One of ``choices``."""
        text, last = collected(pieces)
        return {
            "index": choice,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self.logprobs(pieces),
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }

    def logprobs(self, pieces: Sequence[Piece]) -> Json | None:
        """Log-probabilities in the chat's form, if there are any."""
        given = [(p.token, p.logprobs) for p in pieces if p.token is not None and p.logprobs is not None]
        if not given:
            return None
        content = []
        for token, found in given:
            top = [self._token(t, logprob) for t, logprob in found.top]
            content.append({**self._token(token, found.token_logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        text = self.text.token(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def event(data: Any) -> bytes:
    """``data`` as an event of a stream."""
    return b"data: " + encode(data) + b"\n\n"


def _usage(prompt: int, output: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB

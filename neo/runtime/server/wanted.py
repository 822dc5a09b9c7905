"""From a body to what is asked of the engine: prompts as tokens, parameters checked, lengths capped."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from neo.core.errors import InputError
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.server.errors import ApiError, bad
from neo.runtime.server.generation import Wanted
from neo.runtime.server.messages import Ready
from neo.runtime.server.schemas import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    Message,
    Sampled,
)
from neo.runtime.server.text import TextSide

_MOST_FORMS, _DEEPEST = 4, 8  # of an error message
_INLINE_CHARACTERS = 4096  # longer texts are tokenized on a thread: about a millisecond a kilobyte
_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in completions

Body = TypeVar("Body", bound=BaseModel)


def parse(schema: type[Body], body: bytes) -> Body:
    """The body as ``schema``. ApiError 400 naming the first field that is wrong."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _wrong_field(error) from None


def _wrong_field(error: ValidationError) -> ApiError:
    """400 for the first field that is wrong; what its forms would have to be, where it has several."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    param = next((str(p) for p in errors[0]["loc"][:1]), None)
    whys = dict.fromkeys(e["msg"] for e in errors if [str(p) for p in e["loc"][:1]] == [param])
    if param is None:
        return bad(None, errors[0]["msg"])
    if len(whys) > 1:
        return bad(param, f"{param}: no form of it fits: {'; '.join(list(whys)[:_MOST_FORMS])}")
    where = ".".join(str(p) for p in errors[0]["loc"][:_DEEPEST])
    return bad(param, f"{where}: {errors[0]['msg']}")


class Reader:
    """Reads bodies for one model."""

    def __init__(self, text: TextSide, ready: Ready, names: Sequence[str]) -> None:
        self.text = text
        self.ready = ready
        self.names = tuple(names)

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served; none named means the one that is."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"model {name!r} is not served here; {self.names[0]!r} is",
                param="model",
                code="model_not_found",
            )

    async def completion(self, body: CompletionRequest) -> Wanted:
        """What a ``CompletionRequest`` asks for."""
        self.check_model(body.model)
        if body.suffix:
            raise bad("suffix", "suffix: text cannot be inserted by this model")
        if body.echo and body.logprobs not in (None, False):
            raise bad("echo", "echo with logprobs: log-probabilities of prompts are not computed")
        prompts = await self._prompts(body)
        wants = body.logprobs if not isinstance(body.logprobs, bool) else int(body.logprobs) or None
        texts = None
        if body.echo:
            texts = [self.text.decode(ids) for ids in prompts]
            if isinstance(body.prompt, str):
                texts = [body.prompt]
            else:
                pairs = zip(body.prompt, texts, strict=False)
                texts = [p if isinstance(p, str) else text for p, text in pairs]
        return self._wanted(body, f"cmpl-{uuid4().hex}", prompts, body.max_tokens, wants, texts, "prompt")

    async def chat(self, body: ChatRequest) -> Wanted:
        """What a ``ChatRequest`` asks for."""
        self.check_model(body.model)
        if body.tools:
            raise bad("tools", "tools: tool calls are not supported")
        if body.chat_template is not None:
            raise bad("chat_template", "chat_template: only the model's own template is used")
        if body.top_logprobs and not body.logprobs:
            raise bad("top_logprobs", "top_logprobs: needs logprobs to be true")
        resume = bool(body.continue_final_message)
        prompt = self.conversation(
            body.messages, generate=body.add_generation_prompt is not False and not resume, resume=resume
        )
        most = body.max_completion_tokens or body.max_tokens or self.ready.max_model_len
        wants = (body.top_logprobs or 0) if body.logprobs else None
        return self._wanted(body, f"chatcmpl-{uuid4().hex}", [prompt], most, wants, None, "messages")

    def conversation(self, messages: Sequence[Message], *, generate: bool, resume: bool) -> list[int]:
        """Token ids of messages by the model's chat template."""
        plain = []
        for i, message in enumerate(messages):
            content = message.content
            if content is None and not (message.role == "assistant" and message.tool_calls):
                where = f"messages[{i}].content"
                raise bad(where, f"{where}: missing; only an assistant's message with tool_calls needs none")
            if isinstance(content, list):
                if any(part.type != "text" or part.text is None for part in content):
                    raise bad("messages", "messages: only parts of type 'text' are supported")
                content = "".join(part.text or "" for part in content)
            role = "system" if message.role == "developer" else message.role
            plain.append({"role": role, "content": content or ""})
        try:
            return self.text.chat(plain, generate=generate, resume=resume)
        except InputError as error:
            raise bad("messages", str(error)) from None

    async def _prompts(self, body: CompletionRequest) -> list[list[int]]:
        given: Any = body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given:
            raise bad("prompt", "prompt: there is none")
        if len(given) > MAX_CHOICES:
            raise bad("prompt", f"prompt: {len(given)} prompts, at most {MAX_CHOICES} in a request")
        special = body.add_special_tokens is not False
        return [self._known(p) if isinstance(p, list) else await self.encode(p, special) for p in given]

    def _known(self, ids: list[int]) -> list[int]:
        """The ids; 400 if one is no token."""
        vocab = self.ready.vocab
        if ids and (min(ids) < 0 or max(ids) >= vocab):
            wrong = next(t for t in ids if not 0 <= t < vocab)
            raise bad("prompt", f"prompt: token {str(wrong)[:20]} is not in the vocabulary of {vocab}")
        return ids

    async def encode(self, text: str, special: bool) -> list[int]:
        """Token ids of a text, on a thread if it is long."""
        if len(text) <= _INLINE_CHARACTERS:
            return self.text.encode(text, special)
        return await asyncio.to_thread(self.text.encode, text, special)

    def _wanted(
        self,
        body: Sampled,
        id: str,
        prompts: list[list[int]],
        most: int | None,
        logprobs: int | None,
        texts: list[str] | None,
        field: str,
    ) -> Wanted:
        n = body.n or 1
        _refuse_unsupported(body, n)
        if n * len(prompts) > MAX_CHOICES:
            raise bad("n", f"n: {len(prompts)} prompts of {n} choices, at most {MAX_CHOICES} in all")
        most = most or _COMPLETION_TOKENS
        if (body.min_tokens or 0) > most:
            raise bad("min_tokens", f"min_tokens: {body.min_tokens} is more than max_tokens, which is {most}")
        lengths = [self._cap(ids, most, field) for ids in prompts]
        stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        return Wanted(
            id,
            prompts,
            self._params(body, min(lengths), logprobs),
            lengths,
            n,
            stops,
            bool(body.include_stop_str_in_output),
            body.skip_special_tokens is not False,
            body.priority or 0,
            texts,
        )

    def _cap(self, ids: list[int], most: int, field: str) -> int:
        """Tokens that may be generated behind a prompt; 400 if it is empty or too long."""
        if not ids:
            raise bad(field, f"{field}: the prompt is empty")
        ready = self.ready
        room = ready.max_model_len - len(ids)
        if room < 1:
            raise bad(
                field,
                f"{field}: {len(ids)} tokens leave no room for an answer, the model's context length is "
                f"{ready.max_model_len}",
                "context_length_exceeded",
            )
        # Where no limit was asked for, what KV memory can hold is one: the last token needs no KV.
        fits = ready.capacity_tokens - len(ids) + 1
        return min(most, room if most < ready.max_model_len or fits < 1 else min(room, fits))

    def _params(self, body: Sampled, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """SamplingParams; 400 with their own message, naming the field."""
        vocab = self.ready.vocab
        given: dict[str, Any] = {
            name: value for name in _PASSED if (value := getattr(body, name)) is not None
        }
        if "top_k" in given:
            given["top_k"] = min(given["top_k"], vocab)
        if "min_tokens" in given:
            given["min_tokens"] = min(given["min_tokens"], max_tokens)
        if logprobs is not None:
            given["logprobs"] = logprobs
        stops = tuple(body.stop_token_ids or ())
        if any(not 0 <= t < vocab for t in stops):
            raise bad("stop_token_ids", f"stop_token_ids: a token is not in the vocabulary of {vocab}")
        try:
            return SamplingParams(
                max_tokens=max_tokens, stop_token_ids=stops, logit_bias=_bias(body.logit_bias, vocab), **given
            )
        except InputError as error:
            named = re.match(r"\w+", str(error))
            raise bad(named.group() if named else None, str(error)) from None


_PASSED = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "ignore_eos", "min_tokens"),
)


def _bias(given: dict[str, float] | None, vocab: int) -> dict[int, float] | None:
    if not given:
        return None
    if any(not key.isdecimal() or len(key) > 9 or int(key) >= vocab for key in given):
        raise bad("logit_bias", f"logit_bias: a key is no token id below {vocab}")
    return {int(key): value for key, value in given.items()}


def _refuse_unsupported(body: Sampled, n: int) -> None:
    """What would change the answer and is not there."""
    if body.best_of is not None and body.best_of not in (1, n):
        raise bad("best_of", f"best_of: {body.best_of} candidates are not ranked; leave it out or give n")
    if body.best_of is not None and body.best_of < n:
        raise bad("best_of", f"best_of: must be at least n, which is {n}")
    if body.use_beam_search:
        raise bad("use_beam_search", "use_beam_search: not supported")
    kind = (body.response_format or {"type": "text"}).get("type")
    if kind != "text":
        raise bad("response_format", f"response_format: only 'text' is supported, not {str(kind)[:40]!r}")

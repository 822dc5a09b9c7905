"""Bodies of requests, as OpenAI's interface and its common extensions have them. Unknown fields are ignored.

Ranges that sampling checks itself (``SamplingParams``) are not repeated here; a field that would change the
answer and that neo does not have is refused by name where it is used (``refuse_unsupported``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_CHOICES = 128
"""Choices (prompts times ``n``) of one HTTP request; OpenAI's limit of ``n``."""

MAX_STOPS = 16
"""Stop strings of a request: each is looked for with every token. OpenAI takes 4."""

MAX_STOP_LENGTH = 256

Ids = Annotated[list[int], Field(fail_fast=True)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Body):
    """What a stream also holds."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Sampled(_Body):
    """What both kinds of completion have."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    skip_special_tokens: bool | None = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = 0
    user: str | None = None
    use_beam_search: bool | None = False
    response_format: dict[str, Any] | None = None


class CompletionRequest(Sampled):
    """``POST /v1/completions``."""

    prompt: str | Ids | Annotated[list[str | Ids], Field(fail_fast=True)]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0)] | bool | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = True


class ContentPart(_Body):
    """A piece of a message."""

    type: str
    text: str | None = None


class Message(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    name: str | None = None


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ChatRequest(Sampled):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    tools: list[dict[str, Any]] | None = None
    chat_template: str | None = None


class TokenizeRequest(_Body):
    """``POST /tokenize``: of a text, or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = True
    add_generation_prompt: bool | None = True
    return_token_strs: bool | None = False


class DetokenizeRequest(_Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Ids

"""A request in the engine: checked when it comes, its tokens and how it samples while it is there."""

from __future__ import annotations

from collections.abc import Sequence

from neo.core.errors import InputError
from neo.core.request import Request
from neo.runtime.sampler_state import SamplerState
from neo.runtime.sampling_params import SamplingParams


class Live:
    """A request's tokens and how it samples.

    Attributes:
        ends: tokens that end it.
        ended: told to its client, though a step planned ahead may still hold it.
    """

    __slots__ = ("ended", "ends", "prompt", "request", "state")

    def __init__(
        self, request: Request, prompt: Sequence[int], state: SamplerState, ends: frozenset[int]
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.state = state
        self.ends = ends
        self.ended = False

    @property
    def tokens(self) -> list[int]:
        """Generated so far."""
        return self.state.tokens


def check_prompt(
    request_id: str, prompt: Sequence[int], params: SamplingParams, vocab: int, max_model_len: int
) -> None:
    """InputError, naming the request, for a prompt that cannot be continued as asked."""
    if not len(prompt):
        raise InputError(f"request {request_id!r}: the prompt is empty")
    if min(prompt) < 0 or max(prompt) >= vocab:
        wrong = next(t for t in prompt if not 0 <= t < vocab)
        raise InputError(f"request {request_id!r}: token {wrong} is not in the vocabulary of {vocab}")
    if len(prompt) + params.max_tokens > max_model_len:
        raise InputError(
            f"request {request_id!r}: {len(prompt)} prompt tokens and {params.max_tokens} to generate "
            f"are more than max_model_len = {max_model_len}"
        )


def begin_request(
    request: Request,
    prompt: Sequence[int],
    params: SamplingParams,
    vocab: int,
    eos_token_ids: tuple[int, ...],
    seed: int,
) -> Live:
    """A request that nothing is generated of yet; InputError if its parameters leave no token to choose.

    ``eos_token_ids`` end it unless it ignores them; ``seed`` is used if it brings none.
    """
    if params.ignore_eos:
        eos_token_ids = ()
    state = SamplerState(params, prompt, vocab, seed, eos_token_ids)
    if params.min_tokens and len(state.end_ids) >= vocab:
        raise InputError(f"request {request.id!r}: stop_token_ids with min_tokens leave no token to choose")
    ends = frozenset(params.stop_token_ids) | frozenset(eos_token_ids)
    return Live(request, list(prompt), state, ends)

"""How the next token of a request is chosen: the parameters, checked. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neo.core.errors import InputError

MAX_LOGPROBS = 64
"""Most likely tokens that may be asked for with each token. OpenAI's limit is 20, as is vLLM's default; more
than a few dozen makes every streamed line several KiB and serves no client we know of."""

BIAS_LIMIT = 100.0
"""Largest absolute `logit_bias`, as in OpenAI's interface."""

PENALTY_LIMIT = 2.0
"""Largest absolute presence and frequency penalty, as in OpenAI's interface."""

REPETITION_LIMITS = (0.01, 100.0)
"""Of `repetition_penalty`: far beyond what is of use (0.8 to 1.5), and no logit overflows by it."""

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: there float32 cannot tell logits apart that the division would."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a request asks of sampling; checked when made (InputError naming the field).

    Attributes:
        max_tokens: tokens to generate at most.
        temperature: divides the logits; 0 is greedy.
        top_k: only the k most likely tokens; 0 and -1 mean all.
        top_p: only the fewest most likely tokens whose probabilities (after `top_k`) sum to at least this.
        min_p: only tokens at least this share as likely as the most likely one.
        repetition_penalty: logits of tokens in the prompt or the output are divided by it if positive,
            multiplied if negative (CTRL, arXiv:1909.05858, with the sign handled as Hugging Face does).
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted once for every time the token is in the output.
        seed: makes the request's tokens reproducible; any integer of 64 bits, signed or not.
        stop_token_ids: tokens that end the request besides the model's own end tokens.
        ignore_eos: do not end at the model's end tokens.
        logprobs: give log-probabilities of each token and of this many most likely ones; None gives none.
        min_tokens: end and stop tokens are impossible before this many tokens.
        logit_bias: added to the logits of these tokens, before the penalties.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens, "max_tokens")
        _real("temperature", self.temperature, 0.0)
        _integer("top_k", self.top_k, -1)
        _real("top_p", self.top_p, 0.0, 1.0, above=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, *REPETITION_LIMITS)
        _real("presence_penalty", self.presence_penalty, -PENALTY_LIMIT, PENALTY_LIMIT)
        _real("frequency_penalty", self.frequency_penalty, -PENALTY_LIMIT, PENALTY_LIMIT)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"ignore_eos is {self.ignore_eos!r}, must be true or false")
        self._check_tokens()

    def _check_tokens(self) -> None:
        stops: Any = self.stop_token_ids
        if not isinstance(stops, Sequence) or isinstance(stops, str | bytes):
            raise InputError(f"stop_token_ids is {stops!r}, must be a list of token ids")
        for token in stops:
            _integer("stop_token_ids: an entry", token, 0)
        object.__setattr__(self, "stop_token_ids", tuple(stops))
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias is {self.logit_bias!r}, must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias: a token id", token, 0)
            _real(f"logit_bias of token {token}", bias, -BIAS_LIMIT, BIAS_LIMIT)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without a draw."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether the request's own tokens change its logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def truncated(self) -> bool:
        """Whether only some of the tokens may be drawn."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def _integer(name: str, value: object, least: int, most: int | None = None, most_name: str = "") -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and least <= value and (most is None or value <= most):  # type: ignore[operator]
        return
    if most is None:
        wanted = f"of at least {least}"
    else:
        wanted = f"from {least} to {f'{most_name} ({most})' if most_name else most}"
    raise InputError(f"{name} is {value!r}, must be an integer {wanted}")


def _real(name: str, value: object, least: float, most: float = math.inf, *, above: bool = False) -> None:
    """Check least <= value <= most and finite; `above` excludes `least` itself."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and least <= number <= most and not (above and number == least):
            return
    if most == math.inf:
        wanted = f"a finite number {'above' if above else 'of at least'} {least:g}"
    elif above:
        wanted = f"a number above {least:g} and at most {most:g}"
    else:
        wanted = f"a number from {least:g} to {most:g}"
    raise InputError(f"{name} is {value!r}, must be {wanted}")

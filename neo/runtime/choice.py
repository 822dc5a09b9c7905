"""The tokens of one step: chosen where its logits are, read when it has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from neo.core.request import Request
from neo.runtime.sampler_state import SamplerState
from neo.runtime.sampling import Sampler, SamplingError, TokenLogprobs, refuse

Plain = tuple[tuple[str, ...], list[int]]
"""Requests and the token that each of them got."""


class Chooses(Protocol):
    """What is known of a request that a token is chosen for."""

    request: Request
    state: SamplerState


class Choice:
    """Called by an executor with a step's logits (``neo.runtime.executor.Sample``), then ``collect``.

    Args:
        at_once: choose when called. Otherwise tokens of requests that are all ``plain`` are chosen on the
            device without waiting for it; else ``collect`` looks at the logits, which must last until then.

    Attributes:
        sampled: by request, after ``collect``: its token and log-probabilities.
        unsampled: requests from whose logits no token can be chosen, and why; the others are none the worse.
        plain: after ``collect``: all of it, if every request got a token, and no log-probabilities.
        settled: whether a step behind this one need not wait for ``collect`` to know its tokens.
    """

    def __init__(self, sampler: Sampler, known: Mapping[str, Chooses], at_once: bool) -> None:
        self.sampled: dict[str, tuple[int, TokenLogprobs | None]] = {}
        self.unsampled: dict[str, str] = {}
        self.plain: Plain | None = None
        self.settled = False
        self._sampler = sampler
        self._known = known
        self._at_once = at_once
        self._logits: Tensor | None = None
        self._requests: tuple[str, ...] = ()
        self._found: tuple[Tensor, Tensor] | None = None  # tokens, largest logits: on their way to the host

    def __call__(self, logits: Any, requests: tuple[str, ...]) -> Tensor | None:
        """See ``neo.runtime.executor.Sample``."""
        if self._at_once:
            self._sample(logits, requests)
            return None
        self._requests = requests
        of = [self._known[r] for r in requests]
        if not all(one.state.plain for one in of):
            self._logits = logits
            return None
        pending = [one.request.generated - len(one.state.tokens) for one in of]
        tokens, best = self._sampler.choose(logits, [one.state for one in of], pending)
        self._found = _to_host(tokens), _to_host(best)
        self.settled = True
        return tokens

    def collect(self) -> None:
        """Read what was chosen; the step has ended."""
        if self._found is not None:
            tokens, best = self._found
            numbers = tokens.tolist()
            try:
                refuse(best)
            except SamplingError as error:
                self._refused(error, self._requests)
            self.sampled |= {
                r: (token, None)
                for r, token in zip(self._requests, numbers, strict=True)
                if r not in self.unsampled
            }
            if not self.unsampled:
                self.plain = self._requests, numbers
        elif self._logits is not None:
            self._sample(self._logits, self._requests)
        self._found = self._logits = None

    def _sample(self, logits: Tensor, requests: tuple[str, ...]) -> None:
        states = [self._known[r].state for r in requests]
        try:
            tokens, logprobs = self._sampler.sample(logits, states)
        except SamplingError as error:
            self._refused(error, requests)
            rows = [i for i in range(len(requests)) if i not in error.rows]
            if rows:
                self._sample(logits[rows], tuple([requests[i] for i in rows]))
            return
        self.sampled |= dict(zip(requests, zip(tokens, logprobs, strict=True), strict=True))
        if not self.unsampled and not any(logprobs):
            self.plain = requests, tokens

    def _refused(self, error: SamplingError, requests: Sequence[str]) -> None:
        self.unsampled |= {requests[row]: error.reason for row in error.rows}


def _to_host(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return values
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)

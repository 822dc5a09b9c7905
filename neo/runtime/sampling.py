"""Logits to tokens: bias, penalties, temperature, top-k, top-p, min-p, the draw, log-probabilities.

A row's result depends on its own logits, parameters, seed and history, never on the rest of the batch. Three
things make that exact. Random numbers are a function of the request's seed and of how many tokens it has.
Probabilities are integers (exponentials in fixed point): their sums do not depend on the order of addition,
so neither on the shape of the batch nor on how a device splits it. And what top-k, top-p and min-p leave is
always a beginning of one order: by logit downwards, then by token id upwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from neo.core.errors import NeoError
from neo.runtime.sampler_state import SamplerState
from neo.runtime.sampling_params import SamplingParams

__all__ = ["Sampler", "SamplerState", "SamplingError", "SamplingParams", "TokenLogprobs"]

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_CPU_ELEMENTS = 1 << 18
"""Logits worked on at once on the CPU, so that intermediates stay in the caches. Measured on one core of a
server: 2**17 to 2**19 are alike; a batch of 64 rows of 152064 in one go takes 4 to 8 times as long."""
_PARTS = 512  # of a row, at most


class SamplingError(NeoError):
    """Rows of logits from which no token can be chosen; raised before any row's state has changed.

    Attributes:
        rows: all such rows of the batch, ascending.
        row: the first of them.
        reason: what is wrong with them.
    """

    def __init__(self, rows: Sequence[int], reason: str) -> None:
        self.rows = tuple(rows)
        self.row = self.rows[0]
        self.reason = reason
        listed = ", ".join(map(str, self.rows))
        super().__init__(f"no token can be sampled from row{'s' * (len(self.rows) > 1)} {listed}: {reason}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities under the model's own distribution, before bias, penalties and temperature.

    Attributes:
        token_logprob: that of the chosen token.
        rank: 1 + how many tokens are strictly more likely than it.
        top: (token, log-probability) of the most likely tokens, downwards, ties by token id; may be -inf.
    """

    token_logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the next token of every row of a batch. Holds no state of its own.

    On the CPU numpy sorts and searches maxima: its vector instructions are several times faster than torch.
    """

    def __init__(self, vocab: int) -> None:
        if not 1 <= vocab < 2**31:
            raise ValueError(f"vocab is {vocab}, must be from 1 to 2**31 - 1")
        self.vocab = vocab
        # The largest power of two with which `vocab` weights of at most 1.0 cannot overflow int64.
        self._one = 1 << (62 - (vocab - 1).bit_length())

    @torch.inference_mode()
    def sample(
        self, logits: torch.Tensor, states: Sequence[SamplerState]
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Choose a token per row of `logits`, float32 [rows, vocab]; give log-probabilities where asked.

        Changes no state: the caller appends what it accepts. Raises SamplingError for rows with NaN or +inf,
        or with no finite logit, either as given or once bias, penalties and barred tokens are applied.
        """
        self._fits(logits, states)
        if not states:
            return [], []
        logits = logits.detach().float()
        best, tokens = _maxima(logits)
        refuse(best)
        edited = _edited(logits, states)
        if edited is not logits:
            best, tokens = _maxima(edited)
            refuse(best, "nothing finite is left after bias, penalties and min_tokens, or they overflow")
        tokens = self._drawn(edited, best, tokens, states)
        logprobs = _logprobs(logits, tokens, states)
        return tokens.tolist(), logprobs

    @torch.inference_mode()
    def choose(
        self, logits: torch.Tensor, states: Sequence[SamplerState], pending: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same on a device for states that are all ``plain``, without waiting for it.

        ``pending``: how many tokens of each state have been chosen that it does not know yet. Returns tokens,
        int64 [rows], and each row's largest logit, for ``refuse`` once they are there.
        """
        self._fits(logits, states)
        best, tokens = _maxima(logits.detach())
        if all(s.params.greedy for s in states):
            return tokens, best
        return self._drawn(logits.detach().float(), best.float(), tokens, states, pending), best

    def _fits(self, logits: torch.Tensor, states: Sequence[SamplerState]) -> None:
        if logits.shape != (len(states), self.vocab):
            raise ValueError(
                f"logits have shape {tuple(logits.shape)}, must be ({len(states)}, {self.vocab})"
            )

    def _drawn(
        self,
        logits: torch.Tensor,
        best: torch.Tensor,
        tokens: torch.Tensor,
        states: Sequence[SamplerState],
        pending: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """`tokens` with those of rows that are not greedy replaced by draws."""
        for truncated in (False, True):
            rows = [
                i for i, s in enumerate(states) if not s.params.greedy and s.params.truncated is truncated
            ]
            for some in _pieces(rows, logits):
                of = [states[i] for i in some]
                index = _sent(torch.tensor(some), logits.device)
                gaps = _gaps(logits, best, index, of)
                later = [0] * len(of) if pending is None else [pending[i] for i in some]
                uniforms = [s.uniform(n) for s, n in zip(of, later, strict=True)]
                uniform = _column(uniforms, torch.float64, logits.device)
                draw = self._draw_truncated(gaps, uniform, of) if truncated else self._draw(gaps, uniform)
                tokens = tokens.index_copy(0, index, draw)
        return tokens

    def _weights(self, gaps: torch.Tensor) -> torch.Tensor:
        """Probabilities over that of the most likely token, in fixed point: int64."""
        return (torch.exp(-gaps) * float(self._one)).long()

    def _draw(self, gaps: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """A token per row by inverting the cumulative distribution, over token ids."""
        cumulative = self._weights(gaps).cumsum(-1)
        at = _point(uniform, cumulative[:, -1:])
        return torch.searchsorted(cumulative, at, right=True).squeeze(1)

    def _draw_truncated(
        self, gaps: torch.Tensor, uniform: torch.Tensor, states: Sequence[SamplerState]
    ) -> torch.Tensor:
        """The same over the beginning that top-k, top-p and min-p leave of the tokens sorted by logit."""
        ordered = _ascending(gaps)
        weights = self._weights(ordered)
        cumulative = weights.cumsum(-1)
        last = self._support(weights, cumulative, [s.params for s in states]) - 1
        place = torch.searchsorted(
            cumulative, _point(uniform, cumulative.gather(1, last)), right=True
        )  # in the order by logit; only values were sorted, so find whose value that is
        value = ordered.gather(1, place)
        among_equals = place - torch.searchsorted(ordered, value)
        seen = (gaps == value).cumsum(-1, dtype=torch.int32)
        return torch.searchsorted(seen, (among_equals + 1).int()).squeeze(1)

    def _support(
        self, weights: torch.Tensor, cumulative: torch.Tensor, params: Sequence[SamplingParams]
    ) -> torch.Tensor:
        """How many tokens remain, at least 1: int64 [rows, 1]. `weights` fall along a row."""
        device = weights.device
        top_k = [min(p.top_k, self.vocab) if p.top_k > 0 else self.vocab for p in params]
        count = _column(top_k, torch.int64, device)
        if any(p.top_p < 1.0 for p in params):
            total = cumulative.gather(1, count - 1)
            top_p = _column([p.top_p for p in params], torch.float64, device)
            # From above, so that what remains has the whole of top_p; rounding may carry it past the total.
            enough = (top_p * total).ceil().long().minimum(total)
            count = count.minimum(torch.searchsorted(cumulative, enough) + 1)
        if any(p.min_p > 0.0 for p in params):
            least = _column([math.ceil(p.min_p * self._one) for p in params], torch.int64, device)
            count = count.minimum((weights >= least).sum(-1, keepdim=True))
        return count


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return _sent(torch.tensor(values, dtype=dtype).unsqueeze(1), device)


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor on a device, without waiting for it."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def _maxima(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row the largest logit, NaN if there is any, and the lowest token id that has it."""
    if logits.device.type != "cpu":
        return maxima_in_parts(logits)
    indices = torch.from_numpy(logits.numpy().argmax(-1))
    return logits.gather(1, indices.unsqueeze(1)).squeeze(1), indices


def maxima_in_parts(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row the largest logit, NaN if there is any, and a token id that has it; in two rounds.

    A GPU takes one long row with few threads: 64 rows of 128256 in one round take it 40 us, a hundredth of
    the step that they come from.
    """
    rows, vocab = logits.shape
    parts = next(n for n in range(min(_PARTS, vocab), 0, -1) if vocab % n == 0)
    values, within = logits.reshape(rows, parts, vocab // parts).max(-1)
    best, part = values.max(-1)
    return best, part * (vocab // parts) + within.gather(1, part.unsqueeze(1)).squeeze(1)


def _ascending(values: torch.Tensor) -> torch.Tensor:
    if values.device.type != "cpu":
        return values.sort(-1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))


def refuse(best: torch.Tensor, reason: str = "its logits hold NaN or +inf, or nothing finite") -> None:
    """SamplingError if a row's largest logit is not finite."""
    finite = best.isfinite().tolist()
    if not all(finite):
        raise SamplingError([row for row, ok in enumerate(finite) if not ok], reason)


def _gaps(
    logits: torch.Tensor, best: torch.Tensor, index: torch.Tensor, states: Sequence[SamplerState]
) -> torch.Tensor:
    """(largest logit - logit) / temperature of the rows `index`: from 0 to inf, so that nothing overflows."""
    temperature = [min(s.params.temperature, _FLOAT32_MAX) for s in states]
    return (best[index].unsqueeze(1) - logits[index]).div_(_column(temperature, torch.float32, logits.device))


def _point(uniform: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """A place in [0, total), int64."""
    return (uniform * total).long().minimum(total - 1)


def _edited(logits: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """Logits with bias, barred tokens and penalties; `logits` themselves if no state has any.

    Only the entries concerned are touched, those of all rows at once.
    """
    biased = [(i, s) for i, s in enumerate(states) if s.bias_ids.size]
    barred = [(i, s.barred) for i, s in enumerate(states) if s.params.min_tokens]
    penalised = [(i, s, s.history) for i, s in enumerate(states) if s.history is not None]
    places = _places([(i, s.bias_ids) for i, s in biased], logits)
    closed = _places(barred, logits)
    seen = _places([(i, h.ids) for i, _, h in penalised], logits)
    if not (places.numel() or closed.numel() or seen.numel()):
        return logits
    flat = logits.clone(memory_format=torch.contiguous_format).view(-1)
    if places.numel():
        flat[places] += _spread([s.bias for _, s in biased], logits)
    if closed.numel():
        flat[closed] = -math.inf
    if seen.numel():
        counts = _spread([h.counts for _, _, h in penalised], logits)
        repeats = [len(h.ids) for _, _, h in penalised]
        repetition, presence, frequency = (
            _spread([np.repeat(np.array(values, np.float32), repeats)], logits)
            for values in zip(
                *(
                    (s.params.repetition_penalty, s.params.presence_penalty, s.params.frequency_penalty)
                    for _, s, _ in penalised
                ),
                strict=True,
            )
        )
        values = flat[seen]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[seen] = values - frequency * counts - presence * (counts > 0)
    return flat.view(logits.shape)


def _places(of_rows: Sequence[tuple[int, npt.NDArray[np.int64]]], logits: torch.Tensor) -> torch.Tensor:
    """Flat indices of token ids of rows."""
    flat = [row * logits.shape[1] + ids for row, ids in of_rows]
    return torch.from_numpy(np.concatenate(flat) if flat else np.empty(0, np.int64)).to(logits.device)


def _spread(of_rows: Sequence[npt.NDArray[np.float32]], logits: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(of_rows)).to(logits.device)


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, states: Sequence[SamplerState]
) -> list[TokenLogprobs | None]:
    found: list[TokenLogprobs | None] = [None] * len(states)
    rows = [i for i, s in enumerate(states) if s.params.logprobs is not None]
    for some in _pieces(rows, logits):
        index = torch.tensor(some, device=logits.device)
        raw = logits[index]
        own = tokens[index].unsqueeze(1)
        logprobs = raw.log_softmax(-1)
        ranks = ((raw > raw.gather(1, own)).sum(-1) + 1).tolist()
        owns = logprobs.gather(1, own).squeeze(1).tolist()
        tops = _tops(raw, logprobs, [states[i].params.logprobs or 0 for i in some])
        for i, logprob, rank, top in zip(some, owns, ranks, tops, strict=True):
            found[i] = TokenLogprobs(logprob, rank, top)
    return found


def _pieces(rows: Sequence[int], logits: torch.Tensor) -> Iterator[Sequence[int]]:
    """`rows` in runs that are worked on at once: all of them, but on the CPU."""
    most = max(1, _CPU_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(rows))
    for first in range(0, len(rows), most):
        yield rows[first : first + most]


def _tops(
    raw: torch.Tensor, logprobs: torch.Tensor, wanted: Sequence[int]
) -> list[tuple[tuple[int, float], ...]]:
    """The `wanted[row]` most likely tokens of each row, equals by token id on every device."""
    most = min(max(wanted), raw.shape[1])
    if most == 0:
        return [()] * len(wanted)
    least = raw.topk(most, dim=-1).values[:, -1:]
    row, token = (raw >= least).nonzero(as_tuple=True)  # by row, then by token
    entries = zip(*(t.tolist() for t in (row, token, raw[row, token], logprobs[row, token])), strict=True)
    found: list[list[tuple[float, int, float]]] = [[] for _ in wanted]
    for i, t, logit, logprob in entries:
        found[i].append((-logit, t, logprob))
    return [tuple((t, p) for _, t, p in sorted(one)[:n]) for one, n in zip(found, wanted, strict=True)]

"""How many requests ``neo`` keeps on the host for relayed decoding.

Relayed decodes (``SubBatch.relay_decode``) have the CPU to themselves for a whole step: with N of them, each
of L layers attends for N / (L + 1) requests, and N / (L + 1) tokens come out. More of them than the CPU can
serve within a step make the GPU wait: the N of the best rate keeps the CPU busy for as long as a step takes.

A request on the host takes L + 1 steps for a token. As many are sent there as give the highest rate and make
the mean time in the system no longer (``neo.policy.host_target``), where what has been done for them before
their turn counts as work begun: those in work are half done on average; those on the host have their prompt
computed, and as many of their tokens as the host makes before the GPU has room for them, half of that on
average. With fewer than L + 1 of them there would be steps in which nobody on the host is between two tokens,
and room on the GPU would pass them by: no fewer are aimed at. As long as there are as many, they are served,
up to the N of the best rate, even if no more are sent.

Beside prompts, further requests on the host may run in a second sub-batch, for which relayed ones stand still
(``neo.policy.neo_relay``): as many as a step full of prompts hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from neo.core.graph import OpKind, Work
from neo.core.view import SystemView
from neo.policy.estimate import StageTimes
from neo.policy.host_target import SPREAD, HostTarget, Load, Steady, mean_load

_BELIEVED = 0.98  # of a rate with the host, an estimate of what CPU and GPU do side by side
_WORTH = 1.04  # what relaying must gain to begin: filling the host and draining it again cost time, too


class Goal(NamedTuple):
    """What to aim at with relayed decodes.

    Attributes:
        hosted: requests on the host, beyond which no more are sent there.
        served: requests within a token, beyond which no more begin one.
    """

    hosted: int
    served: int


class RelayTarget:
    """Goals for one set of stage times; the rates of one (rounded) load are kept."""

    def __init__(self, times: StageTimes, pipeline: HostTarget) -> None:
        self.times = times
        self.pipeline = pipeline
        self.layers = times.model.layers
        self._known: dict[tuple[Load, int], tuple[Steady, ...]] = {}

    def look(self, view: SystemView, budget: int) -> Goal | None:
        """The best goal; None where it is not worth beginning, beside the GPU alone and two sub-batches.

        None too while nobody decodes: nothing is known of outputs.

        Args:
            budget: tokens of a step.
        """
        load = mean_load(view, budget)
        if load is None:
            return None
        most = min(load.host // load.kv, view.limits.relay_rows * (self.layers + 1))
        most = min(most, view.limits.max_seqs - load.resident)  # who asks for few in work gets few
        options = self._known.get((load, most))
        if options is None:
            options = self._known[load, most] = tuple(self._options(load, most))
        outlook = self.pipeline.outlook(view, load)
        aim, fastest = outlook.harmless(options), max(options, key=lambda option: option.rate)
        usual = max([rate for _, rate in outlook.rates])
        if not view.relaying and aim.rate < _WORTH * usual:
            return None
        if not aim.hosted and len(view.cpu_decodes) <= self.layers:
            return None
        return Goal(aim.hosted, fastest.served)

    def _options(self, load: Load, most: int) -> Iterator[Steady]:
        """Steady states; rates are relative to the one without the host, of which the pipeline's is taken."""
        usual = self.pipeline.rate(load, 0)
        yield Steady(0, usual, 0.0)
        alone, _, _ = self.rate(load, 0)
        for served in _counts(self.layers + 1, most):
            for beside in dict.fromkeys((0, most - served)):
                rate, prefill, extra = self.rate(load, served, beside)
                if bool(beside) != bool(extra):
                    continue
                made = max(served / (self.layers + 1), extra)  # of both kinds of step the one with more
                begun = 2.0 * prefill + (1.0 - prefill) * made / (load.resident + made)
                hosted = served + min(beside, int(SPREAD * extra))
                yield Steady(hosted, _BELIEVED * usual * rate / alone, begun * hosted, served)

    def rate(self, load: Load, relayed: int, beside: int = 0) -> tuple[float, float, int]:
        """What comes of a steady state with that many relayed, and that many more beside prompts.

        For each request that ends a prompt is computed, in steps that have as much prefill as the budget
        allows; between them are steps of decodes alone.

        Returns:
            Requests per second that end, prefill's share of the time, and how many of those beside prompts
            run in such a step.
        """
        prompts = load.budget / load.prompt
        shorter, tokens = self._step(load, relayed, 0), load.resident + relayed / (self.layers + 1)
        longer, in_longer, extra = self._step(load, relayed, load.budget), tokens, 0
        if beside:
            longer, extra = self.pipeline.step(load, prompts, beside)
            in_longer = load.resident + extra
        # As many requests get their prompt as end: share * prompts = (share * in_longer + ...) / output.
        missing = prompts * load.output - in_longer  # tokens of those requests that come in other steps
        share = tokens / (missing + tokens) if missing > 0.0 else 1.0
        seconds = share * longer + (1.0 - share) * shorter
        return share * prompts / seconds, share * (longer - shorter) / seconds, extra

    def _step(self, load: Load, hosted: int, prefill: int) -> float:
        """Seconds of a step with that many tokens of prefill."""
        times = self.times
        rows = -(-hosted // (self.layers + 1))
        chunks = ((load.prompt // 2, prefill),) if prefill else ()
        decodes = load.resident + rows
        layer = times.linear(decodes + prefill)
        layer += times.gpu_attention(chunks, load.resident, load.resident * load.kv)
        seconds = self.layers * layer + times.around(decodes + prefill, decodes, decodes)
        if not hosted:
            return seconds
        kv = hosted * load.kv // (self.layers + 1)
        attention = float(times.cost.seconds(OpKind.CPU_ATTN, Work(rows, rows, kv, layers=self.layers)))
        return max(seconds, self.layers * attention)


def _counts(least: int, most: int) -> list[int]:
    """Numbers of requests to look at: each a good tenth above the one before."""
    found, count = list[int](), least
    while count <= most:
        found.append(count)
        count += max(1, count // 8)
    return found

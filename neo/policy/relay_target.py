"""How many requests ``neo`` keeps on the host for relayed decoding.

Relayed decodes (``SubBatch.relay_decode``) have the CPU to themselves for a whole step: with N of them, each
of L layers attends for N / (L + 1) requests, and N / (L + 1) tokens come out. More of them than the CPU can
serve within a step make the GPU wait: the best N keeps it busy for as long as a step of decodes takes.
"""

from __future__ import annotations

from typing import NamedTuple

from neo.core.graph import OpKind, Work
from neo.core.view import SystemView
from neo.policy.estimate import StageTimes
from neo.policy.host_target import HostTarget, Load, mean_load

_WORTH = 1.02  # of the rate without the host: estimates are no better than that


class Goal(NamedTuple):
    """A steady state that is aimed at.

    Attributes:
        hosted: requests on the host.
        rate: requests/s that end then.
    """

    hosted: int
    rate: float


class RelayTarget:
    """Goals for one set of stage times; those of one (rounded) load are kept."""

    def __init__(self, times: StageTimes, pipeline: HostTarget) -> None:
        self.times = times
        self.pipeline = pipeline
        self.layers = times.model.layers
        self._known: dict[tuple[Load, int], Goal | None] = {}

    def look(self, view: SystemView, budget: int) -> Goal | None:
        """The best goal; None where another way to decode does as well, or so few wait that none is worth it.

        None too while nobody decodes, and so nothing is known of outputs.

        Args:
            budget: tokens of a step.
        """
        load = mean_load(view, budget)
        if load is None:
            return None
        there = len(view.requests) - load.resident
        if there < 1:
            return None
        most = min(load.host // load.kv, view.limits.relay_rows * (self.layers + 1), _rounded(there))
        if (load, most) not in self._known:
            self._known[load, most] = self._best(load, most)
        return self._known[load, most]

    def _best(self, load: Load, most: int) -> Goal | None:
        alone = self.rate(load, 0)
        best = max([Goal(n, self.rate(load, n)) for n in _counts(most)], key=lambda goal: goal.rate)
        pipelined = max([self.pipeline.rate(load, n) for n in _counts(min(most, load.most))], default=0.0)
        return best if best.rate > max(_WORTH * alone, pipelined) else None

    def rate(self, load: Load, hosted: int) -> float:
        """Requests per second that end in a steady state with that many on the host.

        For each that ends a prompt is computed, in steps that have as much prefill as the budget allows;
        between them are steps of decodes alone.
        """
        times, stages = self.times, self.layers + 1
        tokens = load.resident + hosted / stages
        with_chunk = min(1.0, tokens / load.output * load.prompt / load.budget)
        served = self._host_seconds(load, hosted)
        seconds = 0.0
        for share, prefill in ((with_chunk, load.budget), (1.0 - with_chunk, 0)):
            chunks = ((load.prompt // 2, prefill),) if prefill else ()
            rows = load.resident + -(-hosted // stages)
            layer = times.linear(rows + prefill)
            layer += times.gpu_attention(chunks, load.resident, load.resident * load.kv)
            alone = self.layers * layer + times.around(rows + prefill, rows, rows)
            seconds += share * max(alone, served)
        made = tokens / load.output if with_chunk < 1.0 else load.budget / load.prompt
        return made / seconds

    def _host_seconds(self, load: Load, hosted: int) -> float:
        """Seconds of CPU attention in a step."""
        if not hosted:
            return 0.0
        rows = -(-hosted // (self.layers + 1))
        kv = hosted * load.kv // (self.layers + 1)
        return self.layers * float(self.times.cost.seconds(OpKind.CPU_ATTN, Work(rows, rows, kv)))


def _rounded(count: int) -> int:
    """``count`` down to one of the numbers that are looked at anyway."""
    return max(_counts(count), default=0)


def _counts(most: int) -> list[int]:
    """Numbers of requests to look at: each a good tenth above the one before."""
    found, count = [], 1
    while count <= most:
        found.append(count)
        count += max(1, count // 8)
    return found

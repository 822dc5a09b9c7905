"""How many requests ``neo`` keeps on the host for relayed decoding.

Relayed decodes (``SubBatch.relay_decode``) have the CPU to themselves for a whole step: with N of them, each
of L layers attends for N / (L + 1) requests, and N / (L + 1) tokens come out. More of them than the CPU can
serve within a step make the GPU wait: the N of the best rate keeps it busy for as long as a step takes.

A request on the host takes L + 1 steps for a token. So, as with two sub-batches, no more are sent there than
shorten the mean time in the system (``neo.policy.host_target``): that of N has all of them in work. Those who
are there already are served up to the N of the best rate: that costs nobody anything.
"""

from __future__ import annotations

from typing import NamedTuple

from neo.core.graph import OpKind, Work
from neo.core.view import SystemView
from neo.policy.estimate import StageTimes
from neo.policy.host_target import BELIEVED, HostTarget, Load, mean_load


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
        self._known: dict[tuple[Load, int], tuple[tuple[int, float], ...]] = {}

    def look(self, view: SystemView, budget: int) -> Goal | None:
        """The best goal; None where two sub-batches give a shorter mean time in the system.

        None too while nobody decodes, and so nothing is known of outputs.

        Args:
            budget: tokens of a step.
        """
        load = mean_load(view, budget)
        if load is None:
            return None
        most = min(load.host // load.kv, view.limits.relay_rows * (self.layers + 1))
        rates = self._known.get((load, most))
        if rates is None:
            rates = tuple((n, self.rate(load, n) * (BELIEVED if n else 1.0)) for n in _counts(most))
            self._known[load, most] = rates
        outlook = self.pipeline.outlook(view, load)
        best, pipelined = outlook.best(rates), outlook.on_host()
        if best.seconds > pipelined.seconds:
            return None
        return Goal(best.hosted, max(rates, key=lambda pair: pair[1] if pair[0] else 0.0)[0])

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


def _counts(most: int) -> list[int]:
    """Numbers of requests to look at: each a good tenth above the one before."""
    found, count = [0], 1
    while count <= most:
        found.append(count)
        count += max(1, count // 8)
    return found

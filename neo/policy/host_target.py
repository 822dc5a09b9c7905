"""How many requests ``neo`` keeps on the host: as many as shorten the mean time in the system.

More requests in work raise throughput, and each of them takes longer. With S requests in the system, W of
them in work and X ending per second, the mean time that they still need is about (S + W) / (2 X): a queue
served in order takes S / X to drain, and a request is in work for W / X (Little's law). Without the host, W
is what GPU memory holds and X its rate; every request on the host adds to both. ``HostTarget`` looks for the
number on the host with the least (S + W) / X. That is 0 for short queues, where prompts and not memory bound
the rate, where a second pass over the weights costs more than it brings, and where the CPU is too weak.

Rates are those of a steady state in which every request brings the mean prompt and output. The mean output is
not known; requests in work are on average half way through theirs (a property of renewal processes), so twice
what they have generated so far is taken.
"""

from __future__ import annotations

from itertools import islice

from neo.core.request import Request, Tier
from neo.core.view import SystemView
from neo.policy.estimate import StageTimes

_SAMPLE = 64  # waiting requests whose prompts are looked at
_GRAIN = 16  # quantities are rounded to this many steps per doubling (4%), so that answers can be kept


def _rounded(value: float) -> int:
    """``value`` (at least 1) as a multiple of 1/16 of the power of two below it."""
    whole = max(1, round(value))
    grain = max(1, (1 << (whole.bit_length() - 1)) // _GRAIN)
    return round(whole / grain) * grain


class HostTarget:
    """Answers for one set of stage times; one answer is kept per (rounded) question."""

    def __init__(self, times: StageTimes) -> None:
        self.times = times
        self.layers = times.model.layers
        self._known: dict[tuple[int, ...], int] = {}

    def of(self, view: SystemView, budget: int) -> int:
        """The number of requests on the host with the least mean time in the system.

        Args:
            budget: tokens of a step.
        """
        decodes = (*view.gpu_decodes, *view.cpu_decodes)
        if not decodes:
            return 0
        output = 2.0 * sum([r.generated for r in decodes]) / len(decodes)
        prompts = [r.prompt_tokens for r in (*decodes, *islice(view.waiting, _SAMPLE))]
        gpu, host = view.pools[Tier.GPU], view.pools[Tier.CPU]
        everyone = len(view.requests)
        question = (
            _rounded(sum(prompts) / len(prompts)),
            _rounded(output),
            _rounded(everyone),
            gpu.tokens,
            host.tokens,
            min(view.limits.max_seqs, view.limits.max_batch_tokens),
            budget,
        )
        known = self._known.get(question)
        if known is None:
            known = self._known[question] = self._best(*question)
        return known

    def _best(
        self, prompt: int, output: int, everyone: int, gpu: int, host: int, most: int, budget: int
    ) -> int:
        kv = prompt + output // 2
        resident = max(1, min(gpu // kv, everyone, most))
        farthest = min(everyone, most) - resident
        farthest = min(farthest, host // kv)
        best, least = 0, (everyone + resident) / self._rate(prompt, output, resident, 0, budget)
        count = 1
        while count <= farthest:
            time = (everyone + resident + count) / self._rate(prompt, output, resident, count, budget)
            if time < least:
                best, least = count, time
            count += max(1, count // 2)
        return best

    def _rate(self, prompt: int, output: int, resident: int, hosted: int, budget: int) -> float:
        """Requests per second, ``resident`` decoding on the GPU and ``hosted`` on the CPU.

        For every output token of a request, prompt / output tokens of another's prompt are computed; if that
        is more than a step takes, prompts bound the rate and fewer decode at a time.
        """
        times = self.times
        decodes = resident + hosted
        busy = min(1.0, budget * output / (decodes * (prompt + output)))
        resident, hosted = max(1, round(resident * busy)), round(hosted * busy)
        decodes = resident + hosted
        prefill = round(decodes * prompt / output)
        kv = prompt + output // 2
        linear = times.linear(resident + prefill)
        attention = times.gpu_attention(((prompt // 2, prefill),) if prefill else (), resident, resident * kv)
        layer = linear + attention
        if hosted:
            cpu = times.cpu_stage(hosted, hosted * kv)
            beside = times.linear(resident + prefill + hosted) + max(attention, cpu)
            layer = min(max(linear, cpu) + times.linear(hosted) + attention, beside)
        rows = decodes + round(decodes / output)
        step = self.layers * layer + times.around(decodes + prefill, rows, rows)
        return decodes / output / step


def on_host(decodes: tuple[Request, ...], prefilling: list[Request]) -> int:
    """Requests whose KV lives on the host, those on their way there included."""
    return len(decodes) + sum([r.tier is Tier.CPU for r in prefilling])

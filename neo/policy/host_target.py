"""How many requests ``neo`` keeps on the host: as many as shorten the mean time in the system.

More requests in work raise throughput, and each of them takes longer. With S requests in the system, W of
them in work, X ending and A arriving per second, the mean time that they still need grows with
(S + W) / (X - A): a queue served in order drains in S / (X - A), and a request is in work for W / X (Little's
law). Without the host, W is what GPU memory holds and X its rate. Every request on the host adds to W, and to
X as long as the CPU is hidden. Sought is the number on the host with the least (S + W) / (X - A). It is 0 for
short queues, where prompts and not memory bound the rate, where a second pass over the weights costs more
than it brings, and where the CPU is too weak. Where more arrive than X, the queue only grows; since nobody
knows for how long, A is taken to be at most a share of the rate without the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from neo.core.request import Request, Tier
from neo.core.view import SystemView
from neo.policy.estimate import StageTimes

_SAMPLE = 64  # waiting requests whose prompts are looked at
_GRAIN = 8  # lengths are rounded to this many steps per doubling (9%), so that rates can be kept
_EXPECTED = 0.5  # load that is assumed before arrivals are seen, of the rate without the host
_LASTING = 0.8  # arrivals that are believed to last, of that rate; an overload is taken to pass
_BELIEVED = 0.95  # of a rate with the host, an estimate of what CPU and GPU do side by side
SPREAD = 1.5  # requests on the host for one that runs in a step: lengths differ, and some are being prefilled
_PAUSE = 3.0  # mean gaps without an arrival after which a rate is no longer believed (chance: e^-3 = 5%)


class Load(NamedTuple):
    """What the rate of a steady state depends on, beside the machine."""

    prompt: int  # tokens, of a mean request
    output: int
    gpu: int  # tokens of KV that the GPU holds
    host: int
    most: int  # requests in a step
    budget: int  # tokens in a step

    @property
    def kv(self) -> int:
        """KV tokens of a request half way through its output."""
        return self.prompt + self.output // 2

    @property
    def resident(self) -> int:
        """Requests whose KV the GPU holds."""
        return max(1, min(self.gpu // self.kv, self.most))


class Steady(NamedTuple):
    """A steady state to choose from.

    Attributes:
        hosted: requests that the host serves.
        rate: requests/s that end.
        in_work: requests that have been begun beyond those that the GPU holds, counted as if they were half
            done on average.
        served: of those on the host, the ones that are relayed.
    """

    hosted: int
    rate: float
    in_work: float
    served: int = 0


class Choice(NamedTuple):
    """A number of requests on the host, and the mean time in the system that comes of it.

    ``seconds`` is without the factor that all choices share; infinite if more arrive than end.
    """

    hosted: int
    seconds: float


class Outlook(NamedTuple):
    """What a policy asks of the system as it is.

    Attributes:
        rates: (requests on the host, requests/s that end), from (0, rate without the host) upwards.
        everyone: requests in the system.
        resident: of them, those that the GPU holds.
        arriving: requests/s, fewer than the rate without the host.
    """

    rates: tuple[tuple[int, float], ...]
    everyone: int
    resident: int
    arriving: float

    def best(self, options: Iterable[Steady]) -> Choice:
        """The one with the least mean time in the system, and that."""
        best, least = 0, math.inf
        for option in options:
            if option.hosted < self.everyone and option.rate > self.arriving:
                time = (self.everyone + self.resident + option.in_work) / (option.rate - self.arriving)
                if time < least:
                    best, least = option.hosted, time
        return Choice(best, least)

    def harmless(self, options: Sequence[Steady]) -> Steady:
        """The one with the highest rate of those that make the mean time in the system no longer.

        It is the first's time that they are held against. Of a queue that only drains, what is begun ahead
        counts half: seen from the middle of it, as much is done already as will be done. While others
        arrive, it is still to be done; in between, in proportion.
        """
        longest = self.best(options[:1]).seconds
        ahead = 0.5 + 0.5 * min(1.0, self.arriving / options[0].rate)
        fine = [o for o in options if self.best([o._replace(in_work=ahead * o.in_work)]).seconds <= longest]
        return max(fine, key=lambda option: option.rate, default=options[0])

    def on_host(self) -> int:
        """How many requests belong on the host where it serves them in two sub-batches."""
        found = self.best([Steady(n, rate, SPREAD * n) for n, rate in self.rates])
        return int(found.hosted * SPREAD)

    def crowding(self, extra: int, in_work: int) -> float:
        """By which factor ``extra`` more requests in a step must raise its rate to shorten the mean time.

        From (S + W') / (X' - A) <= (S + W) / (X - A).
        """
        spare = 1.0 - self.arriving / self.rates[0][1]
        return 1.0 + spare * extra / (self.everyone + in_work)


class HostTarget:
    """Outlooks for one set of stage times; the rates of one (rounded) load are kept."""

    def __init__(self, times: StageTimes) -> None:
        self.times = times
        self.layers = times.model.layers
        self._known: dict[Load, tuple[tuple[int, float], ...]] = {}

    def look(self, view: SystemView, budget: int) -> Outlook | None:
        """What to expect; None while nobody decodes, and so nothing is known of outputs.

        Args:
            budget: tokens of a step.
        """
        load = mean_load(view, budget)
        return None if load is None else self.outlook(view, load)

    def outlook(self, view: SystemView, load: Load) -> Outlook:
        """What to expect under a load."""
        rates = self._known.get(load)
        if rates is None:
            rates = tuple((n, self.rate(load, n) * (_BELIEVED if n else 1.0)) for n in _counts(load))
            self._known[load] = rates
        everyone = len(view.requests)
        usual = rates[0][1]
        arriving = arrival_rate(view, _EXPECTED * usual, load.resident / usual)
        arriving = min(arriving, _LASTING * usual)
        return Outlook(rates, everyone, min(load.resident, everyone), arriving)

    def rate(self, load: Load, hosted: int) -> float:
        """Requests per second that end in a steady state with that many on the host.

        For every request that ends, a prompt is computed: in a step, in several if it is longer than a step
        takes, or several in one if that many end in it. Between such steps, decodes run alone. CPU decodes
        run beside either kind of step as far as they are hidden, or beside one kind only if that is faster.
        """
        resident, prompts = load.resident, min(1.0, load.budget / load.prompt)
        alone = [self.step(load, 0.0, count) for count in dict.fromkeys((0, hosted))]
        best = 0.0
        for count in dict.fromkeys((0, hosted)):
            _, extra = self.step(load, prompts, count)
            together = min(load.budget / load.prompt, max(prompts, (resident + extra) / load.output))
            seconds, extra = self.step(load, together, count)
            left = max(0.0, together * load.output - resident - extra)  # tokens, by steps without prefill
            for seconds_alone, extra_alone in alone:
                best = max(best, together / (seconds + left / (resident + extra_alone) * seconds_alone))
        return best

    def step(self, load: Load, prompts: float, hosted: int) -> tuple[float, int]:
        """How long a step with that many prompts takes, and how many CPU decodes run hidden in it."""
        times, resident = self.times, load.resident
        prefill = round(prompts * load.prompt)
        chunks = ((load.prompt // 2, prefill),) if prefill else ()
        attention = times.gpu_attention(chunks, resident, resident * load.kv)
        first = second = 0
        if hosted:
            one = times.cpu_stage(1, load.kv)
            each = (times.cpu_stage(hosted, hosted * load.kv) - one) / max(1, hosted - 1)
            second = _hidden(times.linear(resident + prefill), one, each, hosted)
            if second:
                first = _hidden(times.linear(second) + attention, one, each, hosted - second)
        layer = times.linear(resident + prefill + first) + times.linear(second) + attention
        rows = resident + first + second + math.ceil(prompts)
        return self.layers * layer + times.around(rows + prefill, rows, rows), first + second


def _hidden(seconds: float, one: float, each: float, most: int) -> int:
    """How many CPU decodes fit into a time, the first taking ``one`` and every further one ``each``."""
    if most < 1 or seconds < one:
        return 0
    return min(most, 1 + int((seconds - one) / each)) if each > 0 else most


def _counts(load: Load) -> Iterator[int]:
    """Numbers of requests on the host to look at, up to where the host or a step is full."""
    yield 0
    farthest = min(load.host // load.kv, load.most - load.resident)
    count = 1
    while count <= farthest:
        yield count
        count += max(1, count // 3)


def _rounded(value: float) -> int:
    """``value`` (at least 1) as a multiple of 1/_GRAIN of the power of two below it."""
    whole = max(1, round(value))
    grain = max(1, (1 << (whole.bit_length() - 1)) // _GRAIN)
    return round(whole / grain) * grain


def mean_load(view: SystemView, budget: int) -> Load | None:
    """The mean request of those at hand; None while nobody decodes.

    The mean output is not known. Requests in work are on average half way through theirs (a property of
    renewal processes), so twice what they have generated so far is taken.
    """
    decodes = (*view.gpu_decodes, *view.cpu_decodes)
    if not decodes:
        return None
    even = (view.relaying and view.gpu_decodes) or decodes  # relayed ones advance more slowly than others
    output = 2.0 * sum([r.generated for r in even]) / len(even)
    prompts = [r.prompt_tokens for r in (*decodes, *islice(view.waiting, _SAMPLE))]
    return Load(
        _rounded(sum(prompts) / len(prompts)),
        _rounded(output),
        view.pools[Tier.GPU].tokens,
        view.pools[Tier.CPU].tokens,
        min(view.limits.max_seqs, view.limits.max_batch_tokens),
        budget,
    )


def arrival_rate(view: SystemView, expected: float, over_s: float) -> float:
    """Requests per second that arrive, told from those that wait; 0 if fewer than two do.

    Served in order, none that came since the first of them is missing. What is seen over a short time is
    mixed with what was expected (the mean of a gamma posterior, the expectation having the weight of
    ``over_s`` seconds of watching), and a pause says that a burst is over.

    Args:
        expected: requests/s.
        over_s: seconds.
    """
    waiting = len(view.waiting)
    if waiting < 2:
        return 0.0
    first = next(iter(view.waiting)).arrival_s
    last: Request = next(reversed(view.waiting))  # type: ignore[call-overload]  # list or values of a dict
    rate = (waiting - 1 + expected * over_s) / (max(0.0, last.arrival_s - first) + over_s)
    silence = view.now - last.arrival_s
    return min(rate, _PAUSE / silence) if silence > 0.0 else rate

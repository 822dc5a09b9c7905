"""The simulator: SimPy processes for arrivals, aborts and steps around the Scheduler, on a virtual clock."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import simpy

from neo.core.errors import InputError, NeoError, PolicyError
from neo.core.graph import OpKind, Resource
from neo.core.pipeline import bytes_moved
from neo.core.plan import PrefillChunk, StepPlan
from neo.core.record import Mode, RunRecord
from neo.core.request import FinishReason, Request, Tier
from neo.core.runlog import RunLog
from neo.core.scheduler import Planned, Scheduler, StepResult
from neo.core.timing import busy_seconds, durations, step_seconds
from neo.sim.oplevel import run_operations

Level = Literal["step", "op"]
Events = Generator[simpy.Event, Any, None]
_TRACKED = {Resource.GPU: 0, Resource.CPU: 1, Resource.H2D: 2, Resource.D2H: 3}  # order of the busy columns
_MOST_AT_ONCE = 4096  # repeated steps priced in one go


@dataclass(frozen=True, slots=True)
class Client:
    """A request with what its client does: when it arrives, and when it gives up (seconds after arrival)."""

    request: Request
    timeout_s: float | None = None
    abort_s: float | None = None


def until(env: simpy.Environment, then: float) -> Events:
    """Wait until the clock shows exactly ``then``: times must not depend on how they were reached.

    SimPy adds delays to its clock, and ``now + (then - now)`` may be off by a rounding. A stop on the way
    makes it exact: from the second half of the way on, ``then - now`` has no rounding error (Sterbenz).
    """
    delay = then - env.now
    if env.now + delay != then:
        yield env.timeout(delay / 2)
        delay = then - env.now
    yield env.timeout(delay)


class Simulation:
    """One run. ``record`` fills as it goes, so that an interrupted run leaves what it had.

    Args:
        scheduler: fresh, with policy, cost model and pools.
        clients: in order of arrival.
        level: ``"step"`` computes a step's length by recurrence; ``"op"`` runs every operation as an event.
        log: where to write the run log.
        timeline_steps: keep the operations of that many first steps as slices (level ``op`` only).
        repeat: let the clock advance several steps at once where the policy's plan allows it. The numbers
            are the same without, only slower.
        progress: called with the number of ended requests, now and then.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        clients: Iterable[Client],
        level: Level = "step",
        log: RunLog | None = None,
        timeline_steps: int = 0,
        repeat: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.clients = list(clients)
        self.level = level
        self.log = log
        self.timeline_steps = timeline_steps
        self.repeat = repeat and level == "step"
        self.progress = progress
        self.record = RunRecord(requests=[c.request for c in self.clients])
        self._submitted = [(r.arrival_s, r.prompt_tokens, r.max_tokens) for r in self.record.requests]
        pools = scheduler.view.pools
        self.record.kv_capacity = {str(t): pools[t].total for t in pools}
        self.record.start_s = self.clients[0].request.arrival_s if self.clients else 0.0
        self.env = simpy.Environment()
        self._wake: simpy.Event | None = None
        self._steps = 0
        self._ended = 0

    def run(self) -> RunRecord:
        """Run to the end of the last request. PlanError and PolicyError pass through; the record stays."""
        self.env.process(self._arrivals())
        engine = self.env.process(self._engine())
        try:
            self.env.run(until=engine)
        except BaseException:
            self.record.end_s = self.env.now
            raise
        self.record.end_s = max((r.finish_s or 0.0 for r in self.record.requests), default=0.0)
        self._check_untouched()
        return self.record

    def _check_untouched(self) -> None:
        """Policies only read; what they may have written would make every figure wrong."""
        for r, submitted in zip(self.record.requests, self._submitted, strict=True):
            if (r.arrival_s, r.prompt_tokens, r.max_tokens) != submitted or r.generated > r.max_tokens:
                raise PolicyError(f"the policy changed request {r.id}; it may only read the view")

    # -- processes ----------------------------------------------------------------------------------------

    def _arrivals(self) -> Events:
        env = self.env
        for client in self.clients:
            request = client.request
            if request.arrival_s > env.now:
                yield from until(env, request.arrival_s)
            self.scheduler.add(request)
            if self.log:
                self.log.add(env.now, request)
            if client.timeout_s is not None:
                env.process(self._give_up(request, client.timeout_s, FinishReason.TIMEOUT))
            if client.abort_s is not None:
                env.process(self._give_up(request, client.abort_s, FinishReason.ABORT))
            self._notify()

    def _give_up(self, request: Request, after_s: float, reason: FinishReason) -> Events:
        yield self.env.timeout(after_s)
        if self.scheduler.abort(request.id, self.env.now, reason) and self.log:
            self.log.end(self.env.now, request.id, reason)
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def _engine(self) -> Events:
        env, scheduler = self.env, self.scheduler
        while True:
            while env.peek() <= env.now:  # what happens at this instant is seen by the plan
                yield env.timeout(0)
            start = env.now
            planned = scheduler.plan_step(start)
            self._collect_ended()
            if planned is None:
                if self._ended == len(self.clients):
                    return
                if env.peek() == math.inf:
                    raise scheduler.stalled()
                self._wake = env.event()
                yield self._wake
                continue
            yield from self._run_step(planned, start)

    def _run_step(self, planned: Planned, start: float) -> Events:
        env = self.env
        seconds = self._price(planned)
        most = self.scheduler.max_steps(planned.plan) if self.repeat and planned.graph.template.serial else 1
        if self.level == "op":
            keep = self._steps if self._steps < self.timeline_steps else None
            yield from run_operations(env, planned.graph, seconds, self.record.slices, keep)
            ends = [env.now]
        elif most == 1:
            ends = [start + float(step_seconds(planned.graph.template, seconds))]
            yield from until(env, ends[0])
        else:
            seconds, ends = self._repeated(planned, seconds, most, start)
            if not ends[-1] < math.inf:
                raise self._unpriceable(planned, "gave what is no time")
            self.scheduler.extend_step(planned, len(ends))
            yield from until(env, ends[-1])
        self._observe(planned, seconds, start, ends)
        self.scheduler.finish_step(planned, StepResult(ends[-1], len(ends)))
        if self.log:
            self.log.step(planned.plan, start, ends[-1], len(ends))
        self._collect_ended()

    def _price(self, planned: Planned) -> list[Any]:
        try:
            seconds = [float(s) for s in durations(planned.graph, self.scheduler.cost)]
            if min(seconds) >= 0.0 and sum(seconds) < math.inf:  # which NaN fails too
                return seconds
        except NeoError:
            raise
        except (Exception, SystemExit) as error:
            raise self._unpriceable(planned, f"raised {type(error).__name__}: {error}") from error
        raise self._unpriceable(planned, "gave what is no time")

    def _unpriceable(self, planned: Planned, what: str) -> InputError:
        """The error for a cost model that fails, naming the first operation whose price is no time."""
        cost, graph = self.scheduler.cost, planned.graph
        for kind, work in zip(graph.template.kinds, graph.works, strict=True):
            try:
                price = float(cost.seconds(kind, work))
            except (Exception, SystemExit):
                return InputError(f"cost model {type(cost).__name__} {what} ({kind}, {work})")
            if not 0.0 <= price < math.inf:
                return InputError(f"cost model {type(cost).__name__} says {price} seconds for {kind}, {work}")
        return InputError(f"cost model {type(cost).__name__} {what}")

    def _repeated(
        self, planned: Planned, seconds: list[Any], most: int, start: float
    ) -> tuple[list[Any], list[float]]:
        """Ends of as many repetitions as start before anything else happens, each with its own KV length."""
        template = planned.graph.template
        horizon = self.env.peek()
        first = float(step_seconds(template, seconds))
        if first > 0 and horizon < math.inf:
            most = min(most, int((horizon - start) / first) + 1)
        most = min(most, _MOST_AT_ONCE)
        if most <= 1:
            return seconds, [start + first]
        try:
            seconds = self._prices(planned, seconds, most)
        except NeoError:
            raise
        except (Exception, SystemExit) as error:
            raise self._unpriceable(planned, f"raised {type(error).__name__}: {error}") from error
        lengths = np.empty(most + 1)
        lengths[0] = start
        lengths[1:] = step_seconds(template, seconds)
        ends = np.add.accumulate(lengths)
        count = int(np.searchsorted(ends[:-1], horizon, side="left"))
        count = max(1, min(count, most))
        return [s[:count] if isinstance(s, np.ndarray) else s for s in seconds], ends[1 : count + 1].tolist()

    def _prices(self, planned: Planned, seconds: list[Any], steps: int) -> list[Any]:
        """Seconds of each work entry over ``steps`` repetitions: only attention changes, as its KV grows."""
        cost, graph = self.scheduler.cost, planned.graph
        prices = list(seconds)
        for i, (kind, work) in enumerate(zip(graph.template.kinds, graph.works, strict=True)):
            if kind is not OpKind.GPU_ATTN:
                continue
            kv: Any = work.kv_tokens + work.sequences * np.arange(steps)
            if getattr(cost, "vectorized", False):
                price = np.asarray(cost.seconds(kind, work._replace(kv_tokens=kv)), dtype=np.float64)
            else:
                price = np.array([float(cost.seconds(kind, work._replace(kv_tokens=n))) for n in kv.tolist()])
            if price.shape != (steps,) or not price.min() >= 0.0:
                raise ValueError(f"{steps} times expected, got shape {price.shape}, least {price.min()}")
            prices[i] = price
        return prices

    # -- what the record keeps ----------------------------------------------------------------------------

    def _observe(self, planned: Planned, seconds: list[Any], start: float, ends: list[float]) -> None:
        """Note a step (or its repetitions) before it is committed."""
        plan, graph, record = planned.plan, planned.graph, self.record
        steps = len(ends)
        self._steps += steps
        chunk_tokens = on_gpu = on_cpu = streamed = 0
        for batch in plan.batches:
            on_gpu += len(batch.gpu_decode)
            on_cpu += len(batch.cpu_decode)
            streamed += len(batch.stream_decode)
            if batch.prefill:
                chunk_tokens += sum([c.length for c in batch.prefill])
                self._observe_prefills(batch.prefill, ends[0])
        busy = [0.0] * len(_TRACKED)
        for resource, total in busy_seconds(graph.template, seconds).items():
            at = _TRACKED.get(resource)
            if at is not None:
                busy[at] = record.add_busy(resource, total, steps)
        if not graph.template.serial:
            into, out = bytes_moved(graph)
            record.bytes_h2d += into
            record.bytes_d2h += out
        if plan.evict:
            record.preemptions += len(plan.evict)
        view = self.scheduler.view
        mode = mode_of(plan)
        gpu, cpu = view.pools[Tier.GPU].used, view.pools[Tier.CPU].used
        waiting = len(view.waiting)
        row = (start, ends[-1], steps, mode, waiting, chunk_tokens, on_gpu, on_cpu, streamed, gpu, cpu, *busy)
        record.add_row(row)
        if on_gpu or on_cpu or streamed:
            self._observe_gaps(plan, ends, on_gpu + on_cpu + streamed)

    def _observe_gaps(self, plan: StepPlan, ends: list[float], decodes: int) -> None:
        """Inter-token gaps of the decodes: time since each one's last token, then between repetitions."""
        values, counts = self.record.itl_values, self.record.itl_counts
        last = [r.last_token_s or 0.0 for b in plan.batches for r in b.decodes]
        if last.count(last[0]) == decodes:  # the usual case: all of them ran in the step before
            values.append(ends[0] - last[0])
            counts.append(decodes)
        else:
            for time, n in Counter(last).items():
                values.append(ends[0] - time)
                counts.append(n)
        if len(ends) > 1:
            values.extend([b - a for a, b in pairwise(ends)])
            counts.extend([decodes] * (len(ends) - 1))

    def _observe_prefills(self, chunks: tuple[PrefillChunk, ...], end: float) -> None:
        """A preempted request's next token comes out of a prefill: that gap counts too."""
        for c in chunks:
            if c.request.last_token_s is not None and c.length == c.request.remaining_prefill:
                self.record.itl_values.append(end - c.request.last_token_s)
                self.record.itl_counts.append(1)

    def _collect_ended(self) -> None:
        ended = self.scheduler.ended
        if ended:
            self._ended += len(ended)
            if self.log:
                for request in ended:
                    if request.finish_reason is FinishReason.REJECTED:
                        self.log.end(self.env.now, request.id, FinishReason.REJECTED)
            ended.clear()
            if self.progress is not None:
                self.progress(self._ended)


def mode_of(plan: StepPlan) -> Mode:
    """How a step is run."""
    if len(plan.batches) == 2:
        return Mode.PIPELINED
    batch = plan.batches[0]
    if batch.cpu_decode:
        return Mode.CPU_SEQUENTIAL
    return Mode.STREAMED if batch.stream_decode else Mode.GPU_ONLY

"""The simulator: SimPy processes for arrivals, aborts and steps around the Scheduler, on a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simpy

from neo.core.bubbles import Bubbles
from neo.core.errors import PolicyError
from neo.core.record import RunRecord
from neo.core.recorder import Recorder
from neo.core.request import FinishReason, Request
from neo.core.runlog import RunLog
from neo.core.scheduler import Planned, Scheduler, StepResult
from neo.core.timing import step_seconds
from neo.sim.oplevel import run_operations
from neo.sim.pricing import price, price_repeated, unpriceable

Level = Literal["step", "op"]
Events = Generator[simpy.Event, Any, None]
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
        bubbles: note for what each resource waited (``RunRecord.bubbles``).
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
        bubbles: bool = False,
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
        self._bubbles = Bubbles(self.record.start_s) if bubbles else None
        self._recorder = Recorder(self.record, scheduler, self._bubbles)
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
            self._end(self.env.now)
            raise
        self._end(max((r.finish_s or 0.0 for r in self.record.requests), default=0.0))
        self._check_untouched()
        return self.record

    def _end(self, end_s: float) -> None:
        self.record.end_s = end_s
        if self._bubbles is not None:
            self.record.bubbles = self._bubbles.summary(end_s)

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
        seconds = price(planned.graph, self.scheduler.cost)
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
                raise unpriceable(planned.graph, self.scheduler.cost, "gave what is no time")
            self.scheduler.extend_step(planned, len(ends))
            yield from until(env, ends[-1])
        self._steps += len(ends)
        self._recorder.observe(planned, seconds, start, ends)
        self.scheduler.finish_step(planned, StepResult(ends[-1], len(ends)))
        if self.log:
            self.log.step(planned.plan, start, ends[-1], len(ends))
        self._collect_ended()

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
        seconds = price_repeated(planned.graph, self.scheduler.cost, seconds, most)
        lengths = np.empty(most + 1)
        lengths[0] = start
        lengths[1:] = step_seconds(template, seconds)
        ends = np.add.accumulate(lengths)
        count = int(np.searchsorted(ends[:-1], horizon, side="left"))
        count = max(1, min(count, most))
        return [s[:count] if isinstance(s, np.ndarray) else s for s in seconds], ends[1 : count + 1].tolist()

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

"""Replaying a run log through the Scheduler: are the decisions those of the policy, and what was predicted?

The log says what the policy could not know (arrivals, ends, when each step began and ended); every decision
is asked of the policy again and compared. Two decisions that differ leave different states behind, so the
replay stops at the first difference.

Order of events: the log's lines are in the order in which things were done, a step's when it finished. What
lies before a step's line in the file and is not later than its ``t`` happened before it was planned. A step
whose ``t`` is before the end of the step before it was planned ahead (``Scheduler.commit_step``).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
import simpy

from neo.core.errors import InputError, NeoError
from neo.core.graph import OpKind, Template
from neo.core.learning import StepSeconds, learning
from neo.core.logreader import AddLine, EndLine, LogReader, StepLine
from neo.core.replayed import Divergence, Replay, Times
from neo.core.request import FinishReason, Request
from neo.core.scheduler import Planned, StepResult
from neo.core.timing import Prices, step_seconds
from neo.sim.difference import Differences
from neo.sim.oplevel import run_operations
from neo.sim.pricing import price, price_repeated
from neo.system.config import System

Event = AddLine | EndLine
_REJECTED = (FinishReason.REJECTED,)


@dataclass(slots=True)
class Journal:
    """What a log says of each request: when it entered, and when it was told to end.

    Attributes:
        adds: by request id, its line.
        ends: by request id, when it was told to end or stopped (seconds), and why.
        requests: by request id, the request as the replay left it.
    """

    adds: dict[str, AddLine] = field(default_factory=dict)
    ends: dict[str, tuple[float, FinishReason]] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)


class _Diverged(Exception):  # noqa: N818 - a result, not an error
    """The decisions differ; the rest of the log has nothing to be compared with."""


def replay_log(
    reader: LogReader,
    decided: System,
    cost: Prices,
    arrivals: Mapping[str, float],
    slices_of: Container[int] = (),
) -> tuple[Replay, Journal]:
    """Replay a log to its end or to the first decision that differs; it is read to its end in both cases.

    Args:
        reader: the log, of which only the header has been read.
        decided: the system of the header (``neo.sim.header.systems_of``).
        cost: predicts the seconds of each step, from the graph that was replayed.
        arrivals: by request id, when it arrived, where that is not when it entered the scheduler.
        slices_of: numbers of the steps (from 0) of which every operation is wanted.

    Raises:
        InputError: a line is malformed or contradicts the lines before it (file and line).
    """
    run = _Run(reader, decided, cost, arrivals, slices_of)
    groups = run.groups()
    events, line = next(groups)
    while line is not None:
        following = next(groups)
        run.step([*events, *_early(following[0], line)], line, following[1])
        events, line = following
    run.tail(events)
    return run.replay, run.journal


def _early(events: list[Event], line: StepLine) -> list[Event]:
    """Take out of the events behind a step line the rejections that were decided while that step ran."""
    early = [e for e in events if line.t < e.t < line.end and _rejects(e)]
    if early:
        events[:] = [e for e in events if e not in early]
    return early


def _rejects(event: Event) -> bool:
    return isinstance(event, EndLine) and event.reason in _REJECTED


class _Run:
    """One replay as it goes."""

    def __init__(
        self,
        reader: LogReader,
        decided: System,
        cost: Prices,
        arrivals: Mapping[str, float],
        slices_of: Container[int],
    ) -> None:
        self.reader = reader
        self.scheduler = decided.scheduler()
        self.cost = cost
        self._decides = learning(self.scheduler.cost)
        self._predicts = None if cost is self.scheduler.cost else learning(cost)
        if self._predicts is not None:
            self._predicts.begin()
        self.arrivals = arrivals
        self.slices_of = slices_of
        self._steps = 0
        self.replay = Replay()
        self.journal = Journal()
        self._differences = Differences(reader, self.journal.adds)
        self._running: Planned | None = None
        self._committed = False
        self._ahead: Planned | None = None
        self._last_end = float("-inf")

    def groups(self) -> Iterator[tuple[list[Event], StepLine | None]]:
        """Each step line with the events before it in the file; then those behind the last, with None."""
        journal, events = self.journal, list[Event]()
        for entry in self.reader:
            if isinstance(entry, StepLine):
                self.replay.logged += 1
                for request_id, reason in entry.stopped.items():
                    if request_id not in journal.adds:
                        raise self.reader.error(f"stopped: request {request_id!r} was never added")
                    journal.ends.setdefault(request_id, (entry.end, reason))
                yield events, entry
                events = []
                continue
            if isinstance(entry, AddLine):
                journal.adds[entry.id] = entry
            elif entry.id not in journal.adds:
                raise self.reader.error(f"request {entry.id!r} ends, but was never added")
            else:
                journal.ends[entry.id] = (entry.t, entry.reason)
            events.append(entry)
        yield events, None

    def step(self, events: list[Event], line: StepLine, ahead: StepLine | None) -> None:
        """Replay one step line, and the planning of the next one if that was done while this one ran."""
        if self.replay.divergence is not None:
            return
        try:
            self._step(events, line, ahead)
        except _Diverged:
            self._running = self._ahead = None

    def _step(self, events: list[Event], line: StepLine, ahead: StepLine | None) -> None:
        if self._running is None:
            self._apply([e for e in events if e.t <= line.t], line.t)
            self._running = self._plan(line, False)
            events = [e for e in events if e.t > line.t]
        if ahead is not None and ahead.t < line.end:
            self._apply([e for e in events if e.t <= ahead.t], ahead.t, line)
            self._commit(line)
            self._ahead = self._plan(ahead, True, line.end)
            events = [e for e in events if e.t > ahead.t]
        self._apply(events, None, line, last=ahead is None)
        self.scheduler.finish_step(self._running, StepResult(line.end, line.steps, line.stopped))
        self.scheduler.ended.clear()
        self._learn(line)
        self._running, self._ahead, self._committed = self._ahead, None, False

    def tail(self, events: list[Event]) -> None:
        """What happened behind the last step line."""
        if self.replay.divergence is not None:
            return
        try:
            self._apply(events, None, last=True)
            self._check_rejections()
        except _Diverged:
            pass

    # -- events -------------------------------------------------------------------------------------------

    def _apply(
        self,
        events: list[Event],
        next_plan: float | None,
        running: StepLine | None = None,
        last: bool = False,
    ) -> None:
        for event in events:
            if isinstance(event, AddLine):
                self._add(event)
            elif event.reason in _REJECTED:
                if event.t != next_plan:  # else the plan that comes now rejects it
                    self._rejected(event, running, last)
            elif not self.scheduler.abort(event.id, event.t, event.reason):
                raise self.reader.error(f"request {event.id!r} ends, but had ended or was ending", event.line)

    def _add(self, line: AddLine) -> None:
        arrival = self.arrivals.get(line.id, line.t)
        request = Request(line.id, line.prompt, line.max_tokens, arrival, line.priority)
        try:
            self.scheduler.add(request)
        except InputError as error:
            raise self.reader.error(str(error), line.line) from error
        self.journal.requests[line.id] = request

    def _rejected(self, event: EndLine, running: StepLine | None, last: bool) -> None:
        """A rejection that is no step's: the policy was asked, rejected, and had nothing else to do.

        Behind the last step line it may also belong to a step that was interrupted and has no line.
        """
        request = self.journal.requests[event.id]
        if request.finish_reason in _REJECTED:
            return
        planned = None
        if self._ahead is None and (self._running is None or running is not None):
            if running is not None:
                self._commit(running)
            try:
                planned = self.scheduler.plan_step(event.t)
            except NeoError as error:
                self._diverged(event.line, f"the policy fails: {error}", error)
        if request.finish_reason not in _REJECTED:
            self._diverged(event.line, f"the log rejects request {event.id}, the policy does not")
        if planned is not None and not last:
            self._diverged(event.line, "the policy plans a step where the log has none")
        if planned is not None:
            self._ahead = planned

    def _check_rejections(self) -> None:
        if self._ahead is not None or self._running is not None:  # a step that the log does not have
            return
        ends = self.journal.ends
        for request in self.journal.requests.values():
            planned = request.finish_reason in _REJECTED
            logged = request.id in ends and ends[request.id][1] in _REJECTED
            if planned != logged:
                who = ("the policy", "the log") if planned else ("the log", "the policy")
                line = self.journal.adds[request.id].line
                self._diverged(line, f"{who[0]} rejects request {request.id}, {who[1]} does not")

    # -- steps --------------------------------------------------------------------------------------------

    def _commit(self, line: StepLine) -> None:
        if not self._committed:
            assert self._running is not None
            self.scheduler.commit_step(self._running, line.steps)
            self._committed = True

    def _plan(self, line: StepLine, ahead: bool, begins: float | None = None) -> Planned:
        """Ask the policy for the step that ``line`` logs; it must be the same."""
        try:
            planned = self.scheduler.plan_step(line.t)
        except NeoError as error:
            self._diverged(line.line, f"the log runs a step, the policy fails: {error}", error)
        if planned is None:
            self._diverged(line.line, "the log runs a step, the policy has nothing to do")
        what = self._differences.first(line, planned.plan)
        if what is not None:
            self._diverged(line.line, what)
        most = self.scheduler.max_steps(planned.plan) if line.steps > 1 else 1
        if line.steps > most:
            self._diverged(
                line.line, f"the log runs the step {line.steps} times, the policy's plan holds for {most}"
            )
        self.scheduler.extend_step(planned, line.steps)
        self.replay.equal += 1
        self.replay.planned_ahead += ahead
        self._predict(line, planned, begins)
        return planned

    def _diverged(self, line: int, what: str, cause: BaseException | None = None) -> NoReturn:
        self.replay.divergence = Divergence(self.replay.equal + 1, line, " ".join(what.split()))
        raise _Diverged from cause

    def _learn(self, line: StepLine) -> None:
        """What the cost model had taken from the step, when the run planned on."""
        if self._decides is not None and line.cost:
            try:
                self._decides.restore(line.cost)
            except ValueError as error:
                raise self.reader.error(f"cost: {error}", line.line) from error

    # -- times --------------------------------------------------------------------------------------------

    def _predict(self, line: StepLine, planned: Planned, begins: float | None) -> None:
        """Note predicted and measured seconds; ``begins``: end of the step before one planned ahead."""
        graph, steps = planned.graph, line.steps
        seconds = price(graph, self.cost)
        number, self._steps = self._steps, self._steps + steps
        if steps > 1:
            seconds = price_repeated(graph, self.cost, seconds, steps)
        start = line.t if begins is None else max(line.t, begins)
        if line.start is not None:
            start = line.start
        end = _end(graph.template, seconds, start, steps)
        self.replay.steps.add(end - start, line.end - start)
        if steps == 1 and number in self.slices_of:
            env = simpy.Environment(start)
            env.run(env.process(run_operations(env, graph, seconds, self.replay.slices, number)))
        if self._predicts is not None and steps == 1:  # it learns from the log as it would have in the run
            self._predicts.observe(graph, _measured(line, line.end - start))
        if line.ops:
            predicted = _per_operation(graph.template, seconds, steps)
            for key, (_, measured) in line.ops.items():
                self.replay.ops.setdefault(key, Times()).add(predicted.get(key, 0.0), measured)


def _measured(line: StepLine, total: float) -> StepSeconds:
    """What the log has of a step's length."""
    if not line.ops:
        return StepSeconds(total)
    of = {OpKind.SCHEDULE.value: 0.0, OpKind.CPU_ATTN.value: 0.0}
    for (kind, _), (_, seconds) in line.ops.items():
        if kind in of:
            of[kind] += seconds
    return StepSeconds(total, *of.values())


def _end(template: Template, seconds: list[Any], start: float, steps: int) -> float:
    """When a step ends that begins at ``start``, with the rounding of a simulator's clock."""
    if steps == 1:
        return start + float(step_seconds(template, seconds))
    if template.serial:
        lengths = np.full(steps, step_seconds(template, seconds))
    else:
        each = [np.broadcast_to(s, steps).tolist() for s in seconds]
        lengths = np.array([step_seconds(template, [s[i] for s in each]) for i in range(steps)])
    return float(np.add.accumulate(np.concatenate([[start], lengths]))[-1])


def _per_operation(template: Template, seconds: list[Any], steps: int) -> dict[tuple[str, int], float]:
    """By (kind, sub-batch), seconds of all its operations in all repetitions of a step."""
    totals: dict[tuple[str, int], float] = {}
    for key, count, work in _operations(template):
        value = seconds[work]
        total = float(value.sum()) if isinstance(value, np.ndarray) else value * steps
        totals[key] = totals.get(key, 0.0) + count * total
    return totals


@lru_cache(maxsize=4096)
def _operations(template: Template) -> tuple[tuple[tuple[str, int], int, int], ...]:
    """((kind, sub-batch), how often, work entry) of each operation of a template."""
    return tuple(
        ((str(op.kind), op.batch), section.repeat, op.work)
        for section in template.sections
        for op in section.ops
    )

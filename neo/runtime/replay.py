"""Playing a workload to an engine in real time: requests come when they are due, and clients give up."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from neo.core.bubbles import Bubbles
from neo.core.errors import InputError, PolicyError
from neo.core.graph import Resource
from neo.core.record import RunRecord
from neo.core.request import FinishReason, Request, State
from neo.core.runlog import RunLog
from neo.runtime.engine import Engine, Output
from neo.runtime.executor import StepTimes
from neo.runtime.prompts import Prompts
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.setup import EngineParts
from neo.system.config import System
from neo.workload import TraceRequest, Workload

_AWAKE_S = 5e-4  # a sleep may last some 0.1 ms longer than asked for: the last of a wait is spent awake
_WARM_REQUESTS, _WARM_PROMPT, _WARM_TOKENS = 2, 64, 4
_WARM_POLICIES = ("gpu-only", "fastdecode")  # between them every kind of operation but swaps


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """How requests are made of a workload's rows.

    Attributes:
        temperature: of sampling; 0 is greedy. Ends of sequence are ignored: lengths are the workload's.
        timeout_s: how long clients wait (seconds after arrival) where the workload does not say.
    """

    temperature: float = 0.0
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not 0.0 < self.timeout_s < math.inf:
            raise InputError(f"--timeout {self.timeout_s}: expected a positive number of seconds")
        SamplingParams(temperature=self.temperature)


class Replay:
    """One run. ``record`` fills as it goes, so that an interrupted run leaves what it had.

    The run's clock starts at the first arrival. The engine is single-threaded: whoever arrives or gives up
    while a step runs is seen when it has ended.

    Args:
        engine: fresh; its scheduler, executor and options are used, its clock, log and record are not.
        workload: requests in order of arrival.
        prompts: their token ids.
        options: see ReplayOptions.
        log: where to write the run log.
        progress: called with the number of ended requests, now and then.
        observe: called with every Output.
        timeline_steps: keep slices of that many first steps only; by default of all whose operations the
            engine's executor notes.
        bubbles: note for what each resource waited (``RunRecord.bubbles``); the executor must note the
            operations of every step.
    """

    def __init__(
        self,
        engine: Engine,
        workload: Workload,
        prompts: Prompts,
        options: ReplayOptions | None = None,
        log: RunLog | None = None,
        progress: Callable[[int], None] | None = None,
        observe: Callable[[Output], None] | None = None,
        timeline_steps: int | None = None,
        bubbles: bool = False,
    ) -> None:
        self.timeline_steps = timeline_steps
        self._bubbles = Bubbles() if bubbles else None
        self.options = options or ReplayOptions()
        self.workload = workload
        self.prompts = prompts
        self.record = RunRecord()
        self.too_long = 0  # requests longer than the engine takes
        self.engine = engine
        self._log = log
        self._progress = progress
        self._observe = observe
        self._next = 0  # position of the next arrival
        self._live: set[str] = set()
        self._leaving: list[tuple[float, int, str, FinishReason]] = []  # heap: when, and in which order told
        self._ended = 0

    def run(self) -> RunRecord:
        """Run to the end of the last request; errors of policy and executor pass through."""
        rows, record, given = self.workload.requests, self.record, self.engine
        record.start_s = rows[0].arrival_s if rows else 0.0
        if self._bubbles is not None:
            self._bubbles.start_s = record.start_s
        self._zero = time.perf_counter() - record.start_s
        self.engine = engine = Engine(
            given.scheduler, given.executor, given.vocab, given.options, self._zero, self._log, record
        )
        try:
            self._loop()
            engine.check_integrity()
            self._check_untouched()
        except BaseException:
            record.end_s = engine.clock()
            self._report_bubbles()
            arrived = {r.id for r in record.requests}
            record.requests += [_request(row) for row in rows[self._next :] if row.id not in arrived]
            raise
        record.end_s = max((r.finish_s or 0.0 for r in record.requests), default=0.0)
        self._report_bubbles()
        return record

    def _report_bubbles(self) -> None:
        if self._bubbles is not None:
            self.record.bubbles = self._bubbles.summary(self.record.end_s)

    def close(self) -> None:
        """Stop the engine's threads."""
        self.engine.close()

    def _loop(self) -> None:
        engine = self.engine
        while True:
            self._deliver()
            ran = engine.steps
            outputs = engine.step()  # also without work: the engine's books must know of a pause
            if engine.steps > ran and engine.last is not None and engine.last.slices:
                self._keep_slices(engine.last)
            self._take(outputs)
            if engine.steps > ran:
                continue
            if self._next == len(self.workload) and not engine.has_work:
                return
            then = self._next_event()
            if then == math.inf:
                raise engine.scheduler.stalled()
            wait_until(engine, then)

    # -- what clients do ----------------------------------------------------------------------------------

    def _deliver(self) -> None:
        """Requests that have arrived, and clients that have given up."""
        now, rows = self.engine.clock(), self.workload.requests
        while self._next < len(rows) and rows[self._next].arrival_s <= now:
            row = rows[self._next]
            self._submit(row, self._next)
            self._next += 1
        while self._leaving and self._leaving[0][0] <= now:
            _, _, request_id, reason = heapq.heappop(self._leaving)
            if request_id in self._live:
                self.engine.abort(request_id, reason)

    def _submit(self, row: TraceRequest, position: int) -> None:
        most = self.engine.options.max_model_len
        if row.prompt_tokens + row.output_tokens > most:
            self._turn_away(row, most)
            return
        params = SamplingParams(
            max_tokens=row.output_tokens, temperature=self.options.temperature, ignore_eos=True
        )
        self.engine.add(
            row.id, self.prompts[position], params, arrival_s=row.arrival_s, priority=row.priority
        )
        self._live.add(row.id)
        timeout = self.options.timeout_s if row.timeout_s is None else row.timeout_s
        for after, reason in ((timeout, FinishReason.TIMEOUT), (row.abort_s, FinishReason.ABORT)):
            if after is not None:
                heapq.heappush(self._leaving, (row.arrival_s + after, position, row.id, reason))

    def _turn_away(self, row: TraceRequest, most: int) -> None:
        """A request that is too long for the engine never enters its scheduler, nor the run log."""
        request = _request(row)
        request.state, request.finish_reason = State.REJECTED, FinishReason.REJECTED
        request.finish_s = row.arrival_s
        request.detail = (
            f"{row.prompt_tokens} prompt tokens and {row.output_tokens} to generate are more than "
            f"max_model_len = {most}"
        )
        self.record.requests.append(request)
        self.too_long += 1
        self._count(1)

    def _next_event(self) -> float:
        """When, on the engine's clock, somebody arrives or gives up next; infinite if nobody will."""
        while self._leaving and self._leaving[0][2] not in self._live:
            heapq.heappop(self._leaving)
        rows = self.workload.requests
        arrival = rows[self._next].arrival_s if self._next < len(rows) else math.inf
        return min(arrival, self._leaving[0][0] if self._leaving else math.inf)

    # -- what comes out -----------------------------------------------------------------------------------

    def _take(self, outputs: list[Output]) -> None:
        ended = 0
        for output in outputs:
            if output.finish_reason is not None:
                self._live.discard(output.request_id)
                ended += 1
            if self._observe is not None:
                self._observe(output)
        if ended:
            self._count(ended)

    def _count(self, ended: int) -> None:
        self._ended += ended
        if self._progress is not None:
            self._progress(self._ended)

    def _keep_slices(self, times: StepTimes) -> None:
        """The operations of a step, on the run's clock, and what its planning and preparation took."""
        zero, first = self._zero, times.slices[0]
        planned = first._replace(
            resource="host",
            name="SCHEDULE",
            layer=None,
            batch=-1,
            start_s=times.begin_s - times.seconds[0],
            end_s=times.begin_s,
        )
        slices = [
            s._replace(start_s=s.start_s - zero, end_s=s.end_s - zero) for s in (planned, *times.slices)
        ]
        if self.timeline_steps is None or first.step < self.timeline_steps:
            self.record.slices += slices
        if self._bubbles is not None:
            ordered = sorted(slices, key=lambda s: (s.start_s, s.end_s))
            ran = [(Resource(s.resource), s.start_s, s.end_s) for s in ordered]
            self._bubbles.add_operations(ran, slices[0].start_s, times.end_s - zero)

    def _check_untouched(self) -> None:
        """Policies only read; what they may have written would make every figure wrong."""
        requests = {r.id: r for r in self.record.requests}
        for row in self.workload.requests:
            r = requests[row.id]
            now = (r.arrival_s, r.prompt_tokens, r.max_tokens)
            if now != (row.arrival_s, row.prompt_tokens, row.output_tokens):
                raise PolicyError(f"the policy changed request {r.id}; it may only read the view")


def _request(row: TraceRequest) -> Request:
    return Request(row.id, row.prompt_tokens, row.output_tokens, row.arrival_s, row.priority)


def wait_until(engine: Engine, then: float) -> None:
    """Sleep until shortly before a time on the engine's clock, and stay awake for the rest."""
    while (left := then - engine.clock()) > 0.0:
        if left > _AWAKE_S:
            time.sleep(left - _AWAKE_S)


def warm_up(parts: EngineParts, system: System) -> None:
    """Run a few steps of throw-away engines, so that no step that is measured is the process's first.

    Threads start, and libraries choose and prepare their kernels. The engines are small, with budgets of
    their own and the limits of ``system``; nothing of them is left.
    """
    most = parts.max_model_len
    tokens = min(_WARM_TOKENS, most - 1)
    if tokens < 1:
        return
    prompt = [0] * min(_WARM_PROMPT, most - tokens)
    limits = system.config.limits
    blocks = _WARM_REQUESTS * (-(-(len(prompt) + tokens) // limits.block_size) + 1)
    for policy in _WARM_POLICIES:
        config = replace(system.config, policy=policy, policy_options={})
        engine = parts.engine(replace(system, config=config, gpu_blocks=2 * blocks, cpu_blocks=blocks))
        try:
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            for i in range(_WARM_REQUESTS):
                engine.add(str(i), prompt, params)
            ran = -1
            while engine.has_work and engine.steps > ran:
                ran = engine.steps
                engine.step()
        finally:
            engine.close()

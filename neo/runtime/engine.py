"""The engine: the second driver of the Scheduler, with a real clock, real tokens and real KV memory.

Its loop is three calls long::

    planned = self._plan()
    times = self._run(planned)
    return self._finish(planned, times)

With ``ahead`` the next step is planned while this one runs, on the assumption that it ends as planned; what a
request that stopped unforeseen (an end token) still computed in that next step is thrown away. An executor
that can queue steps gets it at once where nobody has to see this one's tokens first: its device never idles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from neo.core.errors import InputError, NeoError
from neo.core.graph import StepGraph
from neo.core.plan import StepPlan
from neo.core.record import RunRecord
from neo.core.recorder import Begun, Recorder
from neo.core.request import FinishReason, Request, Tier
from neo.core.runlog import RunLog
from neo.core.scheduler import Planned, Scheduler, StepResult
from neo.runtime.choice import Choice, Plain
from neo.runtime.errors import EngineError
from neo.runtime.executor import FAULTS, Executor, Pending, Queueing, StepTimes
from neo.runtime.live import Live, begin_request, check_prompt
from neo.runtime.sampling import Sampler, TokenLogprobs
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.step_inputs import prepare


class Output(NamedTuple):
    """What a step brought to a request: a token, its end, or both.

    A request that ends without a token (aborted, rejected, failed) has ``token`` None; ``detail`` says why.
    """

    request_id: str
    token: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine runs.

    Attributes:
        max_model_len: tokens of prompt and output together that a request may have.
        eos_token_ids: tokens that end a request unless it ignores them.
        seed: of requests that bring none.
        ahead: plan the next step while one runs.
    """

    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0
    ahead: bool = False


_SCHEDULE = 0  # its work is the first of every graph


class _Running(NamedTuple):
    planned: Planned
    begun: Begun
    start_s: float
    planned_s: float
    choice: Choice
    ended: Pending | None = None  # once it was started: waits for its end


class Engine:
    """Adds, aborts and steps. Not thread-safe: one thread owns it.

    Args:
        scheduler: fresh; its pools are those of the executor's tables.
        executor: runs the steps.
        vocab: tokens of the model.
        options: see EngineOptions.
        zero_s: what ``time.perf_counter`` shows at the zero of the run's clock; None for now.
        log: where to write the run log.
        record: filled as it goes; every request that is added is put there. None keeps none (a server's
            would grow without end).

    Attributes:
        on_start: called with the graph of every step before it starts, if given.
        plain: the latest step's tokens, if it brought one to each of its rows and nothing else.
        brief: such a step's tokens are in ``plain`` alone: ``step`` makes no Outputs of them.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        vocab: int,
        options: EngineOptions,
        zero_s: float | None = None,
        log: RunLog | None = None,
        record: RunRecord | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.vocab = vocab
        self.options = options
        self._zero = time.perf_counter() if zero_s is None else zero_s
        self.log = log
        self.record = record
        self.steps = 0
        self.last: StepTimes | None = None  # of the latest step
        self.last_sequences = 0  # requests in it
        self.plain: Plain | None = None
        self.brief = False
        self.on_start: Callable[[StepGraph], None] | None = None
        self._recorder = Recorder(RunRecord() if record is None else record, scheduler)
        self._sampler = Sampler(vocab)
        self._live: dict[str, Live] = {}
        self._next: _Running | None = None
        self._failed: NeoError | None = None  # a policy's error in a plan made ahead
        self._broken: EngineError | None = None
        self._free_at: float | None = None  # when the step before ended, if work has gone on without a pause
        self._added = 0
        self._queue = executor if isinstance(executor, Queueing) else None
        self._thread = ThreadPoolExecutor(1, "neo-step") if options.ahead and not self._queue else None
        if record is not None:
            pools = scheduler.view.pools
            record.kv_capacity = {str(t): pools[t].total for t in pools}

    # -- requests -----------------------------------------------------------------------------------------

    def clock(self) -> float:
        """Seconds since the run's zero."""
        return time.perf_counter() - self._zero

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._live)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        arrival_s: float | None = None,
        priority: int = 0,
    ) -> Request:
        """Queue a request; ``arrival_s`` is on the engine's clock, by default now.

        Raises InputError, naming the request, if its prompt is empty, holds no token of the vocabulary or is
        longer with its output than ``max_model_len``, or if its id is in use.
        """
        check_prompt(request_id, prompt, params, self.vocab, self.options.max_model_len)
        now = self.clock()
        if request_id in self._live:
            raise InputError(f"request id {request_id!r} is already in use")
        request = Request(
            request_id, len(prompt), params.max_tokens, now if arrival_s is None else arrival_s, priority
        )
        live = begin_request(
            request, prompt, params, self.vocab, self.options.eos_token_ids, self.options.seed + self._added
        )
        self.scheduler.add(request)
        self._live[request_id] = live
        self._added += 1
        if self.record is not None:
            self.record.requests.append(request)
        if self.log:
            self.log.add(now, request)
        return request

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a request early: at once, or with the step that runs. False if it is not live, or ending."""
        live = self._live.get(request_id)
        if live is None or live.ended:
            return False
        now = self.clock()
        aborted = self.scheduler.abort(request_id, now, reason)
        if aborted and self.log:
            self.log.end(now, request_id, reason)
        return aborted

    # -- the loop -----------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Run one step, if there is work: plan, run, finish. Returns what it brought, one Output a request
        (none where ``brief`` says so).

        Tokens come first, in the order of the step's rows; behind them requests that ended without one.

        Raises PlanError and PolicyError from a policy: the engine can go on. Raises EngineError from the
        executor: it cannot, and says so again at every further step.
        """
        self.plain = None
        if self._broken is not None:
            raise EngineError(f"the engine cannot go on: {self._broken}") from self._broken
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        running = self._next or self._plan()
        self._next = None
        if running is None:
            self._free_at = None
            return self._collect(None)
        times = self._run(running)
        return self._finish(running, times)

    def _plan(self) -> _Running | None:
        now = self.clock()
        planned = self.scheduler.plan_step(now)
        if planned is None:
            return None
        start = now if self._free_at is None else self._free_at
        choice = Choice(self._sampler, self._live, at_once=self._queue is None)
        return _Running(planned, self._recorder.begin(planned), start, now, choice)

    def _run(self, running: _Running) -> StepTimes:
        try:
            running = running if running.ended else self._launch(running)
            if self.options.ahead:
                self._meanwhile(running)
            assert running.ended is not None
            times = running.ended()
            running.choice.collect()
            return times
        except EngineError as error:
            self._broken = error
            raise
        except FAULTS as error:
            self._broken = EngineError(f"step {self.steps} failed: {error}")
            raise self._broken from error
        except BaseException as error:  # a bug, or an interruption: the step is half done all the same
            self._broken = EngineError(f"step {self.steps} failed: {type(error).__name__}: {error}")
            raise

    def _launch(self, running: _Running) -> _Running:
        """Start a step, or run it where nothing else is to be done meanwhile."""
        planned, tables = running.planned, self.executor.tables
        if self.on_start is not None:
            self.on_start(planned.graph)
        for request in (*self.scheduler.ended, *self.scheduler.leaving):  # this plan may have their blocks
            tables.release(request.id)
        copies = tables.begin(planned.plan)
        inputs = prepare(planned.plan, tables, self._live)
        running.choice.settled = not inputs.sampled  # nothing to choose: a step behind it need not wait
        job = (planned.plan, planned.graph, inputs, copies, running.choice)
        if self._queue is not None:
            return running._replace(ended=self._queue.start(*job))
        if self._thread is not None:
            return running._replace(ended=self._thread.submit(self.executor.run, *job).result)
        times = self.executor.run(*job)
        return running._replace(ended=lambda: times)

    def _meanwhile(self, running: _Running) -> None:
        """Plan the next step while this one runs, and queue it if the executor can.

        A policy's error waits until this step's tokens are out.
        """
        self.scheduler.commit_step(running.planned)
        try:
            self._next = self._plan()
        except NeoError as error:
            self._failed = error
        if self._next is not None and self._may_follow(running, self._next.planned.plan):
            self.executor.tables.commit()  # a step that is followed leaves no blocks behind
            self._next = self._launch(self._next)

    def _may_follow(self, running: _Running, plan: StepPlan) -> bool:
        """Whether a step can be queued behind the one that runs, whose tokens nobody has seen yet."""
        queue = self._queue
        if queue is None or not (running.choice.settled and queue.may_be_followed):
            return False
        members = [r for b in plan.batches for r in (*b.decodes, *b.relay_decode)]
        members += [c.request for b in plan.batches for c in b.prefill]
        return all(self._live[r.id].state.plain for r in members)

    def _finish(self, running: _Running, times: StepTimes) -> list[Output]:
        planned, graph = running.planned, running.planned.graph
        end = self.clock()
        self._free_at = end
        start = running.start_s
        if self._next is not None:
            self._next = self._next._replace(start_s=end)
        times.seconds[_SCHEDULE] = max(0.0, times.begin_s - self._zero - start)
        stopped = self._accept(running.choice)
        self._recorder.observe_measured(running.begun, times.busy(graph), start, end)
        self.scheduler.finish_step(planned, StepResult(end, stopped=stopped))
        if self._next is None or self._next.ended is None:
            self.executor.tables.commit()
        if self.log:
            self.log.step(
                planned.plan,
                running.planned_s,
                end,
                start=start,
                stopped=stopped,
                ops=times.by_operation(graph) if times.measured else None,
            )
        self.steps += 1
        self.last = times
        self.last_sequences = graph.works[_SCHEDULE].sequences
        return self._collect(running.choice)

    def _accept(self, choice: Choice) -> dict[str, FinishReason]:
        """Append what was sampled, and forget what nobody waits for; which requests it ends."""
        stopped: dict[str, FinishReason] = {}
        late: list[str] = []
        for request_id, (token, _) in choice.sampled.items():
            live = self._live[request_id]
            if live.ended:
                late.append(request_id)
                continue
            live.state.append(token)
            if token in live.ends:
                stopped[request_id] = FinishReason.STOP
        for request_id in late:
            del choice.sampled[request_id]
        for request_id, why in choice.unsampled.items():
            live = self._live[request_id]
            if not live.ended:
                live.request.detail = f"no token can be sampled: {why}"
                live.state.append(0)  # a step planned ahead takes it; nothing comes of that
                self.abort(request_id)  # it ends with this step
        return stopped

    def _collect(self, choice: Choice | None) -> list[Output]:
        """Join tokens and ends; requests that ended give their memory back."""
        over = list(self._over())
        sampled = {} if choice is None else choice.sampled
        if choice is not None and choice.plain is not None and not over:
            self.plain = choice.plain if len(sampled) == len(choice.plain[0]) else None
        brief = self.brief and self.plain is not None
        outputs = {} if brief else {r: Output(r, token, given) for r, (token, given) in sampled.items()}
        for request_id, reason in over:
            live = self._live[request_id]
            live.ended = True
            before = outputs.get(request_id, Output(request_id, None))
            outputs[request_id] = before._replace(finish_reason=reason, detail=live.request.detail)
        for request in self.scheduler.ended:
            self.executor.tables.release(request.id)
            del self._live[request.id]
            if self.log and request.finish_reason is FinishReason.REJECTED:
                self.log.end(request.finish_s or 0.0, request.id, FinishReason.REJECTED)
        self.scheduler.ended.clear()
        return list(outputs.values())

    def _over(self) -> Iterable[tuple[str, FinishReason]]:
        """Requests that ended and whose clients do not know yet."""
        for request in self.scheduler.ended:
            live = self._live[request.id]
            if not live.ended and request.finish_reason is not None:
                yield request.id, request.finish_reason
        for request_id, reason in self.scheduler.stopping:
            if not self._live[request_id].ended:
                yield request_id, reason

    # -- the end ------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Hold the executor's block tables against the scheduler's accounts; between two steps only.

        Raises EngineError with the numbers if they differ.
        """
        tables = self.executor.tables
        for tier in Tier:
            pool = self.scheduler.view.pools[tier]
            held = {owner: tables.held(owner, tier) for owner in tables.owners if tables.held(owner, tier)}
            if held != pool.holders():
                raise EngineError(f"{tier} memory holds {held}, the scheduler accounts {pool.holders()}")

    def close(self) -> None:
        """Stop the executor's threads and give its memory back; may be called again."""
        if self._thread is not None:
            self._thread.shutdown()
        self.executor.close()

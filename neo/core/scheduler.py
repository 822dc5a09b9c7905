"""Scheduler: queues, pools and a policy; the state machine that the simulator and the engine both drive.

It knows no wall clock and does no I/O: the driver passes the time, runs the StepGraph (or prices it) and
reports back::

    planned = scheduler.plan_step(now)          # policy -> check -> compile -> apply
    ...                                         # run or price planned.graph
    scheduler.finish_step(planned, result)      # tokens, finished requests, freed blocks

A driver may plan one step ahead: ``commit_step(planned)`` while the step runs assumes that it will end as
planned, and lets ``plan_step`` be called for the next one; ``finish_step`` then only adds what no plan can
know: times, and requests that stopped early.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from neo.core.blocks import BlockPool
from neo.core.books import Books
from neo.core.errors import InputError, NeoError, PlanError, PolicyError, raised
from neo.core.graph import StepGraph
from neo.core.growth import new_layer_blocks, repeats_fit
from neo.core.pipeline import compile
from neo.core.plan import StepPlan
from neo.core.request import FinishReason, Request, State, Tier
from neo.core.specs import HardwareSpec, ModelSpec
from neo.core.timing import Prices
from neo.core.validate import check
from neo.core.view import Limits, SystemView


class Planner(Protocol):
    """What the scheduler needs of a policy; ``neo.policy.interface.Policy`` is the full contract."""

    def plan(self, view: SystemView, cost: Any) -> StepPlan:
        """Decide the next step."""
        ...


class Planned(NamedTuple):
    """A step that has been applied to queues and pools and waits to be run."""

    plan: StepPlan
    graph: StepGraph


@dataclass(frozen=True, slots=True)
class StepResult:
    """What running a step gave.

    ``steps`` > 1: the plan was repeated, ``end_s`` is the end of the last repetition. ``stopped`` names
    requests that ended before their length limit (end of sequence, stop string), with the reason.
    """

    end_s: float
    steps: int = 1
    stopped: Mapping[str, FinishReason] = field(default_factory=dict)


def _takes_part(request: Request, plan: StepPlan) -> bool:
    """Whether a plan that has been applied uses a request's KV."""
    actors = [c.request for b in plan.batches for c in b.prefill]
    actors += [r for b in plan.batches for r in (*b.decodes, *b.relay_decode)]
    actors += [m.request for m in plan.moves] + [e.request for e in plan.evict]
    return any(r is request for r in actors)


class _Stop(NamedTuple):
    """How a request ended before its length limit while a step planned ahead still held it."""

    request: Request
    state: State
    reason: FinishReason
    end_s: float
    generated: int
    cpu_steps: int
    last_token_s: float | None


class _Committed(NamedTuple):
    """A committed step: what ``finish_step`` still has to note."""

    plan: StepPlan
    steps: int
    first: list[Request]  # whose prefill this step completes
    relayed: list[Request]  # whose relayed token it completes
    ended: list[Request]  # at their length limit
    void: list[_Stop]  # had stopped before it began


class Scheduler:
    """Owns queues and block accounting (``neo.core.books``); applies a plan only after ``validate.check``.

    Attributes:
        view: what the policy sees (always current).
        ended: requests that ended since the driver last emptied this list.
    """

    def __init__(
        self,
        policy: Planner,
        cost: Prices,
        model: ModelSpec,
        hardware: HardwareSpec,
        limits: Limits,
        gpu_blocks: int,
        cpu_blocks: int,
    ) -> None:
        self.policy = policy
        self.cost = cost
        self.staging_layers: int = getattr(policy, "staging_layers", 0)
        most = max(16, model.layers)
        if not (isinstance(self.staging_layers, int) and 0 <= self.staging_layers <= most):
            raise PolicyError(
                f"policy {self._name}: staging_layers is {self.staging_layers!r}, not 0 to {most}"
            )
        size = limits.block_size
        self._books = Books(
            model,
            hardware,
            limits,
            BlockPool(Tier.GPU, gpu_blocks, model.layers, size, self.staging_layers),
            BlockPool(Tier.CPU, cpu_blocks, model.layers, size),
        )
        self._requests = self._books.requests
        self.view = self._books.view
        self.ended = self._books.ended
        self._in_flight: StepPlan | None = None
        self._committed: _Committed | None = None  # a step whose effects are applied and that still runs
        self._steps = 1  # repetitions that the running step has blocks for
        self._aborting: dict[str, FinishReason] = {}
        self._stopping: list[_Stop] = []  # what the step planned ahead still holds

    @property
    def _name(self) -> str:
        return type(self.policy).__name__

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def stopping(self) -> list[tuple[str, FinishReason]]:
        """Requests that have stopped while the step planned ahead holds them still."""
        return [(stop.request.id, stop.reason) for stop in self._stopping]

    @property
    def leaving(self) -> Sequence[Request]:
        """Requests that reach their length limit with the committed step: their blocks are free already."""
        return () if self._committed is None else self._committed.ended

    # -- requests come and go -----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a new request. InputError if its id is in use."""
        if request.id in self._requests:
            raise InputError(f"request id {request.id!r} is already in use")
        if request.state is not State.WAITING or request.computed or request.sequence >= 0:
            raise InputError(f"request {request.id!r} has been scheduled before")
        self._books.admit(request)

    def abort(self, request_id: str, now: float, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a request early, in a running step with the step. False if it is not live, or ending."""
        request = self._requests.get(request_id)
        if request is None or request_id in self._aborting:
            return False
        running = self._in_flight is not None or self._committed is not None
        if running and request.state is not State.WAITING:
            self._aborting[request_id] = reason
        else:
            self._books.end(request, State.ABORTED, reason, now)
        return True

    # -- a step -------------------------------------------------------------------------------------------

    def plan_step(self, now: float) -> Planned | None:
        """Ask the policy for the next step and apply it; None if it has nothing to do.

        While a committed step runs, this plans the one behind it. Raises PlanError if the plan breaks an
        invariant and PolicyError if the policy fails; in both cases nothing of the plan has been applied.
        """
        if self._in_flight is not None:
            raise AssertionError("plan_step while a step is running")
        self.view.now = now
        while self._requests:
            plan = self._ask()
            if plan.idle:
                return None
            graph = self._checked(plan)
            self._books.apply(plan, now)
            if graph is None:
                continue
            self._in_flight = plan
            if self._committed is None:
                self.view.in_flight = plan
            return Planned(plan, graph)
        return None

    def max_steps(self, plan: StepPlan) -> int:
        """How many steps the applied plan may run: until a request ends or a pool runs dry; at least 1."""
        if plan.repeat == 0:
            return 1
        decodes = [r for b in plan.batches for r in b.decodes]
        steps = min(plan.repeat + 1, min([r.max_tokens - r.generated for r in decodes]))
        while steps > 1 and not repeats_fit(self.view, plan, steps):
            steps //= 2
        return max(1, steps)

    def extend_step(self, planned: Planned, steps: int) -> None:
        """Let the running step be repeated up to ``steps`` times in all: takes the blocks for that."""
        if planned.plan is not self._in_flight or self._steps != 1:
            raise AssertionError("extend_step of a step that is not running, or twice")
        if steps > 1:
            for tier, owner, count in new_layer_blocks(self.view, planned.plan, steps):
                self.view.pools[tier].take(owner, count)
            self._steps = steps

    def commit_step(self, planned: Planned, steps: int = 1) -> None:
        """Apply what a running step will do, so that the next one can be planned while it runs.

        Requests at their length limit leave the queues and give their blocks back: whatever uses these
        runs behind this step.
        """
        plan = planned.plan
        if plan is not self._in_flight:
            raise AssertionError("commit_step of a step that is not running")
        if self._committed is not None:
            raise AssertionError("commit_step while the step before it still runs")
        if steps != self._steps:
            raise AssertionError(f"{steps} steps finished, {self._steps} were planned")
        self._steps = 1
        self._in_flight = None
        first: list[Request] = []
        ended = self._books.commit_decodes(plan, steps)
        relayed, last = self._books.commit_relay(plan)
        ended += last
        ended += self._books.commit_chunks(plan, first)
        self._books.complete_moves(plan)
        void = self._leave_stopped()
        if void:
            ended = [r for r in ended if not any(r is stop.request for stop in void)]
        for request in ended:
            self._books.leave(request, State.FINISHED, FinishReason.LENGTH)
        self._committed = _Committed(plan, steps, first, relayed, ended, void)

    def finish_step(self, planned: Planned, result: StepResult) -> None:
        """Commit a step that has run: tokens, copies completed, requests that ended."""
        if self._committed is None:
            self.commit_step(planned, result.steps)
        done = self._committed
        if done is None or planned.plan is not done.plan or result.steps != done.steps:
            raise AssertionError("finish_step of a step that is not running")
        self._committed = None
        self.view.in_flight = self._in_flight
        end = result.end_s
        for batch in planned.plan.batches:
            for r in batch.decodes:
                r.last_token_s = end
        for r in done.relayed:
            r.last_token_s = end
        for r in done.first:
            r.last_token_s = end
            if r.first_token_s is None and r.generated:
                r.first_token_s = end
        for stop in done.void:
            stop.request.last_token_s = stop.last_token_s
        for request in done.ended:
            request.finish_reason = result.stopped.get(request.id, FinishReason.LENGTH)
            request.finish_s = end
            self.ended.append(request)
        for request_id, reason in result.stopped.items():
            self._stop(request_id, State.FINISHED, reason, end)
        if self._aborting:
            for request_id, reason in self._aborting.items():
                self._stop(request_id, State.ABORTED, reason, end)
            self._aborting.clear()

    def _stop(self, request_id: str, state: State, reason: FinishReason, now: float) -> None:
        """End a request early; one that a step planned ahead holds leaves when that step is committed."""
        request = self._requests.get(request_id)
        if request is None or any(stop.request is request for stop in self._stopping):
            return
        if self._in_flight is None or not _takes_part(request, self._in_flight):
            self._books.end(request, state, reason, now)
        else:
            r = request
            self._stopping.append(_Stop(r, state, reason, now, r.generated, r.cpu_steps, r.last_token_s))

    def _leave_stopped(self) -> list[_Stop]:
        """Requests that had stopped leave: what the step planned ahead computed for them is void."""
        stopping, self._stopping = self._stopping, []
        for stop in stopping:
            self._books.end(stop.request, stop.state, stop.reason, stop.end_s)
            stop.request.generated, stop.request.cpu_steps = stop.generated, stop.cpu_steps
        return stopping

    # -- planning -----------------------------------------------------------------------------------------

    def _ask(self) -> StepPlan:
        try:
            plan = self.policy.plan(self.view, self.cost)
        except (NeoError, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit, GeneratorExit: a policy must not end what runs it
            raise PolicyError(f"policy {self._name} raised {raised(error)}") from error
        if not isinstance(plan, StepPlan):
            raise PolicyError(f"policy {self._name} returned {type(plan).__name__}, not a StepPlan")
        return plan

    def _checked(self, plan: StepPlan) -> StepGraph | None:
        """The graph of a plan that keeps all rules; None if it only rejects."""
        try:
            check(self.view, plan)
            if not plan.batches:
                return None
            return compile(plan, self.view.model, self.view.limits.block_size, self.staging_layers)
        except NeoError:
            raise
        except Exception as error:
            raise PolicyError(
                f"policy {self._name} returned a malformed plan ({type(error).__name__}: {error}); "
                "batches, roles and moves are tuples, as neo.core.plan says"
            ) from error

    def stalled(self) -> PlanError:
        """The error for a driver whose policy stays idle although nothing else will ever happen."""
        first = next(iter(self._requests.values()))
        return PlanError(
            "progress",
            f"the policy is idle, nothing more will arrive, {len(self._requests)} requests would wait on",
            first.id,
        )

"""What an engine asks of a device: run one StepGraph on real memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from neo.core.graph import RESOURCE_OF, OpKind, Resource, StepGraph
from neo.core.plan import StepPlan
from neo.core.record import Slice
from neo.runtime.block_tables import BlockTables
from neo.runtime.step_inputs import StepInputs

Sample = Callable[[Any, tuple[str, ...]], Any]
"""Called once per step with logits ([rows, vocab], on the device) and the requests of the rows, on the stream
that computes them. Returns the tokens, int64 [rows] on the device, if it chose them there without waiting."""

Pending = Callable[[], "StepTimes"]
"""A step that was started: waits until it has ended."""


FAULTS = (RuntimeError, ValueError, IndexError, MemoryError)
"""What torch, numpy and kernels raise when an operation cannot be done (CpuKernelError is a RuntimeError)."""


@dataclass(slots=True)
class StepTimes:
    """What running a step took, on the clock of ``time.perf_counter``.

    Attributes:
        begin_s: when its first operation began.
        end_s: when its tokens were there.
        seconds: per work entry of the graph, seconds of all its operations together; SCHEDULE's is set by the
            engine.
        slices: every operation, where asked for.
        measured: whether ``seconds`` holds every operation; else those of CPU_ATTN alone.
    """

    begin_s: float
    end_s: float
    seconds: list[float]
    slices: list[Slice] = field(default_factory=list)
    measured: bool = True

    def by_operation(self, graph: StepGraph) -> dict[str, tuple[int, float]]:
        """``KIND:sub-batch`` to (operations, seconds in all), as run logs hold it."""
        found: dict[str, tuple[int, float]] = {}
        for name, count, seconds in zip(
            operation_names(graph), graph.template.counts, self.seconds, strict=True
        ):
            before = found.get(name, (0, 0.0))
            found[name] = (before[0] + count, before[1] + seconds)
        return found

    def busy(self, graph: StepGraph) -> dict[Resource, float]:
        """Seconds each resource worked."""
        found: dict[Resource, float] = {} if self.measured else {Resource.GPU: self.end_s - self.begin_s}
        for kind, seconds in zip(graph.template.kinds, self.seconds, strict=True):
            resource = RESOURCE_OF[kind]
            found[resource] = found.get(resource, 0.0) + seconds
        return found


class Executor(Protocol):
    """Runs steps, one after the other."""

    tables: BlockTables

    def run(
        self, plan: StepPlan, graph: StepGraph, inputs: StepInputs, copies: Any, sample: Sample
    ) -> StepTimes:
        """Run a step to its end: order, resources and dependencies are those of the graph.

        ``copies`` is what ``tables.begin(plan)`` gave. Raises EngineError where the device fails; memory may
        then hold anything.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Device, threads, library and versions, for run logs and reports (JSON-serialisable)."""
        ...

    def close(self) -> None:
        """Stop threads and give memory back; may be called again."""
        ...


@runtime_checkable
class Queueing(Executor, Protocol):
    """An executor that takes a step while the one before it runs, so that its device never idles."""

    def start(
        self, plan: StepPlan, graph: StepGraph, inputs: StepInputs, copies: Any, sample: Sample
    ) -> Pending:
        """As ``run``, without waiting. Tokens that the step before samples are ``pending_token``s."""
        ...

    @property
    def may_be_followed(self) -> bool:
        """Whether the next step may be started while the last one that was started runs."""
        ...


@runtime_checkable
class Replaying(Executor, Protocol):
    """An executor that runs some steps in one piece: operations overlap, and none can be timed alone."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows that such steps are padded to, ascending."""
        ...

    def replays(self, plan: StepPlan, inputs: StepInputs) -> bool:
        """Whether ``replay`` can be asked for this step: decodes on the GPU alone."""
        ...

    def replay(
        self, graph: StepGraph, inputs: StepInputs, sample: Sample, without: frozenset[OpKind] = frozenset()
    ) -> float:
        """Seconds of such a step that runs right behind another one like it, on the device's clock.

        ``without``: kinds of operations that are left out, so that memory may then hold anything in the rows
        that the step computes, and in the KV that it appends; a whole step puts that right. ``sample`` must
        not wait for the device. May run the step any number of times.
        """
        ...


def operation_names(graph: StepGraph) -> list[str]:
    """``KIND:sub-batch`` of each work entry."""
    batches: dict[int, int] = {}
    kinds: dict[int, OpKind] = {}
    for section in graph.template.sections:
        for op in section.ops:
            batches[op.work] = op.batch
            kinds[op.work] = op.kind
    return [f"{kinds[i]}:{batches[i]}" for i in range(len(graph.works))]

"""Recorder: turns steps into a RunRecord, of simulator and engine alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from neo.core.bubbles import Bubbles
from neo.core.graph import Resource
from neo.core.learning import StepSeconds, learning
from neo.core.pipeline import bytes_moved
from neo.core.plan import StepPlan
from neo.core.record import Mode, RunRecord
from neo.core.request import Request, Tier
from neo.core.scheduler import Planned, Scheduler
from neo.core.timing import busy_seconds

_TRACKED = {Resource.GPU: 0, Resource.CPU: 1, Resource.H2D: 2, Resource.D2H: 3}  # order of the busy columns


class Begun(NamedTuple):
    """What the record needs of a step that only its planning knows; requests move on while it runs."""

    planned: Planned
    prefill_tokens: int
    gpu_decodes: int
    cpu_decodes: int
    stream_decodes: int
    relayed: tuple[Request, ...]  # whose relayed token this step completes
    completing: tuple[Request, ...]  # whose prefill this step completes
    waiting: int
    kv_gpu: int  # layer-blocks
    kv_cpu: int


class Recorder:
    """Fills a RunRecord from the steps of one scheduler; its requests, times and capacities the driver sets.

    A driver that prices its steps calls ``observe`` when a step ends. One that measures them calls ``begin``
    when a step has been planned and ``observe_measured`` when it has ended: in between the next step may
    have been planned. Both are told before ``Scheduler.finish_step``, as gaps between tokens are counted from
    each request's ``last_token_s``. What was measured is passed on to a cost model that learns.

    Args:
        bubbles: is told of every step that was priced, if given.
    """

    def __init__(self, record: RunRecord, scheduler: Scheduler, bubbles: Bubbles | None = None) -> None:
        self.record = record
        self.scheduler = scheduler
        self.bubbles = bubbles
        self._learning = learning(scheduler.cost)

    def begin(self, planned: Planned) -> Begun:
        """Note what a planned step starts from; after ``plan_step``, before ``commit_step``."""
        tokens = on_gpu = on_cpu = streamed = 0
        completing: tuple[Request, ...] = ()
        relayed: tuple[Request, ...] = ()
        layers = self.scheduler.view.model.layers
        for batch in planned.plan.batches:
            on_gpu += len(batch.gpu_decode)
            on_cpu += len(batch.cpu_decode)
            streamed += len(batch.stream_decode)
            if batch.relay_decode:
                relayed = tuple([r for r in batch.relay_decode if r.relay_layers == layers])
                on_cpu += len(relayed)  # whose token the step brings
            if batch.prefill:
                tokens += sum([c.length for c in batch.prefill])
                completing += tuple(
                    [c.request for c in batch.prefill if c.length == c.request.remaining_prefill]
                )
        view = self.scheduler.view
        gpu, cpu = view.pools[Tier.GPU].used, view.pools[Tier.CPU].used
        waiting = len(view.waiting)
        return Begun(planned, tokens, on_gpu, on_cpu, streamed, relayed, completing, waiting, gpu, cpu)

    def observe(self, planned: Planned, seconds: list[Any], start: float, ends: list[float]) -> None:
        """Note a step that was priced, or its repetitions.

        Args:
            seconds: per work entry of the graph, seconds of one operation: a number, or an array with one
                entry per repetition.
            start: when the first repetition began.
            ends: when each repetition ended.
        """
        begun = self.begin(planned)
        decodes = [r for b in planned.plan.batches for r in b.decodes]
        last = [r.last_token_s or 0.0 for r in (*decodes, *begun.relayed)]
        self._note(begun, busy_seconds(planned.graph.template, seconds), start, ends, last)
        if self.bubbles is not None:
            self.bubbles.add(planned.graph.template, seconds, start, ends)

    def observe_measured(
        self, begun: Begun, busy: Mapping[Resource, float], start: float, end: float
    ) -> None:
        """Note a step that has run.

        A request that stopped while this step, planned ahead, still held it gets no token of it: commit the
        step first, so that such requests have ended (``finish_s`` is set) and their gaps are not counted.

        Args:
            busy: seconds in which each resource worked; those that did not may be missing.
            start: when its first operation began.
            end: when its last one ended.
        """
        decodes = [r for b in begun.planned.plan.batches for r in b.decodes]
        last = [r.last_token_s or 0.0 for r in (*decodes, *begun.relayed) if r.finish_s is None]
        self._note(begun, busy, start, [end], last)
        graph = begun.planned.graph
        measured = StepSeconds(end - start, busy.get(Resource.HOST), busy.get(Resource.CPU))
        if self._learning is not None:
            self._learning.observe(graph, measured)
        self.record.ran(graph, measured)

    def _note(
        self, begun: Begun, busy: Mapping[Resource, Any], start: float, ends: list[float], last: list[float]
    ) -> None:
        """One row, and the gaps; ``last`` has the time of each decode's token before this step."""
        record, plan, graph = self.record, begun.planned.plan, begun.planned.graph
        steps = len(ends)
        if begun.completing:
            self._prefill_gaps(begun.completing, ends[0])
        worked = [0.0] * len(_TRACKED)
        for resource, total in busy.items():
            at = _TRACKED.get(resource)
            if at is not None:
                worked[at] = record.add_busy(resource, total, steps)
        if not graph.template.serial:
            into, out = bytes_moved(graph)
            record.bytes_h2d += into
            record.bytes_d2h += out
        if plan.evict:
            record.preemptions += len(plan.evict)
        _, tokens, on_gpu, on_cpu, streamed, _, _, waiting, gpu, cpu = begun
        mode = mode_of(plan)
        row = (start, ends[-1], steps, mode, waiting, tokens, on_gpu, on_cpu, streamed, gpu, cpu, *worked)
        record.add_row(row)
        if last:
            self._decode_gaps(ends, last)

    def _decode_gaps(self, ends: list[float], last: list[float]) -> None:
        """Inter-token gaps of the decodes: time since each one's last token, then between repetitions."""
        values, counts, decodes = self.record.itl_values, self.record.itl_counts, len(last)
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

    def _prefill_gaps(self, completing: tuple[Request, ...], end: float) -> None:
        """A preempted request's next token comes out of a prefill: that gap counts too."""
        for request in completing:
            if request.last_token_s is not None and request.finish_s is None:
                self.record.itl_values.append(end - request.last_token_s)
                self.record.itl_counts.append(1)


def mode_of(plan: StepPlan) -> Mode:
    """How a step is run."""
    if len(plan.batches) == 2:
        return Mode.PIPELINED
    batch = plan.batches[0]
    if batch.cpu_decode:
        return Mode.CPU_SEQUENTIAL
    if batch.relay_decode:
        return Mode.RELAYED
    return Mode.STREAMED if batch.stream_decode else Mode.GPU_ONLY

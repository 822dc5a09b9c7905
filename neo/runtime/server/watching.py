"""What metrics need of a running engine, without keeping all of it: the last step, its graph, its price."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from neo.core.graph import StepGraph
from neo.core.plan import StepPlan
from neo.core.record import RunRecord, StepRow
from neo.core.timing import Prices, durations, step_seconds
from neo.runtime.executor import Executor, Sample, StepTimes
from neo.runtime.server.messages import StepInfo

LIKE = slice(3, 9)
"""Columns in which the rows of steps agree that are alike: mode, requests that wait, tokens by kind."""
_EMBED = 1  # of a graph's works: the embedding's, which has all tokens
PRICE_S = 0.02
"""Seconds between two prices of steps that are alike: the KV that they read has hardly grown meanwhile."""


class _Nothing(list[Any]):
    """A list that keeps nothing."""

    def append(self, _item: Any) -> None:
        """Forget it."""

    def extend(self, _items: Any) -> None:
        """Forget them."""


class LiveRecord(RunRecord):
    """A RunRecord for a server that runs for months: only the last row is kept, unless ``keep``."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        self.last: StepRow | None = None
        if not keep:
            nothing: Any = _Nothing()
            self.requests = self.itl_values = self.itl_counts = nothing

    def add_row(self, row: StepRow) -> None:
        """Note the row of the step that ended."""
        self.last = row
        if self.keep:
            super().add_row(row)


class WatchedExecutor:
    """An executor that remembers the graph it ran last.

    Attributes:
        held: something is held back; ``before`` is called where a step begins that may take longer than the
            one before it.
    """

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.tables = inner.tables
        self.graph: StepGraph | None = None
        self.held = False
        self.before: Callable[[], None] = _nothing

    def run(self, plan: StepPlan, graph: StepGraph, inputs: Any, copies: Any, sample: Sample) -> StepTimes:
        """Run a step."""
        if self.held and (self.graph is None or _more(graph, self.graph)):
            self.before()
        self.graph = graph
        return self.inner.run(plan, graph, inputs, copies, sample)

    def describe(self) -> dict[str, Any]:
        """The inner one's words."""
        return self.inner.describe()

    def close(self) -> None:
        """Close the inner one."""
        self.inner.close()


def _nothing() -> None:
    pass


def _more(graph: StepGraph, before: StepGraph) -> bool:
    """Whether a step has other operations than the one before it, or more tokens."""
    return graph.template is not before.template or graph.works[_EMBED][0] > before.works[_EMBED][0]


class StepWatch:
    """Turns what a record saw of steps into a StepInfo; ``cost`` prices their graphs.

    A price takes longer than all else that is said of a short step. So of steps that are alike and follow
    each other, one is priced every ``PRICE_S``, and its price counts for those before it.
    """

    def __init__(self, record: LiveRecord, executor: WatchedExecutor, cost: Prices) -> None:
        self.record = record
        self.executor = executor
        self.cost = cost
        self._before = (0, 0, 0)
        self._unpriced = 0  # steps
        self._graph: StepGraph | None = None  # of the last of them
        self._priced_s = 0.0  # when the last one was
        self._predicted: list[tuple[float, int]] = []

    def info(self, rows: Sequence[StepRow], graph: StepGraph | None, more: bool) -> StepInfo:
        """One or more steps that are alike (see LIKE), the last of them with this graph.

        ``more``: others like them may follow; those before them were like them.
        """
        record = self.record
        now = (record.bytes_h2d, record.bytes_d2h, record.preemptions)
        h2d, d2h, preempted = (a - b for a, b in zip(now, self._before, strict=True))
        self._before = now
        _start, end, _steps, mode, _waiting, prefill, gpu, cpu, streamed = rows[-1][:9]
        if not more:
            self.settle()
        self._graph = graph
        self._unpriced += len(rows)
        if not more or end - self._priced_s >= PRICE_S:
            self.settle()
            self._priced_s = end
        predicted, self._predicted = self._predicted, []
        return StepInfo(
            int(mode),
            [row[1] - row[0] for row in rows],
            predicted,
            int(prefill),
            int(gpu),
            int(cpu),
            int(streamed),
            h2d,
            d2h,
            preempted,
        )

    def settle(self) -> None:
        """Price what has no price yet: what follows is different."""
        seconds = self._price() if self._unpriced else None
        if seconds is not None:
            self._predicted.append((seconds, self._unpriced))
        self._unpriced = 0

    def _price(self) -> float | None:
        """The cost model's seconds for a step; None where it has no price: that must not stop serving."""
        graph = self._graph
        if graph is None:
            return None
        try:
            seconds = float(step_seconds(graph.template, durations(graph, self.cost)))
        except Exception:  # a cost model may come from anybody's file
            return None
        return seconds if math.isfinite(seconds) else None

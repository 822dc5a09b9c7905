"""What metrics need of a running engine, without keeping all of it: the last step, its graph, its price."""

from __future__ import annotations

import math
from typing import Any

from neo.core.graph import StepGraph
from neo.core.learning import StepSeconds
from neo.core.record import RunRecord, StepRow
from neo.core.timing import Prices, durations, step_seconds
from neo.cost.calibrated import Calibrated
from neo.runtime.server.messages import StepInfo


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
        self.graph: StepGraph | None = None  # of the same step
        if not keep:
            nothing: Any = _Nothing()
            self.requests = self.itl_values = self.itl_counts = nothing

    def add_row(self, row: StepRow) -> None:
        """Note the row of the step that ended."""
        self.last = row
        if self.keep:
            super().add_row(row)

    def ran(self, graph: StepGraph, measured: StepSeconds) -> None:
        """Note the graph of the step that ended."""
        self.graph = graph


class StepWatch:
    """Turns what a record saw of the last step into a StepInfo; ``cost`` prices its graph."""

    def __init__(self, record: LiveRecord, cost: Prices) -> None:
        self.record = record
        self.cost = cost
        self._before = (0, 0, 0)
        self._calibrated = cost if isinstance(cost, Calibrated) else None
        self._version = 0 if self._calibrated is None else self._calibrated.version

    def take(self) -> StepInfo | None:
        """The step since the last call, if there was one."""
        row, record = self.record.last, self.record
        if row is None:
            return None
        record.last = None
        now = (record.bytes_h2d, record.bytes_d2h, record.preemptions)
        h2d, d2h, preempted = (a - b for a, b in zip(now, self._before, strict=True))
        self._before = now
        start, end, _steps, mode, _waiting, prefill, gpu, cpu, streamed = row[:9]
        return StepInfo(
            int(mode),
            end - start,
            self._predicted(),
            int(prefill),
            int(gpu),
            int(cpu),
            int(streamed),
            h2d,
            d2h,
            preempted,
            self._factors(),
        )

    def _factors(self) -> dict[str, float] | None:
        """The cost model's corrections, where they have changed."""
        model = self._calibrated
        if model is None or model.version == self._version:
            return None
        self._version = model.version
        return model.factors

    def _predicted(self) -> float | None:
        """The cost model's seconds for the step; None where it has no price: that must not stop serving."""
        if self._calibrated is not None:  # which has learnt from this step by now
            return self._calibrated.predicted_s
        graph = self.record.graph
        if graph is None:
            return None
        try:
            seconds = float(step_seconds(graph.template, durations(graph, self.cost)))
        except Exception:  # a cost model may come from anybody's file
            return None
        return seconds if math.isfinite(seconds) else None

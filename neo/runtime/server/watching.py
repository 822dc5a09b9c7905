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

LIKE = slice(3, 9)
"""Columns in which the rows of steps agree that are alike: mode, requests that wait, tokens by kind."""
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
    """Turns what a record saw of steps into a StepInfo; ``cost`` prices their graphs.

    A price takes longer than all else that is said of a short step. So of steps that are alike and follow
    each other, one is priced every ``PRICE_S``, and its price counts for those before it. A calibrated model
    has priced every step to learn from it: these prices are taken.

    Attributes:
        learns: the cost model is calibrated: ``note_price`` behind every step.
    """

    def __init__(self, record: LiveRecord, cost: Prices) -> None:
        self.record = record
        self.cost = cost
        self._graph: StepGraph | None = None  # of the last step
        self._rows: list[StepRow] = []  # of steps since the last StepInfo
        self._like: StepRow = ()  # what they have in common
        self._told = (0, 0, 0)  # bytes to and from the device, preemptions: what was told of them
        self._unpriced = 0  # steps
        self._priced_s = 0.0  # when the last one was
        self._predicted: list[tuple[float, int]] = []
        self._calibrated = cost if isinstance(cost, Calibrated) else None
        self.learns = self._calibrated is not None
        self._version = 0 if self._calibrated is None else self._calibrated.version

    def add(self, rows: list[StepRow], graph: StepGraph | None, alone: bool = False) -> None:
        """Steps ended that are alike, the last with this graph, and ``info`` has told those before them.

        ``alone``: they share no price with those.
        """
        like = rows[-1][LIKE]
        if alone or like != self._like:
            self._settle()
            self._like = like
        self._rows = rows
        self._graph = graph
        if not self.learns:
            self._unpriced += len(rows)

    def note_price(self) -> None:
        """A step ended: a calibrated model has its price."""
        if self._calibrated is not None and self._calibrated.predicted_s is not None:
            self._predicted.append((self._calibrated.predicted_s, 1))

    def info(self, more: bool) -> StepInfo:
        """The steps since the last call, one at least; ``more``: others like them may follow."""
        rows, self._rows = self._rows, []
        end = rows[-1][1]
        if not more or end - self._priced_s >= PRICE_S:
            self._settle()
            self._priced_s = end
        return self._info([row[1] - row[0] for row in rows])

    def rest(self) -> StepInfo | None:
        """Nothing follows the steps so far: the price of those that have none yet, if there are any."""
        if not self._unpriced:
            return None
        self._settle()
        return self._info([])

    def _info(self, seconds: list[float]) -> StepInfo:
        mode, _waiting, prefill, gpu, cpu, streamed = self._like
        predicted, self._predicted = self._predicted, []
        record, told = self.record, self._told
        self._told = now = (record.bytes_h2d, record.bytes_d2h, record.preemptions)
        return StepInfo(
            int(mode),
            seconds,
            predicted,
            int(prefill),
            int(gpu),
            int(cpu),
            int(streamed),
            now[0] - told[0],
            now[1] - told[1],
            now[2] - told[2],
            self._factors(),
        )

    def _factors(self) -> dict[str, float] | None:
        """The cost model's corrections, where they have changed."""
        model = self._calibrated
        if model is None or model.version == self._version:
            return None
        self._version = model.version
        return model.factors

    def _settle(self) -> None:
        """Price what has no price yet."""
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

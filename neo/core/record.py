"""RunRecord: what a run leaves behind, in columns. Simulator and engine fill it; ``neo.report`` reads it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from neo.core.graph import StepGraph
from neo.core.learning import StepSeconds
from neo.core.request import Request


class Mode(IntEnum):
    """How a step was run; the name in reports is the lower-case name with dashes."""

    GPU_ONLY = 0  # one batch, attention on the GPU from resident KV
    CPU_SEQUENTIAL = 1  # one batch with CPU attention
    PIPELINED = 2  # two sub-batches
    STREAMED = 3  # one batch with streamed KV
    RELAYED = 4  # one batch, beside it decodes on the CPU that go a layer further


@dataclass(slots=True)
class StepColumns:
    """One entry per recorded row; a row stands for ``steps`` equal steps from ``start_s`` to ``end_s``.

    Counts are per step, KV use (layer-blocks) is the peak within the row, ``busy_*`` are seconds in which the
    resource worked, over the whole row.
    """

    start_s: array[float] = field(default_factory=lambda: array("d"))
    end_s: array[float] = field(default_factory=lambda: array("d"))
    steps: array[int] = field(default_factory=lambda: array("q"))
    mode: array[int] = field(default_factory=lambda: array("b"))
    waiting: array[int] = field(default_factory=lambda: array("q"))
    prefill_tokens: array[int] = field(default_factory=lambda: array("q"))
    gpu_decodes: array[int] = field(default_factory=lambda: array("q"))
    cpu_decodes: array[int] = field(default_factory=lambda: array("q"))
    stream_decodes: array[int] = field(default_factory=lambda: array("q"))
    kv_gpu: array[int] = field(default_factory=lambda: array("q"))
    kv_cpu: array[int] = field(default_factory=lambda: array("q"))
    busy_gpu: array[float] = field(default_factory=lambda: array("d"))
    busy_cpu: array[float] = field(default_factory=lambda: array("d"))
    busy_h2d: array[float] = field(default_factory=lambda: array("d"))
    busy_d2h: array[float] = field(default_factory=lambda: array("d"))


StepRow = tuple[float, ...]
"""One row of StepColumns, in the order of its fields."""

_BUFFERED_ROWS = 4096


class Slice(NamedTuple):
    """One operation on a timeline; times in seconds on the run's clock."""

    step: int
    resource: str
    name: str
    layer: int | None
    batch: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class RunRecord:
    """Everything reports are made of.

    ``itl_values`` / ``itl_counts``: each gap between two tokens of a request (seconds), and how many
    requests saw it (a step that yields a token for n requests is one entry of count n).
    """

    requests: list[Request] = field(default_factory=list)
    _columns: StepColumns = field(default_factory=StepColumns)
    _rows: list[StepRow] = field(default_factory=list)
    _kept: int = 0  # rows that are in the columns
    itl_values: array[float] = field(default_factory=lambda: array("d"))
    itl_counts: array[int] = field(default_factory=lambda: array("q"))
    busy: dict[str, float] = field(default_factory=dict)  # resource -> seconds it worked
    bytes_h2d: int = 0
    bytes_d2h: int = 0
    preemptions: int = 0
    start_s: float = 0.0  # when the first request arrived
    end_s: float = 0.0  # when the last one ended
    kv_capacity: Mapping[str, int] = field(default_factory=dict)  # tier -> layer-blocks
    slices: list[Slice] = field(default_factory=list)
    bubbles: Mapping[str, Mapping[str, float]] | None = None  # resource -> cause -> seconds, if asked for
    interrupted: str | None = None  # why the run stopped early, if it did

    @property
    def columns(self) -> StepColumns:
        """The step rows so far, by column."""
        if self._rows:
            names = StepColumns.__dataclass_fields__
            for name, values in zip(names, zip(*self._rows, strict=True), strict=True):
                column = getattr(self._columns, name)
                del column[self._kept :]  # what is left of an attempt that a signal has ended half way
                column.extend(values)
            self._kept, self._rows = self._kept + len(self._rows), []
        return self._columns

    def gaps(self) -> tuple[Sequence[float], Sequence[int]]:
        """``itl_values`` and ``itl_counts``, without a value that a signal has kept from being counted."""
        return self.itl_values[: len(self.itl_counts)], self.itl_counts

    def add_row(self, row: StepRow) -> None:
        """Append a step row. Rows are kept as tuples for a while: one append is cheaper than fifteen."""
        self._rows.append(row)
        if len(self._rows) >= _BUFFERED_ROWS:
            _ = self.columns

    def ran(self, graph: StepGraph, measured: StepSeconds) -> None:
        """A measured step ended, whose row was added just now. Nothing of it is kept here."""

    def add_busy(self, resource: str, seconds: Any, steps: int) -> float:
        """Add the busy seconds of ``steps`` steps (a number, or one per step); returns their sum.

        Added one by one, so that repeated steps give the same total as single ones.
        """
        total = self.busy.get(resource, 0.0)
        before = total
        if isinstance(seconds, (int, float)):
            for _ in range(steps):
                total += seconds
        else:
            for value in seconds.tolist():
                total += value
        self.busy[resource] = total
        return total - before

"""What replaying a run log gives. The simulator fills it; ``neo.report`` reads it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from neo.core.record import Slice


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first decision that differs: in which step (from 1) and line of the log, and how."""

    step: int
    line: int
    what: str


@dataclass(slots=True)
class Times:
    """Predicted and measured seconds, one entry of each per replayed step line that has both."""

    predicted: array[float] = field(default_factory=lambda: array("d"))
    measured: array[float] = field(default_factory=lambda: array("d"))

    def add(self, predicted: float, measured: float) -> None:
        """Note one step."""
        self.predicted.append(predicted)
        self.measured.append(measured)


@dataclass(slots=True)
class Replay:
    """A run log, replayed.

    Attributes:
        equal: step lines whose decision the policy repeated.
        logged: step lines of the log.
        planned_ahead: of the equal ones, those planned while the step before still ran.
        divergence: the first difference, where the replay stopped; None if there is none.
        steps: seconds of each step line.
        ops: by (operation kind, sub-batch), seconds of all such operations of each step line.
        slices: every operation of the steps asked for, as predicted from when these steps began.
    """

    equal: int = 0
    logged: int = 0
    planned_ahead: int = 0
    divergence: Divergence | None = None
    steps: Times = field(default_factory=Times)
    ops: dict[tuple[str, int], Times] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)

"""What a driver that measures its steps tells a cost model that learns from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from neo.core.graph import StepGraph


class StepSeconds(NamedTuple):
    """What a step took, in seconds; None where that was not measured.

    Attributes:
        total: from the end of the step before (or from its planning) to its own end.
        host: of that, what lay before its first operation; 0 if that was waiting already.
        cpu: all its CPU attention together.
    """

    total: float
    host: float | None = None
    cpu: float | None = None


@runtime_checkable
class Learning(Protocol):
    """A cost model whose prices follow the measured ones.

    They change in these calls alone, which drivers make between two steps; so a policy still gives the same
    plan for the same view and the same ``factors``.

    Attributes:
        version: grows with every change of prices.
        factors: by part, what prices are multiplied by; all that prices depend on.
    """

    version: int

    @property
    def factors(self) -> Mapping[str, float]:
        """See above."""
        ...

    def begin(self) -> None:
        """A run begins: nothing is known of it."""
        ...

    def observe(self, graph: StepGraph, measured: StepSeconds) -> None:
        """A step ended. Must take whatever a clock may give, and never raise."""
        ...

    def restore(self, factors: Mapping[str, float]) -> None:
        """Take the factors of a logged run. ValueError for what are none."""
        ...


def learning(cost: object) -> Learning | None:
    """``cost`` if it learns."""
    return cost if isinstance(cost, Learning) else None

"""The calibrated cost model: another one, corrected online by factors that follow measured steps.

A step's length is one number, so that operations cannot be corrected one by one. They fall into ``PARTS``,
each with one factor. Two parts are measured by themselves in every step: ``host``, what lies before the first
operation, and ``cpu``, CPU attention. What then remains between a step's measured and predicted length is
shared out among the others by how much the step's length depends on each: the share of it that lies on the
critical path. This is the normalised least mean squares rule (Widrow and Hoff 1960; Nagumo and Noda 1967) on
the logarithms of factors, where over- and underestimates weigh the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from neo.core.graph import OpKind, StepGraph, Template, Work
from neo.core.learning import StepSeconds
from neo.core.timing import durations, step_seconds
from neo.cost.interface import CostModel

PART_OF: dict[OpKind, str] = {
    OpKind.SCHEDULE: "host",
    OpKind.EMBED: "dense",
    OpKind.PRE: "dense",
    OpKind.POST: "dense",
    OpKind.HEAD: "dense",
    OpKind.ALLREDUCE: "dense",
    OpKind.GPU_ATTN: "attention",
    OpKind.CPU_ATTN: "cpu",
    OpKind.SEND: "copies",
    OpKind.RECV: "copies",
    OpKind.SWAP_OUT: "copies",
    OpKind.SWAP_IN: "copies",
    OpKind.STREAM: "copies",
}
PARTS = ("host", "dense", "attention", "cpu", "copies")
TIME_CONSTANT = 50.0
"""Steps after which an old error has shrunk to 1/e."""

_UNSEEN = 2  # steps at the start of a run that say nothing: threads start, kernels are chosen
_CLIP = math.log(2.0)  # the most that one step is believed to be off: what it may move is bounded by it
_MOST = math.log(100.0)  # bound of every factor, both ways
_WORTH = math.log(1.02)  # change of a factor from which prices change: policies then ask everything again
_RETURN = 20.0  # time constants after which a factor that nothing is heard of has come back to 1/e of itself
_DAMPING = 0.1  # in the rule's denominator: a part with little influence on the step moves little
_NUDGE = 1e-3  # relative change by which influence is measured


class Corrected:
    """A cost model times a constant factor for each part.

    Args:
        base: what is corrected.
        factors: by part; 1 where missing.
    """

    def __init__(self, base: CostModel, factors: Mapping[str, float] | None = None) -> None:
        self.base = base
        self.vectorized = bool(getattr(base, "vectorized", False))
        self._base_seconds = base.seconds
        self._set(dict(factors or {}))

    def _set(self, factors: Mapping[str, float]) -> None:
        self._factors = {part: float(factors.get(part, 1.0)) for part in PARTS}
        self._of = {kind: self._factors[part] for kind, part in PART_OF.items()}

    @property
    def factors(self) -> dict[str, float]:
        """By part, what prices are multiplied by."""
        return dict(self._factors)

    def seconds(self, kind: OpKind, work: Work) -> Any:
        """Seconds of one operation in one layer; see ``neo.cost.interface.CostModel``."""
        return self._of[kind] * self._base_seconds(kind, work)

    def describe(self) -> dict[str, Any]:
        """The base's words, and the factors as they are now."""
        base = self.base.describe()
        return {
            "cost_model": "calibrated",
            "factors": self.factors,
            "base": base,
            "warnings": list(base.get("warnings", ())),
        }


class Calibrated(Corrected):
    """See the module's description; ``neo.core.learning.Learning`` says who calls what.

    Args:
        base: what is corrected.
        time_constant: steps after which an old error has shrunk to 1/e.

    Attributes:
        version: grows when prices change.
        predicted_s: what the prices before the last ``observe`` said of its step; None if they had none.
    """

    def __init__(self, base: CostModel, time_constant: float = TIME_CONSTANT) -> None:
        super().__init__(base)
        self.version = 0
        self.time_constant = time_constant
        self.begin()

    def begin(self) -> None:
        """A run begins: every factor is 1, and the first steps count as in a plain mean."""
        self.predicted_s: float | None = None
        self._steps = 0
        self._seen = dict.fromkeys(PARTS, 0.0)
        self._logs = dict.fromkeys(PARTS, 0.0)  # of the factors as they are estimated
        self._publish(dict.fromkeys(PARTS, 1.0))

    def restore(self, factors: Mapping[str, float]) -> None:
        """Take the factors that a log holds. ValueError for an unknown part or what is no factor."""
        for part, factor in factors.items():
            if part not in PARTS:
                raise ValueError(f"unknown part {part!r} (parts: {', '.join(PARTS)})")
            if not 0.0 < factor < math.inf:
                raise ValueError(f"{part}: {factor!r} is no factor")
        self._publish({**self._factors, **factors})

    def fixed(self) -> Corrected:
        """The model with its factors as they are now, for good."""
        return Corrected(self.base, self._factors)

    def told(self) -> str:
        """The factors in words."""
        shown = ", ".join(f"{part} {factor:.3g}" for part, factor in self._factors.items())
        return f"factors at the end: {shown}"

    def describe(self) -> dict[str, Any]:
        """As ``Corrected``, with the steps that were seen."""
        return {**super().describe(), "time_constant_steps": self.time_constant, "steps_seen": self._steps}

    def _publish(self, factors: Mapping[str, float]) -> None:
        if factors != self._factors:
            self._set(factors)
            self.version += 1

    # -- learning -----------------------------------------------------------------------------------------

    def observe(self, graph: StepGraph, measured: StepSeconds) -> None:
        """Learn from a step; what is no time, or has no price, is passed over."""
        self.predicted_s = None
        template = graph.template
        try:
            base = [float(s) for s in durations(graph, self.base)]
            of = self._factors
            priced = [of[PART_OF[k]] * s for k, s in zip(template.kinds, base, strict=True)]
            predicted = float(step_seconds(template, priced))
        except Exception:  # a base from anybody's file: no price must not stop what runs
            return
        if not (0.0 < predicted < math.inf and min(base) >= 0.0):
            return
        self.predicted_s = predicted
        if not 0.0 < measured.total < math.inf:
            return
        self._steps += 1
        if self._steps > _UNSEEN:
            self._learn(template, base, measured)
            if any(abs(self._logs[p] - math.log(self._factors[p])) > _WORTH for p in PARTS):
                self._publish({p: float(f"{math.exp(x):.4g}") for p, x in self._logs.items()})

    def _learn(self, template: Template, base: list[float], measured: StepSeconds) -> None:
        shares = _shares(template)
        logs = dict(self._logs)  # with what this step's own host and CPU took, for the rest of it
        for part, seconds in (("host", measured.host), ("cpu", measured.cpu)):
            expected = sum([count * base[i] for i, count in shares.get(part, ())])
            if seconds is not None and 0.0 <= seconds < math.inf and expected > 0.0:
                # A step that was queued behind another has no time of the host at all.
                ratio = math.log(seconds) - math.log(expected) if seconds > 0.0 else -_MOST
                logs[part] = _within(ratio, _MOST)
                self._move(part, logs[part] - self._logs[part], 1.0)
        priced = [math.exp(logs[PART_OF[k]]) * s for k, s in zip(template.kinds, base, strict=True)]
        length = float(step_seconds(template, priced))
        influence = {}
        for part in ("dense", "attention", "copies"):
            if part in shares:
                nudged = list(priced)
                for i, _ in shares[part]:
                    nudged[i] *= 1.0 + _NUDGE
                influence[part] = (float(step_seconds(template, nudged)) / length - 1.0) / _NUDGE
        error = _within(math.log(measured.total) - math.log(length), _CLIP)
        norm = _DAMPING + sum([x * x for x in influence.values()])
        for part, x in influence.items():
            if x > 0.0:
                self._move(part, error * x / norm, x * x / norm)
        for part in PARTS:
            if part not in shares:
                self._logs[part] *= 1.0 - 1.0 / (_RETURN * self.time_constant)

    def _move(self, part: str, by: float, weight: float) -> None:
        """Move the logarithm of a factor: at first as a mean of all steps and 1 does, then as time forgets.

        ``weight``, up to 1: how much the step says of the part.
        """
        self._seen[part] += weight
        gain = max(1.0 / self.time_constant, 1.0 / (1.0 + self._seen[part]))
        self._logs[part] = _within(self._logs[part] + gain * _within(by, _CLIP), _MOST)


def _within(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)


@lru_cache(maxsize=4096)
def _shares(template: Template) -> dict[str, tuple[tuple[int, int], ...]]:
    """By part, (work entry, how often it runs) of its operations."""
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    for i, (kind, count) in enumerate(zip(template.kinds, template.counts, strict=True)):
        part = PART_OF[kind]
        found[part] = (*found.get(part, ()), (i, count))
    return found

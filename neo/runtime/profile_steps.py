"""Whole steps beside what a table's operations add up to: where ``neo profile`` holds itself to account."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isqrt
from typing import Any

from neo.core.graph import OpKind, Work
from neo.cost.interface import CostModel
from neo.cost.profiled import Profiled
from neo.runtime.profile_samples import Samples

STEP = "step"
"""In ``Samples``: whole steps that were replayed, by (sequences, KV tokens)."""


def between(values: Sequence[int]) -> tuple[int, ...]:
    """One size between every two of an axis, as far from both by ratio: there a table is interpolated."""
    return tuple([n for a, b in pairwise(values) if a < (n := isqrt(a * b)) < b])


def step_seconds(cost: CostModel, layers: int, sequences: int, kv_tokens: int) -> float:
    """Seconds of a step of decodes on the GPU, SCHEDULE left out: the sum of its operations."""
    work = Work(tokens=sequences, sequences=sequences, kv_tokens=kv_tokens)
    once = [cost.seconds(kind, work) for kind in (OpKind.EMBED, OpKind.HEAD)]
    per_layer = [cost.seconds(kind, work) for kind in (OpKind.PRE, OpKind.GPU_ATTN, OpKind.POST)]
    return float(sum(once) + layers * sum(per_layer))


def check_steps(document: Mapping[str, Any], samples: Samples) -> dict[str, Any] | None:
    """How far a table's sums are from steps that were measured, as ``StepCheck`` has it; None without any.

    Steps of the table's own sizes show what its values, and what was raised, are worth; those between them
    what interpolation is, graphs being padded.
    """
    cost = Profiled.from_dict(dict(document))
    layers = document["model"]["layers"]
    errors = {
        at: step_seconds(cost, layers, *at) / samples.at(STEP, at) - 1.0
        for at in sorted(samples.points(STEP))
    }
    if not errors:
        return None
    worst = max(errors, key=lambda at: abs(errors[at]))
    return {
        "shapes": len(errors),
        "median": statistics.median(map(abs, errors.values())),
        "worst": errors[worst],
        "sequences": worst[0],
        "kv_tokens": worst[1],
    }

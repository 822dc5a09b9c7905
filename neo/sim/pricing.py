"""Seconds of a step's operations from a cost model that anybody may have written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from neo.core.errors import InputError, NeoError
from neo.core.graph import OpKind, StepGraph
from neo.core.timing import Prices, durations


def price(graph: StepGraph, cost: Prices) -> list[Any]:
    """Seconds of one operation of each work entry. InputError if the cost model gives what is no time."""
    try:
        seconds = [float(s) for s in durations(graph, cost)]
        if min(seconds) >= 0.0 and sum(seconds) < math.inf:  # which NaN fails too
            return seconds
    except NeoError:
        raise
    except (Exception, SystemExit) as error:
        raise unpriceable(graph, cost, f"raised {type(error).__name__}: {error}") from error
    raise unpriceable(graph, cost, "gave what is no time")


def price_repeated(graph: StepGraph, cost: Prices, seconds: list[Any], steps: int) -> list[Any]:
    """Seconds of each work entry over ``steps`` repetitions: only attention changes, as its KV grows.

    Args:
        seconds: of the first repetition, from ``price``.

    Returns:
        Per work entry a number, or for attention an array of shape (steps,).
    """
    try:
        return _repeated(graph, cost, seconds, steps)
    except NeoError:
        raise
    except (Exception, SystemExit) as error:
        raise unpriceable(graph, cost, f"raised {type(error).__name__}: {error}") from error


def _repeated(graph: StepGraph, cost: Prices, seconds: list[Any], steps: int) -> list[Any]:
    prices = list(seconds)
    for i, (kind, work) in enumerate(zip(graph.template.kinds, graph.works, strict=True)):
        if kind is not OpKind.GPU_ATTN and kind is not OpKind.CPU_ATTN:
            continue
        kv: Any = work.kv_tokens + work.sequences * np.arange(steps)
        if getattr(cost, "vectorized", False):
            each = np.asarray(cost.seconds(kind, work._replace(kv_tokens=kv)), dtype=np.float64)
        else:
            each = np.array([float(cost.seconds(kind, work._replace(kv_tokens=n))) for n in kv.tolist()])
        if each.shape != (steps,) or not each.min() >= 0.0:
            raise ValueError(f"{steps} times expected, got shape {each.shape}, least {each.min()}")
        prices[i] = each
    return prices


def unpriceable(graph: StepGraph, cost: Prices, what: str) -> InputError:
    """The error for a cost model that fails, naming the first operation whose price is no time."""
    for kind, work in zip(graph.template.kinds, graph.works, strict=True):
        try:
            seconds = float(cost.seconds(kind, work))
        except (Exception, SystemExit):
            return InputError(f"cost model {type(cost).__name__} {what} ({kind}, {work})")
        if not 0.0 <= seconds < math.inf:
            return InputError(f"cost model {type(cost).__name__} says {seconds} seconds for {kind}, {work}")
    return InputError(f"cost model {type(cost).__name__} {what}")

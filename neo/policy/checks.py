"""Ranges of policy options."""

from __future__ import annotations

import math


def in_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """ValueError unless ``low <= value <= high``; NaN and infinity are never in range."""
    if not (math.isfinite(value) and low <= value <= high):
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} must be at least {low:g}{upper}, got {value}")

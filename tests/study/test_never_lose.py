"""``neo`` against ``gpu-only`` on a small part of the grid of benchmarks/never_lose.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "never_lose.py"


@pytest.fixture(scope="module")
def grid() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_neo_does_not_lose_on_a_small_grid(grid: dict[str, Any]) -> None:
    """Tight and ample memory, long and short outputs; all at once, below saturation, above it, in bursts."""
    machine, load = grid["Machine"], grid["Load"]
    machines = [
        machine("g4dn.4xlarge", "llama-2-7b", 54, "few", 832),
        machine("g5.16xlarge", "llama-3.1-8b", 400, "few"),
        machine("h200-16c", "llama-3.1-8b", 400, "few"),
    ]
    lengths = {
        "few": {
            "short/long": ("around:60:0.3", "around:120:0.3"),
            "long/short": ("around:500:0.2", "around:20:0.2"),
        }
    }
    loads = [load("at once"), load("0.8", 0.8), load("1.2", 1.2), load("bursts", 0.7, 4.0)]
    grid["LENGTHS"] |= lengths  # type: ignore[assignment]
    rows = grid["run_grid"](machines, loads, 60, jobs=1)
    assert len(rows) == 24
    lost = [grid["describe"](row) for row in rows if grid["loses"](row)]
    assert not lost, "\n".join(lost)
    assert max(row["throughput_ratio"] for row in rows) > 1.5  # and wins where memory is short


def test_the_grid_has_the_points_it_promises(grid: dict[str, Any]) -> None:
    points = grid["base_points"](grid["MACHINES"], 10)
    assert len(points) * len(grid["LOADS"]) >= 200
    assert len({p.settings.hardware for p in points}) >= 6


def test_a_loss_is_one_of_throughput_or_latency_or_of_requests(grid: dict[str, Any]) -> None:
    fine = {"throughput_ratio": 0.99, "latency_ratio": 1.05, "neo_completed": 5, "gpu-only_completed": 5}
    assert not grid["loses"](fine)
    assert grid["loses"]({**fine, "throughput_ratio": 0.989})
    assert grid["loses"]({**fine, "latency_ratio": 1.051})
    assert grid["loses"]({**fine, "neo_completed": 4})

"""Draws the pictures of the documentation. From the repository root: python docs/images/make_images.py."""

from __future__ import annotations

import sys
from pathlib import Path

from neo.core.record import Mode
from neo.report.timeline import plot_timeline
from neo.sim.setup import SystemConfig, build_system, simulation
from neo.workload import synthetic

STEPS = 60  # as --timeline 60


def pipelined_step(folder: Path) -> list[Path]:
    """The last pipelined step of the first STEPS: a few of its layers, on all resources."""
    workload = synthetic("around:1000:0.1", "around:100:0.1", n=64, seed=0)
    options = {"eager": "true"}  # so few requests would not go to the host otherwise
    config = SystemConfig(policy_options=options, hardware="g5.16xlarge", model="llama-3.1-8b")
    system = build_system(config)
    record = simulation(system, workload, level="op", timeline_steps=STEPS).run()
    step = max(i for i, mode in enumerate(record.columns.mode[:STEPS]) if mode == Mode.PIPELINED)
    path, title = folder / "pipelined-step.svg", "neo on g5.16xlarge, Llama-3.1-8B: a pipelined step"
    return plot_timeline(record.slices, path, step=step, layers=(15, 17), title=title)


if __name__ == "__main__":
    for path in pipelined_step(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(path.name, path.stat().st_size, "bytes")

"""A signal comes between any two lines of the simulator: what the run leaves can be written and read."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from report_builders import meta
from support import BUILT_IN, make_scheduler

import neo.core
import neo.sim
from neo.core.request import Request
from neo.core.runlog import RunLog
from neo.report.files import read_run, write_run
from neo.sim.driver import Client, Simulation

_WATCHED = tuple(str(Path(str(package.__file__)).parent) for package in (neo.core, neo.sim))
_TRIES = 300


def simulation_of(policy: Any) -> Simulation:
    clients = [Client(Request(f"r{i}", 3 + i, 4 + i % 3, 0.02 * i), abort_s=9.0) for i in range(8)]
    return Simulation(make_scheduler(policy, gpu=6), clients, log=RunLog(io.StringIO(), {}))


def run_until(simulation: Simulation, last: int | None) -> int:
    """Run, interrupted at the given line of the simulator (None: to the end); how many lines it had."""
    lines = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Callable[..., Any] | None:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(_WATCHED):
            return None
        if event == "line":
            lines += 1
            if lines == last:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        simulation.run()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("name", ["gpu-only/chunked", "neo/chunked"])
def test_an_interrupt_between_any_two_lines_leaves_results(name: str, tmp_path: Path) -> None:
    make = BUILT_IN[name]
    run_until(simulation_of(make(token_budget="24")), None)  # what is made once is made here
    lines = run_until(simulation_of(make(token_budget="24")), None)
    completed = []
    for last in range(1, lines, -(-lines // _TRIES)):
        simulation = simulation_of(make(token_budget="24"))
        with pytest.raises(KeyboardInterrupt):
            run_until(simulation, last)
        written = write_run(tmp_path, simulation.record, meta())
        assert read_run(tmp_path).summary == written
        completed.append(written["requests"]["completed"])
    assert completed == sorted(completed)  # never less than was there a moment before
    assert completed[0] == 0 < completed[-1]

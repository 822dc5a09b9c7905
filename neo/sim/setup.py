"""From a System and a workload to a Simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

from neo.core.errors import InputError
from neo.core.request import Request
from neo.core.runlog import RunLog
from neo.sim.driver import Client, Level, Simulation
from neo.system.config import System, SystemConfig, build_system
from neo.workload.base import Workload

__all__ = ["System", "SystemConfig", "build_system", "clients_of", "simulation"]

_LATEST_S = 4e9  # more than Unix time; a float64 then resolves half a microsecond


def clients_of(workload: Workload, timeout_s: float | None = None) -> list[Client]:
    """Fresh requests of a workload; ``timeout_s`` applies where the workload names none."""
    if timeout_s is not None and not 0.0 < timeout_s < math.inf:
        raise InputError(f"--timeout {timeout_s}: expected a positive number of seconds")
    clients = []
    for r in workload.requests:
        if not r.arrival_s <= _LATEST_S:
            raise InputError(
                f"request {r.id} arrives at {r.arrival_s:g} s; beyond {_LATEST_S:g} s microseconds are lost"
            )
        request = Request(r.id, r.prompt_tokens, r.output_tokens, r.arrival_s, r.priority)
        clients.append(Client(request, timeout_s if r.timeout_s is None else r.timeout_s, r.abort_s))
    return clients


def simulation(
    system: System,
    workload: Workload,
    *,
    level: Level = "step",
    log: RunLog | None = None,
    timeline_steps: int = 0,
    repeat: bool = True,
    timeout_s: float | None = None,
    progress: Callable[[int], None] | None = None,
    bubbles: bool = False,
) -> Simulation:
    """A Simulation of ``workload`` on ``system``, ready to ``run()``."""
    clients = clients_of(workload, timeout_s)
    return Simulation(system.scheduler(), clients, level, log, timeline_steps, repeat, progress, bubbles)

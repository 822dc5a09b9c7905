"""The requests of a run once more, with the simulator's own decisions and times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from neo.core.errors import InputError
from neo.core.logreader import RequestRow
from neo.core.record import RunRecord
from neo.core.request import FinishReason, Request
from neo.sim.driver import Client, Simulation
from neo.sim.replay import Journal
from neo.system.config import System


def check_outcomes(journal: Journal, rows: Mapping[str, RequestRow], path: Path, complete: bool) -> None:
    """Hold what a replay without divergence gave each request against its row in ``requests.csv``.

    Args:
        complete: whether the run came to its end; otherwise a request may have ended behind the log's end.

    Raises:
        InputError: a row that is not of this log, naming file and line, or a request without one.
    """
    for ended in journal.requests.values():
        if ended.finish_reason is not None and ended.id not in rows:
            raise InputError(
                f"{path}: holds no request {ended.id!r}, which ended in the run log: the file is cut off"
            )
    for row in rows.values():
        request = journal.requests.get(row.id)
        if row.reason is None or request is None or (request.finish_reason is None and not complete):
            continue
        if request.finish_reason is None:
            raise InputError(
                f"{path}:{row.line}: request {row.id!r} ended ({row.reason}), in the run log it does not"
            )
        if (request.generated, request.finish_reason) != (row.output_tokens, row.reason):
            raise InputError(
                f"{path}:{row.line}: request {row.id!r} has {row.output_tokens} output tokens and ended by "
                f"{row.reason}; by the run log {request.generated}, and by {request.finish_reason}"
            )


def clients_again(journal: Journal, rows: Mapping[str, RequestRow], path: Path) -> list[Client]:
    """The clients of a run, in order of arrival, with the lengths and ends that it gave them.

    Requests that had not ended when the run was interrupted are left out, and so are those that never
    entered the scheduler. One that stopped early (end of sequence) asks for as many tokens as it got.

    Args:
        journal: what the log says of each request.
        rows: of ``requests.csv``.
        path: of ``requests.csv``, for messages.

    Raises:
        InputError: a row contradicts the log.
    """
    clients = []
    for row in rows.values():
        line = journal.adds.get(row.id)
        if row.reason is None or line is None:
            continue
        if row.prompt_tokens != line.prompt:
            raise InputError(
                f"{path}:{row.line}: request {row.id!r} has {row.prompt_tokens} prompt tokens, "
                f"in the run log {line.prompt}"
            )
        ran = row.reason in (FinishReason.LENGTH, FinishReason.STOP)
        length = max(1, row.output_tokens) if ran else line.max_tokens
        request = Request(row.id, row.prompt_tokens, length, row.arrival_s, line.priority)
        told = journal.ends.get(row.id)
        after = None
        if row.reason in (FinishReason.ABORT, FinishReason.TIMEOUT):
            if told is None:
                raise InputError(
                    f"{path}:{row.line}: request {row.id!r} ended by {row.reason}, the log has no such end"
                )
            after = _delay(row.arrival_s, told[0])
        timeout = row.reason is FinishReason.TIMEOUT
        clients.append(Client(request, after if timeout else None, None if timeout else after))
    return sorted(clients, key=lambda c: c.request.arrival_s)


def rerun(system: System, clients: list[Client]) -> RunRecord:
    """Simulate these clients on ``system``."""
    return Simulation(system.scheduler(), clients).run()


def _delay(start: float, then: float) -> float:
    """Seconds from ``start`` to ``then``, such that their sum is exactly ``then`` where that can be."""
    delay = then - start
    for candidate in (delay, math.nextafter(delay, math.inf), math.nextafter(delay, 0.0)):
        if start + candidate == then:
            return candidate
    return max(0.0, delay)

"""``neo bench --url``: a workload against any OpenAI-compatible server, with the files of every other run."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo.core.errors import InputError
from neo.core.record import RunRecord
from neo.core.request import FinishReason, Request, State
from neo.report.files import RunMeta, RunResult, run_result, write_run
from neo.report.metrics import SLO
from neo.workload import Workload

if TYPE_CHECKING:
    from neo.runtime.server.load import Endpoint, Served, Target

_SHOWN_ERRORS = 3


def bench_url(
    url: str,
    workload: Workload,
    *,
    model: str | None = None,
    endpoint: Endpoint = "completions",
    api_key: str | None = None,
    concurrency: int | None = None,
    temperature: float = 0.0,
    timeout_s: float | None = None,
    seed: int = 0,
    out: Path | None = None,
    slo: SLO | None = None,
    drop_first: float = 0.0,
    command: tuple[str, ...] = (),
) -> RunResult:
    """Send a workload to a server and measure what comes back.

    Args:
        url: ``http(s)://host:port``.
        workload: its arrivals are followed (open loop) unless ``concurrency`` is given.
        model: name in requests; None asks the server.
        endpoint: ``completions`` or ``chat``.
        concurrency: closed loop with that many clients.
        timeout_s: clients give up after it.
        out: directory for ``summary.json`` and ``requests.csv``.

    Raises:
        InputError: the server cannot be reached, or no request ended well.
    """
    from neo.runtime.server.load import HttpError, Load, Target, served_model

    target = Target(url, model, endpoint, api_key, temperature)
    requests = workload.requests
    if timeout_s is not None:
        requests = tuple(r._replace(timeout_s=min(timeout_s, r.timeout_s or timeout_s)) for r in requests)

    async def run() -> tuple[str, list[Served]]:
        name = model or await served_model(target)
        load = Load(Target(url, name, endpoint, api_key, temperature), seed)
        if concurrency is not None:
            return name, await load.closed_loop(requests, concurrency)
        return name, await load.open_loop(requests)

    started = time.perf_counter()
    try:
        name, served = asyncio.run(run())
    except (HttpError, OSError) as error:
        raise InputError(f"--url {url}: {error}") from error
    record = record_of(served, closed=concurrency is not None)
    warnings = _warnings(served)
    if all(s.error is not None for s in served):
        raise InputError(f"--url {url}: every request failed; {warnings[0]}")
    meta = _meta(target, name, workload, concurrency, seed, warnings, command, time.perf_counter() - started)
    if out is not None:
        write_run(out, record, meta, slo, drop_first)
    return run_result(record, meta, slo, drop_first)


def record_of(served: list[Served], *, closed: bool = False) -> RunRecord:
    """What the clients saw, as the record of a run; times count from the first arrival.

    In an open loop a request arrives when the workload says; in a closed loop when it is sent.
    """
    record = RunRecord()
    first = min(s.request.arrival_s for s in served)
    gaps: Counter[float] = Counter()
    for s in served:
        arrival = s.start_s if closed else s.request.arrival_s - first
        request = Request(s.request.id, max(1, s.prompt_tokens), s.request.output_tokens, arrival)
        request.priority = s.request.priority
        request.generated = s.tokens
        request.finish_s = s.end_s
        if s.token_times:
            request.first_token_s, request.last_token_s = s.token_times[0], s.token_times[-1]
        _conclude(request, s)
        gaps.update(b - a for a, b in pairwise(s.token_times))
        record.requests.append(request)
    record.itl_values.extend(gaps.keys())
    record.itl_counts.extend(gaps.values())
    record.start_s = min(r.arrival_s for r in record.requests)
    record.end_s = max(s.end_s for s in served)
    return record


def _conclude(request: Request, served: Served) -> None:
    """How a request ended. One that failed counts as rejected if it got nothing, else as aborted."""
    if served.error is not None:
        nothing = not served.token_times
        request.state = State.REJECTED if nothing else State.ABORTED
        request.finish_reason = FinishReason.REJECTED if nothing else FinishReason.ABORT
        request.detail = served.error
    elif served.gave_up is not None:
        request.state = State.ABORTED
        request.finish_reason = FinishReason.TIMEOUT if served.gave_up == "timeout" else FinishReason.ABORT
    else:
        request.state = State.FINISHED
        stopped = served.finish_reason == "stop"
        request.finish_reason = FinishReason.STOP if stopped else FinishReason.LENGTH


def _warnings(served: list[Served]) -> list[str]:
    """The errors that came most often, and lengths that are not the workload's."""
    errors = Counter(s.error for s in served if s.error is not None)
    found = [
        f"{n} of {len(served)} requests failed: {error}" for error, n in errors.most_common(_SHOWN_ERRORS)
    ]
    well = [s for s in served if s.error is None and s.gave_up is None]
    short = sum(s.tokens != s.request.output_tokens for s in well)
    if short:
        found.append(f"{short} requests got another number of tokens than the workload has")
    other = sum(s.prompt_tokens != s.request.prompt_tokens for s in well)
    if other:
        found.append(f"{other} prompts have another number of tokens than the workload has")
    return found


def _meta(
    target: Target,
    model: str,
    workload: Workload,
    concurrency: int | None,
    seed: int,
    warnings: list[str],
    command: tuple[str, ...],
    wall_time_s: float,
) -> RunMeta:
    loop: dict[str, Any] = {"loop": "open"}
    if concurrency is not None:
        loop = {"loop": "closed", "concurrency": concurrency}
    return RunMeta(
        kind="measured",
        policy="unknown (a server's)",
        model=model,
        hardware="unknown (a server's)",
        workload={"name": workload.name, **workload.source, **loop, "endpoint": target.endpoint},
        seed=seed,
        warnings=warnings,
        command=command,
        wall_time_s=wall_time_s,
    )

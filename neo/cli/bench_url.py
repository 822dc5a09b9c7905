"""``neo bench --url``: a workload against any OpenAI-compatible server, with the files of every other run."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from neo.cli.flags import KEY_VARIABLE
from neo.cli.runner import Output, Progress, open_results, progress_bar, show, try_plot
from neo.core.errors import InputError, one_line
from neo.core.record import RunRecord
from neo.core.request import FinishReason, Request, State
from neo.report.files import RunMeta, RunResult, run_result, write_run
from neo.workload import Workload

if TYPE_CHECKING:
    from neo.runtime.server.client import Endpoint, Target
    from neo.runtime.server.load import Load, PromptIds, Served

POLICY, HARDWARE = "served", "a server"  # no interface tells which
_SHOWN_ERRORS, _KEPT_ERRORS = 3, 20
_LONGEST_ERROR = 200


@dataclass(frozen=True, slots=True)
class Client:
    """How a server is asked.

    Attributes:
        url: ``http(s)://host:port``.
        model: name in requests; None asks the server.
        endpoint: ``completions`` or ``chat``.
        concurrency: clients of a closed loop; None follows the workload's arrivals (open loop).
        timeout_s: clients give up after it, where the workload does not say.
    """

    url: str
    model: str | None = None
    endpoint: Endpoint = "completions"
    api_key: str | None = None
    concurrency: int | None = None
    temperature: float = 0.0
    timeout_s: float | None = None
    seed: int = 0
    prompts: PromptIds | None = None

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not 0.0 < self.timeout_s < math.inf:
            raise InputError(f"--timeout {self.timeout_s}: expected a positive number of seconds")
        self.target(None)

    def target(self, model: str | None) -> Target:
        """The server; InputError for an address that is none."""
        from neo.runtime.server.client import Target

        return Target(self.url, model, self.endpoint, self.api_key, self.temperature)


def run_url(workload: Workload, client: Client, output: Output, quiet: bool, as_json: bool) -> bool:
    """Run, write and show: the command. False if a request failed, which is then said in a line."""
    with ExitStack() as stack:
        progress = None
        if not quiet and not as_json:
            progress = progress_bar(stack, "requests", len(workload))
        result, served = bench_url(workload, client, output, progress)
    show([result], output, as_json)
    failed = [s for s in served if s.error is not None]
    if failed:
        first = min(failed, key=lambda s: math.inf if s.end_s is None else s.end_s)
        why = one_line(str(first.error))[:_LONGEST_ERROR]
        print(f"{len(failed)} of {len(served)} requests failed; the first: {why}", file=sys.stderr)
    return not failed


def bench_url(
    workload: Workload, client: Client, output: Output, progress: Progress | None = None
) -> tuple[RunResult, list[Served]]:
    """Send a workload to a server and measure what comes back; write ``output.directory``, if there is one.

    Returns the result, and what became of each request.

    Ctrl-C leaves the results so far, as with every other run.

    Raises:
        InputError: the server cannot be reached, or every request failed.
    """
    from neo.runtime.server.client import HttpError, served_model
    from neo.runtime.server.load import Load
    from neo.runtime.server.open_files import raise_file_limit

    raise_file_limit()
    if output.directory is not None:
        open_results(output.directory)
    try:
        model = client.model or asyncio.run(served_model(client.target(None)))
    except (HttpError, OSError) as error:
        raise InputError(f"--url {client.url}: {str(error) or type(error).__name__}") from error
    load = Load(client.target(model), client.seed, prompts=client.prompts, ended=progress)
    started = time.perf_counter()
    interrupted: KeyboardInterrupt | None = None
    try:
        asyncio.run(_drive(load, workload, client))
    except KeyboardInterrupt as error:
        interrupted = error
    wall_time_s = time.perf_counter() - started
    if load.served and all(s.error is not None for s in load.served):
        raise InputError(f"--url {client.url}: every request failed; {warnings_of(load.served)[0]}")
    record = record_of(load.served, closed=client.concurrency is not None, now=load.clock())
    record.interrupted = None if interrupted is None else "interrupted"
    meta = _meta(workload, client, model, load.served, output.command, wall_time_s)
    if output.directory is not None:
        _write(record, meta, output)
    if interrupted is not None:
        if output.directory is not None:
            print(f"interrupted; partial results in {output.directory}", file=sys.stderr)
        raise interrupted
    return run_result(record, meta, output.slo, output.drop_first), load.served


async def _drive(load: Load, workload: Workload, client: Client) -> None:
    requests = [
        r if r.timeout_s is not None else r._replace(timeout_s=client.timeout_s) for r in workload.requests
    ]
    if client.concurrency is None:
        await load.open_loop(requests)
    else:
        await load.closed_loop(requests, client.concurrency)


def _write(record: RunRecord, meta: RunMeta, output: Output) -> None:
    directory = output.directory
    assert directory is not None
    write_run(directory, record, meta, output.slo, output.drop_first)
    if output.plots and record.requests:
        from neo.report.plots import plot_run

        try_plot(lambda: plot_run(record, meta, directory))


def record_of(served: list[Served], *, closed: bool, now: float) -> RunRecord:
    """What the clients saw until ``now``, as the record of a run; times count from the first arrival.

    In an open loop a request arrives when the workload says, in a closed loop when it is sent.
    """
    record = RunRecord()
    first = min((s.request.arrival_s for s in served), default=0.0)
    gaps: Counter[float] = Counter()
    for s in served:
        arrival = s.start_s if closed else s.request.arrival_s - first
        request = Request(s.request.id, max(1, s.prompt_tokens), s.request.output_tokens, arrival)
        request.priority = s.request.priority
        request.generated = s.tokens or len(s.token_times)
        if s.token_times:
            request.first_token_s, request.last_token_s = s.token_times[0], s.token_times[-1]
        if s.end_s is not None:
            request.finish_s = s.end_s
            _conclude(request, s)
        gaps.update(b - a for a, b in pairwise(s.token_times))
        record.requests.append(request)
    record.itl_values.extend(gaps.keys())
    record.itl_counts.extend(gaps.values())
    record.start_s = min((r.arrival_s for r in record.requests), default=0.0)
    record.end_s = max((now if s.end_s is None else s.end_s for s in served), default=now)
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


def errors_of(served: list[Served]) -> Counter[str]:
    """How often each error came."""
    return Counter(s.error[:_LONGEST_ERROR] for s in served if s.error is not None)


def warnings_of(served: list[Served]) -> list[str]:
    """The errors that came most often, and lengths that are not the workload's."""
    errors = errors_of(served)
    found = [
        f"{n} of {len(served)} requests failed: {error}" for error, n in errors.most_common(_SHOWN_ERRORS)
    ]
    if rest := sum(errors.values()) - sum(n for _, n in errors.most_common(_SHOWN_ERRORS)):
        found.append(f"{rest} of {len(served)} requests failed in other ways")
    well = [s for s in served if s.end_s is not None and s.error is None and s.gave_up is None]
    short = sum(s.tokens != s.request.output_tokens for s in well)
    if short:
        found.append(f"{short} requests got another number of tokens than the workload has")
    other = sum(s.prompt_tokens != s.request.prompt_tokens for s in well)
    if other:
        found.append(f"{other} prompts have another number of tokens than the workload has")
    return found


def _meta(
    workload: Workload,
    client: Client,
    model: str,
    served: list[Served],
    command: tuple[str, ...],
    wall_time_s: float,
) -> RunMeta:
    errors = errors_of(served)
    how: dict[str, Any] = {
        "server": client.url,
        "endpoint": client.endpoint,
        "loop": "open" if client.concurrency is None else "closed",
        "concurrency": client.concurrency,
        "temperature": client.temperature,
        "token_ids": "random" if client.prompts is None else "trace",
        "failed": sum(errors.values()),
        "errors": dict(errors.most_common(_KEPT_ERRORS)),
    }
    return RunMeta(
        kind="measured",
        policy=POLICY,
        model=model,
        hardware=HARDWARE,
        workload={"name": workload.name, **workload.source},
        seed=client.seed,
        engine=how,
        warnings=warnings_of(served),
        command=_without_key(command),
        wall_time_s=wall_time_s,
    )


def _without_key(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command as it may be kept: without the API key."""
    kept, hidden = [], False
    for argument in command:
        if hidden or argument.startswith("--api-key="):
            kept.append(f"${KEY_VARIABLE}" if hidden else f"--api-key=${KEY_VARIABLE}")
            hidden = False
            continue
        hidden = argument == "--api-key"
        kept.append(argument)
    return tuple(kept)

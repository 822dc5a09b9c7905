"""Runs for the command line, simulated or measured: from the first request to the files, and side by side."""

from __future__ import annotations

import json
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from neo.cli.flags import folder_of
from neo.core.errors import InputError, NeoError
from neo.core.record import RunRecord
from neo.core.runlog import RunLog
from neo.cost.loading import table_of
from neo.report.files import RunMeta, RunResult, run_result, write_run
from neo.report.metrics import SLO
from neo.report.tables import comparison_table, result_table
from neo.sim.driver import Simulation
from neo.sim.setup import System, simulation
from neo.workload import Workload

if TYPE_CHECKING:
    from rich.console import Console

_PICTURES = ("latency", "kv", "batch", "utilization", "bubbles", "comparison")
_OWN_FILES = (
    *("summary.json", "requests.csv", "steps.jsonl", "timeline.json"),
    *(f"{name}.{ending}" for name in _PICTURES for ending in ("svg", "png")),
)

OpenLog = Callable[[Mapping[str, Any]], RunLog | None]
"""Starts the run log with a header; None where no results are kept."""

Progress = Callable[[int], None]
"""Told how many requests have ended."""


@dataclass(frozen=True, slots=True)
class Output:
    """What to leave behind of each run."""

    directory: Path | None
    plots: bool
    slo: SLO | None
    drop_first: float
    command: tuple[str, ...]
    timeline: int = 0


class Driver(Protocol):
    """Simulator or engine, ready to run; ``record`` fills as it goes."""

    record: RunRecord

    def run(self) -> object:
        """Run to the end of the last request, or to an error or interruption."""
        ...


D = TypeVar("D", bound=Driver)


class Run(ABC, Generic[D]):
    """One run of a workload on a system, and how it is driven.

    It does not hold its driver, whose memory is given back when it has run.
    """

    def __init__(self, system: System, workload: Workload, seed: int) -> None:
        self.system = system
        self.workload = workload
        self.seed = seed

    @abstractmethod
    def prepare(self, stack: ExitStack, log: OpenLog, progress: Progress | None) -> D:
        """Make the driver; what must be closed goes on ``stack``."""

    @abstractmethod
    def about(self, driver: D) -> dict[str, Any]:
        """Fields of RunMeta that only this kind of driver knows: ``kind`` and others."""

    def meta(self, driver: D, command: Sequence[str], wall_time_s: float) -> RunMeta:
        """What the run was."""
        system, config = self.system, self.system.config
        described = system.cost.describe()
        fields = {"warnings": described.get("warnings", ()), **self.about(driver)}
        return RunMeta(
            policy=config.policy,
            policy_options=dict(config.policy_options),
            model=system.model.name,
            hardware=system.hardware.name,
            workload={"name": self.workload.name, **self.workload.source},
            seed=self.seed,
            cost_model=described,
            limits=system.describe()["limits"],
            layers=system.model.layers,
            tensor_parallel=system.model.tp,
            command=command,
            wall_time_s=wall_time_s,
            **fields,
        )


class SimulatedRun(Run[Simulation]):
    """A run in the simulator; the arguments as ``neo.sim.setup.simulation`` takes them."""

    def __init__(
        self,
        system: System,
        workload: Workload,
        seed: int,
        level: Any,
        timeline: int,
        repeat: bool,
        timeout_s: float | None,
        bubbles: bool = False,
    ) -> None:
        super().__init__(system, workload, seed)
        self.bubbles = bubbles
        self.level = level
        self.timeline = timeline
        self.repeat = repeat
        self.timeout_s = timeout_s

    def prepare(self, stack: ExitStack, log: OpenLog, progress: Progress | None) -> Simulation:
        """Make the Simulation."""
        return simulation(
            self.system,
            self.workload,
            level=self.level,
            log=log(self.system.describe()),
            timeline_steps=self.timeline,
            repeat=self.repeat,
            timeout_s=self.timeout_s,
            progress=progress,
            bubbles=self.bubbles,
        )

    def about(self, driver: Simulation) -> dict[str, Any]:
        """Simulated."""
        return {"kind": "simulated"}


class Runner:
    """Takes one run from its first request to its files."""

    def __init__(self, run: Run[Any], output: Output) -> None:
        self._run = run
        self.output = output

    def run(self, show_progress: bool) -> RunResult:
        """Run and write; an interrupted run leaves what it had."""
        started = time.perf_counter()
        run = self._run
        with ExitStack() as stack:
            label = run.system.config.policy
            progress = progress_bar(stack, label, len(run.workload)) if show_progress else None
            driver: Driver = run.prepare(stack, lambda header: self._log(stack, header), progress)
            try:
                driver.run()
            except (NeoError, KeyboardInterrupt, OSError) as error:
                driver.record.interrupted = " ".join(str(error).split()) or "interrupted"
                self._finish(driver, time.perf_counter() - started)
                if isinstance(error, KeyboardInterrupt) and self.output.directory is not None:
                    print(f"interrupted; partial results in {self.output.directory}", file=sys.stderr)
                raise
        return self._finish(driver, time.perf_counter() - started)

    def _log(self, stack: ExitStack, header: Mapping[str, Any]) -> RunLog | None:
        directory = self.output.directory
        if directory is None:
            return None
        open_results(directory)
        try:
            file = stack.enter_context(
                (directory / "steps.jsonl").open("w", encoding="utf-8", buffering=1 << 20)
            )
        except OSError as error:
            raise InputError(f"cannot write into --out {directory}: {error.strerror}") from error
        keep_cost_table(self._run.system.config.cost_model, directory)
        return RunLog(file, header, self._run.system.cost)

    def _finish(self, driver: Driver, wall_time_s: float) -> RunResult:
        output, record = self.output, driver.record
        meta = self._run.meta(driver, output.command, wall_time_s)
        if output.directory is not None:
            write_run(output.directory, record, meta, output.slo, output.drop_first)
            if output.timeline:
                from neo.report.bubbles import waits
                from neo.report.timeline import write_timeline

                more = waits(record.slices) if record.bubbles is not None else []
                write_timeline([*record.slices, *more], output.directory / "timeline.json")
            if output.plots and record.columns.steps:
                from neo.report.plots import plot_run

                directory = output.directory
                try_plot(lambda: plot_run(record, meta, directory))
                if record.bubbles is not None:
                    _plot_bubbles(
                        {meta.policy: record.bubbles}, directory, f"{meta.model} on {meta.hardware}"
                    )
        return run_result(record, meta, output.slo, output.drop_first)


def open_results(directory: Path, flag: str = "--out") -> None:
    """Make a run's directory, or clear it of an earlier run's files; InputError if that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in _OWN_FILES:  # nothing of an earlier run may stand beside this one
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {flag} {directory}: {error.strerror}") from error


def keep_cost_table(cost_model: str, directory: Path) -> None:
    """The table that decisions are made with stays with them: ``neo validate`` looks for it here."""
    path = table_of(cost_model)
    if path is None:
        return
    table = Path(path).expanduser()
    try:
        if table.parent.resolve() != directory.resolve():
            shutil.copyfile(table, directory / table.name)
    except OSError as error:
        raise InputError(f"cannot copy {table} into {directory}: {error.strerror or error}") from error


def run_all(runs: Sequence[Run[Any]], output: Output, quiet: bool, as_json: bool) -> None:
    """One run after the other, each with its own folder if there are several; then all in one table."""
    names = [run.system.config.policy for run in runs]
    results: list[RunResult] = []
    for i, run in enumerate(runs):
        out = output.directory
        where = out if out is None or len(runs) == 1 else out / folder_of(names, i)
        try:
            runner = Runner(run, replace(output, directory=where))
            results.append(runner.run(show_progress=not quiet and not as_json))
        except (NeoError, KeyboardInterrupt):
            if results:  # what the policies before this one gave is not lost
                show(results, replace(output, plots=False), as_json)
            if names[i + 1 :]:
                print(f"not run: {', '.join(names[i + 1 :])}", file=sys.stderr)
            raise
    show(results, output, as_json)


def show(results: list[RunResult], output: Output, as_json: bool) -> None:
    """Print one run, or several side by side, and what to know of them; several are plotted together."""
    summaries = [r.summary for r in results]
    if as_json:
        for summary in summaries:
            print(json.dumps(summary))
        return
    from rich.console import Console

    console = Console()
    show_tables(summaries, console)
    for warning in dict.fromkeys(w for s in summaries for w in s.get("warnings", ())):
        print(f"warning: {warning}", file=sys.stderr)
    if output.directory is not None:
        if len(results) > 1 and output.plots:
            from neo.report.plots import plot_comparison

            try_plot(lambda: plot_comparison(results, output.directory or "."))
            if found := bubbles_of(summaries):
                _plot_bubbles(found, output.directory)
        console.print(f"Results in {output.directory}", highlight=False)


def show_tables(summaries: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A run, or several beside the first; then what their resources waited for, where that was asked for."""
    console.print(result_table(summaries[0]) if len(summaries) == 1 else comparison_table(summaries))
    if found := bubbles_of(summaries):
        from neo.report.bubbles import bubble_table

        console.print(bubble_table(found))


def bubbles_of(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Mapping[str, float]]]:
    """Bubble reports by run, of the runs that have one."""
    names = [f"{s['policy']}" if s["kind"] == "simulated" else f"{s['policy']}, measured" for s in summaries]
    found: dict[str, Mapping[str, Mapping[str, float]]] = {}
    for i, summary in enumerate(summaries):
        if "bubbles" in summary["metrics"]:
            name = names[i] if names.count(names[i]) == 1 else f"{names[i]} ({i + 1})"
            found[name] = summary["metrics"]["bubbles"]
    return found


def _plot_bubbles(
    found: Mapping[str, Mapping[str, Mapping[str, float]]], directory: Path, subtitle: str = ""
) -> None:
    from neo.report.bubbles import plot_bubbles

    try_plot(lambda: plot_bubbles(found, directory / "bubbles", subtitle))


def progress_bar(stack: ExitStack, label: str, total: int) -> Progress | None:
    """A callback that moves a progress bar; None where nobody watches."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=5,
    )
    stack.enter_context(bar)
    task = bar.add_task(label, total=total)
    return lambda ended: bar.update(task, completed=ended)


def try_plot(draw: Any) -> None:
    """Draw, or say why not: plots are no reason to lose a run."""
    try:
        draw()
    except Exception as error:
        print(f"no plots: {error}", file=sys.stderr)

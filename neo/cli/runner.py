"""One simulated run for the command line, from its first request to its files."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo.core.errors import InputError, NeoError
from neo.core.runlog import RunLog
from neo.report.files import RunMeta, RunResult, run_result, write_run
from neo.report.metrics import SLO
from neo.sim.driver import Simulation
from neo.sim.setup import System, simulation
from neo.workload import Workload

_PICTURES = ("latency", "kv", "batch", "utilization", "comparison")
_OWN_FILES = (
    *("summary.json", "requests.csv", "steps.jsonl", "timeline.json"),
    *(f"{name}.{ending}" for name in _PICTURES for ending in ("svg", "png")),
)


@dataclass(frozen=True, slots=True)
class Output:
    """What to leave behind of each run."""

    directory: Path | None
    plots: bool
    slo: SLO | None
    drop_first: float
    command: tuple[str, ...]


class Runner:
    """One run, from its first request to its files."""

    def __init__(
        self,
        system: System,
        workload: Workload,
        seed: int,
        output: Output,
        level: Any,
        timeline: int,
        repeat: bool,
        timeout_s: float | None,
    ) -> None:
        self.system = system
        self.workload = workload
        self.seed = seed
        self.output = output
        self.level = level
        self.timeline = timeline
        self.repeat = repeat
        self.timeout_s = timeout_s

    def run(self, show_progress: bool) -> RunResult:
        """Simulate and write; an interrupted run leaves what it had."""
        started = time.perf_counter()
        with ExitStack() as stack:
            sim = simulation(
                self.system,
                self.workload,
                level=self.level,
                log=self._log(stack),
                timeline_steps=self.timeline,
                repeat=self.repeat,
                timeout_s=self.timeout_s,
                progress=_progress(stack, self.system.config.policy, len(self.workload))
                if show_progress
                else None,
            )
            try:
                sim.run()
            except (NeoError, KeyboardInterrupt, OSError) as error:
                sim.record.interrupted = " ".join(str(error).split()) or "interrupted"
                self._finish(sim, time.perf_counter() - started)
                if isinstance(error, KeyboardInterrupt) and self.output.directory is not None:
                    print(f"interrupted; partial results in {self.output.directory}", file=sys.stderr)
                raise
        return self._finish(sim, time.perf_counter() - started)

    def _log(self, stack: ExitStack) -> RunLog | None:
        directory = self.output.directory
        if directory is None:
            return None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name in _OWN_FILES:  # nothing of an earlier run may stand beside this one
                (directory / name).unlink(missing_ok=True)
            file = stack.enter_context(
                (directory / "steps.jsonl").open("w", encoding="utf-8", buffering=1 << 20)
            )
        except OSError as error:
            raise InputError(f"cannot write into --out {directory}: {error.strerror}") from error
        return RunLog(file, self.system.describe())

    def _finish(self, sim: Simulation, wall_time_s: float) -> RunResult:
        meta, output, record = self._meta(wall_time_s), self.output, sim.record
        if output.directory is not None:
            write_run(output.directory, record, meta, output.slo, output.drop_first)
            if self.timeline:
                from neo.report.timeline import write_timeline

                write_timeline(record.slices, output.directory / "timeline.json")
            if output.plots and record.columns.steps:
                from neo.report.plots import plot_run

                directory = output.directory
                try_plot(lambda: plot_run(record, meta, directory))
        return run_result(record, meta, output.slo, output.drop_first)

    def _meta(self, wall_time_s: float) -> RunMeta:
        system, config = self.system, self.system.config
        described = system.cost.describe()
        return RunMeta(
            kind="simulated",
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
            warnings=described.get("warnings", ()),
            command=self.output.command,
            wall_time_s=wall_time_s,
        )


def _progress(stack: ExitStack, label: str, total: int) -> Any:
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

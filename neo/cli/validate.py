"""``neo validate``: replay runs through the simulator, and say how far it is from them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from neo import __version__
from neo.cli.flags import key_values
from neo.cli.runner import try_plot
from neo.cli.validate_timeline import View, timeline_of, write_timelines
from neo.core.errors import InputError, NeoError
from neo.core.logreader import LOG_FILE, LogReader, RequestRow, read_requests
from neo.core.record import RunRecord, Slice
from neo.core.replayed import Replay
from neo.cost.calibrated import Calibrated
from neo.report.files import REQUESTS_FILE, SUMMARY_FILE, atomic, read_summary
from neo.report.validation import (
    exceeded,
    labels,
    parse_limits,
    spread_of,
    validation,
    validation_tables,
)
from neo.sim.header import Substitutes, systems_of
from neo.sim.replay import Journal, replay_log
from neo.sim.rerun import check_outcomes, clients_again, rerun
from neo.system.config import System

Runs = Annotated[
    list[Path], typer.Argument(help="Directories that 'neo bench --out' or 'neo simulate --out' wrote.")
]
Cost = Annotated[
    str | None,
    typer.Option(
        "--cost",
        help="Predict times with this cost model (roofline, profiled:PATH, file.py:Class), not the run's.",
    ),
]
CostOpt = Annotated[list[str] | None, typer.Option("--cost-opt", help="key=value of --cost. Repeatable.")]
Policy = Annotated[
    str | None, typer.Option("--policy", "-p", help="Where the run's policy is: path/to/file.py:Class.")
]
MaxError = Annotated[
    str | None,
    typer.Option(
        "--max-error",
        help="Largest relative errors, as throughput=0.10,tpot=0.10,ttft=0.15; exit code 1 beyond them.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Directory for validation.json and the plots.")]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the plots into --out.")]
Step = Annotated[
    int | None,
    typer.Option(
        "--step",
        help="Draw this step (from 0) of a run with a timeline.json (default: one with much to see).",
        min=0,
    ),
]
LayersOpt = Annotated[
    str | None, typer.Option("--layers", help="Draw only the time in which these layers run, as 10-12.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def validate(
    runs: Runs,
    cost: Cost = None,
    cost_opt: CostOpt = None,
    policy: Policy = None,
    max_error: MaxError = None,
    out: Out = None,
    plots: Plots = True,
    step: Step = None,
    layers: LayersOpt = None,
    as_json: AsJson = False,
) -> None:
    """Replay runs: do the decisions agree with the simulator's (else exit code 1), how far are its times?"""
    limits = {} if max_error is None else parse_limits(max_error)
    options = key_values(cost_opt, "--cost-opt")
    if options and cost is None:
        raise InputError("--cost-opt needs --cost")
    instead = Substitutes(policy, cost, options)
    view = View(step, layers)
    if (step is not None or layers is not None) and out is None:
        raise InputError("--step and --layers say what is drawn into --out")
    names = labels([str(run) for run in runs])
    checked = [_validate(run, name, instead, out is not None) for run, name in zip(runs, names, strict=True)]
    results = [result for result, _, _ in checked]
    failures = _divergences(results) + exceeded(results, limits)
    report = {
        "neo": __version__,
        "runs": results,
        "spread": spread_of(results),
        "limits": limits,
        "failures": failures,
    }
    if out is not None:
        _write(out, report, [replay for _, replay, _ in checked], plots)
        write_timelines(out, [(r["run"], r, replay, slices) for r, replay, slices in checked], view, plots)
    if as_json:
        print(json.dumps(report, allow_nan=False))
    else:
        _show(report, out)
    if failures:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A run's files, read as far as nothing has to be replayed for it."""

    folder: Path
    summary: dict[str, Any]
    rows: dict[str, RequestRow]
    log: LogReader

    @property
    def complete(self) -> bool:
        """Whether the run came to its end."""
        return not self.summary.get("interrupted")


def _validate(
    run: Path, name: str, instead: Substitutes, timelines: bool
) -> tuple[dict[str, Any], Replay, list[Slice]]:
    """One run: its decisions replayed, its steps predicted, its requests simulated; its own timeline."""
    if not run.is_dir():
        raise InputError(f"{run}: no such directory; give one that 'neo bench --out' or 'neo simulate' wrote")
    opened = _Opened(run, _summary(run), read_requests(run / REQUESTS_FILE), LogReader(run / LOG_FILE))
    decided, timed, notes = systems_of(opened.log.header, f"{run / LOG_FILE}:1", run, instead)
    arrivals = {row.id: row.arrival_s for row in opened.rows.values()}
    slices = timeline_of(run) if timelines else []
    shown_steps = {s.step for s in slices}
    replay, journal = replay_log(opened.log, decided, timed.cost, arrivals, shown_steps)
    notes += _check_end(opened, replay, journal)
    if isinstance(timed.cost, Calibrated):
        notes.append(f"{timed.cost.told()}; end to end is simulated with these, which are of this run itself")
        timed = replace(timed, cost=timed.cost.fixed())
    record, kept = _again(opened, timed, journal)
    left_out = len(opened.rows) - len(kept)
    if left_out:
        notes.append(f"{left_out} requests had not ended; they are left out of the end-to-end comparison")
    notes += [str(w) for w in timed.cost.describe().get("warnings", ())]
    cost = instead.cost_model or str(opened.log.header.get("cost_model"))
    shown = ":".join(Path(part).name for part in cost.split(":"))
    result = validation(name, opened.summary, shown, replay, kept, left_out, record, notes)
    return result, replay, slices


def _summary(run: Path) -> dict[str, Any]:
    summary = read_summary(run)
    if not isinstance(summary["metrics"], dict) or not isinstance(summary["requests"], dict):
        raise InputError(f"{run / SUMMARY_FILE}: metrics and requests must be objects")
    return summary


def _check_end(run: _Opened, replay: Replay, journal: Journal) -> list[str]:
    """Hold the log's end against the other files; notes on a run that did not come to its own."""
    log = run.log
    if log.cut and run.complete:
        raise log.error("the log is cut off in this line, although by summary.json the run came to its end")
    if replay.divergence is None:
        late = next((r for r in journal.requests.values() if not r.done), None)
        if late is not None and run.complete:
            raise log.error(
                f"the log ends here, and request {late.id!r} has not, although by summary.json the run did"
            )
        check_outcomes(journal, run.rows, run.folder / REQUESTS_FILE, run.complete)
    if run.complete:
        return []
    where = f"; the log is cut off in line {log.line}" if log.cut else ""
    return [f"the run was interrupted ({run.summary['interrupted']}): validated up to there{where}"]


def _again(run: _Opened, system: System, journal: Journal) -> tuple[RunRecord | None, dict[str, RequestRow]]:
    """The run's requests simulated freely, and their rows."""
    path = run.folder / REQUESTS_FILE
    clients = clients_again(journal, run.rows, path)
    kept = {c.request.id for c in clients}
    rows = {i: row for i, row in run.rows.items() if i in kept}
    if not clients:
        return None, rows
    try:
        return rerun(system, clients), rows
    except NeoError as error:
        raise InputError(f"{run.folder}: its requests cannot be simulated: {error}") from error


def _divergences(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for result in results:
        found = result["decisions"]["divergence"]
        if found is not None:
            where = f"{result['run']}/{LOG_FILE}:{found['line']}"
            lines.append(f"decisions diverge at step {found['step']} ({where}): {found['what']}")
    return lines


def _write(out: Path, report: dict[str, Any], replays: list[Replay], plots: bool) -> None:
    with atomic(out / "validation.json") as path:
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    if plots:
        from neo.report.validation_plots import plot_validation

        try_plot(lambda: plot_validation(report["runs"], replays, out))


def _show(report: dict[str, Any], out: Path | None) -> None:
    from rich.console import Console

    console = Console()
    for part in validation_tables(report["runs"]):
        console.print(part)
    for run in report["runs"]:
        for note in run["notes"]:
            console.print(f"note: {run['run']}: {note}", style="yellow", markup=False, highlight=False)
    for line in report["failures"]:
        console.print(line, style="bold red", markup=False, highlight=False)
    if not report["failures"]:
        steps = sum(run["decisions"]["equal"] for run in report["runs"])
        console.print(f"no decision diverges, in {steps:,} steps", style="green", highlight=False)
    if out is not None:
        console.print(f"Results in {out}", highlight=False)

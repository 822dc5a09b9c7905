"""``neo show``: runs that have been, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from neo.cli import options as opt
from neo.cli.runner import show_tables
from neo.core.errors import InputError
from neo.report.files import SUMMARY_FILE, read_summary
from neo.report.tables import comparison_table, result_table

Runs = Annotated[list[Path], typer.Argument(help="Directories (or summary.json files) of runs.")]


def show(runs: Runs, as_json: opt.AsJson = False) -> None:
    """Print the results of runs, simulated or measured; several are compared with the first."""
    summaries = [read_summary(run) for run in runs]
    if as_json:
        for summary in summaries:
            print(json.dumps(summary))
        return
    for run, summary in zip(runs, summaries, strict=True):
        _check(run / SUMMARY_FILE if run.is_dir() else run, summary)
    from rich.console import Console

    show_tables(summaries, Console())


def _check(path: Path, summary: dict[str, Any]) -> None:
    """Raise InputError if the tables cannot be made of a summary: by hand, or by another version of neo."""
    try:
        result_table(summary)
        comparison_table([summary])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: not a summary that neo can show: {what}") from error

"""``neo show``: runs that have been, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from neo.cli import options as opt
from neo.cli.runner import show_tables
from neo.report.files import read_summary

Runs = Annotated[list[Path], typer.Argument(help="Directories (or summary.json files) of runs.")]


def show(runs: Runs, as_json: opt.AsJson = False) -> None:
    """Print the results of runs, simulated or measured; several are compared with the first."""
    summaries = [read_summary(run) for run in runs]
    if as_json:
        for summary in summaries:
            print(json.dumps(summary))
        return
    from rich.console import Console

    show_tables(summaries, Console())

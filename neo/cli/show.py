"""``neo show``: runs that have been, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from neo.cli import options as opt
from neo.report.files import read_summary
from neo.report.tables import comparison_table, result_table

Runs = Annotated[list[Path], typer.Argument(help="Directories (or summary.json files) of runs.")]


def show(runs: Runs, as_json: opt.AsJson = False) -> None:
    """Print the results of runs, simulated or measured; several are compared with the first."""
    summaries = [read_summary(run) for run in runs]
    if as_json:
        for summary in summaries:
            print(json.dumps(summary))
        return
    from rich.console import Console

    Console().print(result_table(summaries[0]) if len(summaries) == 1 else comparison_table(summaries))

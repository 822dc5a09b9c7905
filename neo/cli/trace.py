"""``neo trace``: look at request traces and convert them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from neo.workload import describe as describe_workload
from neo.workload import read_trace, render, write_jsonl

app = typer.Typer(help="Look at request traces and convert them.", no_args_is_help=True)

Trace = Annotated[Path, typer.Argument(help="Trace file; its format is recognised by its content.")]
Format = Annotated[str | None, typer.Option("--format", help="Read it as this format instead.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N requests.")]


@app.command()
def describe(trace: Trace, format: Format = None, limit: Limit = None) -> None:
    """Print what a trace holds: requests, rate, burstiness, lengths."""
    Console().print(render(describe_workload(read_trace(trace, format, limit))))


@app.command()
def convert(
    trace: Trace,
    to: Annotated[Path, typer.Argument(help="The file to write, in neo's own JSONL.")],
    format: Format = None,
    limit: Limit = None,
) -> None:
    """Write a trace in neo's own JSONL format."""
    workload = read_trace(trace, format, limit)
    write_jsonl(workload, to)
    print(f"{len(workload)} requests -> {to}")

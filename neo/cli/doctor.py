"""``neo doctor``: what this machine has for the engine, what is missing, and how to get it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from neo.runtime.doctor import Report

_STYLES = {"ok": "green", "note": "yellow", "missing": "red"}
_PIPE_WIDTH = 400  # columns: lines in a pipe are for grep, and are not folded


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth", help="Also measure how fast memory is read (about a second).")
    ] = False,
) -> None:
    """Show what neo finds here and what is missing. Exit code 1 if the engine cannot run (no torch)."""
    from neo.runtime.doctor import examine  # looks at torch, which the rest of the command line does without

    report = examine(bandwidth=bandwidth)
    if as_json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _show(report)
    if not report.can_run:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    console = Console()
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console = Console(width=_PIPE_WIDTH)
    table = Table("", "status", "found", "what to do", box=box.SIMPLE, pad_edge=False)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for column in table.columns[2:]:
        column.overflow = "fold"
    before = ""
    for fact in report.facts:
        if before and fact.group != before:
            table.add_section()
        before = fact.group
        status = f"[{_STYLES[fact.status]}]{fact.status}[/]"
        table.add_row(escape(fact.name), status, escape(fact.value), escape(fact.advice))
    console.print(table, highlight=False)
    if report.can_run:
        console.print("The engine can run here.", highlight=False)
    else:
        console.print("The engine cannot run here: torch is missing. neo simulate works.", highlight=False)

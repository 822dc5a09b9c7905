"""``neo policies``, ``neo hardware``, ``neo models``: what there is, and where its numbers come from."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from neo.cost.presets import hardware_rows, hardware_sources, model_rows, model_sources
from neo.policy.registry import policy_class, policy_names, policy_options


def policies(
    name: Annotated[
        str | None, typer.Argument(help="Show this policy's options (also path/to/file.py:Class).")
    ] = None,
) -> None:
    """List the scheduling policies, or one policy's options."""
    console = Console()
    if name is None:
        table = Table("policy", "what it does", title="Policies", title_justify="left")
        for known in policy_names():
            table.add_row(known, _summary(policy_class(known)))
        console.print(table)
        console.print(
            "Options of one: neo policies NAME. Your own: --policy path/to/file.py:Class", highlight=False
        )
        return
    cls = policy_class(name)
    options = policy_options(cls)
    console.print(_summary(cls), highlight=False)
    if not options:
        console.print("No options.")
        return
    table = Table(
        "option", "type", "default", "meaning", title=f"--policy-opt of {name}", title_justify="left"
    )
    for o in options:
        table.add_row(o.name, o.type, o.default, o.help)
    console.print(table)


def hardware(
    name: Annotated[
        str | None, typer.Argument(help="Show every figure of this machine with its source.")
    ] = None,
) -> None:
    """List the hardware presets, or the figures and sources of one (also a TOML file of your own)."""
    _listing("Hardware presets", hardware_rows() if name is None else hardware_sources(name))


def models(
    name: Annotated[
        str | None, typer.Argument(help="Show every figure of this model with its source.")
    ] = None,
) -> None:
    """List the model presets, or the figures of one (also a Hugging Face config.json)."""
    _listing("Model presets", model_rows() if name is None else model_sources(name))


def _listing(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(*(rows[0] if rows else ()), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    Console().print(table)


def _summary(cls: Any) -> str:
    """First paragraph of what a policy says of itself, or of its module if it points there."""
    module = inspect.getmodule(cls)
    text = (module.__doc__ if module is not None and module.__doc__ else cls.__doc__) or ""
    return " ".join(text.strip().split("\n\n")[0].split()).replace("``", "")

"""``neo policies``, ``neo hardware``, ``neo models``: what there is, and where its numbers come from."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
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
            table.add_row(known, escape(_summary(policy_class(known))))
        console.print(table)
        console.print(
            "Options of one: neo policies NAME. Your own: --policy path/to/file.py:Class", highlight=False
        )
        return
    cls = policy_class(name)
    options = policy_options(cls)
    console.print(escape(_summary(cls)), highlight=False)
    if not options:
        console.print("No options.")
        return
    table = Table(
        "option", "type", "default", "meaning", title=f"--policy-opt of {escape(name)}", title_justify="left"
    )
    for o in options:
        table.add_row(*map(escape, (o.name, o.type, o.default, o.help)))
    console.print(table)


def hardware(
    name: Annotated[
        str | None, typer.Argument(help="Show every figure of this machine with its source.")
    ] = None,
) -> None:
    """List the hardware presets, or the figures and sources of one (also a TOML file of your own)."""
    if name is not None:
        _listing(f"{name}: figures and sources", hardware_sources(name))
        return
    rows = [
        {
            "name": r["name"],
            "GPU": f"{r['gpus']} x {r['gpu']}" if r["gpus"] > 1 else r["gpu"].removeprefix("NVIDIA "),
            "GB": f"{r['gpu_memory_bytes'] / 1e9:.0f}",
            "GB/s": f"{r['gpu_bandwidth'] / 1e9:,.0f}",
            "TFLOP/s": f"{r['gpu_flops'] / 1e12:.0f}",
            "host GB": f"{r['cpu_memory_bytes'] / 1e9:.0f}",
            "host GB/s": f"{r['cpu_bandwidth'] / 1e9:.0f}",
            "link GB/s": f"{r['h2d_bandwidth'] / 1e9:.0f}",
        }
        for r in hardware_rows()
    ]
    _listing("Hardware presets (GPU figures per GPU)", rows)
    _hint("Figures with their sources: neo hardware NAME. Your own machine: --hardware path/to/machine.toml")


def models(
    name: Annotated[
        str | None, typer.Argument(help="Show every figure of this model with its source.")
    ] = None,
) -> None:
    """List the model presets, or the figures of one (also a Hugging Face config.json)."""
    if name is not None:
        _listing(f"{name}: figures and sources", model_sources(name))
        return
    rows = [
        {
            "name": r["name"],
            "params": f"{r['params'] / 1e9:.2f} B",
            "weights GB": f"{r['weight_bytes'] / 1e9:.1f}",
            "KV KiB/token": f"{r['kv_bytes_per_token'] / 1024:.0f}",
            "layers": r["layers"],
            "heads/KV": f"{r['heads']}/{r['kv_heads']}",
            "positions": f"{r['max_positions']:,}",
        }
        for r in model_rows()
    ]
    _listing("Model presets", rows)
    _hint("Figures with their sources: neo models NAME. Any other: --model path/to/config.json")


def _listing(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in rows[0] if rows else ():
        numeric = all(str(r[column])[:1].isdigit() for r in rows) and column != "name"
        table.add_column(column, justify="right" if numeric else "left", no_wrap=column == "name")
    for row in rows:
        table.add_row(*(escape(_cell(v)) for v in row.values()))
    Console().print(table)


def _cell(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _hint(text: str) -> None:
    Console().print(text, highlight=False)


def _summary(cls: Any) -> str:
    """First paragraph of what a policy says of itself, or of its module if it points there."""
    module = inspect.getmodule(cls)
    text = (module.__doc__ if module is not None and module.__doc__ else cls.__doc__) or ""
    return " ".join(text.strip().split("\n\n")[0].split()).replace("``", "")

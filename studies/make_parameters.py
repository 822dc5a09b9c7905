"""Write the table of machine parameters in docs/studies.md anew: ``python studies/make_parameters.py``."""

from __future__ import annotations

import re
from pathlib import Path

from neo.cost.presets import hardware_sources

PAGE = Path(__file__).resolve().parents[1] / "docs/studies.md"
MACHINES = ("g4dn.4xlarge", "g5.4xlarge", "g5.16xlarge", "2xh100")
BEGIN, END = "<!-- parameters: begin -->", "<!-- parameters: end -->"


def table() -> str:
    """Every figure of the studies' machines with its source, as Markdown; equal rows of machines merged."""
    machines: dict[tuple[str, str, str], list[str]] = {}
    for machine in MACHINES:
        for row in hardware_sources(machine):
            value = f"{row['value']:.6g}" if isinstance(row["value"], float | int) else str(row["value"])
            unit = str(row.get("unit", ""))
            machines.setdefault(
                (str(row["field"]), f"{value} {unit}".strip(), str(row["source"])), []
            ).append(machine)
    fields = list(dict.fromkeys(field for field, _, _ in machines))
    ordered = sorted(machines.items(), key=lambda item: fields.index(item[0][0]))
    lines = ["| parameter | machine | value | source |", "|---|---|---|---|"]
    lines += [f"| `{f}` | {', '.join(names)} | {value} | {source} |" for (f, value, source), names in ordered]
    return "\n".join(lines)


def page_with_table(text: str) -> str:
    """The page with its table as it should be."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{table()}\n{END}", text)


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

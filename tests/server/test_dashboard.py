"""The metrics page, its documentation and the dashboard name the same metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from serving import Served

ROOT = Path(__file__).resolve().parents[2]
QUERY = re.compile(r"neo:[a-z0-9_]+")


def families(server: Served) -> dict[str, Metric]:
    """Metrics of a server that has answered something, by name."""
    server.complete(prompt="a", max_tokens=2)
    server.wait_until_empty()
    page = server.http.get("/metrics").text
    return {family.name: family for family in text_string_to_metric_families(page) if family.samples}


def labels_of(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"model_name", "le"}


def test_the_table_is_that_of_the_code(server: Served) -> None:
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| metric \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    shown = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()]
    made = families(server).values()
    found = sorted(
        [f"`{f.name}`", f.type, ", ".join(f"`{x}`" for x in sorted(labels_of(f))), f.documentation]
        for f in made
    )
    assert sorted(shown) == found


def targets_of(dashboard: Any) -> list[tuple[str, str]]:
    return [(p["title"], t["expr"]) for p in dashboard["panels"] for t in p.get("targets", ())]


def test_every_query_of_the_dashboard_has_its_metric(server: Served) -> None:
    dashboard = json.loads((ROOT / "dashboards/neo-grafana.json").read_text())
    found = families(server)
    samples = {sample.name for family in found.values() for sample in family.samples}
    labels = {sample.name: set(sample.labels) for family in found.values() for sample in family.samples}
    asked: set[str] = set()
    for title, query in targets_of(dashboard):
        names = set(QUERY.findall(query))
        assert names, title
        assert names <= samples, f"{title}: {names - samples}"
        for by in re.findall(r"by \((\w+)\)", query):
            assert all(by in labels[name] for name in names), f"{title}: by ({by})"
        if "model_name" in query:
            assert all("model_name" in labels[name] for name in names), title
        asked |= names
    shown = {name for name, family in found.items() if asked & {s.name for s in family.samples}}
    assert shown == set(found), "a metric without a panel"


def test_panels_do_not_lie_on_each_other() -> None:
    dashboard = json.loads((ROOT / "dashboards/neo-grafana.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])

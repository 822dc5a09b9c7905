"""``--bubbles``: the report in summaries, tables, pictures, timelines and studies."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from neo.cli import app
from neo.core.bubbles import CAUSES

SMALL = [
    *("--prompt-lengths", "uniform:10:400", "--output-lengths", "uniform:1:60", "--requests", "40"),
    *("--rate", "4", "--kv-gpu-blocks", "60"),
]


def neo(*arguments: str | Path) -> str:
    found = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})
    assert found.exit_code == 0, found.output
    return found.stdout


def metrics(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "summary.json").read_text())["metrics"]
    return found


def test_a_run_with_bubbles_leaves_them_everywhere(tmp_path: Path) -> None:
    shown = neo(
        *("simulate", *SMALL, "-p", "gpu-only", "-p", "fastdecode", "--bubbles", "--timeline", "12"),
        *("--out", tmp_path / "o", "--quiet"),
    )
    assert "Where the time went" in shown
    assert "CPU attention" in shown
    for policy in ("gpu-only", "fastdecode"):
        found = metrics(tmp_path / "o" / policy)
        assert list(found["bubbles"]) == ["gpu", "cpu", "h2d", "d2h"]
        for resource, seconds in found["bubbles"].items():
            assert list(seconds) == ["busy", *CAUSES]
            assert sum(seconds.values()) == pytest.approx(found["duration_s"], rel=1e-9)
            share = found["utilization"][resource]
            assert seconds["busy"] == pytest.approx(share * found["duration_s"], rel=1e-9)
        assert {"bubbles.svg", "bubbles.png"} <= {p.name for p in (tmp_path / "o" / policy).iterdir()}
    assert (tmp_path / "o/bubbles.svg").exists()
    events = json.loads((tmp_path / "o/fastdecode/timeline.json").read_text())["traceEvents"]
    assert any(e["name"] == "WAIT cpu_attention" for e in events)
    again = neo("show", tmp_path / "o/gpu-only", tmp_path / "o/fastdecode")
    assert "Where the time went" in again


def test_without_the_flag_there_is_no_report(tmp_path: Path) -> None:
    shown = neo("simulate", *SMALL, "--timeline", "3", "--out", tmp_path, "--no-plots", "--quiet")
    assert "Where the time went" not in shown
    assert "bubbles" not in metrics(tmp_path)
    assert "WAIT" not in (tmp_path / "timeline.json").read_text()
    assert "Where the time went" not in neo("show", tmp_path)


def test_a_study_with_bubbles_has_them_by_point(tmp_path: Path) -> None:
    shown = neo(
        *("compare", *SMALL[:-4], "--vary", "rate=2,4", "--bubbles", "--jobs", "1", "--out", tmp_path),
        "--quiet",
    )
    assert "neo, rate 4" in shown
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        parts = [float(row[f"bubbles_gpu_{cause}_s"]) for cause in ("busy", *CAUSES)]
        assert sum(parts) == pytest.approx(float(row["duration_s"]), rel=1e-9)
    assert (tmp_path / "bubbles.svg").exists()

"""docs/compare.md, docs/studies.md: what they show is what there is."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from neo.cli.study import load_study
from neo.report.published import crossing, read_published

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_parameter_table_is_current() -> None:
    script = runpy.run_path(str(ROOT / "studies/make_parameters.py"))
    text = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    assert script["page_with_table"](text) == text, "run: python studies/make_parameters.py"


def test_the_example_study_loads() -> None:
    (example,) = blocks("compare.md", "toml")
    assert len(load_study(tomllib.loads(example)).points) == 8


def test_python_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("compare.md", "python")
    exec(block, {})
    assert capsys.readouterr().out.count(" s\n") == 4


def test_every_study_stands_on_the_page_with_its_command_or_figure() -> None:
    text = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    for path in (ROOT / "studies").glob("*.toml"):
        assert path.stem in text


def test_published_figures_of_the_studies_are_there() -> None:
    for path in (ROOT / "studies").glob("*.toml"):
        published = tomllib.loads(path.read_text(encoding="utf-8")).get("published")
        if published:
            assert read_published(path.parent / published["file"], published["figure"])


def test_where_a_curve_crosses_a_limit() -> None:
    curve = [(1.0, 0.1), (2.0, 0.5), (3.0, 1.5)]
    assert crossing(curve, 1.0) == (2.5, False)
    assert crossing(curve, 2.5) == (4.0, True)

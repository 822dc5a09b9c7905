"""Study files: what they lay out, and what is said of mistakes in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neo.cli.study import Point, Sustained, load_study
from neo.cli.study_point import point_key
from neo.cli.study_run import bisection
from neo.core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "studies").glob("*.toml"))
SYNTHETIC = {"prompt_lengths": "fixed:50", "output_lengths": "fixed:5", "requests": 20}


def study(**more: Any) -> dict[str, Any]:
    return {"title": "t", "settings": dict(SYNTHETIC), "system": [{"policy": "gpu-only"}], **more}


def test_a_grid_is_laid_out_system_by_system_and_axis_by_axis() -> None:
    laid = load_study(
        study(
            system=[{"policy": "gpu-only"}, {"label": "N", "policy": "neo", "kv-gpu-blocks": 90}],
            case=[{"label": "small", "kv-gpu-blocks": 50}, {"label": "large", "kv_gpu_bytes": "1GB"}],
            vary={"rate": [1, 2.5], "output-lengths": {"short": "fixed:5"}},
        )
    )
    assert [n for n, _ in laid.axes] == ["case", "rate", "output_lengths"]
    assert len(laid.points) == 8
    first, last = laid.points[0], laid.points[-1]
    assert first.at == (("case", "small"), ("rate", "1"), ("output_lengths", "short"))
    assert (first.settings.kv_gpu_blocks, first.settings.rate) == (50, 1)
    # a case says the budget anew, in its own unit: the system's blocks no longer hold
    assert (last.settings.kv_gpu_blocks, last.settings.kv_gpu_bytes) == (None, "1GB")


def test_options_of_all_levels_add_up() -> None:
    laid = load_study(
        study(
            settings={**SYNTHETIC, "cost-opt": {"graphs": 1, "sample_s": 0}},
            system=[{"policy": "neo", "policy-opt": {"eager": True}, "cost-opt": {"sample_s": 1e-6}}],
        )
    )
    settings = laid.points[0].settings
    assert settings.cost_opt == {"graphs": "1", "sample_s": "1e-06"}
    assert settings.policy_opt == {"eager": "true"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"rat": 1}}, "[settings] rat: not a flag of a study, did you mean"),
        ({"settings": {"rate": -1}}, "[settings] rate:"),
        ({"system": [{"label": "A", "policy": "neo", "block-size": "x"}]}, "[[system]] 'A' block-size:"),
        ({"system": []}, "system"),
        ({"system": [{"policy": "neo"}, {"policy": "neo"}]}, "two [[system]] tables have the label 'neo'"),
        ({"vary": {"raet": [1]}}, "[vary] raet: not a flag that can be varied"),
        ({"vary": {"rate": [1, 1]}}, "[vary] rate: expected different values"),
        ({"vary": {"rate": ["fast"]}}, "rate"),
        ({"sustained": {"limt": 2}}, "[sustained] limt: unknown"),
        ({"sustained": {"limit": 0}}, "[sustained] limit:"),
        ({"titel": "x"}, "titel: unknown, did you mean 'title'"),
        ({"published": {"file": "none.toml", "figure": "1"}}, "[published] file: no such file"),
        ({"settings": {"trace": "gone.csv"}}, "trace gone.csv: no such file"),
        ({"vary": {"kv-gpu-blocks": [True]}}, "kv_gpu_blocks: only bubbles is true or false"),
        ({"settings": {**SYNTHETIC, "rate": True}}, "[settings] rate: only bubbles is true or false"),
        ({"title": "\x1b[31mred"}, "title: control characters in '\\x1b[31mred'"),
        ({"system": [{"label": "a\0", "policy": "neo"}]}, "[[system]]: control characters in the label"),
        ({"case": [{"label": "a\x9b"}]}, "[[case]]: control characters in the label"),
        ({"vary": {"rate": {"\x1b[2J": 1}}}, "[vary] rate: control characters in '\\x1b[2J'"),
        (
            {"vary": {"rate": list(range(1, 2001)), "seed": list(range(2000))}},
            "4000000 points (system 1 x rate 2000 x seed 2000), at most 100000 are run",
        ),
    ],
)
def test_mistakes_name_table_and_field(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_study({**study(), **change}, where="my.toml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("my.toml: ")
    assert "\n" not in str(caught.value)


def test_a_key_tells_points_apart_and_knows_the_files_they_read(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    row = '{"id": "a", "arrival_s": 0, "prompt_tokens": 5, "output_tokens": 5}\n'
    trace.write_text(row)
    data = {"title": "t", "settings": {"trace": str(trace)}, "system": [{"policy": "gpu-only"}]}
    one = load_study({**data, "vary": {"seed": [1, 2]}}).points
    keys = {point_key(p.settings) for p in one}
    assert len(keys) == 2
    other = tmp_path / "u.jsonl"
    other.write_text(row.replace('"output_tokens": 5', '"output_tokens": 6'))
    data["settings"] = {"trace": str(other)}
    assert point_key(load_study({**data, "vary": {"seed": [1, 2]}}).points[0].settings) not in keys


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_the_studies_load(path: Path, tmp_path: Path) -> None:
    for name in ("AzureLLMInferenceTrace_code.csv", "neo_osc.json"):
        (tmp_path / name).write_text("present")
    laid = load_study(path, traces=tmp_path)
    assert laid.points
    assert all(isinstance(p, Point) for p in laid.points)
    assert f"neo compare studies/{path.name}" in path.read_text(encoding="utf-8")


# -- bisection ----------------------------------------------------------------------------------------------


def searched(known: dict[float, float | None], wanted: Sustained, metric: Callable[[float], float]) -> Any:
    """What a search finds, and the rates it asked for."""
    search, asked = bisection(known, wanted), list[float]()
    try:
        rate = next(search)
        while True:
            asked.append(rate)
            rate = search.send(metric(rate))
    except StopIteration as stop:
        return stop.value, asked


@pytest.mark.parametrize("rates", [[], [0.5, 8.0], [9.0], [0.25]])
@pytest.mark.parametrize("edge", [0.013, 1.0, 3.7, 250.0])
def test_the_search_finds_the_edge_within_its_tolerance(rates: list[float], edge: float) -> None:
    """A metric that reaches the limit 1 at the rate ``edge``; what is known agrees with it."""
    known: dict[float, float | None] = {rate: rate / edge for rate in rates}
    found, asked = searched(known, Sustained(limit=1.0, tolerance=0.01), lambda rate: rate / edge)
    assert edge / 1.0101 <= found <= edge
    assert len(asked) == len(set(asked)) < 40
    assert not set(asked) & set(rates)


def test_a_limit_that_nothing_keeps_gives_zero() -> None:
    assert searched({}, Sustained(limit=1.0), lambda rate: 2.0)[0] == 0.0


def test_a_limit_that_nothing_misses_is_said_to_be_none() -> None:
    found, asked = searched({4.0: 0.5}, Sustained(limit=1.0), lambda rate: 0.5)
    assert found is None
    assert max(asked) <= 4.0 * 256

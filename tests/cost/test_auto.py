"""``--cost auto``: the table that comes with a hardware preset, else the roofline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from neo.core.errors import InputError
from neo.cost import presets
from neo.cost.loading import load_cost_model, resolve_cost
from neo.cost.presets import load_hardware, load_model, shipped_table
from neo.cost.table_schema import SHAPE_FIELDS, check_model_matches, read_table


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the presets with a table of one machine, which holds what the look-up reads."""
    for name in ("hardware", "models"):
        shutil.copytree(presets.profiles_dir() / name, tmp_path / name)
    model = load_model("llama-2-7b")
    folder = tmp_path / "a100"
    folder.mkdir()
    shape = {name: getattr(model, name) for name in ("name", *SHAPE_FIELDS)}
    (folder / "any-name.json").write_text(json.dumps({"model": shape, "tp": 1}))
    monkeypatch.setattr(presets, "profiles_dir", lambda: tmp_path)
    return folder / "any-name.json"


def test_the_table_of_machine_and_shape_is_taken(own: Path) -> None:
    model = load_model("llama-2-7b")
    assert resolve_cost("auto", model, "a100") == f"profiled:{own}"
    assert resolve_cost("calibrated:auto", model, "a100") == f"calibrated:profiled:{own}"


@pytest.mark.parametrize(("name", "dtype", "hardware"), [
    ("llama-2-7b", None, "h100"),
    ("llama-2-7b", None, "my own machine"),
    ("llama-2-7b", "float32", "a100"),
    ("llama-2-13b", None, "a100"),
])  # fmt: skip
def test_anything_else_is_the_rooflines(own: Path, name: str, dtype: str | None, hardware: str) -> None:
    model = load_model(name, dtype=dtype)
    assert resolve_cost("auto", model, hardware) == "roofline"
    assert resolve_cost("calibrated:auto", model, hardware) == "calibrated:roofline"


@pytest.mark.parametrize("spec", ["roofline", "profiled:auto", "auto.py:auto", "mine"])
def test_what_was_named_stays(own: Path, spec: str) -> None:
    assert resolve_cost(spec, load_model("llama-2-7b"), "a100") == spec


def test_options_are_the_rooflines(own: Path) -> None:
    model = load_model("llama-2-7b")
    assert resolve_cost("auto", model, "a100", {"graphs": "1"}) == "roofline"
    assert resolve_cost("auto", model, "a100", {}) == f"profiled:{own}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"tp": ' + "1" * 5000 + "}", "not valid JSON: Exceeds the limit"),
    ],
)
def test_files_that_are_hard_to_read(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_table(path)


def test_numbers_that_fit_no_float(tmp_path: Path) -> None:
    table = json.loads(next(presets.profiles_dir().glob("*/*.json")).read_text())
    for place in ("axes", "seconds"):
        broken = json.loads(json.dumps(table))
        entry = broken["tables"]["pre"]
        (entry["axes"]["tokens"] if place == "axes" else entry["seconds"])[-1] = 10**400
        path = tmp_path / f"{place}.json"
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=f"tables.pre.{place}"):
            read_table(path)


def test_tables_that_come_with_neo_are_whole() -> None:
    for path in presets.profiles_dir().glob("*/*.json"):
        table = read_table(path)
        model = load_model(table.model.name, dtype=table.dtype)
        check_model_matches(table, model, str(path))
        hardware = load_hardware(path.parent.name)
        assert shipped_table(hardware.name, model) == path, "one table for a machine and a shape"
        load_cost_model(resolve_cost("auto", model, hardware.name), model, hardware)

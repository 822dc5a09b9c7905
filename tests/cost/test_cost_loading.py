import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from cost_works import MACHINE, MODEL

from neo.core.errors import InputError
from neo.core.graph import OpKind, Work
from neo.core.plugins import close_matches, load_object
from neo.cost.loading import cost_model_names, load_cost_model
from neo.cost.profiled import Profiled
from neo.cost.roofline import Roofline
from neo.cost.tabulate import tabulate

GOOD = """
from dataclasses import dataclass

@dataclass
class Flat:
    model: object
    hardware: object
    price: str = "1"

    def seconds(self, kind, work):
        return float(self.price)

    def describe(self):
        return {}

class Broken:
    def __init__(self, model, hardware):
        raise ValueError("no\\nway")

class Half:
    def __init__(self, model, hardware, **options):
        pass

    def describe(self):
        return {}

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    return path


def test_built_in(tmp_path: Path) -> None:
    model = load_cost_model("roofline", MODEL, MACHINE, {"matmul_efficiency": "0.5"})
    assert isinstance(model, Roofline)
    assert model.factors.matmul_efficiency == 0.5
    path = tmp_path / "table.json"
    path.write_text(json.dumps(tabulate(model, MODEL)))
    assert isinstance(load_cost_model(f"profiled:{path}", MODEL, MACHINE), Profiled)
    assert {"roofline", "profiled"} <= set(cost_model_names())


def test_own_file(file: Path) -> None:
    model = load_cost_model(f"{file}:Flat", MODEL, MACHINE, {"price": "2"})
    assert model.seconds(OpKind.PRE, Work(1)) == 2.0
    module = type(model).__module__
    assert module.startswith("neo_user_mine_")


class _Entry:
    value = "package:Thing"

    def __init__(self, name: str, loads: Any) -> None:
        self.name = name
        self.loads = loads

    def load(self) -> Any:
        if isinstance(self.loads, Exception):
            raise self.loads
        return self.loads


def test_registered(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    entries = [_Entry("flat", load_object(f"{file}:Flat", "x")), _Entry("gone", ImportError("no torch"))]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: entries if group == "neo.cost_models" else []
    )
    assert load_cost_model("flat", MODEL, MACHINE).seconds(OpKind.PRE, Work()) == 1.0
    with pytest.raises(InputError, match=r"cost model 'gone' \(package:Thing\): ImportError: no torch"):
        load_cost_model("gone", MODEL, MACHINE)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            "rofline",
            {},
            r"unknown cost model 'rofline', did you mean 'roofline' .*\(known: auto, calibrated, profiled, ",
        ),
        ("roofline", {"speed": "1"}, "unknown factor 'speed'"),
        ("profiled:", {}, "profiled:PATH.json"),
        ("profiled", {}, "profiled:PATH.json"),
        ("profiled:x.json", {"a": "1"}, "takes no options, got a"),
        ("profiled:x.json", {}, "cannot be read"),
        ("{file}:Flt", {}, "has no 'Flt', did you mean 'Flat'"),
        ("{file}:Flat", {"prise": "1"}, r"unknown option 'prise', did you mean 'price'\? \(takes price\)"),
        ("{file}:Broken", {"a": "1"}, r"unknown option 'a' \(takes no options\)"),
        ("{file}:Broken", {}, "constructing it failed: ValueError: no way"),
        ("{file}:Half", {"a": "1"}, r"Half lacks seconds\(\)"),
        ("{file}:number", {}, "int is not a class or function"),
        ("{file}", {}, "give the file and the name in it"),
    ],
)
def test_errors(file: Path, spec: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_cost_model(spec.replace("{file}", str(file)), MODEL, MACHINE, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\ndef f(:\n", "line 2: syntax error: "),
        ("x = 1\n\nimport no_such_module_anywhere\n", "line 3: ModuleNotFoundError: No module named"),
        ("def f():\n    return 1 / 0\n\nf()\n", "line 2: ZeroDivisionError"),
        ("raise RuntimeError\n", "line 1: RuntimeError"),
    ],
)
def test_files_that_do_not_import(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_object(f"{path}:X", "policy")
    assert str(caught.value).startswith(f"policy '{path}'")
    assert "\n" not in str(caught.value)


def test_load_object_from_modules_and_missing_files() -> None:
    assert load_object("neo.cost.roofline:Roofline", "cost model") is Roofline
    with pytest.raises(InputError, match=r"'nowhere\.py': no such file"):
        load_object("nowhere.py:X", "policy")
    with pytest.raises(InputError, match=r"'/dev/null': no Python file, whose name ends in \.py"):
        load_object("/dev/null:Mine", "policy")
    with pytest.raises(InputError, match="'no_such_module': cannot be imported: ModuleNotFoundError"):
        load_object("no_such_module:X", "policy")
    with pytest.raises(InputError, match="has no 'Rooflin', did you mean 'Roofline'"):
        load_object("neo.cost.roofline:Rooflin", "cost model")


def test_close_matches() -> None:
    assert close_matches("nea", ["neo", "pie"]) == ", did you mean 'neo'?"
    assert close_matches("NEO", ["neo"]) == ", did you mean 'neo'?"
    assert close_matches("zzz", ["neo"]) == ""

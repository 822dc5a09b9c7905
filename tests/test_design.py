"""The shape of the house: who may import whom, and what runs without the heavy extras."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "neo"

# Who may import what: cli -> report, sim, runtime -> policy, cost, workload -> core.
MAY_IMPORT: dict[str, set[str]] = {
    "core": {"core"},
    "cost": {"core", "cost"},
    "policy": {"core", "cost", "policy"},
    "workload": {"core", "workload"},
    "report": {"core", "cost", "policy", "workload", "report"},
    "system": {"core", "cost", "policy", "system"},
    "sim": {"core", "cost", "policy", "system", "workload", "sim"},
    "runtime": {"core", "cost", "policy", "system", "workload", "runtime"},
    "cli": {"core", "cost", "policy", "workload", "report", "system", "sim", "runtime", "cli"},
}
CORE_MAY_IMPORT = {"numpy", "neo"}
HEAVY = {"torch", "matplotlib"}  # extras: never imported at the top of a module


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The package of the house a file is in; ``""`` for those right under ``neo``."""
    inside = path.relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else ""


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, anywhere in it, with its line."""
    package = ("neo", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield module, node.lineno
            for alias in node.names:  # "from neo import sim" imports neo.sim
                yield f"{module}.{alias.name}", node.lineno


def parsed() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text(), str(path))) for path in modules()]


def test_imports_point_one_way() -> None:
    wrong = []
    for path, tree in parsed():
        here = name_of(path)
        for module, line in imported(tree, path):
            parts = module.split(".")
            if parts[0] != "neo" or len(parts) < 2 or not (PACKAGE / parts[1]).is_dir():
                continue
            if here and parts[1] not in MAY_IMPORT[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {here} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_package_has_its_place() -> None:
    found = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert found <= set(MAY_IMPORT), "a new package: say in MAY_IMPORT where it stands"
    assert {"core", "cost", "policy", "workload", "sim", "report", "cli"} <= found


def test_the_core_needs_only_the_standard_library_and_numpy() -> None:
    wrong = []
    for path, tree in parsed():
        if name_of(path) != "core":
            continue
        for module, line in imported(tree, path):
            top = module.split(".")[0]
            if top not in CORE_MAY_IMPORT and top not in sys.stdlib_module_names:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert not wrong, "\n".join(wrong)


def test_simulator_and_reports_do_not_know_each_other() -> None:
    assert "sim" not in MAY_IMPORT["report"]
    assert "report" not in MAY_IMPORT["sim"]
    assert "runtime" not in MAY_IMPORT["sim"]
    assert "sim" not in MAY_IMPORT["runtime"]


def test_extras_are_imported_only_inside_functions() -> None:
    wrong = []
    for path, tree in parsed():
        if name_of(path) == "runtime":
            continue
        for node in tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for module, line in imported(ast.Module([node], []), path):
                if module.split(".")[0] in HEAVY:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("import neo.sim.driver", "neo.sim.driver"),
        ("from neo.sim import driver", "neo.sim"),
        ("from neo import sim", "neo.sim"),
        ("def f():\n    from neo.sim.driver import Client", "neo.sim.driver"),
        ("from ..sim import driver", "neo.sim"),
        ("from .. import sim", "neo.sim"),
        ("from . import record", "neo.core.record"),
    ],
)
def test_the_check_sees_every_way_to_import(line: str, module: str) -> None:
    assert module in [m for m, _ in imported(ast.parse(line), PACKAGE / "core" / "plan.py")]


BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(HEAVY)!r}:
            raise ImportError(f"{{name}} is blocked by the test")

sys.meta_path.insert(0, Blocked())
"""


def run_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK + code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "module", ["neo", "neo.cli", "neo.sim.setup", "neo.policy.registry", "neo.report.tables"]
)
def test_it_imports_without_torch_and_matplotlib(module: str) -> None:
    done = run_without_extras(f"import {module}")
    assert done.returncode == 0, done.stderr


def test_neo_simulate_has_its_help_without_torch_and_matplotlib() -> None:
    done = run_without_extras('import neo.cli\nsys.argv = ["neo", "simulate", "--help"]\nneo.cli.main()')
    assert done.returncode == 0, done.stderr
    assert "--policy" in done.stdout
    assert "--trace" in done.stdout


def test_the_block_blocks() -> None:
    done = run_without_extras("import matplotlib")
    assert "matplotlib is blocked by the test" in done.stderr

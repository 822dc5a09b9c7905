"""``neo show``: runs that have been, side by side, and files that are no runs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neo.cli import main

Neo = Callable[..., tuple[int, str, str]]
LOAD = ["--prompt-lengths", "uniform:10:400", "--output-lengths", "uniform:1:60", "--requests", "30"]


@pytest.fixture
def neo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Neo]:
    """Run a command line: exit code, standard output, standard error."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["neo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def runs(neo: Neo, tmp_path: Path) -> Path:
    """A folder with a simulated run of each of two policies."""
    out = tmp_path / "out"
    policies = ["-p", "gpu-only", "-p", "fastdecode", "--kv-gpu-blocks", "80"]
    code, _, errors = neo("simulate", *LOAD, *policies, "--quiet", "--no-plots", "--out", out)
    assert (code, errors) == (0, "")
    return out


def test_one_run(neo: Neo, runs: Path) -> None:
    code, shown, errors = neo("show", runs / "gpu-only")
    assert (code, errors) == (0, "")
    assert "gpu-only" in shown
    assert "30 completed" in shown
    assert "TTFT" in shown
    assert neo("show", runs / "gpu-only" / "summary.json")[1] == shown


def test_several_runs_are_compared_with_the_first(neo: Neo, runs: Path) -> None:
    code, shown, errors = neo("show", runs / "gpu-only", runs / "fastdecode")
    assert (code, errors) == (0, "")
    header = next(line for line in shown.splitlines() if "gpu-only" in line and "fastdecode" in line)
    assert header.index("gpu-only") < header.index("fastdecode")
    assert "relative to the first column" in shown
    assert "%" in shown


def test_json_is_one_summary_a_line(neo: Neo, runs: Path) -> None:
    code, shown, errors = neo("show", "--json", runs / "fastdecode", runs / "gpu-only")
    assert (code, errors) == (0, "")
    found = [json.loads(line) for line in shown.splitlines()]
    assert [s["policy"] for s in found] == ["fastdecode", "gpu-only"]
    assert found[0] == json.loads((runs / "fastdecode" / "summary.json").read_text())


def change(path: Path, **fields: Any) -> str:
    summary = json.loads(path.read_text())
    return json.dumps({k: v for k, v in (summary | fields).items() if v != "gone"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda _: "", "not a JSON file"),
        (lambda _: "{", "not a JSON file"),
        (lambda _: "[]", "not a summary of a neo run"),
        (lambda _: '{"policy": "neo"}', "not a summary of a neo run, it lacks "),
        (lambda _: "\x00\x01", "not a JSON file"),
        (lambda p: change(p, metrics="gone"), "it lacks metrics"),
        (lambda p: change(p, metrics={}), "summary.json"),
        (lambda p: change(p, metrics=[]), "summary.json"),
        (lambda p: change(p, requests=3), "summary.json"),
        (lambda p: change(p, workload="azure"), "summary.json"),
    ],
)
@pytest.mark.parametrize("others", [0, 1])
def test_what_is_no_run_is_one_line_and_exit_code_2(
    neo: Neo, runs: Path, content: Callable[[Path], str], message: str, others: int
) -> None:
    path = runs / "fastdecode" / "summary.json"
    path.write_text(content(path))
    code, shown, errors = neo("show", *[runs / "gpu-only"] * others, runs / "fastdecode")
    assert (code, shown) == (2, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert str(path) in errors
    assert errors.count("\n") == 1


def test_a_folder_without_a_run(neo: Neo, tmp_path: Path) -> None:
    for where in (tmp_path / "nowhere", tmp_path):
        code, _, errors = neo("show", where)
        assert code == 2
        assert errors.startswith("error: cannot read ")
        assert errors.count("\n") == 1


def test_nothing_to_show(neo: Neo) -> None:
    code, _, errors = neo("show")
    assert code == 2
    assert "Traceback" not in errors

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from report_builders import meta, synthetic_run
from rich.console import Console

from neo.core.record import RunRecord
from neo.report import tables
from neo.report.files import build_summary
from neo.report.metrics import SLO


def show(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(table)
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0, "0 s"), (1.5e-5, "15.0 µs"), (0.0123, "12.3 ms"), (0.99964, "1.00 s"),
        (0.9996e-3, "1.00 ms"), (1.0, "1.00 s"), (123.4, "123 s"), (5999.0, "5,999 s"), (7200.0, "120 min"),
        (35_940.0, "599 min"), (36_000.0, "10.0 h"), (180_000.0, "50.0 h"), (864_000.0, "10.0 days"),
        (753_153_818 * 60.0, "523,023 days"), (1e300, "1.16e+295 days"), (float("inf"), "inf days"),
    ],
)  # fmt: skip
def test_seconds(value: float | None, text: str) -> None:
    assert tables.format_seconds(value) == text


def test_other_units() -> None:
    assert tables.format_bytes(0) == "0 B"
    assert tables.format_bytes(12_300_000_000) == "12.3 GB"
    assert tables.format_bytes(4.5e15) == "4,500 TB"
    assert tables.format_rate(1234.5, "tok/s") == "1,234 tok/s"
    assert tables.format_rate(None, "tok/s") == "–"
    assert tables.format_share(0.1234) == "12.3%"
    assert tables.format_count(1234567) == "1,234,567"
    assert tables.format_change(0.1234) == "+12.3%"
    assert tables.format_change(-0.5) == "-50.0%"
    assert tables.format_change(24.0) == "×25"
    assert tables.format_change(1e-5) == "="


def test_result_table_shows_everything() -> None:
    record = synthetic_run(50)
    record.interrupted = "stopped by [user]"
    summary = build_summary(record, meta(warnings=("beyond the table",)), SLO(ttft_s=2))
    text = show(tables.result_table(summary))
    for part in (
        "neo · llama-3.1-8b on g5.16xlarge · simulated", "TTFT", "TPOT", "ITL", "end to end",
        "per output token", "50 completed", "tok/s", "req/s", "goodput", "H2D / D2H moved",
        "steps by mode", "cpu-sequential",
        "interrupted: stopped by [user]; partial results", "warning: beyond the table",
    ):  # fmt: skip
        assert part in text


def test_result_table_of_nothing() -> None:
    assert "–" in show(tables.result_table(build_summary(RunRecord(), meta())))


def test_comparison_is_against_the_first() -> None:
    summaries = [
        build_summary(synthetic_run(200, offload=False), meta("gpu-only")),
        build_summary(synthetic_run(200), meta("neo")),
    ]
    text = show(tables.comparison_table(summaries))
    base, other = (s["metrics"]["request_throughput"] for s in summaries)
    line = next(x for x in text.splitlines() if x.strip().startswith("requests  "))
    assert line.split() == [
        "requests", f"{base:.2f}", "req/s", f"{other:.2f}", "req/s", f"{100 * (other / base - 1):+.1f}%",
    ]  # fmt: skip
    assert "goodput" not in text
    assert text.rstrip().endswith("changes (%, ×) are relative to the first column")
    assert "relative" not in show(tables.comparison_table(summaries[:1]))
    assert "llama-3.1-8b on g5.16xlarge" in text


def test_the_best_is_highlighted() -> None:
    row = tables.Row("x", ("x",), tables.format_seconds, -1)
    cells = tables._cells(row, [2.0, 1.0, None, 4.0])
    assert ["underline" in str(c.style) for c in cells] == [False, True, False, False]
    assert [str(c.spans[0].style) for c in cells if c.spans] == [
        "not bold not underline green", "not bold not underline dim", "not bold not underline red",
    ]  # fmt: skip
    assert not any(c.style for c in tables._cells(row, [1.0, 1.0]))


def test_labels_say_what_differs() -> None:
    def summary(**fields: object) -> dict:
        return build_summary(RunRecord(), meta(**fields))

    assert tables.run_labels([summary(policy="a"), summary(policy="b")]) == ["a", "b"]
    assert tables.run_labels([summary(hardware="h1"), summary(hardware="h2")]) == ["neo, h1", "neo, h2"]
    assert tables.run_labels([summary(), summary(policy_options={"k": 1})]) == ["neo", "neo, k=1"]
    assert tables.run_labels([summary(), summary()]) == ["neo #1", "neo #2"]
    rates = [summary(workload={"name": "w", "rate": r}) for r in (1.0, 2.5)]
    assert tables.run_labels(rates) == ["neo, rate 1", "neo, rate 2.5"]


def test_labels_of_policies_from_files_have_no_folders() -> None:
    def labels(*policies: str) -> list[str]:
        return tables.run_labels([build_summary(RunRecord(), meta(p)) for p in policies])

    assert labels("docs/examples/fcfs.py:FCFS", "neo") == ["fcfs.py:FCFS", "neo"]
    assert labels("a/p.py:P", "b/p.py:P", "b/p.py:Q") == ["a/p.py:P", "b/p.py:P", "p.py:Q"]
    assert labels("a/p.py:P", "a/p.py:P") == ["p.py:P #1", "p.py:P #2"]
    assert labels("package.module:P") == ["package.module:P"]


def test_rich_and_matplotlib_are_imported_late() -> None:
    code = (
        "import sys\n"
        "from neo.report import files, metrics, plots, tables, timeline\n"
        "late = {'rich', 'matplotlib', 'torch', 'simpy', 'pydantic', 'neo.sim', 'neo.policy', 'neo.cost'}\n"
        "sys.exit(', '.join(late & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

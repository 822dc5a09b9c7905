"""Result tables for the terminal. rich is imported when a table is made, not before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from neo.report.metrics import LATENCIES

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

Summary = Mapping[str, Any]
NOTHING = "–"
LATENCY_NAMES = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "itl_s": "ITL",
    "e2e_s": "end to end",
    "latency_per_output_token_s": "per output token",
}
# A relative change below this is shown as none.
NO_CHANGE = 5e-4


def digits(value: float, count: int = 3) -> str:
    """``value`` with ``count`` significant digits, never in exponent form, thousands separated."""
    if value == 0:
        return "0"
    text = f"{value:.{count}g}"
    whole = abs(float(text))
    decimals = 0
    while whole < 10 ** (count - 1) and decimals < 9:
        whole, decimals = whole * 10, decimals + 1
    return f"{value:,.{decimals}f}"


def format_seconds(value: float | None) -> str:
    """Seconds in the unit that fits, from µs to days."""
    if value is None:
        return NOTHING
    for limit, scale, unit in (
        (9.995e-4, 1e6, "µs"),
        (0.9995, 1e3, "ms"),
        (6000.0, 1.0, "s"),
        (36_000.0, 1 / 60, "min"),
        (360_000.0, 1 / 3600, "h"),
    ):
        if abs(value) < limit:
            return f"{digits(value * scale)} {unit}" if value else "0 s"
    days = value / 86_400
    return f"{digits(days)} days" if abs(days) < 1e7 else f"{days:.3g} days"


def format_bytes(value: float | None) -> str:
    """Bytes in decimal units (1 GB = 1e9 bytes)."""
    if value is None:
        return NOTHING
    for limit, scale, unit in ((1e3, 1.0, "B"), (1e6, 1e-3, "kB"), (1e9, 1e-6, "MB"), (1e12, 1e-9, "GB")):
        if abs(value) < limit:
            return f"{digits(value * scale)} {unit}"
    return f"{digits(value * 1e-12)} TB"


def format_rate(value: float | None, unit: str) -> str:
    """A rate with its unit, e.g. ``1,234 tok/s``."""
    return NOTHING if value is None else f"{digits(value, 4 if value >= 1000 else 3)} {unit}"


def format_share(value: float | None) -> str:
    """A share (0..1) in percent."""
    return NOTHING if value is None else f"{100 * value:.1f}%"


def format_count(value: float | None) -> str:
    """A whole number, thousands separated."""
    return NOTHING if value is None else f"{int(value):,}"


def _requests_per_s(value: float | None) -> str:
    return format_rate(value, "req/s")


def _tokens_per_s(value: float | None) -> str:
    return format_rate(value, "tok/s")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a comparison: where the number is, how to print it, and which way is better."""

    name: str
    path: tuple[str, ...]
    text: Callable[[float | None], str]
    better: int = 0  # 1: more, -1: less, 0: neither
    section: bool = False  # a rule follows

    def value(self, summary: Summary) -> float | None:
        """The number in ``summary``, None if it is not there."""
        found: Any = summary
        for key in self.path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, int | float) else None


def _latency_rows() -> tuple[Row, ...]:
    return tuple(
        Row(f"{LATENCY_NAMES[name]} {stat}", ("metrics", name, stat), format_seconds, -1, stat == "p99")
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "latency_per_output_token_s")
        for stat in ("mean", "p50", "p99")
    )


ROWS = (
    Row("requests completed", ("requests", "completed"), format_count, 1),
    Row("duration", ("metrics", "duration_s"), format_seconds, -1),
    Row("requests", ("metrics", "request_throughput"), _requests_per_s, 1),
    Row("input tokens", ("metrics", "input_token_throughput"), _tokens_per_s, 1),
    Row("output tokens", ("metrics", "output_token_throughput"), _tokens_per_s, 1),
    Row("goodput", ("metrics", "goodput"), _requests_per_s, 1),
    Row("requests within SLO", ("metrics", "goodput_fraction"), format_share, 1, section=True),
    *_latency_rows(),
    Row("preemptions", ("metrics", "preemptions"), format_count, -1),
    Row("steps", ("metrics", "steps"), format_count),
    Row("steps pipelined", ("metrics", "steps_pipelined"), format_count),
    Row("steps relayed", ("metrics", "steps_relayed"), format_count),
    Row("moved to GPU", ("metrics", "bytes_h2d"), format_bytes),
    Row("moved to host", ("metrics", "bytes_d2h"), format_bytes, section=True),
    Row("GPU busy", ("metrics", "utilization", "gpu"), format_share),
    Row("CPU busy", ("metrics", "utilization", "cpu"), format_share),
    Row("H2D busy", ("metrics", "utilization", "h2d"), format_share),
    Row("D2H busy", ("metrics", "utilization", "d2h"), format_share),
)
OPTIONAL = {("metrics", "goodput"), ("metrics", "goodput_fraction"), ("metrics", "steps_relayed")}


def describe_run(summary: Summary) -> str:
    """``model on hardware``, with the tensor-parallel degree where it is not 1."""
    degree = summary.get("tensor_parallel") or 1
    model = f"{summary['model']} (tp {degree})" if degree != 1 else summary["model"]
    return f"{model} on {summary['hardware']}"


def run_labels(summaries: Sequence[Summary]) -> list[str]:
    """A short name for each run: its policy, with what else differs; numbered where nothing does.

    Of a policy from a file the folders are left out, unless two files of one name are compared.
    """
    policies = [str(s["policy"]) for s in summaries]
    short = {policy: _without_folders(policy) for policy in policies}
    labels = [p if list(short.values()).count(short[p]) > 1 else short[p] for p in policies]
    parts: list[Callable[[Summary], str]] = [
        lambda s: str(s["hardware"]),
        lambda s: str(s["model"]),
        lambda s: str(s["workload"].get("name", "")),
        lambda s: f"rate {s['workload']['rate']:g}" if "rate" in s["workload"] else "",
        lambda s: ", ".join(f"{k}={v}" for k, v in s.get("policy_options", {}).items()),
        lambda s: f"seed {s.get('seed')}",
        lambda s: str(s.get("kind", "")),
    ]
    for part in parts:
        texts = [part(s) for s in summaries]
        if len(set(labels)) < len(labels) and len(set(texts)) > 1:
            labels = [
                f"{a}, {b}" if b and labels.count(a) > 1 else a for a, b in zip(labels, texts, strict=True)
            ]
    return [f"{a} #{labels[: i + 1].count(a)}" if labels.count(a) > 1 else a for i, a in enumerate(labels)]


def _without_folders(policy: str) -> str:
    """``docs/examples/fcfs.py:FCFS`` as ``fcfs.py:FCFS``."""
    path, colon, name = policy.rpartition(":")
    return PurePath(path).name + colon + name if path.endswith(".py") else policy


def result_table(summary: Summary) -> Table:
    """One run: latencies as a grid of statistics, everything else below it."""
    from rich import box
    from rich.table import Table

    metrics = summary["metrics"]
    latencies = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    latencies.add_column("latency")
    for stat in ("mean", "p50", "p90", "p99"):
        latencies.add_column(stat.upper() if stat != "mean" else stat, justify="right", min_width=9)
    for name in LATENCIES:
        row = metrics.get(name) or {}
        latencies.add_row(
            LATENCY_NAMES[name], *(format_seconds(row.get(s)) for s in ("mean", "p50", "p90", "p99"))
        )

    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for style in ("dim", "", "dim", ""):
        facts.add_column(style=style)
    pairs = _facts(summary)
    half = -(-len(pairs) // 2)
    for i in range(half):
        right = pairs[half + i] if half + i < len(pairs) else ("", "")
        facts.add_row(*pairs[i], *right)

    title = f"[bold]{summary['policy']}[/] · {describe_run(summary)} · {summary['kind']}"
    table = Table.grid()
    table.add_row(title)
    table.add_row(latencies)
    table.add_row(facts)
    decisions = {k: v for k, v in metrics.get("decisions", {}).items() if v}
    if decisions:
        total = sum(decisions.values())
        shares = ", ".join(f"{k} {format_share(v / total)}" for k, v in decisions.items())
        table.add_row(f"[dim]steps by mode[/]  {shares}")
    if summary.get("interrupted"):
        table.add_row(f"[yellow]interrupted: {_escape(summary['interrupted'])}; partial results[/]")
    for warning in summary.get("warnings") or ():
        table.add_row(f"[yellow]warning: {_escape(warning)}[/]")
    return table


def _escape(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))


def _facts(summary: Summary) -> list[tuple[str, str]]:
    """Everything but the latencies, as (name, text) pairs."""
    requests, metrics = summary["requests"], summary["metrics"]
    ended = ("completed", "rejected", "aborted")
    unfinished = requests["submitted"] - sum(requests[k] for k in ended)
    counts = ", ".join(f"{format_count(requests[k])} {k}" for k in ended if requests[k] or k == "completed")
    pairs = [
        ("requests", counts + (f", {format_count(unfinished)} unfinished" if unfinished else "")),
        ("duration", format_seconds(metrics["duration_s"])),
        ("throughput", _requests_per_s(metrics["request_throughput"])),
        ("input tokens", _tokens_per_s(metrics["input_token_throughput"])),
        ("output tokens", _tokens_per_s(metrics["output_token_throughput"])),
    ]
    if "goodput" in metrics:
        share = format_share(metrics["goodput_fraction"])
        pairs.append(("goodput", f"{_requests_per_s(metrics['goodput'])} ({share})"))
    pairs += [
        ("GPU / CPU busy", _busy(metrics, "gpu", "cpu")),
        ("H2D / D2H busy", _busy(metrics, "h2d", "d2h")),
        ("H2D / D2H moved", f"{format_bytes(metrics['bytes_h2d'])} / {format_bytes(metrics['bytes_d2h'])}"),
        ("steps", format_count(metrics["steps"])),
        ("preemptions", format_count(metrics["preemptions"])),
    ]
    return pairs


def _busy(metrics: Summary, *names: str) -> str:
    return " / ".join(format_share(metrics["utilization"][n]) for n in names)


def comparison_table(summaries: Sequence[Summary]) -> Table:
    """Several runs side by side; the first is the baseline of the changes beside the others' numbers.

    Green and red say better and worse than the baseline; the best of a line is bold and underlined.
    """
    from rich import box
    from rich.table import Table

    subjects = {describe_run(s) for s in summaries}
    title = subjects.pop() if len(subjects) == 1 else None
    caption = "changes (%, ×) are relative to the first column" if len(summaries) > 1 else None
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("")
    for label in run_labels(summaries):
        table.add_column(label, justify="right")
    for row in ROWS:
        values = [row.value(s) for s in summaries]
        if row.path in OPTIONAL and all(v is None for v in values):
            continue
        table.add_row(row.name, *_cells(row, values), end_section=row.section)
    return table


def _cells(row: Row, values: Sequence[float | None]) -> list[Text]:
    """The cells of one line: number, and from the second on the change against the first."""
    from rich.text import Text

    known = [v for v in values if v is not None]
    best = None
    if row.better and len(known) > 1 and min(known) != max(known):
        best = max(known) if row.better > 0 else min(known)
    cells = []
    for i, value in enumerate(values):
        cell = Text(row.text(value), style="bold underline" if best is not None and value == best else "")
        if i:
            change = relative_change(values[0], value)
            good = None if change is None or abs(change) < NO_CHANGE else change * row.better
            style = "dim" if not good else "green" if good > 0 else "red"
            cell.append(f"{format_change(change):>8}", style=f"not bold not underline {style}")
        cells.append(cell)
    return cells


def relative_change(base: float | None, value: float | None) -> float | None:
    """``value / base - 1``; None where that says nothing."""
    return None if base is None or value is None or base == 0 else value / base - 1


def format_change(change: float | None) -> str:
    """A relative change: ``+12.3%``, ``=``, or ``×25`` where it is tenfold or more; empty for None."""
    if change is None:
        return ""
    if abs(change) < NO_CHANGE:
        return "="
    return f"{100 * change:+.1f}%" if abs(change) < 9.995 else f"×{1 + change:,.0f}"

"""How far a simulator is from a run: step times, operation times and end-to-end metrics, as plain values.

Every relative error is ``predicted / measured - 1``: 0.05 means that the simulator says 5% more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from neo.core.errors import InputError
from neo.core.graph import RELAY
from neo.core.logreader import RequestRow
from neo.core.plugins import close_matches
from neo.core.record import RunRecord
from neo.core.replayed import Replay, Times
from neo.report.columns import Floats
from neo.report.metrics import compute_metrics
from neo.report.tables import NOTHING, format_count, format_rate, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SUB_BATCHES = {None: NOTHING, RELAY: "relay"}  # else its number
# (name, label, path within ``metrics``); names are those of --max-error
METRICS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("request_throughput", "requests", ("request_throughput",)),
    ("output_throughput", "output tokens", ("output_token_throughput",)),
    ("ttft_mean", "TTFT mean", ("ttft_s", "mean")),
    ("ttft_p50", "TTFT p50", ("ttft_s", "p50")),
    ("ttft_p99", "TTFT p99", ("ttft_s", "p99")),
    ("tpot_mean", "TPOT mean", ("tpot_s", "mean")),
    ("tpot_p99", "TPOT p99", ("tpot_s", "p99")),
    ("e2e_mean", "end to end mean", ("e2e_s", "mean")),
    ("e2e_p99", "end to end p99", ("e2e_s", "p99")),
    ("duration", "duration", ("duration_s",)),
)
STEP_ERRORS = (
    ("step_median", "median", "step, median |error|"),
    ("step_p90", "p90", "step, P90 |error|"),
    ("step_mean", "mean", "step, mean error"),
    ("step_total", "total", "all steps together"),
)
# What the short names of --max-error stand for.
SHORT = {
    "throughput": ("request_throughput", "output_throughput"),
    "ttft": ("ttft_mean",),
    "tpot": ("tpot_mean",),
    "e2e": ("e2e_mean",),
    "step": ("step_median",),
}
Validation = Mapping[str, Any]


def relative_error(predicted: float | None, measured: float | None) -> float | None:
    """``predicted / measured - 1``; None where that says nothing."""
    if predicted is None or measured is None:
        return None
    if measured == 0:
        return 0.0 if predicted == 0 else None
    return predicted / measured - 1


def step_errors(times: Times) -> dict[str, float | None]:
    """Errors of single steps and of all together.

    Returns:
        ``median`` and ``p90`` of the absolute relative error over steps, ``mean`` of the signed one, the
        error of the ``total``, and both totals (seconds). Steps that took no time count in the totals only.
    """
    predicted, measured = np.array(times.predicted), np.array(times.measured)
    errors = _errors(predicted, measured)
    known = len(errors) > 0
    total, whole = float(predicted.sum()), float(measured.sum())
    return {
        "median": float(np.median(np.abs(errors))) if known else None,
        "p90": float(np.percentile(np.abs(errors), 90)) if known else None,
        "mean": float(errors.mean()) if known else None,
        "total": relative_error(total, whole),
        "predicted_s": total,
        "measured_s": whole,
    }


def op_errors(ops: Mapping[tuple[str, int], Times]) -> list[dict[str, Any]]:
    """Per operation kind and sub-batch: seconds, mean absolute relative error over steps, error of the total.

    ``sub_batch`` is None for operations that belong to none.
    """
    rows = []
    for (kind, batch), times in sorted(ops.items()):
        predicted, measured = np.array(times.predicted), np.array(times.measured)
        errors = _errors(predicted, measured)
        total, whole = float(predicted.sum()), float(measured.sum())
        rows.append(
            {
                "op": kind,
                "sub_batch": None if batch < 0 else batch,
                "steps": len(predicted),
                "predicted_s": total,
                "measured_s": whole,
                "mean_error": float(np.abs(errors).mean()) if len(errors) else None,
                "total_error": relative_error(total, whole),
            }
        )
    return rows


def _errors(predicted: Floats, measured: Floats) -> Floats:
    some = measured > 0
    return predicted[some] / measured[some] - 1


def measured_metrics(rows: Mapping[str, RequestRow], duration_s: float | None) -> dict[str, Any]:
    """The metrics of ``METRICS`` from the rows of ``requests.csv``; only completed requests count.

    Args:
        duration_s: of the run; None: from the first arrival to the end of the last completed request.
    """
    done = [r for r in rows.values() if r.e2e_s is not None]
    if duration_s is None:
        ends = [r.arrival_s + (r.e2e_s or 0.0) for r in done]
        duration_s = max(ends) - min(r.arrival_s for r in rows.values()) if ends else 0.0
    tokens = sum(r.output_tokens for r in done)
    return {
        "duration_s": duration_s,
        "request_throughput": len(done) / duration_s if duration_s > 0 else None,
        "output_token_throughput": tokens / duration_s if duration_s > 0 else None,
        "ttft_s": _statistics([r.ttft_s for r in done]),
        "tpot_s": _statistics([r.tpot_s for r in done]),
        "e2e_s": _statistics([r.e2e_s for r in done]),
    }


def _statistics(values: Sequence[float | None]) -> dict[str, float | None]:
    known = np.array([v for v in values if v is not None], dtype=np.float64)
    if not len(known):
        return {"mean": None, "p50": None, "p99": None}
    p50, p99 = np.percentile(known, (50, 99)).tolist()
    return {"mean": float(known.mean()), "p50": p50, "p99": p99}


def end_to_end(predicted: RunRecord, measured: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Per metric of ``METRICS`` ``{"predicted", "measured", "error"}``."""
    simulated = compute_metrics(predicted)
    found = {}
    for name, _, path in METRICS:
        mine, theirs = _at(simulated, path), _at(measured, path)
        found[name] = {"predicted": mine, "measured": theirs, "error": relative_error(mine, theirs)}
    return found


def _at(metrics: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        metrics = metrics[key]
    return None if metrics is None else float(metrics)


def validation(
    name: str,
    summary: Mapping[str, Any],
    cost_model: str,
    replay: Replay,
    rows: Mapping[str, RequestRow],
    left_out: int,
    predicted: RunRecord | None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """One run's validation, as JSON values.

    Args:
        name: of the run.
        summary: its ``summary.json``.
        cost_model: what predicted the times.
        rows: of ``requests.csv``, those that ``predicted`` holds.
        left_out: requests that are in the run and not in ``rows``.
        predicted: the same requests simulated; None if there were none.
    """
    whole = not left_out and not summary.get("interrupted")
    duration = summary["metrics"].get("duration_s") if whole else None
    divergence = replay.divergence
    return {
        "run": name,
        "kind": summary["kind"],
        "policy": summary["policy"],
        "model": summary["model"],
        "hardware": summary["hardware"],
        "cost_model": cost_model,
        "decisions": {
            "logged": replay.logged,
            "equal": replay.equal,
            "planned_ahead": replay.planned_ahead,
            "divergence": None
            if divergence is None
            else {"step": divergence.step, "line": divergence.line, "what": divergence.what},
        },
        "steps": {"count": len(replay.steps.measured), **step_errors(replay.steps)},
        "ops": op_errors(replay.ops),
        "requests": {"compared": len(rows), "left_out": left_out},
        "end_to_end": {} if predicted is None else end_to_end(predicted, measured_metrics(rows, duration)),
        "notes": list(notes),
    }


def errors_of(run: Validation) -> dict[str, float | None]:
    """Every relative error of a run, by the names of ``METRICS`` and ``STEP_ERRORS``."""
    found = {name: run["end_to_end"].get(name, {}).get("error") for name, _, _ in METRICS}
    return found | {name: run["steps"][key] for name, key, _ in STEP_ERRORS}


def spread_of(runs: Sequence[Validation]) -> dict[str, dict[str, float]]:
    """Per error its ``mean``, ``stdev``, ``min`` and ``max`` over repeats; of two runs or more."""
    if len(runs) < 2:
        return {}
    by_run = [errors_of(run) for run in runs]
    found = {}
    for name in by_run[0]:
        values = [v for errors in by_run if (v := errors[name]) is not None]
        if len(values) > 1:
            found[name] = {
                "mean": fmean(values),
                "stdev": stdev(values),
                "min": min(values),
                "max": max(values),
            }
    return found


# -- limits -----------------------------------------------------------------------------------------------


def parse_limits(text: str) -> dict[str, float]:
    """Read the form ``throughput=0.10,ttft=0.15``: the largest absolute relative error of each name.

    Raises:
        InputError: an unknown or repeated name, or a limit that is no positive number.
    """
    known = [*SHORT, *(name for name, _, _ in METRICS), *(name for name, _, _ in STEP_ERRORS)]
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals or name not in known:
            close = close_matches(name, known) or f" (names: {', '.join(known)})"
            raise InputError(f"--max-error {text}: expected name=share, got '{part.strip()}'{close}")
        if name in limits:
            raise InputError(f"--max-error {text}: {name} is given twice")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if not 0.0 <= limits[name] < float("inf"):
            raise InputError(f"--max-error {text}: {name} must be a share such as 0.1, got '{value}'")
    return limits


def exceeded(runs: Sequence[Validation], limits: Mapping[str, float]) -> list[str]:
    """One line for each limit that a run exceeds; an error that could not be had exceeds every limit."""
    lines = []
    for run in runs:
        errors = errors_of(run)
        for limit, most in limits.items():
            for name in SHORT.get(limit, (limit,)):
                error = errors[name]
                if error is None:
                    lines.append(f"{run['run']}: {name} could not be compared (limit {most:.1%})")
                elif abs(error) > most:
                    lines.append(f"{run['run']}: {name} is off by {error:+.1%}, more than {most:.1%}")
    return lines


# -- tables -----------------------------------------------------------------------------------------------


def labels(names: Sequence[str]) -> list[str]:
    """Folders by their last name; as they were given where that is not enough, absolute paths never."""
    short = [PurePath(name).name or name for name in names]
    full = [s if n.startswith("/") else n for n, s in zip(names, short, strict=True)]
    chosen = short if len(set(short)) == len(short) else full
    return [f"{x} #{chosen[: i + 1].count(x)}" if chosen.count(x) > 1 else x for i, x in enumerate(chosen)]


def validation_tables(runs: Sequence[Validation]) -> list[RenderableType]:
    """What ``neo validate`` prints: decisions, errors of all runs, and operations of each."""
    parts: list[RenderableType] = [_error_table(runs)]
    parts += [_op_table(run) for run in runs if run["ops"]]
    return parts


def _error_table(runs: Sequence[Validation]) -> Table:
    """One run with its numbers; several with their errors, one column each, and what these have in common."""
    from rich import box
    from rich.table import Table

    subjects = dict.fromkeys(
        f"{r['policy']} · {r['model']} on {r['hardware']} · {r['cost_model']}" for r in runs
    )
    table = Table(title="\n".join(subjects), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("relative error")
    for run in runs:
        table.add_column(str(run["run"]), justify="right")
    several = len(runs) > 1
    more = ("mean", "min", "max") if several else ("predicted", "measured")
    for name in more:
        table.add_column(name, justify="right")
    blank = [""] * len(more)
    spread = spread_of(runs)

    def rest(name: str, numbers: Sequence[str]) -> list[str]:
        return [format_error(spread.get(name, {}).get(k)) for k in more] if several else list(numbers)

    table.add_row("decisions equal", *(_decisions(run) for run in runs), *blank)
    table.add_row("requests compared", *(_requests(r["requests"]) for r in runs), *blank, end_section=True)
    for name, key, label in STEP_ERRORS:
        cells = [format_error(run["steps"][key], "|" not in label) for run in runs]
        totals = [format_seconds(runs[0]["steps"][k]) for k in ("predicted_s", "measured_s")]
        numbers = totals if key == "total" else blank
        table.add_row(label, *cells, *rest(name, numbers), end_section=key == "total")
    for name, label, _ in METRICS:
        values = [run["end_to_end"].get(name, {}) for run in runs]
        shown = [_shown(name, values[0].get(k)) for k in ("predicted", "measured")]
        table.add_row(label, *(format_error(v.get("error")) for v in values), *rest(name, shown))
    return table


def _shown(name: str, value: float | None) -> str:
    if name.endswith("throughput"):
        return format_rate(value, "tok/s" if name.startswith("output") else "req/s")
    return format_seconds(value)


def _decisions(run: Validation) -> str:
    found = run["decisions"]
    text = f"{format_count(found['equal'])} of {format_count(found['logged'])}"
    return f"[red]{text}, then diverged[/]" if found["divergence"] else f"[green]{text}[/]"


def _requests(counts: Mapping[str, int]) -> str:
    text = format_count(counts["compared"])
    return f"{text} ({format_count(counts['left_out'])} left out)" if counts["left_out"] else text


def format_error(error: float | None, signed: bool = True) -> str:
    """A relative error in percent, with its sign unless it is an absolute one."""
    return NOTHING if error is None else f"{100 * error:+.1f}%" if signed else f"{100 * error:.1f}%"


def _op_table(run: Validation) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"operations · {run['run']}", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    for name in (
        "operation",
        "sub-batch",
        "steps",
        "predicted",
        "measured",
        "mean |error|",
        "error of the total",
    ):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for row in run["ops"]:
        batch = _SUB_BATCHES.get(row["sub_batch"], str(row["sub_batch"]))
        table.add_row(
            row["op"],
            batch,
            format_count(row["steps"]),
            format_seconds(row["predicted_s"]),
            format_seconds(row["measured_s"]),
            format_error(row["mean_error"], signed=False),
            format_error(row["total_error"]),
        )
    return table

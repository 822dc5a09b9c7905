"""The files of a run: ``summary.json`` and ``requests.csv``. Format: docs/results-format.md.

Two equal runs write the same bytes, but for ``wall_time_s``: fixed key order, floats as ``repr`` gives
them, no dates, no absolute paths.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np

from neo import __version__
from neo.core.errors import InputError
from neo.core.record import RunRecord
from neo.report.columns import Floats, RequestColumns, request_columns
from neo.report.metrics import SLO, compute_metrics, count_requests

SUMMARY_FILE = "summary.json"
REQUESTS_FILE = "requests.csv"
REQUEST_FIELDS = (
    "request_id",
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "finish_reason",
    "preemptions",
    "cpu_steps",
)
REQUIRED_FIELDS = ("neo", "kind", "policy", "model", "hardware", "workload", "requests", "metrics")


@dataclass(frozen=True, slots=True)
class RunMeta:
    """What a run was, beyond what happened in it.

    Attributes:
        workload: where the requests came from, as JSON values; a file by its name, not its path.
        limits: the step budgets (``Limits`` as a dict); ``block_size`` is used to give KV in tokens.
        layers: layers of the model; with ``block_size`` it turns layer-blocks into tokens.
        tensor_parallel: GPUs over which the model is split.
        engine: what ran the steps of a measured run, and how; None for a simulated one.
        command: the arguments after ``neo``; ``--out`` is dropped, absolute paths become names.
        wall_time_s: seconds the run took on this machine.
    """

    kind: Literal["simulated", "measured"]
    policy: str
    model: str
    hardware: str
    workload: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    cost_model: str | Mapping[str, Any] | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    layers: int | None = None
    tensor_parallel: int = 1
    engine: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()
    command: Sequence[str] = ()
    wall_time_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class RunResult:
    """A run as comparisons need it: its summary, and latencies of each finished request (seconds; no NaN)."""

    summary: Mapping[str, Any]
    ttft_s: Floats
    e2e_s: Floats
    latency_per_output_token_s: Floats


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well, and vanishes otherwise.

    Raises:
        InputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        if temporary.exists():
            temporary.unlink()


def kv_capacity(record: RunRecord, meta: RunMeta) -> dict[str, dict[str, int | None]]:
    """Per tier ``{"layer_blocks": n, "tokens": m}``; tokens are None without layers or block size."""
    block_size = meta.limits.get("block_size")
    out: dict[str, dict[str, int | None]] = {}
    for tier, blocks in sorted(record.kv_capacity.items(), reverse=True):  # gpu before cpu
        tokens = blocks // meta.layers * int(block_size) if meta.layers and block_size else None
        out[str(tier)] = {"layer_blocks": int(blocks), "tokens": tokens}
    return out


def build_summary(
    record: RunRecord,
    meta: RunMeta,
    slo: SLO | None = None,
    drop_first: float = 0.0,
    columns: RequestColumns | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json`` (arguments as ``compute_metrics`` takes them)."""
    return {
        "neo": __version__,
        "kind": meta.kind,
        "policy": _portable(meta.policy),
        "policy_options": {k: _portable(v) for k, v in sorted(meta.policy_options.items())},
        "model": _portable(meta.model),
        "hardware": _portable(meta.hardware),
        "workload": _portable(meta.workload),
        "seed": meta.seed,
        "requests": count_requests(record),
        "metrics": _portable(compute_metrics(record, slo, drop_first, columns)),
        "tensor_parallel": meta.tensor_parallel,
        "cost_model": _portable(meta.cost_model),
        "limits": _portable(meta.limits),
        "kv_capacity": kv_capacity(record, meta),
        **({} if meta.engine is None else {"engine": _portable(meta.engine)}),
        "warnings": _portable(meta.warnings),
        "interrupted": record.interrupted,
        "command": portable_command(meta.command),
        "wall_time_s": _portable(float(meta.wall_time_s)),
    }


def write_run(
    out_dir: str | Path,
    record: RunRecord,
    meta: RunMeta,
    slo: SLO | None = None,
    drop_first: float = 0.0,
) -> dict[str, Any]:
    """Write ``summary.json`` and ``requests.csv`` into ``out_dir`` (made if missing), each atomically.

    A run that was interrupted is written just so: requests that have not ended have no ``finish_reason``.

    Returns:
        The summary that was written.

    Raises:
        InputError: ``out_dir`` cannot be written, or ``drop_first`` is not in [0, 1).
    """
    out = Path(out_dir)
    columns = request_columns(record)
    summary = build_summary(record, meta, slo, drop_first, columns)
    with atomic(out / REQUESTS_FILE) as path:
        _write_requests(path, columns)
    with atomic(out / SUMMARY_FILE) as path:
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    return summary


def run_result(
    record: RunRecord, meta: RunMeta, slo: SLO | None = None, drop_first: float = 0.0
) -> RunResult:
    """What ``read_run`` would read back, straight from the record."""
    columns = request_columns(record)
    return RunResult(
        summary=build_summary(record, meta, slo, drop_first, columns),
        **{
            name: _numbers(getattr(columns, name)[columns.finished])
            for name in ("ttft_s", "e2e_s", "latency_per_output_token_s")
        },
    )


def read_summary(path: str | Path) -> dict[str, Any]:
    """Read a ``summary.json``, given its path or the directory it lies in.

    Raises:
        InputError: there is no such file, it is not JSON, or it lacks a required field.
    """
    path = Path(path)
    path = path / SUMMARY_FILE if path.is_dir() else path
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    except ValueError as e:
        raise InputError(f"{path}: not a JSON file: {e}") from e
    missing = [k for k in REQUIRED_FIELDS if not isinstance(summary, dict) or k not in summary]
    if missing:
        raise InputError(f"{path}: not a summary of a neo run, it lacks {', '.join(missing)}")
    return dict(summary)


def read_run(out_dir: str | Path) -> RunResult:
    """Read back what ``write_run`` wrote into ``out_dir``.

    Raises:
        InputError: a file is missing or malformed; the message names the file and the line.
    """
    summary = read_summary(out_dir)
    path = Path(out_dir) / REQUESTS_FILE
    rows: list[tuple[float, float, float]] = []
    line = 1
    try:
        with path.open(encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f):
                line += 1
                if row["e2e_s"]:
                    rows.append((float(row["ttft_s"]), float(row["e2e_s"]), float(row["output_tokens"])))
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError, csv.Error) as e:
        raise InputError(f"{path}, line {line}: malformed row ({e})") from e
    ttft, e2e, tokens = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    return RunResult(summary=summary, ttft_s=ttft, e2e_s=e2e, latency_per_output_token_s=e2e / tokens)


def portable_command(arguments: Sequence[str]) -> list[str]:
    """``arguments`` without ``--out`` and with absolute paths cut to names: equal runs, equal commands."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument.startswith("--out="):
            skip = False
        elif argument == "--out":
            skip = True
        else:
            name, equals, value = argument.partition("=")
            kept.append(name + equals + _portable(value) if name.startswith("--") else _portable(argument))
    return kept


def _portable(value: Any) -> Any:
    """``value`` as JSON holds it: absolute paths cut to names, numpy scalars unwrapped, NaN and inf None."""
    if isinstance(value, Mapping):
        return {str(k): _portable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_portable(v) for v in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if isinstance(value, np.generic):
        return _portable(float(value) if isinstance(value, np.floating) else value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    text = str(value)
    return PurePath(text).name if text.startswith("/") and "\n" not in text else text


def _numbers(values: Floats) -> Floats:
    return values[~np.isnan(values)]


def _write_requests(path: Path, columns: RequestColumns) -> None:
    requests = columns.requests
    times = (_cells(columns.ttft_s), _cells(columns.tpot_s), _cells(columns.e2e_s))
    rows = zip(
        [r.id for r in requests],
        columns.arrival_s.tolist(),
        columns.prompt_tokens.tolist(),
        columns.generated.tolist(),
        *times,
        [r.finish_reason for r in requests],
        [r.preemptions for r in requests],
        [r.cpu_steps for r in requests],
        strict=True,
    )
    with path.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(REQUEST_FIELDS)
        writer.writerows(rows)


def _cells(values: Floats) -> list[float | None]:
    """Floats for the csv writer, which writes them by ``repr`` and None as an empty cell."""
    return [None if v != v else v for v in values.tolist()]

"""One point of a study: its key, and its run, made for worker processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import neo
from neo import __version__
from neo.cli.flags import options_by_policy, size_of, workload_of
from neo.cli.study import Settings
from neo.core.errors import InputError, NeoError
from neo.core.view import Limits
from neo.report.columns import request_columns
from neo.report.metrics import LATENCIES, PERCENTILES, SLO, compute_metrics, count_requests
from neo.sim.setup import SystemConfig, build_system, simulation
from neo.workload import Workload

_COMPUTING = ("core", "cost", "policy", "report", "sim", "workload")  # packages that a result depends on
_FILES = ("trace", "format", "policy", "cost", "hardware", "model")  # settings that may name a file
QUANTILES = tuple(range(0, 101, 2))  # percent, of the stored distribution

THROUGHPUTS = (
    "request_throughput",
    "input_token_throughput",
    "output_token_throughput",
    "total_token_throughput",
    "completion_throughput_30_70",
)
STATISTICS = ("mean", *(f"p{p:g}" for p in PERCENTILES))
METRICS = (
    "duration_s",
    *THROUGHPUTS,
    *(f"{latency}_{statistic}" for latency in LATENCIES for statistic in STATISTICS),
    "goodput",
    "preemptions",
    "steps",
    "steps_pipelined",
    "bytes_h2d",
    "bytes_d2h",
    *(f"utilization_{resource}" for resource in ("gpu", "cpu", "h2d", "d2h")),
)
COUNTS = ("submitted", "completed", "rejected", "aborted")


def point_key(settings: Settings) -> str:
    """What a stored result is found by: the settings, the content of files they name, and neo's code."""
    described = settings.model_dump()
    files = {}
    for name in _FILES:
        path = _path_in(described[name])
        if path is not None:
            files[name] = _digest(path)
            described[name] = path.name
    definition = {"neo": __version__, "code": code_digest(), "settings": described, "files": files}
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:20]


def _path_in(value: str | None) -> Path | None:
    if not value:
        return None
    for part in (value, value.partition(":")[0], value.partition(":")[2]):
        if part and Path(part).is_file():
            return Path(part)
    return None


@lru_cache(maxsize=256)
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def code_digest() -> str:
    """Of the code and the presets that results depend on: a changed simulator recomputes every point."""
    from neo.cost.presets import profiles_dir

    root = Path(neo.__file__).parent
    total = hashlib.sha256()
    for package in _COMPUTING:
        for path in sorted((root / package).rglob("*.py")):
            total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    for path in sorted(profiles_dir().rglob("*.toml")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def _workload(settings: Settings) -> Workload:
    s = settings
    trace = Path(s.trace) if s.trace is not None else None
    return workload_of(
        trace, s.format, s.limit, s.prompt_lengths, s.output_lengths, s.requests, s.arrivals, s.rate,
        s.speedup, s.cv, s.seed,
    )  # fmt: skip


def run_point(settings: Settings) -> dict[str, Any]:
    """Simulate a point; its columns by name (``METRICS``, ``COUNTS``) and the distribution of its latencies.

    Raises:
        NeoError: whatever ``neo simulate`` would say.
    """
    workload = _workload(settings)
    system = build_system(_config(settings))
    sim = simulation(system, workload, timeout_s=settings.timeout, bubbles=settings.bubbles)
    record = sim.run()
    columns = request_columns(record)
    slo = SLO.parse(settings.slo) if settings.slo is not None else None
    metrics = compute_metrics(record, slo, settings.drop_first, columns)
    row = flattened(metrics)
    row |= count_requests(record)
    if settings.bubbles:
        row["bubbles"] = metrics["bubbles"]
    measured = columns.finished.copy()
    measured[: int(settings.drop_first * len(measured))] = False
    values = columns.latency_per_output_token_s[measured]
    row["distribution"] = np.percentile(values, QUANTILES).tolist() if len(values) else []
    return row


def _config(settings: Settings) -> SystemConfig:
    limits = Limits(
        block_size=settings.block_size, max_seqs=settings.max_seqs, max_batch_tokens=settings.max_batch_tokens
    )
    options = options_by_policy([settings.policy], dict(settings.policy_opt))
    return SystemConfig(
        policy=settings.policy,
        policy_options=options[settings.policy],
        hardware=settings.hardware,
        model=settings.model,
        cost_model=settings.cost,
        cost_options=dict(settings.cost_opt),
        limits=limits,
        tp=settings.tp,
        dtype=settings.dtype,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_gpu_blocks=settings.kv_gpu_blocks,
        kv_cpu_blocks=settings.kv_cpu_blocks,
        kv_gpu_bytes=size_of(settings.kv_gpu_bytes, "kv_gpu_bytes"),
        kv_cpu_bytes=size_of(settings.kv_cpu_bytes, "kv_cpu_bytes"),
    )


def flattened(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The ``metrics`` of a run as one level: ``ttft_s_p99``, ``utilization_gpu``; None where not measured."""
    flat: dict[str, Any] = {}
    for name in METRICS:
        value: Any = metrics.get(name)
        if value is None:
            group, _, part = name.rpartition("_")
            inside = metrics.get(group)
            value = inside.get(part) if isinstance(inside, Mapping) else None
        flat[name] = value
    return flat


def work(settings: Settings) -> tuple[dict[str, Any] | None, str]:
    """``run_point`` for a worker process: errors meant for people come back as their text."""
    try:
        return run_point(settings), ""
    except NeoError as error:
        return None, " ".join(str(error).split())


def check_metric(name: str, what: str) -> None:
    """InputError if there is no such column."""
    if name not in METRICS:
        from neo.core.plugins import close_matches

        raise InputError(f"{what} '{name}': no such metric{close_matches(name, METRICS)}")

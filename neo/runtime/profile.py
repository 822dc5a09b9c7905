"""``neo profile``: measures every operation kind of an executor into a cost table.

Steps of chosen shapes run through the executor as an engine would run them; their operations' times fill the
tables of ``neo-cost-table/1`` (docs/cost-models.md). SCHEDULE, the host's own time, is taken from a short run
of a whole engine.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from neo import __version__
from neo.core.pipeline import recv_bytes, send_bytes
from neo.core.request import Tier
from neo.core.view import Limits
from neo.cost.table_schema import FORMAT, SHAPE_FIELDS
from neo.runtime.engine import Engine
from neo.runtime.measure import Bench, Measured
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.setup import EngineParts
from neo.system.config import System

Progress = Callable[[str, float], None]
"""Told what is being measured, and the share that is done."""

_SCHEDULE_PROMPT, _SCHEDULE_OUTPUT = 24, 32  # tokens of the requests that SCHEDULE is measured with
_SCHEDULE_SEQS = 64


@dataclass(frozen=True, slots=True)
class Grid:
    """What to measure.

    Attributes:
        tokens: rows of dense work, and lengths of prefill chunks.
        starts: prefixes of prefill chunks.
        sequences: of decode attention.
        gpu_kv: KV tokens that decode attention reads on the GPU, over all sequences.
        cpu_kv: likewise on the CPU.
        moved: tokens whose KV is swapped.
        spilled: tokens whose new KV goes to the host.
        repeats: measured runs of each step.
    """

    tokens: tuple[int, ...]
    starts: tuple[int, ...]
    sequences: tuple[int, ...]
    gpu_kv: tuple[int, ...]
    cpu_kv: tuple[int, ...]
    moved: tuple[int, ...]
    spilled: tuple[int, ...]
    repeats: int

    @classmethod
    def for_budget(cls, limits: Limits, gpu: int, cpu: int, staged: int, quick: bool = False) -> Grid:
        """Powers of 2 (dense work, which is not linear) and 4 up to a system's budgets.

        ``gpu``, ``cpu`` and ``staged`` are the tokens that each tier and the staging buffer hold. ``quick``
        takes powers of 4, and fewer repeats.
        """
        size = limits.block_size
        most = max(gpu - 4 * size, 2)
        tokens = _powers(1, min(limits.max_batch_tokens, most), 4 if quick else 2)
        starts = [n for n in _powers(4 * size, most - tokens[-1], 8) if 0 < n <= most - tokens[-1]]
        both = min(gpu, cpu) // 2
        return cls(
            tokens,
            (0, *(starts or [size])),
            _powers(1, min(limits.max_seqs, most), 4),
            _powers(1, most, 4),
            _powers(1, max(cpu - 4 * size, 2), 4),
            _powers(size, max(both, size + 1), 8),
            _powers(1, max(2, min(staged - size, limits.max_batch_tokens)), 8),
            3 if quick else 7,
        )


def _powers(first: int, last: int, ratio: int) -> tuple[int, ...]:
    """``first``, times ``ratio`` again and again, and ``last``; at least two values."""
    found = [first]
    while found[-1] * ratio < last:
        found.append(found[-1] * ratio)
    if last > found[-1]:
        found.append(last)
    return tuple(found) if len(found) > 1 else (first, first + 1)


@dataclass(slots=True)
class _Samples:
    """Seconds by operation and size."""

    found: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def add(self, table: str, size: int, seconds: float) -> None:
        self.found.setdefault(table, {}).setdefault(size, []).append(seconds)

    def curve(self, table: str, axis: str) -> dict[str, Any]:
        """A one-axis table; of several measurements of one size, the median."""
        sizes = sorted(self.found[table])
        seconds = [statistics.median(self.found[table][n]) for n in sizes]
        return {"axes": {axis: sizes}, "seconds": seconds}


class Profiler:
    """Measures one executor; ``tables()`` gives the document.

    Args:
        parts: the loaded model.
        system: budgets, and the policy whose planning SCHEDULE is measured with.
        quick: a coarser grid and fewer repeats.
        progress: told how far it is.
    """

    def __init__(
        self, parts: EngineParts, system: System, quick: bool = False, progress: Progress | None = None
    ) -> None:
        self.parts = parts
        self.system = system
        self.limits = system.config.limits
        self.progress = progress or (lambda _what, _share: None)
        scheduler = system.scheduler()
        pools = scheduler.view.pools
        self.room = {tier: pools[tier].tokens for tier in Tier}
        self.staged = pools[Tier.GPU].staging_blocks * self.limits.block_size
        self.grid = Grid.for_budget(self.limits, self.room[Tier.GPU], self.room[Tier.CPU], self.staged, quick)
        self.samples = _Samples()
        self.staging_layers = pools[Tier.GPU].staging_layers
        self.on_cpu = self.room[Tier.CPU] > 0 and self.staged > 0

    def document(self, command: str) -> dict[str, Any]:
        """Measure everything; the content of a cost-table file (JSON-serialisable)."""
        engine = self.parts.engine(self.system)
        try:
            bench = Bench(
                engine.executor,
                self.parts.spec,
                self.limits.block_size,
                self.staging_layers,
                self.grid.repeats,
            )
            tables = self._tables(bench)
            described = engine.executor.describe()
        finally:
            engine.close()
        tables["schedule"] = self._schedule()
        model = self.parts.spec
        return {
            "format": FORMAT,
            "provenance": self._provenance(described, bench.spreads, command),
            "model": {name: getattr(model, name) for name in ("name", *SHAPE_FIELDS)},
            "tp": 1,
            "dtype": described["dtype"],
            "tables": tables,
            "contention": self._contention(),
        }

    # -- tables -------------------------------------------------------------------------------------------

    def _tables(self, bench: Bench) -> dict[str, Any]:
        self._chunks(bench)
        tables: dict[str, Any] = {}
        tables["gpu_attn_prefill"] = self._prefill(bench)
        tables["gpu_attn_decode"] = self._decode(bench, Tier.GPU, "GPU_ATTN:0")
        if self.on_cpu:
            tables["cpu_attn"] = self._decode(bench, Tier.CPU, "CPU_ATTN:0")
            self._moves(bench)
            for name in ("swap_out", "swap_in"):
                tables[name] = self.samples.curve(name, "bytes")
            tables["stream"] = self._streams(bench) or tables["swap_in"]
            for name, most in (("send", send_bytes), ("recv", recv_bytes)):
                # Nothing is moved: both sides of this executor see the same memory.
                size = most(self.limits.max_seqs, self.parts.spec)
                tables[name] = {"axes": {"bytes": [1, max(2, size)]}, "seconds": [0.0, 0.0]}
        for name, axis in (("embed", "tokens"), ("pre", "tokens"), ("post", "tokens"), ("head", "sequences")):
            tables[name] = self.samples.curve(name, axis)
        return tables

    def _note(self, found: Measured, tokens: int, rows: int) -> None:
        for name, key, size in (
            ("embed", "EMBED:-1", tokens),
            ("pre", "PRE:0", tokens),
            ("post", "POST:0", tokens),
            ("head", "HEAD:-1", rows),
        ):
            self.samples.add(name, size, found[key].seconds)

    def _chunks(self, bench: Bench) -> None:
        """Dense work at every number of tokens."""
        for i, n in enumerate(self.grid.tokens):
            self.progress("prefill", 0.2 * i / len(self.grid.tokens))
            found = bench.prefill(0, n)
            self._note(found, n, 1)
            self.samples.add("chunk", n, found["GPU_ATTN:0"].seconds)

    def _prefill(self, bench: Bench) -> dict[str, Any]:
        """Prefill attention by chunk length and prefix."""
        starts = self.grid.starts
        rows = []
        for i, n in enumerate(self.grid.tokens):
            row = [statistics.median(self.samples.found["chunk"][n])]
            for start in starts[1:]:
                self.progress("prefill over a prefix", 0.2 + 0.2 * i / len(self.grid.tokens))
                row.append(bench.prefill(start, n)["GPU_ATTN:0"].seconds)
            rows.append(row)
        axes = {"length": list(self.grid.tokens), "start": list(starts)}
        return {"axes": axes, "seconds": rows}

    def _decode(self, bench: Bench, tier: Tier, key: str) -> dict[str, Any]:
        """Decode attention of one tier by sequences and KV tokens."""
        sizes = self.grid.gpu_kv if tier is Tier.GPU else self.grid.cpu_kv
        rows: list[list[float]] = []
        for i, n in enumerate(self.grid.sequences):
            row: list[float] = []
            for kv in sizes:
                done = (0.4 if tier is Tier.GPU else 0.6) + 0.2 * i / len(self.grid.sequences)
                self.progress(f"decode attention on the {tier}", done)
                lengths = self._lengths(n, kv, self.room[tier])
                if lengths is None:  # more blocks than there are: not asked for, and kept monotone
                    row.append(row[-1] if row else rows[-1][0])
                    continue
                found = bench.decode(lengths, tier)
                row.append(found[key].seconds)
                if tier is Tier.GPU:
                    self._note(found, n, n)
            rows.append(row)
        axes = {"sequences": list(self.grid.sequences), "kv_tokens": list(sizes)}
        return {"axes": axes, "seconds": rows}

    def _lengths(self, sequences: int, kv_tokens: int, room: int) -> list[int] | None:
        """KV tokens of each of ``sequences`` that share ``kv_tokens``; None if their blocks do not fit."""
        each, more = divmod(max(kv_tokens, sequences), sequences)
        lengths = [each + (i < more) for i in range(sequences)]
        size = self.limits.block_size
        return lengths if sum(-(-n // size) for n in lengths) * size <= room else None

    def _moves(self, bench: Bench) -> None:
        """Swaps out and in; and new KV that goes to the host, by the same table."""
        token = self.parts.spec.kv_bytes_per_token_layer
        for i, tokens in enumerate(self.grid.moved):
            self.progress("swaps", 0.8 + 0.1 * i / len(self.grid.moved))
            out, into = bench.swap(tokens)
            size = bench.blocks(tokens) * self.limits.block_size * token
            self.samples.add("swap_out", size, out["SWAP_OUT:-1"].seconds)
            self.samples.add("swap_in", size, into["SWAP_IN:-1"].seconds)
        for tokens in self.grid.spilled:
            found = bench.prefill(0, tokens, Tier.CPU)
            self.samples.add("swap_out", tokens * token, found["SWAP_OUT:0"].seconds)

    def _streams(self, bench: Bench) -> dict[str, Any] | None:
        """Prefixes streamed to a chunk whose KV lives on the host."""
        size = self.limits.block_size
        starts = [n for n in _powers(size, max(size, self.staged - 2 * size), 8) if n + size <= self.staged]
        if len(starts) < 2:
            return None
        token = self.parts.spec.kv_bytes_per_token_layer
        for n in starts:
            found = bench.prefill(n, 1, Tier.CPU)
            self.samples.add("stream", n * token, found["STREAM:0"].seconds)
        return self.samples.curve("stream", "bytes")

    # -- the host's own time ------------------------------------------------------------------------------

    def _schedule(self) -> dict[str, Any]:
        """SCHEDULE by requests in the step: a line through the medians of a short engine run."""
        self.progress("scheduling", 0.9)
        most = max(2, min(_SCHEDULE_SEQS, self.limits.max_seqs))
        engine = self.parts.engine(self.system)
        try:
            points = _host_seconds(engine, most, self.parts.spec.vocab)
        finally:
            engine.close()
        sizes = np.array(sorted(points))
        medians = np.array([statistics.median(points[n]) for n in sizes])
        slope, base = np.polyfit(sizes, medians, 1) if len(sizes) > 1 else (0.0, medians[0])
        slope = max(0.0, float(slope))
        base = max(float(base), float(medians.min()) / 2)
        ends = [1, max(2, self.limits.max_seqs)]
        return {"axes": {"sequences": ends}, "seconds": [base + slope * n for n in ends]}

    # -- what else a file holds ---------------------------------------------------------------------------

    def _contention(self) -> dict[str, Any]:
        out = self.samples.found.get("swap_out")
        size = max(out) if out else 1
        rate = size / statistics.median(out[size]) if out else self.parts.hardware.d2h_bandwidth
        return {
            "cpu_share_beside_copy": 1.0,
            "copy_share_duplex": 1.0,
            "copy_bandwidth": rate,
            "source": "bandwidth measured; contention between copies and CPU attention is not",
        }

    def _provenance(
        self, described: dict[str, Any], spreads: Sequence[float], command: str
    ) -> dict[str, Any]:
        hardware = self.parts.hardware
        kernels = [str(described["backend"].get(key, "")) for key in ("kind", "target", "version")]
        return {
            "hardware": hardware.name,
            "gpu": hardware.gpu,
            "cpu": hardware.cpu,
            "driver": f"{platform.system()} {platform.release()}",
            "versions": {
                "neo": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "kernels": " ".join(kernels).strip(),
            },
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": command,
            "repeats": self.grid.repeats,
            "spread": float(statistics.median(spreads)),
        }


def _host_seconds(engine: Engine, sequences: int, vocab: int) -> dict[int, list[float]]:
    """Seconds of SCHEDULE by requests in the step, of a run that fills up and empties."""
    random = np.random.default_rng(0)
    for i in range(2 * sequences):
        prompt = random.integers(0, vocab, _SCHEDULE_PROMPT).tolist()
        # Lengths from 1 up: requests end one after the other, so that every size of step occurs.
        tokens = 1 + i * _SCHEDULE_OUTPUT // (2 * sequences)
        engine.add(f"s{i}", prompt, SamplingParams(tokens, 0.0, ignore_eos=True))
    found: dict[int, list[float]] = {}
    while engine.has_work:
        engine.step()
        if engine.last is not None and engine.steps > 2:
            found.setdefault(engine.last_sequences, []).append(engine.last.seconds[0])
    return found

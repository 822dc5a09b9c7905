"""``neo profile``: measures every operation kind of an executor into a cost table.

Steps of chosen shapes run through the executor as an engine would run them; their operations' times fill the
tables of ``neo-cost-table/1`` (docs/cost-models.md). Steps that the executor replays are timed as they are
replayed (``neo.runtime.measure``): where such numbers are, others of the same size do not count.

All shapes are gone through several times, so that a machine whose speed drifts biases no part of the table
against another, each time in another order: like a step of an engine, one that is measured finds the caches
as a different one left them. SCHEDULE, the host's own time, comes from a short run of a whole engine.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from random import Random
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch

from neo import __version__
from neo.core.errors import InputError
from neo.core.pipeline import recv_bytes, send_bytes
from neo.core.record import RunRecord
from neo.core.request import Tier
from neo.core.runlog import RunLog
from neo.cost.table_schema import FORMAT, SHAPE_FIELDS
from neo.runtime.engine import Engine
from neo.runtime.measure import WHOLE, Bench, Measured
from neo.runtime.profile_grid import Grid, from_nothing, to_corner, to_corners
from neo.runtime.profile_samples import Samples, typical
from neo.runtime.profile_steps import STEP, between, check_steps
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.setup import EngineParts
from neo.system.config import System

Progress = Callable[[str, float], None]
"""Told what is being measured, and the share that is done."""

_ROUNDS, _QUICK_ROUNDS = 8, 4  # behind one that is not counted
_SCHEDULE_PROMPT, _SCHEDULE_OUTPUT = 24, 12  # tokens of the requests that SCHEDULE is measured with
_SCHEDULE_SEQS = 64
_SCHEDULE_STEPS = 6  # that a number of requests needs to count: others are of steps with prompts
_COMPANY, _COMPANY_TOKENS = 8, 16384  # decodes beside which copies are measured, and their KV tokens
_BESIDE = "beside"  # what is measured there: (operation, beside what)
_OPS, _TIMES = ("CPU_ATTN:0", "SWAP_OUT:-1", "SWAP_IN:-1"), ("alone", "out", "in", "both")


class Profiler:
    """Measures one executor; ``document()`` gives the file's content.

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
        # A policy without staging buffers leaves requests the whole budget: a table for every policy.
        self.whole = replace(system, config=replace(system.config, policy="gpu-only", policy_options={}))
        self.room = _room(self.whole)
        size = self.limits.block_size
        if self.room[Tier.GPU] < 2 * max(size, 2):
            raise InputError(
                f"neo profile needs at least 2 GPU KV blocks of {size} tokens, not {system.gpu_blocks}: "
                "give more --kv-gpu-blocks"
            )
        self.on_cpu = self.room[Tier.CPU] > 0
        self.grid = Grid.for_budget(
            self.limits, self.room[Tier.GPU], self.room[Tier.CPU], quick, parts.max_model_len
        )
        self.rounds = _QUICK_ROUNDS if quick else _ROUNDS
        self.samples = Samples()
        self.padded: tuple[int, ...] = ()  # rows of steps that are replayed

    def document(self, command: str) -> dict[str, Any]:
        """Measure everything; the content of a cost-table file (JSON-serialisable)."""
        engine = self.parts.engine(self.whole, timed=True)
        try:
            bench = Bench(engine.executor, self.parts.spec, self.limits.block_size, replayed=True)
            self.padded = bench.replaying.sizes if bench.replaying is not None else ()
            self._measure(list(self._shapes(bench)))
            described = engine.executor.describe()
        finally:
            engine.close()
        model = self.parts.spec
        tables = {**self._tables(), "schedule": self._schedule()}
        document: dict[str, Any] = {
            "format": FORMAT,
            "provenance": self._provenance(described, command),
            "model": {name: getattr(model, name) for name in ("name", *SHAPE_FIELDS)},
            "tp": 1,
            "dtype": described["dtype"],
            "tables": tables,
            "contention": self._contention(),
        }
        document["provenance"]["steps"] = check_steps(document, self.samples)
        return document

    # -- measuring ----------------------------------------------------------------------------------------

    def _measure(self, steps: list[tuple[str, Callable[[], None]]]) -> None:
        random = Random(0)
        for i in range(1 + self.rounds):
            for k, (what, measure) in enumerate(steps):
                self.progress(what, 0.9 * (i + k / len(steps)) / (1 + self.rounds))
                measure()
            if i == 0:
                self.samples = Samples()  # first runs take longer
            random.shuffle(steps)

    def _shapes(self, bench: Bench) -> Iterator[tuple[str, Callable[[], None]]]:
        """What to run in each round."""
        grid = self.grid
        for n in grid.tokens:
            for start in grid.starts:
                if start + n <= max(self.room[Tier.GPU], grid.tokens[-1]):
                    yield "prefill", partial(self._chunk, bench, n, start)
        for n in grid.beyond:
            yield "dense work of both tiers", partial(self._beyond, bench, n)
        for n in grid.rows:
            yield "sampling", partial(self._rows, bench, n)
        for n in grid.gpu_sequences:
            for kv in grid.gpu_kv:
                yield "decode attention on the GPU", partial(self._decode, bench, Tier.GPU, n, kv)
        if bench.replaying is not None:
            for n in between(grid.gpu_sequences):  # and one more, as it is then that most rows are nobody's
                for kv in between(grid.gpu_kv):
                    yield "whole steps", partial(self._whole, bench, n + 1, kv)
        if not self.on_cpu:
            return
        for n in grid.cpu_sequences:
            for kv in grid.cpu_kv:
                yield "decode attention on the CPU", partial(self._decode, bench, Tier.CPU, n, kv)
        for n in grid.moved:
            yield "swaps", partial(self._swap, bench, n)
        for n in grid.spilled:
            yield "new KV to the host", partial(self._spill, bench, n)
        for n in grid.streamed:
            yield "streams", partial(self._stream, bench, n)
        # Two requests move past each other beside the decodes, a block's room for each.
        tokens = min(_COMPANY_TOKENS, self.room[Tier.GPU] // 2, self.room[Tier.CPU] // 4)
        if tokens >= _COMPANY * self.limits.block_size:
            yield "attention beside copies", partial(self._beside, bench, tokens)

    def _rows(self, bench: Bench, n: int) -> None:
        """Decodes that yield ``n`` tokens: on the GPU as many as its blocks allow, the others on the host."""
        size = self.limits.block_size
        on_gpu = min(n, self.room[Tier.GPU] // size)
        on_cpu = min(
            n - on_gpu, self.room[Tier.CPU] // size
        )  # fewer only where the axis has a value too many
        found = bench.mixed({}, {Tier.GPU: on_gpu, Tier.CPU: on_cpu})
        self._dense(found, on_gpu + on_cpu, on_gpu + on_cpu)

    def _beyond(self, bench: Bench, n: int) -> None:
        """Rows whose KV the GPU cannot hold: a chunk that fills it, the others bound for or on the host."""
        on_gpu = min(n, self.room[Tier.GPU])
        bound = min(n - on_gpu, *self.room.values())
        decodes = n - on_gpu - bound
        found = bench.mixed({Tier.GPU: on_gpu, Tier.CPU: bound}, {Tier.CPU: decodes})
        self._dense(found, n, (on_gpu > 0) + (bound > 0) + decodes)

    def _dense(self, found: Measured, tokens: int, rows: int) -> None:
        for table, name, size in (
            ("embed", "EMBED:-1", tokens),
            ("pre", "PRE:0", tokens),
            ("post", "POST:0", tokens),
            ("head", "HEAD:-1", rows),
        ):
            for seconds in found[name]:
                self.samples.add(table, (size,), seconds, WHOLE in found)

    def _add(self, table: str, at: tuple[int, ...], seconds: list[float], scale: float = 1.0) -> None:
        for value in seconds:
            self.samples.add(table, at, scale * value)

    def _chunk(self, bench: Bench, length: int, start: int) -> None:
        found = bench.prefill(start, length)
        self._dense(found, length, 1)
        self._add("gpu_attn_prefill", (length, start), found["GPU_ATTN:0"])

    def _decode(self, bench: Bench, tier: Tier, sequences: int, kv_tokens: int) -> None:
        """Decode attention; where blocks do not suffice for ``kv_tokens``, of fewer, scaled up."""
        table, name = ("gpu_attn_decode", "GPU_ATTN:0") if tier is Tier.GPU else ("cpu_attn", "CPU_ATTN:0")
        lengths = self._lengths(tier, sequences, kv_tokens)
        n, read = len(lengths), sum(lengths)
        found = bench.decode(lengths, tier)
        self._add(STEP, (n, read), found.get(WHOLE, []))
        if tier is Tier.GPU:
            self._dense(found, n, n)
        else:
            self._add("head", (n,), found["HEAD:-1"])
            spec = self.parts.spec
            self._add("send", (send_bytes(n, spec),), found["SEND:0"])
            self._add("recv", (recv_bytes(n, spec),), found["RECV:0"])
        self._add(table, (sequences, kv_tokens), found[name], max(1.0, kv_tokens / read))

    def _lengths(self, tier: Tier, sequences: int, kv_tokens: int) -> list[int]:
        """``kv_tokens`` dealt out to ``sequences``, as far as a tier has blocks; at least a token to each."""
        size = self.limits.block_size
        n = min(sequences, self.room[tier] // size)  # fewer only where the axis has one value too many
        fitting = (self.room[tier] // size // n) * size * n
        each, more = divmod(max(min(kv_tokens, fitting), n), n)
        return [each + (i < more) for i in range(n)]

    def _whole(self, bench: Bench, sequences: int, kv_tokens: int) -> None:
        """A step between the sizes of the tables, to be held against them."""
        lengths = self._lengths(Tier.GPU, sequences, kv_tokens)
        self._add(STEP, (len(lengths), sum(lengths)), bench.whole(lengths))

    def _swap(self, bench: Bench, tokens: int) -> None:
        room = self.room[Tier.GPU] - self.limits.block_size
        out, into = bench.swap(tokens, Tier.GPU if tokens <= room else Tier.CPU)
        size = bench.blocks(tokens) * self.limits.block_size * self.parts.spec.kv_bytes_per_token_layer
        self._add("swap_out", (size,), out["SWAP_OUT:-1"])
        self._add("swap_in", (size,), into["SWAP_IN:-1"])

    def _spill(self, bench: Bench, tokens: int) -> None:
        """New KV that goes to the host has the price of a swap."""
        found = bench.prefill(0, tokens, Tier.CPU)
        self._add("swap_out", (tokens * self.parts.spec.kv_bytes_per_token_layer,), found["SWAP_OUT:0"])

    def _stream(self, bench: Bench, tokens: int) -> None:
        found = bench.prefill(tokens, 1, Tier.CPU)
        self._add("stream", (tokens * self.parts.spec.kv_bytes_per_token_layer,), found["STREAM:0"])

    def _beside(self, bench: Bench, tokens: int) -> None:
        alone, out, into, both = bench.company(min(_COMPANY, self.limits.max_seqs), tokens)
        for name, found in (("alone", alone), ("out", out), ("in", into), ("both", both)):
            for op in ("CPU_ATTN:0", "SWAP_OUT:-1", "SWAP_IN:-1"):
                if op in found:
                    self._add(_BESIDE, (_OPS.index(op), _TIMES.index(name)), found[op])

    # -- tables ---------------------------------------------------------------------------------------------

    def _tables(self) -> dict[str, Any]:
        grid, samples = self.grid, self.samples
        tables = {
            "embed": samples.curve("embed", "tokens", self.padded),
            "pre": samples.curve("pre", "tokens", self.padded),
            "post": samples.curve("post", "tokens", self.padded),
            "head": samples.curve("head", "sequences", self.padded),
            "gpu_attn_prefill": samples.surface(
                "gpu_attn_prefill", {"length": grid.tokens, "start": grid.starts}
            ),
            "gpu_attn_decode": samples.surface(
                "gpu_attn_decode", {"sequences": grid.gpu_sequences, "kv_tokens": grid.gpu_kv}
            ),
        }
        if self.on_cpu:
            axes = {"sequences": grid.cpu_sequences, "kv_tokens": grid.cpu_kv}
            tables["cpu_attn"] = to_corners(samples.surface("cpu_attn", axes))
            tables["swap_out"] = from_nothing(samples.curve("swap_out", "bytes"))
            tables["swap_in"] = from_nothing(samples.curve("swap_in", "bytes"))
            streamed = samples.sizes("stream")
            tables["stream"] = samples.curve("stream", "bytes") if streamed else tables["swap_in"]
            tables["send"] = to_corner(samples.curve("send", "bytes"))
            tables["recv"] = to_corner(samples.curve("recv", "bytes"))
        return tables

    # -- the host's own time ------------------------------------------------------------------------------

    def _schedule(self) -> dict[str, Any]:
        """SCHEDULE by requests in the step, from short engine runs of 1, 2, 4, ... requests.

        Recorded and logged, as runs are that somebody measures: that is part of a step's time on the host.
        Beyond what was measured the last two points go on as a line.
        """
        self.progress("scheduling", 0.9)
        most = max(2, min(_SCHEDULE_SEQS, self.limits.max_seqs))
        room = min([n for n in (*_room(self.system).values(), self.parts.max_model_len) if n])
        output = max(1, min(_SCHEDULE_OUTPUT, room // 2))
        prompt = max(1, min(_SCHEDULE_PROMPT, room - output))
        with TemporaryFile("w") as file:
            engine = self.parts.engine(self.system, log=RunLog(file, {}), record=RunRecord())
            try:
                points = _host_seconds(engine, most, prompt, output)
            finally:
                engine.close()
        sizes = sorted(points)
        seconds = np.maximum.accumulate([typical(points[n]) for n in sizes])
        last = max(sizes[-1] + 1, self.limits.max_seqs)
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
        ends = [*seconds.tolist(), float(seconds[-1] + slope * (last - sizes[-1]))]
        return {"axes": {"sequences": [*sizes, last]}, "seconds": ends}

    # -- what else a file holds ---------------------------------------------------------------------------

    def _contention(self) -> dict[str, Any]:
        sizes = self.samples.sizes("swap_out")
        known = sizes[-1] / self.samples.at("swap_out", (sizes[-1],)) if sizes else None
        cpu = self._share("CPU_ATTN:0", "alone", ("out", "in"))
        duplex = [self._share("SWAP_OUT:-1", "out", ("both",)), self._share("SWAP_IN:-1", "in", ("both",))]
        return {
            "cpu_share_beside_copy": cpu or 1.0,
            "copy_share_duplex": min([share for share in duplex if share] or [1.0]),
            "copy_bandwidth": known or self.parts.hardware.d2h_bandwidth,
            "source": "measured: CPU attention alone and beside copies, copies one way and both"
            if cpu
            else "bandwidth measured; budgets leave no room to measure contention",
        }

    def _share(self, op: str, before: str, beside: tuple[str, ...]) -> float | None:
        """The rate of an operation beside company over its rate before, at most 1; None if not measured."""
        at = _OPS.index(op)
        known = self.samples.points(_BESIDE)
        alone = (at, _TIMES.index(before))
        shared = [(at, _TIMES.index(name)) for name in beside]
        if alone not in known:
            return None
        seconds = [self.samples.at(_BESIDE, where) for where in shared if where in known]
        return min(1.0, self.samples.at(_BESIDE, alone) / max(seconds)) if seconds else None

    def _provenance(self, described: dict[str, Any], command: str) -> dict[str, Any]:
        hardware = self.parts.hardware
        kernels = [str(described["backend"].get(key, "")) for key in ("kind", "target", "version")]
        return {
            "hardware": hardware.name,
            "gpu": hardware.gpu,
            "cpu": hardware.cpu,
            "driver": str(described.get("driver", f"{platform.system()} {platform.release()}")),
            "versions": {
                "neo": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "kernels": " ".join(kernels).strip(),
            },
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": command,
            "repeats": self.rounds,
            "spread": self.samples.spread(),
            "raised": self.samples.raised,
        }


def _room(system: System) -> dict[Tier, int]:
    """Tokens of KV that requests may have on each tier."""
    pools = system.scheduler().view.pools
    return {tier: pools[tier].tokens for tier in Tier}


def _host_seconds(engine: Engine, most: int, prompt: int, output: int) -> dict[int, list[float]]:
    """Seconds of SCHEDULE by requests in the step: by powers of two as far as budgets allow, one run each.

    InputError if the policy runs none.
    """
    random = np.random.default_rng(0)
    steps: list[tuple[int, float]] = []
    rejected = ""
    for count in [1 << i for i in range(most.bit_length())]:
        for i in range(count):
            ids = random.integers(0, engine.vocab, prompt).tolist()
            engine.add(f"s{count}-{i}", ids, SamplingParams(output, 0.0, ignore_eos=True))
        while engine.has_work:
            ran = engine.steps
            outputs = engine.step()
            if engine.steps > ran and engine.last is not None:
                steps.append((engine.last_sequences, engine.last.seconds[0]))
            elif not outputs:
                raise engine.scheduler.stalled()
            rejected = next((o.detail for o in outputs if o.detail), rejected)
    if not steps:
        raise InputError(f"requests of {prompt + output} tokens cannot run under these budgets: {rejected}")
    found: dict[int, list[float]] = {}
    for size, seconds in steps:
        found.setdefault(size, []).append(seconds)
    enough = {size: seconds for size, seconds in found.items() if len(seconds) >= _SCHEDULE_STEPS}
    return enough or found

"""An engine whose model costs nothing (or a set time), alone or behind the real server.

For ``engine_overhead.py`` and ``serve_overhead.py``: what is left is what neo itself costs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from array import array
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from neo.core.graph import StepGraph
from neo.core.plan import StepPlan
from neo.core.record import RunRecord
from neo.core.request import Tier
from neo.core.view import Limits
from neo.runtime import tiny
from neo.runtime.block_tables import BlockTables
from neo.runtime.engine import Engine, EngineOptions
from neo.runtime.engine_config import EngineConfig
from neo.runtime.executor import Sample, StepTimes
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.server.launch import Built, Launch
from neo.runtime.server.limits import ServerLimits
from neo.runtime.server.run import ServeConfig, run_server
from neo.runtime.server.spawn import spawn
from neo.runtime.setup import EngineParts
from neo.runtime.step_inputs import StepInputs

MAX_LENGTH = 1 << 20


class NullExecutor:
    """Computes nothing; every token is the same one.

    Args:
        tables: block tables.
        vocab: tokens of the model.
        token: the one that is sampled.
        busy_s: processor time for which a step keeps its core busy, as a model on the CPU does.
        grid_s: if not 0, a step sleeps until the clock shows a multiple of it, as one that waits for a GPU:
            whoever reads the same clock later knows how old a token is.
        trace: where ``close`` writes, as JSON, when each step began, on the wall clock and in processor time
            of this process, and how many tokens it brought. The process's number lies beside it, in ``.pid``.
    """

    def __init__(
        self,
        tables: BlockTables,
        vocab: int,
        token: int = 0,
        busy_s: float = 0.0,
        grid_s: float = 0.0,
        trace: Path | None = None,
    ) -> None:
        self.tables = tables
        self._logits = torch.zeros(1, vocab)
        self._logits[0, token] = 1.0
        self._busy_s = busy_s
        self._grid_s = grid_s
        self._trace = trace
        self.begins = array("d")
        self.processor = array("d")
        self.tokens = array("q")
        if trace is not None:
            trace.with_suffix(".pid").write_text(str(os.getpid()))

    def run(
        self, plan: StepPlan, graph: StepGraph, inputs: StepInputs, copies: Any, sample: Sample
    ) -> StepTimes:
        begin = time.perf_counter()
        self.begins.append(begin)
        busy = time.process_time()
        self.processor.append(busy)
        self.tokens.append(len(inputs.sampled))
        while self._busy_s and time.process_time() < busy + self._busy_s:
            pass
        if self._grid_s:
            time.sleep(self._grid_s - begin % self._grid_s)
        if inputs.sampled:
            sample(self._logits.expand(len(inputs.sampled), -1), inputs.sampled)
        return StepTimes(begin, time.perf_counter(), [0.0] * len(graph.works))

    def describe(self) -> dict[str, Any]:
        return {"executor": "null"}

    def close(self) -> None:
        if self._trace is not None:
            columns = (self.begins, self.processor, self.tokens)
            self._trace.write_text(json.dumps([column.tolist() for column in columns]))


def build(
    config: EngineConfig,
    record: RunRecord | None,
    log: TextIO | None = None,
    core: int | None = None,
    **pace: Any,
) -> Built:
    """An engine on a NullExecutor; ``pace`` is what that takes beyond tables and vocabulary.

    With ``core`` its process keeps to that core.
    """
    if core is not None:
        os.sched_setaffinity(0, {core})
    parts = EngineParts(config)
    system = parts.system()
    scheduler = system.scheduler()
    pools = scheduler.view.pools
    size = config.limits.block_size
    tables = BlockTables(parts.spec.layers, size, pools[Tier.GPU].total, pools[Tier.CPU].total)
    executor = NullExecutor(tables, parts.spec.vocab, **pace)
    return Engine(scheduler, executor, parts.spec.vocab, EngineOptions(MAX_LENGTH), record=record), system


def config_for(sequences: int, tokens: int) -> EngineConfig:
    """The tiny model with room on the GPU for that many sequences of that many tokens."""
    return EngineConfig(
        str(tiny.FOLDER),
        policy="gpu-only",
        hardware="g5.16xlarge",
        limits=Limits(16, sequences, 8192),
        kv_gpu_blocks=sequences * (tokens // 16 + 2),
        kv_cpu_blocks=0,
        gpu_threads=1,
    )


def run_alone(engine: Engine, sequences: int, tokens: int) -> None:
    """Run without a server, until SIGTERM; prints a line when every sequence has a token.

    A step lies between two arrivals, as behind a server: not all sequences need their next block at once.
    """
    engine.brief = True  # as behind a server: no object per token that nobody reads
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    for i in range(sequences):
        engine.add(str(i), list(range(16)), SamplingParams(tokens - 16, 0.0, ignore_eos=True))
        engine.step()
    print(flush=True)
    while engine.has_work and not ended:
        engine.step()
    engine.executor.close()


def main() -> None:
    """Serve, until SIGTERM; prints the address. To be imported: the engine's process imports it too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--busy", type=float, default=0.0)
    parser.add_argument("--grid", type=float, default=0.0)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--core", type=int, help="of the engine's process; the HTTP process takes the others")
    parser.add_argument("--alone", action="store_true", help="no server: the engine alone, until SIGTERM")
    args = parser.parse_args()
    pace = {"busy_s": args.busy, "grid_s": args.grid, "trace": args.trace}
    size = config_for(args.sequences, args.tokens)
    if args.alone:
        run_alone(build(size, None, None, args.core, **pace)[0], args.sequences, args.tokens)
        return
    child = spawn()
    if args.core is not None:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {args.core})
    launch = Launch(size, partial(build, core=args.core, token=ord("a"), **pace))
    limits = ServerLimits(stream_buffer=1 << 16)
    config = ServeConfig(
        child, launch, tiny.FOLDER, ("null",), port=0, limits=limits, log_style="none",
        announce=lambda address: print(address, flush=True),
    )  # fmt: skip
    raise SystemExit(run_server(config))

"""What a step costs the host beside the model: planning, block tables, inputs, bookkeeping.

usage: python benchmarks/engine_overhead.py [--sequences 64] [--tokens 200]

An executor that computes nothing, so that all that is measured is the engine's own; then the same requests on
a real one, for the scheduler's share of a step. One thread, no wall-clock target: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

from null_engine import build

from neo.core.view import Limits
from neo.runtime.engine import Engine
from neo.runtime.engine_config import EngineConfig
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.setup import EngineParts

PROMPT = 32


def fill(engine: Engine, sequences: int, tokens: int) -> None:
    for i in range(sequences):
        engine.add(f"r{i}", [i % 7] * PROMPT, SamplingParams(tokens, 0.0, ignore_eos=True))


def run(engine: Engine, sequences: int) -> tuple[list[float], list[float]]:
    """Seconds of whole steps, and of their SCHEDULE, in which all sequences decode."""
    whole, schedule = [], []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - start
        if engine.last is not None and engine.last_sequences == sequences:
            whole.append(seconds)
            schedule.append(engine.last.seconds[0])
    return whole[2:], schedule[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--model", default="stories15m")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    args = parser.parse_args()
    n, tokens = args.sequences, args.tokens
    blocks = n * (PROMPT + tokens) // 16 + n
    limits = Limits(16, 2 * n, 4096)
    for name, gpu, cpu in (
        ("gpu-only", blocks + n, 0),
        ("neo", blocks // 2, 2 * blocks),
        ("fastdecode", blocks // 2, 2 * blocks),
    ):
        config = EngineConfig(
            args.model,
            "dummy",
            policy=name,
            limits=limits,
            kv_gpu_blocks=gpu,
            kv_cpu_blocks=cpu,
            max_model_len=1 << 20,
            hardware="g5.16xlarge",
        )
        parts = EngineParts(config)
        engine, _ = build(config, None)
        fill(engine, n, tokens)
        if args.profile:
            profiler = cProfile.Profile()
            profiler.runcall(run, engine, n)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(22)
            continue
        alone, _ = run(engine, n)
        engine = parts.engine(parts.system())
        fill(engine, n, tokens)
        whole, schedule = run(engine, n)
        engine.close()
        if not whole or not alone:
            print(f"{name}: no step had all {n} requests")
            continue
        middle = statistics.median
        print(
            f"{name}: {1e6 * middle(alone):.0f} us per step without the model ({n} requests); "
            f"of a {1e3 * middle(whole):.2f} ms step SCHEDULE is {middle(schedule) / middle(whole):.1%}"
        )


if __name__ == "__main__":
    main()

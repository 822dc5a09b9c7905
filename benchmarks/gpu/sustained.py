"""What prompts take when they come without pause: the GPU's clocks fall as its power reaches the limit.

    python benchmarks/gpu/sustained.py

Steps of one chunk come one at a time with a rest between, then without any: other products keep the GPU at
work while the host prepares the next one. Prints, for every half second, what a layer's PRE, attention and
POST take by events around them, in the median, and the GPU's clock and power from nvidia-smi.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from neo.core.errors import InputError
from neo.core.view import Limits
from neo.runtime.engine_config import EngineConfig
from neo.runtime.measure import Bench, Measured
from neo.runtime.setup import EngineParts

_QUERY = "clocks.sm,power.draw,clocks_event_reasons.sw_power_cap"
_EACH = 0.5  # seconds of a line
_FILLING = 5  # products, 1.6 ms each: about what the host needs for a step
_KINDS = ("PRE", "GPU_ATTN", "POST")


def watched() -> list[str]:
    """Clock, power, and whether it is the power that holds the clock down; empty without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [part.strip() for part in found.stdout.splitlines()[0].split(",")]


def phase(name: str, seconds: float, step: Callable[[], Measured]) -> list[dict[str, Any]]:
    """Run steps for a while; what a layer's operations took in each half second."""
    rows = []
    until = time.perf_counter() + seconds
    while (now := time.perf_counter()) < until:
        took: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        while time.perf_counter() < now + _EACH:
            found = step()
            for kind in _KINDS:
                took[kind] += found[f"{kind}:0"]
        us = {kind: 1e6 * statistics.median(times) for kind, times in took.items()}
        rows.append({"phase": name, "us": us, "gpu": watched()})
        each = "  ".join(f"{kind} {value:5.0f}" for kind, value in us.items())
        print(f"{name:24}{each} us   {'   '.join(rows[-1]['gpu'])}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 1685, 1024], help="of a chunk")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each phase")
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    args = parser.parse_args()
    if min(args.tokens) < 16 or args.seconds <= 0.0:
        parser.error("chunks of at least 16 tokens, for some seconds")
    most = max(args.tokens)
    config = EngineConfig(
        args.model,
        load_format="dummy",
        dtype=args.dtype,
        device="cuda",
        policy="gpu-only",
        limits=Limits(max_batch_tokens=most, max_seqs=64),
        kv_gpu_blocks=2 * most // 16,
        kv_cpu_blocks=0,
        max_model_len=2 * most,
        ahead=True,
    )
    try:
        parts = EngineParts(config)
        engine = parts.engine(parts.system(), slices_of=1 << 30)  # events, and nothing ahead of a step
    except InputError as error:
        parser.error(str(error))
    bench = Bench(engine.executor, parts.spec, config.limits.block_size)
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def step(tokens: int, rest: bool) -> Measured:
        if rest:
            time.sleep(0.2)
        else:
            for _ in range(_FILLING):
                torch.mm(left, right)
        return bench.prefill(0, tokens)

    try:
        rows: list[dict[str, Any]] = []
        for rest in (True, False):
            for tokens in args.tokens:
                name = f"{tokens} tokens, {'with rests' if rest else 'no pause'}"
                rows += phase(name, args.seconds, partial(step, tokens, rest))
    finally:
        engine.close()
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

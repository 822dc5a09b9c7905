"""Where a decode step's time goes on a GPU: the graph's own time, its parts, and the host's part around it.

    python benchmarks/gpu/step.py --sequences 64 --tokens 1000

Prints medians over the steps in which all sequences decode, in microseconds, beside the time in which the
GPU could read the weights and the KV cache once at the bandwidth that was measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from neo.core.view import Limits
from neo.runtime.cuda_linear import Choice, Size, padded_rows
from neo.runtime.engine_config import EngineConfig
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.setup import EngineParts


def timed(where: Any, name: str, spent: dict[str, list[float]], label: str) -> None:
    """Replace a method by one that notes how long it takes."""
    call: Callable[..., Any] = getattr(where, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent[label].append(time.perf_counter() - start)

    setattr(where, name, wrapper)


def bandwidth(device: torch.device) -> float:
    """Bytes per second of reading a gigabyte."""
    data = torch.ones(1 << 28, dtype=torch.float32, device=device)
    best = 1.0
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        data.sum()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e-3)
    return data.numel() * 4 / best


def kernels_of(found: Any) -> str:
    """Kernels by total time: microseconds, launches, names."""
    rows = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:16]
    return "\n".join(f"{e.self_device_time_total:10.0f} us {e.count:6d}  {e.key[:90]}" for e in rows)


def choices_of(executor: Any, rows: int) -> list[tuple[Size, Choice]]:
    """What products of so many rows were tuned to."""
    both = [*executor._tuned.layers.choices.items(), *executor._tuned.head.choices.items()]
    return [(size, choice) for size, choice in both if size.rows == padded_rows(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ahead", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--policy", default="gpu-only")
    parser.add_argument(
        "--tuned", action=argparse.BooleanOptionalAction, default=True, help="matrix products"
    )
    parser.add_argument(
        "--search", type=int, default=1, choices=(0, 1, 2), help="for products, see neo_cuda.h"
    )
    parser.add_argument("--profile", action="store_true", help="kernels of ten steps, by torch's profiler")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    blocks = args.sequences * (args.tokens + args.steps + 40) // 16 + args.sequences + 100
    parts = EngineParts(
        EngineConfig(
            args.model,
            load_format="dummy",
            dtype="bfloat16",
            device="cuda",
            hardware="h200-16c",
            policy=args.policy,
            limits=Limits(max_batch_tokens=8192, max_seqs=1024),
            kv_gpu_blocks=blocks,
            kv_cpu_blocks=0,
            max_model_len=args.tokens + args.steps + 40,
            ahead=args.ahead,
        )
    )
    engine = parts.engine(parts.system())
    executor: Any = engine.executor
    if not args.tuned:
        executor._tuned.layers.most_rows = executor._tuned.head.most_rows = 0
    spent: dict[str, list[float]] = defaultdict(list)
    for i in range(args.sequences):
        prompt = [(7 * i + j) % 1000 + 3 for j in range(args.tokens)]
        engine.add(str(i), prompt, SamplingParams(args.steps + 20, 0.0, ignore_eos=True))
    began = time.perf_counter()
    if args.search != 1:  # once more, for the rows of these steps
        for products in (executor._tuned.layers, executor._tuned.head):
            products.search = args.search
            products.forget()
            with torch.inference_mode():
                products.prepare(args.sequences)
    searched = time.perf_counter() - began
    while len(engine.scheduler.view.gpu_decodes) < args.sequences:
        engine.step()
    for _ in range(5):
        engine.step()
    timed(engine, "_plan", spent, "plan")
    timed(engine, "_finish", spent, "finish")
    timed(engine, "_launch", spent, "launch")
    timed(executor, "start", spent, "executor's part")
    timed(executor._ops, "choose", spent, "sampling")
    timed(executor._ops, "fill", spent, "inputs")
    timed(executor._ops.mirror, "update", spent, "tables")
    timed(executor._graphs, "replay", spent, "find graph")
    timed(executor.tables, "begin", spent, "take blocks")
    for _ in range(args.steps - 20):
        start = time.perf_counter()
        engine.step()
        spent["step"].append(time.perf_counter() - start)
    spec = parts.spec
    rate = bandwidth(parts.device.torch)
    kv = args.sequences * (args.tokens + 30) * spec.kv_bytes_per_token
    floor = (spec.weight_bytes + kv) / rate
    result = {name: 1e6 * statistics.median(values) for name, values in spent.items()}
    graphs = list(executor._graphs._known.values())
    if graphs:
        graph, _ = graphs[-1]
        seconds = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        result["graph alone"] = 1e6 * statistics.median(seconds)
    result["floor"] = 1e6 * floor
    for name, value in result.items():
        print(f"{name:30} {value:9.0f} us")
    for size, choice in choices_of(executor, args.sequences):
        print(
            f"  {size.out} x {size.in_}{' added' if size.add else ''}: {choice.seconds * 1e6:.1f} us "
            f"(first {choice.first_seconds * 1e6:.1f}), {choice.chosen} of {choice.candidates}, "
            f"tile {choice.tile} stages {choice.stages} splits {choice.splits} cluster {choice.cluster}"
        )
    if args.search != 1:
        print(f"  searched for {searched:.1f} s")
    print(f"read bandwidth {rate / 1e9:.0f} GB/s; step / floor {result['step'] / result['floor']:.2f}")
    if args.profile and graphs:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            for _ in range(10):
                graphs[-1][0].replay()
            torch.cuda.synchronize()
        print(kernels_of(found))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    engine.close()


if __name__ == "__main__":
    main()

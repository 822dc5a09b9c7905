"""Steps of prompts alone on a GPU: how long they take beside what their products need at the GPU's own rate.

    python benchmarks/gpu/prefill.py --tokens 8192 --prompt 1024

Prints the median step, the rate of matrix products measured in the same run, and with --profile the kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from step import kernels_of

from neo.core.view import Limits
from neo.runtime.engine_config import EngineConfig
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.setup import EngineParts


def matmul_rate(device: torch.device, rows: int) -> float:
    """Operations per second of bf16 products of many rows with a layer's largest matrix."""
    x = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16)
    w = torch.randn(28672, 4096, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            x @ w.t()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-4)
    return 2.0 * x.shape[0] * x.shape[1] * w.shape[0] / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    count = args.steps * args.tokens // args.prompt
    parts = EngineParts(
        EngineConfig(
            args.model,
            load_format="dummy",
            dtype="bfloat16",
            device="cuda",
            hardware="h200-16c",
            policy="gpu-only",
            policy_options={"token_budget": str(args.tokens)},
            limits=Limits(max_batch_tokens=args.tokens, max_seqs=1024),
            kv_gpu_blocks=count * (args.prompt // 16 + 2),
            kv_cpu_blocks=0,
            max_model_len=args.prompt + 40,
            ahead=True,
        )
    )
    engine = parts.engine(parts.system())
    for i in range(count):
        engine.add(
            str(i),
            [(7 * i + j) % 1000 + 3 for j in range(args.prompt)],
            SamplingParams(1, 0.0, ignore_eos=True),
        )
    seconds: list[float] = []

    def steps(number: int) -> None:
        for _ in range(number):
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)

    steps(2)
    seconds.clear()
    steps(args.steps - 4)
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            engine.step()
            torch.cuda.synchronize()
        print(kernels_of(found))
    spec = parts.spec
    rate = matmul_rate(parts.device.torch, args.tokens)
    products = 2.0 * args.tokens * (spec.weight_bytes / spec.dtype_bytes - 2 * spec.vocab * spec.hidden)
    result = {"step": statistics.median(seconds), "products at full rate": products / rate}
    for name, value in result.items():
        print(f"{name:30} {1e3 * value:9.2f} ms")
    print(
        f"{rate / 1e12:.0f} TFLOP/s; step / products {result['step'] / result['products at full rate']:.2f}"
    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    engine.close()


if __name__ == "__main__":
    main()

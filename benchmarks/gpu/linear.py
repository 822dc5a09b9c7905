"""Measures matrix products of few rows: torch's, torch's through cuBLASLt, and the tuned ones of neo.

usage: linear.py [--out FILE.json] [--rows 1,16,64] [--models llama-3.1-8b] [--search 1]

For every weight of a model and every number of rows: 20 products in one CUDA graph (4 of a large head's),
each with the next of several copies of the weight (more than an L2 holds), the median of replays. Printed as
the bandwidth of reading the weight once, and as a share of what reading alone reaches in the same run. A
variant that fails is reported and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo.runtime import cuda_library
from neo.runtime import cuda_linear as tuned

GB = 1e9
NODES = 20
REPLAYS = 7
COPIES_BYTES = 512 << 20
Run = Callable[[Tensor, Tensor, Tensor], None]

# name: (out, in, how often in a step)
MODELS: dict[str, dict[str, tuple[int, int, int]]] = {
    "llama-3.1-8b": {
        "qkv": (6144, 4096, 32),
        "out": (4096, 4096, 32),
        "gate_up": (28672, 4096, 32),
        "down": (4096, 14336, 32),
        "head": (128256, 4096, 1),
    },
    "llama-2-7b": {
        "qkv": (12288, 4096, 32),
        "out": (4096, 4096, 32),
        "gate_up": (22016, 4096, 32),
        "down": (4096, 11008, 32),
        "head": (32000, 4096, 1),
    },
}
VARIANTS = ["torch", "torch_lt", "tuned"]


def median_seconds(work: Callable[[int], object], nodes: int, replays: int = REPLAYS) -> float:
    """Of one call of ``work(i)``, of which a graph holds so many."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        work(0)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(nodes):
                work(i)
        graph.replay()
        found = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / nodes)
    return statistics.median(found)


def read_bandwidth() -> float:
    """Bytes per second of reading device memory: the best of sums of 1 GiB."""
    data = torch.ones(1 << 28, device="cuda")
    return data.nbytes / median_seconds(lambda _: data.sum(), 3)


@contextmanager
def library(name: str) -> Iterator[None]:
    """torch's matrix products by this library."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def by_torch(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.mm(x, weight.t(), out=out)


class Shape:
    """A weight in several copies, and what is measured of it."""

    def __init__(self, out: int, width: int, dtype: torch.dtype, search: int) -> None:
        self.dtype, self.search = dtype, search
        self.bytes = 2 * out * width
        copies = max(1, -(-COPIES_BYTES // self.bytes))
        self.weights = [
            torch.randn(out, width, device="cuda", dtype=dtype) * width**-0.5 for _ in range(copies)
        ]
        self.workspace = torch.empty(tuned.WORKSPACE, dtype=torch.uint8, device="cuda")

    def measure(self, rows: int) -> dict[str, Any]:
        """Every variant at one number of rows."""
        n, k = self.weights[0].shape
        x = torch.randn(rows, k, device="cuda", dtype=self.dtype)
        out = torch.empty(rows, n, device="cuda", dtype=self.dtype)
        exact = x.float() @ self.weights[0].float().t()
        found: dict[str, Any] = {}
        for name in VARIANTS:
            try:
                found[name] = self._variant(name, x, out, exact)
            except Exception as error:  # what fails is reported, the others go on
                found[name] = {"error": f"{type(error).__name__}: {error}"}
        return found

    def _variant(self, name: str, x: Tensor, out: Tensor, exact: Tensor) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if name == "torch_lt":
            with library("cublaslt"):
                return self._timed(by_torch, x, out, exact)
        if name == "torch":
            return self._timed(by_torch, x, out, exact)
        if name == "triton":
            return self._triton(x, out, exact)
        out_width, width = self.weights[0].shape
        size = tuned.Size(len(x), out_width, width, self.dtype, False)
        began = time.perf_counter()
        plan = tuned.Plan(size, self.workspace, search=self.search)
        about["choice"] = asdict(plan.tune(x, self.weights, None, out))
        about["tuning_seconds"] = time.perf_counter() - began
        return self._timed(lambda x, w, out: plan(x, w, None, out), x, out, exact) | about

    def _triton(self, x: Tensor, out: Tensor, exact: Tensor) -> dict[str, Any]:
        """The best of a few layouts."""
        import linear_triton as lt

        if len(x) > 128:
            raise ValueError("for up to 128 rows")
        found = lt.configs(*self.weights[0].shape, cuda_library.describe().multiprocessors)
        parts = lt.parts_for(found, len(x), len(self.weights[0]))
        measured = []
        for config in found:

            def run(x: Tensor, weight: Tensor, out: Tensor, config: lt.Config = config) -> None:
                lt.multiply(config, x, weight, parts, out)

            try:
                measured.append(self._timed(run, x, out, exact) | {"config": asdict(config)})
            except Exception as error:  # too much shared memory, mostly
                print(f"      {config}: {type(error).__name__}: {error}")
        return min(measured, key=lambda m: m["seconds"])

    def _timed(self, run: Run, x: Tensor, out: Tensor, exact: Tensor) -> dict[str, Any]:
        out.zero_()
        run(x, self.weights[0], out)
        error = float((out.float() - exact).abs().max() / exact.abs().max())
        count = len(self.weights)
        seconds = median_seconds(
            lambda i: run(x, self.weights[i % count], out), NODES if self.bytes < COPIES_BYTES else 4
        )
        return {"seconds": seconds, "bytes_per_s": self.bytes / seconds, "error": error}


def line(name: str, rows: int, found: dict[str, Any], ceiling: float) -> str:
    """One row of the table."""
    text = f"  {name:8s} {rows:5d}"
    for variant in VARIANTS:
        of = found[variant]
        if "error" in of and "seconds" not in of:
            text += "            failed            "
        else:
            rate = of["bytes_per_s"]
            text += f"  {of['seconds'] * 1e6:7.1f} us {rate / GB:5.0f} GB/s {rate / ceiling:6.1%}"
    choice = found["tuned"].get("choice")
    if choice:
        text += (
            f"  {choice['chosen']}/{choice['candidates']} id {choice['algorithm']} tile {choice['tile']}"
            f" stages {choice['stages']} splits {choice['splits']} cluster {choice['cluster']}"
            f" in {found['tuned']['tuning_seconds']:.2f} s, error {found['tuned']['error']:.1e}"
        )
    if "config" in found.get("triton", {}):
        text += f"\n      triton: {found['triton']['config']}, error {found['triton']['error']:.1e}"
    for variant in VARIANTS:
        if "seconds" not in found[variant]:
            text += f"\n      {variant}: {found[variant]['error']}"
    return text


def totals(
    shapes: dict[str, tuple[int, int, int]], results: dict[str, Any], rows: Sequence[int], ceiling: float
) -> None:
    """Of all products of a step."""
    floor = sum(2 * n * k * times for n, k, times in shapes.values()) / ceiling
    print(f"  a step's products; reading the weights once takes {floor * 1e3:.3f} ms")
    for m in rows:
        text = f"  {'step':8s} {m:5d}"
        for variant in VARIANTS:
            parts = [results[name][m][variant].get("seconds") for name in shapes]
            if None in parts:
                text += "            -                 "
                continue
            total = sum(p * times for p, (_, _, times) in zip(parts, shapes.values(), strict=True))
            text += f"  {total * 1e3:7.3f} ms             {floor / total:6.1%}"
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", default="1,4,16,32,64,128,256")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--search", type=int, default=1, choices=(0, 1, 2), help="how widely, see neo_cuda.h")
    parser.add_argument("--triton", action="store_true", help="also a plain Triton kernel (compiles first)")
    parser.add_argument("--within", type=float, default=55.0, help="seconds; what is left then is left out")
    args = parser.parse_args()
    began = time.perf_counter()
    if args.triton:
        VARIANTS.append("triton")
    torch.manual_seed(0)
    rows = [int(m) for m in args.rows.split(",")]
    info = cuda_library.describe()
    ceiling = read_bandwidth()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "l2_bytes": info.l2_bytes,
        "read_bytes_per_s": ceiling,
        "search": args.search,
        "models": {},
    }
    print(f"{results['device']}, torch {torch.__version__}; reading alone {ceiling / GB:.0f} GB/s")
    for model in args.models.split(","):
        print(model, args.dtype)
        print(f"  {'weight':8s} {'rows':>5s}" + "".join(f"  {v:^28s}" for v in VARIANTS))
        found: dict[str, Any] = {}
        results["models"][model] = found
        for name, (out, width, _) in MODELS[model].items():
            shape = Shape(out, width, getattr(torch, args.dtype), args.search)
            found[name] = {}
            for m in rows:
                if time.perf_counter() - began > args.within:
                    print("  no time left for the rest")
                    break
                found[name][m] = shape.measure(m)
                print(line(name, m, found[name][m], ceiling), flush=True)
            del shape
            torch.cuda.empty_cache()
        if all(len(of) == len(rows) for of in found.values()):
            totals(MODELS[model], found, rows, ceiling)
    tuning = [
        of["tuned"].get("tuning_seconds", 0.0)
        for m in results["models"].values()
        for r in m.values()
        for of in r.values()
    ]
    results["tuning_seconds"] = sum(tuning)
    print(f"tuning {sum(tuning):.2f} s of {len(tuning)} sizes, all {time.perf_counter() - began:.1f} s")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

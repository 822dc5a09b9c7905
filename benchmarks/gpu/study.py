"""neo beside gpu-only on a GPU with little memory for KV: throughput, latency, and the most the host can add.

    python benchmarks/gpu/study.py --hardware P/hardware.toml --cost profiled:P/cost.json --out OUT

For every KV budget and output length both policies run on the engine: random weights, prompts of 1000 tokens,
all requests at once, or arriving at random at a rate that is the same for both. Every run's folder is as
'neo bench' writes it, for 'neo validate'.

The bound beside the gain is that of ``bandwidth_bound``, with the rates of products and of reading measured
in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bandwidth_bound import PROMPT, best_gain
from prefill import matmul_rate

from neo.cli.bench import Measured, MeasuredRun, TokenIds
from neo.cli.runner import Output, Runner
from neo.core.errors import InputError
from neo.core.view import Limits
from neo.runtime.engine_config import EngineConfig
from neo.runtime.machine import read_bandwidth, usable_cores
from neo.runtime.prompts import random_prompts
from neo.runtime.replay import ReplayOptions
from neo.runtime.setup import EngineParts
from neo.system.config import System
from neo.workload.arrivals import apply_arrivals
from neo.workload.base import Workload
from neo.workload.synthetic import synthetic

BLOCK = 16  # tokens
# KV tokens of the GPU, output tokens: requests, for some ten seconds of gpu-only on an H200 with an 8B model
POINTS = {
    (3200, 50): 90, (3200, 200): 30, (3200, 400): 16,
    (6400, 50): 140, (6400, 200): 50, (6400, 400): 30,
    (12800, 50): 220, (12800, 200): 90, (12800, 400): 55,
    (26368, 50): 300, (26368, 200): 160, (26368, 400): 100,
    (45056, 50): 340, (45056, 200): 220, (45056, 400): 140,
}  # fmt: skip


class Point(NamedTuple):
    """What is to be run."""

    tokens: int  # of KV that the GPU holds
    output: int
    requests: int
    rate: float  # requests/s; 0: all at once

    @classmethod
    def parse(cls, text: str) -> Point:
        """``tokens/output/requests`` with ``@rate`` behind it or not; what cannot be run is an error now."""
        try:
            counts, _, rate = text.partition("@")
            tokens, output, requests = map(int, counts.split("/"))
            point = cls(tokens, output, requests, float(rate or 0))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected KV/output/requests[@rate]") from None
        try:
            point.workload()
        except InputError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
        if tokens < BLOCK:
            raise argparse.ArgumentTypeError(f"{text!r}: {tokens} KV tokens, less than a block of {BLOCK}")
        return point

    def workload(self) -> Workload:
        """Its requests, lengths within 10 %."""
        found = synthetic(f"around:{PROMPT}:0.1", f"around:{self.output}:0.1", self.requests)
        return apply_arrivals(found, "poisson", self.rate) if self.rate else found

    @property
    def name(self) -> str:
        """For folders."""
        return f"{self.tokens}-{self.output}" + (f"-{self.rate:g}" if self.rate else "")


def points_of(args: argparse.Namespace) -> list[Point]:
    """What was asked for."""
    if args.points:
        return args.points
    chosen = [(t, o, n) for (t, o), n in POINTS.items() if t in args.budgets and o in args.outputs]
    return [Point(t, o, max(8, round(args.share * n)), 0.0) for t, o, n in chosen]


def arguments() -> argparse.Namespace:
    """What was asked for, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hardware", default="h200-16c")
    parser.add_argument("--cost", default="roofline")
    parser.add_argument("--budgets", type=int, nargs="+", default=[3200, 6400, 12800, 26368, 45056])
    parser.add_argument("--outputs", type=int, nargs="+", default=[50, 200, 400])
    parser.add_argument(
        "--points", nargs="+", type=Point.parse,
        help="instead: KV tokens/output tokens/requests, with @requests/s where they arrive at random",
    )  # fmt: skip
    parser.add_argument("--policies", nargs="+", default=["gpu-only", "neo"])
    parser.add_argument("--policy-opt", action="append", default=[], help="POLICY.KEY=VALUE")
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--host-tokens", type=int, default=160000, help="KV tokens of the host")
    parser.add_argument("--share", type=float, default=1.0, help="of the requests of every point")
    parser.add_argument(
        "--stop-after", type=float, default=540.0, help="seconds; points that do not fit are left out"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    names = [point.name for point in points_of(args)]
    if twice := {name for name in names if names.count(name) > 1}:
        parser.error(f"points would write to the same folders: {', '.join(sorted(twice))}")
    return args


def options_of(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Every policy's options, by its name."""
    found: dict[str, dict[str, str]] = {policy: {} for policy in args.policies}
    for given in args.policy_opt:
        name, _, value = given.partition("=")
        policy, _, key = name.partition(".")
        found[policy][key] = value
    return found


def loaded(args: argparse.Namespace) -> EngineParts:
    """The model, for all runs."""
    return EngineParts(
        EngineConfig(
            args.model,
            load_format="dummy",
            dtype=args.dtype,
            device=args.device,
            hardware=args.hardware,
            cost_model=args.cost,
            limits=Limits(max_batch_tokens=args.batch_tokens, max_seqs=256),
            max_model_len=PROMPT * 2,
            ahead=True,
        )
    )


def run(parts: EngineParts, system: System, point: Point, where: Path) -> dict[str, Any]:
    """What comes of a policy at a point; its run log and results go to a folder."""
    workload = point.workload()
    prompts = random_prompts(workload, parts.spec.vocab, 0)
    how = Measured(parts, prompts, TokenIds.random, ReplayOptions(0.0, None), True, timeline=0, bubbles=False)
    output = Output(where, False, None, 0.0, tuple(sys.argv))
    result = Runner(MeasuredRun(system, workload, 0, how), output).run(show_progress=False)
    gc.collect()
    if parts.device.kind == "cuda":
        torch.cuda.empty_cache()
    metrics = result.summary["metrics"]
    return {
        "request_throughput": metrics["request_throughput"],
        "tpot_s": metrics["tpot_s"]["mean"],
        "per_token_s": metrics["latency_per_output_token_s"]["mean"],
        "ttft_s": metrics["ttft_s"]["mean"],
        "steps": metrics["steps"],
        "pipelined": metrics["steps_pipelined"],
        "relayed": metrics["steps_relayed"],
        "preemptions": metrics["preemptions"],
        "bytes_d2h": metrics["bytes_d2h"],
    }


def main() -> None:
    args = arguments()
    began = time.perf_counter()
    options = options_of(args)
    parts = loaded(args)
    on_gpu = parts.device.kind == "cuda"
    products = matmul_rate(parts.device.torch, 8192) if on_gpu else parts.hardware.gpu_flops
    threads = usable_cores() - 1
    read = read_bandwidth(threads) or parts.hardware.cpu_bandwidth
    print(f"{products / 1e12:.0f} TFLOP/s, {read / 1e9:.0f} GB/s by {threads} threads", flush=True)
    about = {"model": args.model, "products": products, "host_read": read, "batch_tokens": args.batch_tokens}
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for point in points_of(args):
        if time.perf_counter() - began > args.stop_after:
            print("out of time", file=sys.stderr)
            break
        row: dict[str, Any] = {"kv_tokens": point.tokens, "output": point.output, "requests": point.requests}
        row |= {"rate": point.rate} if point.rate else {}
        for policy in args.policies:
            system = parts.system(
                policy=policy,
                policy_options=options[policy],
                kv_gpu_blocks=point.tokens // BLOCK,
                kv_cpu_blocks=0 if policy == "gpu-only" else args.host_tokens // BLOCK,
            )
            row[policy] = run(parts, system, point, args.out / f"{point.name}-{policy}")
        if "gpu-only" in row and not point.rate:
            base = row["gpu-only"]["request_throughput"]
            row["bound"] = best_gain(parts.spec, point.output, base, products, read)
        rows.append(row)
        print(line(row), flush=True)
        (args.out / "study.json").write_text(json.dumps({**about, "rows": rows}, indent=1))
    print(f"{time.perf_counter() - began:.0f} s")


def line(row: dict[str, Any]) -> str:
    """A row for the terminal: requests/s of each policy, their ratio to the first, the bound."""
    runs = {name: run for name, run in row.items() if isinstance(run, dict)}
    first = next(iter(runs.values()))
    found = [f"{row['kv_tokens']:6d} tokens, 1000/{row['output']:<4d}"]
    found += [f"{row['rate']:g}/s"] if "rate" in row else []
    for name, run in runs.items():
        ratio = run["request_throughput"] / first["request_throughput"]
        latency = run["per_token_s"] / first["per_token_s"]
        rate = run["request_throughput"]
        found.append(
            f"{name} {rate:6.2f}/s x{ratio:.3f} latency x{latency:.3f} "
            f"({run['pipelined']} pipelined, {run['relayed']} relayed)"
        )
    if "bound" in row:
        found.append(f"bound x{row['bound']:.3f}")
    return "  ".join(found)


if __name__ == "__main__":
    main()

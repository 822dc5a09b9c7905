"""`neo`, with and without relayed decodes, beside `gpu-only`, simulated on an H200 with little memory.

    python benchmarks/relay_grid.py

For memory budgets, output lengths and loads (all at once, and Poisson arrivals at shares of what `gpu-only`
serves): throughput and mean latency per output token over those of `gpu-only`, the 99th percentile of the
latter, and relayed steps. Ends with 1 if throughput falls below 0.99 anywhere.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from neo.core.view import Limits
from neo.report.metrics import compute_metrics
from neo.sim.setup import SystemConfig, build_system, simulation
from neo.workload import apply_arrivals, synthetic

LATENCY = "latency_per_output_token_s"


def metrics(policy: str, blocks: int, output: int, rate: float | None, requests: int, relay: str) -> Any:
    """Of one simulated run."""
    options = {"relay": relay} if policy == "neo" else {}
    config = SystemConfig(
        policy,
        "h200-16c",
        policy_options=options,
        kv_gpu_blocks=blocks,
        kv_cpu_blocks=10_000,
        limits=Limits(max_batch_tokens=2304),
    )
    work = synthetic("around:1000:0.1", f"around:{output}:0.1", n=requests, seed=0)
    if rate is not None:
        work = apply_arrivals(work, "poisson", rate=rate, seed=1)
    return compute_metrics(simulation(build_system(config), work).run())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[200, 800, 1648])
    parser.add_argument("--outputs", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--loads", type=float, nargs="*", default=[0.95, 1.1], help="beside all at once")
    args = parser.parse_args()
    least = 1.0
    print(" blocks output    load   relay  throughput  latency      p99  relayed steps")
    for blocks in args.blocks:
        for output in args.outputs:
            served = None
            for load in (None, *args.loads):
                count = blocks // 3 + 160
                rate = None if load is None or served is None else load * served
                base = metrics("gpu-only", blocks, output, rate, count, "")
                served = served or base["request_throughput"]
                for relay in ("true", "false"):
                    found = metrics("neo", blocks, output, rate, count, relay)
                    share = found["request_throughput"] / base["request_throughput"]
                    mean, p99 = (found[LATENCY][name] / base[LATENCY][name] for name in ("mean", "p99"))
                    least = min(least, share)
                    name = "at once" if load is None else f"{load:g}"
                    print(
                        f"{blocks:7d} {output:6d} {name:>7} {relay:>7} {share:11.3f} {mean:8.3f} {p99:8.3f} "
                        f"{found['steps_relayed']:10d}",
                        flush=True,
                    )
    print(f"least throughput: {least:.3f} of gpu-only's")
    return int(least < 0.99)


if __name__ == "__main__":
    sys.exit(main())

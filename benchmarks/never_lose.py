"""Does ``neo`` ever lose against ``gpu-only``? A grid of machines, KV budgets, lengths and loads.

    python benchmarks/never_lose.py [--out DIR] [--requests N] [--seed N] [--policy-opt K=V] [--case TEXT]

Every point runs the same requests, with the same arrival times, under both policies, until all have ended.
Loads are set by ``gpu-only``: it first runs each workload all at once, and rates are shares of what it then
reaches. Points run as those of a study (``neo compare``): in parallel, kept in ``--out``, resumed. Writes
``results.csv``, a row a point, and prints what breaks a bound: throughput below 0.99 or mean end-to-end
latency above 1.05 of ``gpu-only``'s.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from neo.cli.study import Point, Settings
from neo.cli.study_point import point_key
from neo.cli.study_run import STORE_FILE, Store, Workers, progress_bar

LEAST_THROUGHPUT = 0.99
MOST_LATENCY = 1.05
BASE, OURS = "gpu-only", "neo"


class Machine(NamedTuple):
    """A machine, a model, its KV budget in blocks (None: what is left of the GPU's memory), its workloads."""

    hardware: str
    model: str
    kv_gpu_blocks: int | None
    lengths: str = "usual"
    max_batch_tokens: int = 8192


MACHINES = (
    Machine("g4dn.4xlarge", "llama-2-7b", 54, "small", 832),
    Machine("g4dn.4xlarge", "qwen2.5-3b", 400, "small"),
    Machine("g5.4xlarge", "llama-3.1-8b", 500),
    Machine("g5.4xlarge", "llama-3.1-8b", 1650),
    Machine("g5.16xlarge", "llama-3.1-8b", 250),
    Machine("g5.16xlarge", "llama-3.1-8b", 800),
    Machine("g5.16xlarge", "llama-3.1-8b", 1650),
    Machine("h100", "llama-3.1-8b", 1650),
    Machine("h100", "llama-3.1-8b", None),
    Machine("h200-16c", "llama-3.1-8b", 400),
    Machine("h200-16c", "llama-3.1-8b", 2800),
    Machine("2xh100", "llama-3.1-70b", None),
    Machine("gh200", "qwen2.5-32b", 1000),
    Machine("gh200", "llama-3.1-8b", 2000),
)
LENGTHS: dict[str, dict[str, tuple[str, str]]] = {
    "usual": {
        "short/short": ("around:100:0.3", "around:30:0.3"),
        "short/long": ("around:100:0.3", "around:500:0.3"),
        "middle": ("around:1000:0.1", "around:200:0.1"),
        "long/short": ("around:3000:0.2", "around:50:0.2"),
        "chat": ("azure-conv", "azure-conv"),
    },
    "small": {
        "short/short": ("around:40:0.3", "around:15:0.3"),
        "short/long": ("around:40:0.3", "around:200:0.3"),
        "middle": ("around:200:0.1", "around:60:0.1"),
        "long/short": ("around:500:0.2", "around:20:0.2"),
        "spread": ("uniform:10:500", "uniform:1:250"),
    },
}


@dataclass(frozen=True)
class Load:
    """How requests arrive: all at once, or at a share of what ``gpu-only`` reaches, in bursts or not."""

    name: str
    share: float | None = None
    cv: float | None = None


LOADS = (
    Load("at once"),
    Load("0.7", 0.7),
    Load("0.9", 0.9),
    Load("1.1", 1.1),
    Load("bursts at 0.7", 0.7, 4.0),
)


def base_points(machines: Sequence[Machine], requests: int, seed: int = 0, only: str = "") -> list[Point]:
    """``gpu-only``, all at once, on every machine and workload."""
    points = []
    for m in machines:
        for name, (prompts, outputs) in LENGTHS[m.lengths].items():
            budget = "all" if m.kv_gpu_blocks is None else str(m.kv_gpu_blocks)
            at = (("hardware", m.hardware), ("model", m.model), ("kv_gpu_blocks", budget), ("lengths", name))
            settings = Settings(
                prompt_lengths=prompts,
                output_lengths=outputs,
                requests=requests,
                arrivals="all-at-once",
                seed=seed,
                policy=BASE,
                hardware=m.hardware,
                cost="roofline",
                model=m.model,
                kv_gpu_blocks=m.kv_gpu_blocks,
                max_batch_tokens=m.max_batch_tokens,
            )
            point = Point(BASE, (*at, ("load", LOADS[0].name)), settings)
            if only in point.name:
                points.append(point)
    return points


def under_load(base: Point, load: Load, reached: float, policy: str, options: dict[str, str]) -> Point:
    """A point's workload under another load and policy.

    Args:
        reached: requests/s of ``gpu-only`` all at once.
    """
    change: dict[str, Any] = {"policy": policy, "policy_opt": options if policy == OURS else {}}
    if load.share is not None:
        change |= {"arrivals": "gamma" if load.cv else "poisson", "cv": load.cv}
        change |= {"rate": float(f"{load.share * reached:.4g}")}
    settings = base.settings.model_copy(update=change)
    return Point(policy, (*base.at[:-1], ("load", load.name)), settings)


def run_grid(
    machines: Sequence[Machine],
    loads: Sequence[Load],
    requests: int,
    *,
    seed: int = 0,
    jobs: int | None = None,
    out: Path | None = None,
    options: dict[str, str] | None = None,
    only: str = "",
    show: bool = False,
) -> list[dict[str, Any]]:
    """Run the grid; one row a point, with both policies' figures and their ratios."""
    store = Store(out / STORE_FILE if out is not None else None)
    bases = base_points(machines, requests, seed, only)
    with ExitStack() as stack:
        bar = progress_bar(stack, "never lose") if show else None
        team = stack.enter_context(Workers(store, jobs, len(bases) * (2 * len(loads) + 1), bar))
        team.run_all(bases)
        pairs = []
        for base in bases:
            reached = store.rows[point_key(base.settings)]["request_throughput"]
            if not reached:
                continue  # nothing fits: both reject all
            for load in loads:
                ours, theirs = (under_load(base, load, reached, p, options or {}) for p in (OURS, BASE))
                pairs.append((ours, theirs))
        team.run_all([p for pair in pairs for p in pair])
    rows = [
        _row(ours, *(store.rows[point_key(p.settings)] for p in (ours, theirs))) for ours, theirs in pairs
    ]
    store.finish(point_key(p.settings) for p in [*bases, *(p for pair in pairs for p in pair)])
    return rows


FIGURES = (
    *("completed", "duration_s", "request_throughput", "e2e_s_mean", "e2e_s_p99", "ttft_s_mean"),
    *("tpot_s_mean", "preemptions", "steps", "steps_pipelined"),
)


def _row(point: Point, ours: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = dict(point.at)
    row["rate"] = point.settings.rate
    row["throughput_ratio"] = ours["request_throughput"] / base["request_throughput"]
    row["latency_ratio"] = ours["e2e_s_mean"] / base["e2e_s_mean"]
    for name, source in ((BASE, base), (OURS, ours)):
        row |= {f"{name}_{figure}": source[figure] for figure in FIGURES}
    return row


def loses(row: Mapping[str, Any]) -> bool:
    """Whether a point breaks a bound; both policies must have served the same requests."""
    return bool(
        row["throughput_ratio"] < LEAST_THROUGHPUT
        or row["latency_ratio"] > MOST_LATENCY
        or row[f"{OURS}_completed"] != row[f"{BASE}_completed"]
    )


def describe(row: Mapping[str, Any]) -> str:
    """A point in one line."""
    place = f"{row['hardware']:13} {row['model']:13} {row['kv_gpu_blocks']:>5} {row['lengths']:12}"
    place += f" {row['load']:14}"
    return (
        f"{place} throughput {row['throughput_ratio']:.3f}  latency {row['latency_ratio']:.3f}"
        f"  ttft {row[BASE + '_ttft_s_mean']:.2f} -> {row[OURS + '_ttft_s_mean']:.2f} s"
        f"  pipelined {row[OURS + '_steps_pipelined']} of {row[OURS + '_steps']}"
    )


def main() -> int:
    """Run the grid, write it, print what breaks a bound; 1 if anything does."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/never-lose"))
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--policy-opt", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--case", default="", help="only points in whose name this occurs")
    given = parser.parse_args()
    options = dict(text.split("=", 1) for text in given.policy_opt)
    started = time.perf_counter()
    rows = run_grid(
        MACHINES, LOADS, given.requests,
        seed=given.seed, jobs=given.jobs, out=given.out, options=options, only=given.case, show=True,
    )  # fmt: skip
    with (given.out / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    lost = [row for row in rows if loses(row)]
    for row in sorted(lost, key=lambda r: r["throughput_ratio"] - r["latency_ratio"]):
        print(describe(row))
    throughput = [r["throughput_ratio"] for r in rows]
    latency = [r["latency_ratio"] for r in rows]
    print(
        f"{len(lost)} of {len(rows)} points break a bound; throughput {min(throughput):.3f} to "
        f"{max(throughput):.3f}, mean {statistics.fmean(throughput):.3f}; latency {min(latency):.3f} to "
        f"{max(latency):.3f}, mean {statistics.fmean(latency):.3f}; {time.perf_counter() - started:.0f} s"
    )
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())

"""The linear layer of few rows beside torch's, on this GPU; see docs/results/gpu.md.

    python benchmarks/gpu/linear_kernel.py [--parts shapes cuts chain] [--out FILE.json]

Products of Llama-3.1-8B in bf16, in CUDA graphs, over so many weights that none is left in the L2 cache when
it is read again; medians of replays by CUDA events. ``shapes``: torch, ours, and ours where kernels do not
begin before the one ahead has ended; share of the read bandwidth measured in the same run; largest error
against torch in fp32, relative to the largest result. ``cuts``: ours by parts of the width and stages.
``chain``: the products of 16 layers, each from the one ahead, alone and with norms and SiLU between them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import GB, bandwidth, seconds_of, section
from neo.runtime import cuda_kernels as ck
from neo.runtime import cuda_library as c

HIDDEN, QKV, INNER = 4096, 6144, 14336
SHAPES = {  # columns, width
    "qkv": (QKV, HIDDEN),
    "out": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "head": (128256, HIDDEN),
}
ROWS = (1, 8, 16, 24, 32, 64)
COLD_BYTES = 400 << 20  # more than any L2 cache
LAYERS = 16
CHAINS: tuple[tuple[str, int | None, bool], ...] = (  # stages (None: torch), whether kernels overlap
    ("torch", None, True),
    ("ours", 0, True),
    ("5 stages", 5, True),
    ("4 stages", 4, True),
    ("3 stages", 3, True),
    ("no overlap", 0, False),
)
KIND: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}


def product(x: Tensor, weight: Tensor, out: Tensor) -> Callable[[], None]:
    """Torch's."""

    def run() -> None:
        torch.mm(x, weight.t(), out=out)

    return run


@dataclass(frozen=True)
class Case:
    """A product over several weights in turn."""

    name: str
    weights: list[Tensor]  # [columns, width]
    x: Tensor  # [64, width]
    out: Tensor  # [64, columns]

    @property
    def nodes(self) -> int:
        """Of a graph: all weights equally often, about a millisecond."""
        return len(self.weights) * max(1, round(1.5e9 / (len(self.weights) * self.weights[0].nbytes)))

    def theirs(self, rows: int) -> Callable[[], None]:
        turn = itertools.cycle([product(self.x[:rows], w, self.out[:rows]) for w in self.weights])
        return lambda: next(turn)()

    def ours(self, rows: int, parts: int = 0, stages: int = 0) -> Callable[[], None]:
        turn = itertools.cycle(
            [ck.project(self.x[:rows], w, None, self.out[:rows], parts, stages) for w in self.weights]
        )
        return lambda: next(turn)()


def case_of(name: str) -> Case:
    columns, width = SHAPES[name]
    count = max(2, -(-COLD_BYTES // (columns * width * 2)))
    weights = [torch.randn(columns, width, **KIND).mul_(width**-0.5) for _ in range(count)]
    return Case(name, weights, torch.randn(64, width, **KIND), torch.zeros(64, columns, **KIND))


def errors(case: Case, rows: int, exact: Tensor) -> tuple[float, float]:
    """Largest error of ours and of torch's, relative to the largest result."""
    found = []
    for work in (case.ours(rows), case.theirs(rows)):
        case.out.fill_(float("nan"))
        work()
        torch.cuda.synchronize()
        found.append(float((case.out[:rows].float() - exact[:rows]).abs().max() / exact.abs().max()))
    return found[0], found[1]


def shapes(ceiling: float) -> list[dict[str, Any]]:
    found = []
    for name in SHAPES:
        case = case_of(name)
        exact = case.x.float() @ case.weights[0].float().t()
        size = case.weights[0].nbytes
        for rows in ROWS:
            ours_off, theirs_off = errors(case, rows, exact)
            ways = {"torch": seconds_of(case.theirs(rows), times=case.nodes, replays=7)}
            for label, on in (("ours", True), ("ours, no overlap", False)):
                c.overlap(on)
                ways[label] = seconds_of(case.ours(rows), times=case.nodes, replays=7)
            c.overlap(True)
            line = [
                f"{k} {t * 1e6:7.2f} us {size / t / GB:5.0f} GB/s {size / t / ceiling:4.0%}"
                for k, t in ways.items()
            ]
            print(
                f"  {name:8s} {rows:3d} rows | {' | '.join(line)}"
                f" | error {ours_off:.1e}, torch's {theirs_off:.1e}",
                flush=True,
            )
            found.append(
                {"shape": name, "rows": rows, "bytes": size, "us": {k: t * 1e6 for k, t in ways.items()}}
                | {"error": ours_off, "torch_error": theirs_off}
            )
        del case, exact
        torch.cuda.empty_cache()
    return found


def cuts(ceiling: float) -> list[dict[str, Any]]:
    found = []
    for name in ("qkv", "out", "gate_up", "down"):
        case = case_of(name)
        for rows in (8, 32, 64):
            line = []
            for parts, stages in itertools.product((1, 2, 4, 8), (3, 4, 5, 8)):
                try:
                    took = seconds_of(case.ours(rows, parts, stages), times=case.nodes, replays=5)
                except c.CudaKernelError:  # not with so many parts
                    continue
                line.append((took, parts, stages))
                found.append(
                    {"shape": name, "rows": rows, "parts": parts, "stages": stages, "us": took * 1e6}
                )
            by_time = [f"{p}x{s}: {t * 1e6:.1f}" for t, p, s in sorted(line)]
            print(f"  {name:8s} {rows:3d} rows, parts x stages: us | {'  '.join(by_time)}", flush=True)
        del case
        torch.cuda.empty_cache()
    return found


class Layers:
    """The products of layers, each from the one ahead, alone or with norms and SiLU between them."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.weights = [
            {
                n: torch.randn(SHAPES[n], **KIND).mul_(SHAPES[n][1] ** -0.5)
                for n in ("qkv", "out", "gate_up", "down")
            }
            for _ in range(LAYERS)
        ]
        self.hidden, self.delta, self.x = (torch.randn(rows, HIDDEN, **KIND) for _ in range(3))
        self.qkv, self.gate_up = torch.zeros(rows, QKV, **KIND), torch.zeros(rows, 2 * INNER, **KIND)
        self.act = torch.zeros(rows, INNER, **KIND)
        self.norm_weight = torch.ones(HIDDEN, **KIND)

    def buffers(self, name: str, between: bool) -> tuple[Tensor, Tensor]:
        return {
            "qkv": (self.x if between else self.delta, self.qkv),
            "out": (self.qkv[:, :HIDDEN], self.delta),
            "gate_up": (self.x if between else self.delta, self.gate_up),
            "down": (self.act if between else self.gate_up[:, :INNER], self.delta),
        }[name]

    def launches(self, stages: int | None, between: bool) -> list[Callable[[], Any]]:
        found: list[Callable[[], Any]] = []
        for weights in self.weights:
            for name, weight in weights.items():
                small: ck.Launch | None = None
                if between and name in ("qkv", "gate_up"):
                    small = ck.add_rms_norm(self.hidden, self.delta, self.norm_weight, self.x, 1e-5)
                elif between and name == "down":
                    small = ck.silu_mul(self.gate_up, self.act)
                if small is not None:
                    found.append(small)
                x, out = self.buffers(name, between)
                if stages is None:
                    found.append(product(x, weight, out))
                else:
                    found.append(ck.project(x, weight, None, out, stages=stages))
        return found


def chain(ceiling: float) -> list[dict[str, Any]]:
    found = []
    for rows in (8, 24, 64):
        layers = Layers(rows)
        size = sum(w.nbytes for w in layers.weights[0].values())
        for between in (False, True):
            line = []
            for label, stages, on in CHAINS:
                c.overlap(on)
                steps = layers.launches(stages, between)

                def work(steps: list[Callable[[], Any]] = steps) -> None:
                    for step in steps:
                        step()

                took = seconds_of(work, times=1, replays=9) / LAYERS
                line.append(f"{label} {took * 1e6:6.1f} us {size / took / ceiling:4.0%}")
                found.append({"rows": rows, "between": between, "way": label, "layer_us": took * 1e6})
            c.overlap(True)
            what = "norms and SiLU" if between else "products alone"
            print(f"  {rows:3d} rows, {what:42s} of a layer | {' | '.join(line)}", flush=True)
        del layers
        torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", choices=("shapes", "cuts", "chain"), default=["shapes", "chain", "cuts"]
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    began = time.monotonic()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(results["device"], "torch", torch.__version__)
    measured = section("bandwidth", bandwidth, results)
    ceiling = measured["read"]
    print(f"  read {ceiling / GB:.0f} GB/s")
    work = {"shapes": shapes, "cuts": cuts, "chain": chain}
    for part in args.parts:
        section(part, lambda part=part: work[part](ceiling), results)
        print(f"  {time.monotonic() - began:.0f} s")
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

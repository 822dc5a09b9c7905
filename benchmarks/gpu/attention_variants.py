"""Variants of decode attention, and of a whole layer around it, in one run; see docs/results/gpu.md.

    python benchmarks/gpu/attention_variants.py [--parts rings layer] [--out FILE.json]

``rings``: attention alone, by how many thread blocks a multiprocessor has and how many tiles a warp has in
flight; also with nothing to read (the fixed part of a launch). ``layer``: layers of the shape of
Llama-3.1-8B, 64 rows of 1024 tokens, as a graph, by what begins early. Medians of replays by CUDA events.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import GB, Shape, attention, bandwidth, mixed, seconds_of
from neo.runtime import cuda_kernels as ck
from neo.runtime import cuda_library as c

SHAPES = (
    Shape("64 x 1k", (1024,) * 64),
    Shape("64 x 4k", (4096,) * 64),
    Shape("8 x 32k", (32768,) * 8),
    Shape("256 x 512", (512,) * 256),
    Shape("24 x 1k", (1024,) * 24),
    Shape("3 x 1k", (1024,) * 3),
    Shape("mixed 1..32k", mixed(262144)),
    Shape("64 x 1", (1,) * 64),
    Shape("nothing", (0,) * 64),
)
RINGS = ((2, 2), (2, 3), (3, 2), (1, 4))  # blocks a multiprocessor, tiles


def rings(ceiling: float) -> list[dict[str, Any]]:
    found = []
    multiprocessors = c.describe().multiprocessors
    for shape in SHAPES:
        line = []
        for per, stages in ((0, 0), *RINGS):
            # A block table needs an entry: rows without tokens get theirs behind the plan.
            filled = replace(shape, lengths=tuple(max(1, n) for n in shape.lengths))
            launch, _ = attention(filled, per * multiprocessors, stages)
            if shape != filled:
                launch.attend._keep[4].zero_()  # type: ignore[index]
                launch.plan()
            size = sum(shape.lengths) * shape.kv_heads * shape.dim * 4
            took = seconds_of(launch.attend)
            entry = {"shape": shape.name, "ctas_of_sm": per, "stages": stages, "us": took * 1e6}
            found.append(entry | {"share": size / took / ceiling})
            name = f"{per}x{stages}" if per else "own"
            line.append(f"{name:>4s} {took * 1e6:6.1f} ({size / took / ceiling:4.0%})")
        print(f"  {shape.name:13s}" + " ".join(line), flush=True)
        torch.cuda.empty_cache()
    return found


class Layers:
    """Layers of the shape of Llama-3.1-8B behind each other, each with weights and a cache of its own."""

    HIDDEN, HEADS, KV_HEADS, DIM, INNER = 4096, 32, 8, 128, 14336

    def __init__(self, rows: int, tokens: int, layers: int) -> None:
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        self.layers, self.rows = layers, rows
        q, kv = self.HEADS * self.DIM, self.KV_HEADS * self.DIM
        wide, inner = self.HIDDEN, self.INNER
        shapes = ((q + 2 * kv, wide), (wide, q), (2 * inner, wide), (wide, inner))
        self.weights = [[torch.randn(s, **kind) * s[1] ** -0.5 for s in shapes] for _ in range(layers)]
        self.x, self.delta, self.hidden = (torch.randn(rows, self.HIDDEN, **kind) for _ in range(3))
        self.qkv = torch.randn(rows, q + 2 * kv, **kind)
        self.attended = torch.randn(rows, q, **kind)
        self.gate_up, self.act = (torch.randn(rows, n, **kind) for n in (2 * inner, inner))
        count = -(-tokens // 16)
        shape = (rows * count, self.KV_HEADS, 2, self.DIM * 16)
        self.caches = [ck.cache_of(torch.randn(shape, **kind), 16) for _ in range(layers)]
        self.tables = torch.randperm(rows * count, device="cuda").to(torch.int32).view(rows, count)
        self.positions = torch.full((rows,), tokens - 1, dtype=torch.int32, device="cuda")
        self.slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        self.cos, self.sin = (torch.randn(rows, self.DIM, **kind) for _ in range(2))
        self.norm_weight = torch.ones(self.HIDDEN, **kind)

    def launches(self, early: bool) -> list[list[Callable[[], Any]]]:
        """Of each layer: norm, qkv, rotary and append, attention, out, norm, gate and up, SiLU, down."""
        found = []
        size = ck.decode_workspace(self.caches[0], self.rows, self.HEADS)
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        heads = self.qkv.view(self.rows, -1, self.DIM)
        q, k, v = heads.split([self.HEADS, self.KV_HEADS, self.KV_HEADS], 1)
        angles, places = (self.cos, self.sin), (self.tables, self.slots, self.positions)
        norm = (self.hidden, self.delta, self.norm_weight, self.x, 1e-5)
        out = self.attended.view(self.rows, self.HEADS, self.DIM)
        lengths = self.positions + 1
        plan = None
        for cache, weights in zip(self.caches, self.weights, strict=True):
            norms = [ck.add_rms_norm(*norm) for _ in range(2)]
            silu = ck.silu_mul(self.gate_up, self.act)
            rope = ck.qkv_rope_append(cache, self.qkv, ck.QkvWeights(), *angles, q, k, v, *places)
            rope.args.early = early
            both = ck.decode(cache, q, out, self.tables, lengths, workspace, self.slots, early=early)
            plan = plan or both.plan
            qkv, o, gate_up, down = weights
            found.append(
                [
                    norms[0],
                    product(self.x, qkv, self.qkv),
                    rope,
                    both.attend,
                    product(self.attended, o, self.delta),
                    norms[1],
                    product(self.x, gate_up, self.gate_up),
                    silu,
                    product(self.act, down, self.delta),
                ]
            )
        assert plan is not None
        plan()
        return found


def product(x: Tensor, weight: Tensor, out: Tensor) -> Callable[[], Any]:
    return lambda: torch.mm(x, weight.t(), out=out)


def one_by_one(launches: list[Callable[[], Any]]) -> None:
    for launch in launches:
        launch()


PARTS = {"products": (1, 4, 6, 8), "attention": (3,), "rotary, attention": (2, 3), "all": tuple(range(9))}
WAYS = (("as it was", False, False), ("overlap", True, False), ("overlap, early", True, True))


def layer_variants(rows: int, tokens: int, layers: int = 4) -> list[dict[str, Any]]:
    shape = Layers(rows, tokens, layers)
    found = []
    for name, overlap, early in WAYS:
        before = c.overlap(overlap)
        steps = shape.launches(early)
        times = {}
        for part, indices in PARTS.items():
            chosen = [of_layer[i] for of_layer in steps for i in indices]
            times[part] = seconds_of(partial(one_by_one, chosen), 2, 15) / layers * 1e6
        c.overlap(before)
        found.append({"way": name, "us": times})
        print(f"  {name:16s}" + ", ".join(f"{part} {us:6.1f} us" for part, us in times.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["rings", "layer"], choices=["rings", "layer"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    measured = bandwidth()
    ceiling = max(measured.values())
    print(torch.cuda.get_device_name(), "torch", torch.__version__, f"{ceiling / GB:.0f} GB/s")
    torch.cuda.empty_cache()
    results: dict[str, Any] = {"bandwidth": measured}
    if "layer" in args.parts:
        print(f"a layer, {args.rows} rows of {args.tokens} tokens")
        with torch.inference_mode():
            results["layer"] = layer_variants(args.rows, args.tokens)
        torch.cuda.empty_cache()
    if "rings" in args.parts:
        print("attention alone, us (share of what can be read)")
        results["rings"] = rings(ceiling)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

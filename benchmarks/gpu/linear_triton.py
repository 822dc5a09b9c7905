"""A plain Triton kernel for products of few rows: what linear.py --triton holds the libraries against.

Weight tiles are the left operand, so that rows are the narrow side of the tensor cores; the sum is split over
thread blocks, whose parts a second kernel adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _multiply(
    x, weight, parts, rows, out_width, width, per_split, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    m = tl.arange(0, BM)
    first = split * per_split
    last = tl.minimum(first + per_split, width)
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for k in range(first, last, BK):
        at = k + tl.arange(0, BK)
        left = tl.load(weight + n[:, None] * width + at[None, :])
        right = tl.load(x + m[None, :] * width + at[:, None], mask=m[None, :] < rows, other=0.0)
        total = tl.dot(left, right, total)
    to = parts + split * rows * out_width + m[None, :] * out_width + n[:, None]
    tl.store(to, total.to(parts.dtype.element_ty), mask=m[None, :] < rows)


@triton.jit
def _add(parts, out, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(SPLITS):
        total += tl.load(parts + i * count + at, mask=inside)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Config:
    """Tile of the weight, thread blocks that share a sum, tiles in flight, warps."""

    rows: int
    depth: int
    splits: int
    stages: int
    warps: int


TILES = ((64, 128, 4, 4), (128, 128, 4, 8), (128, 64, 6, 4))


def configs(out_width: int, width: int, multiprocessors: int) -> list[Config]:
    """For each tile, splits that give about one and two thread blocks for each multiprocessor."""
    found = {}
    for rows, depth, stages, warps in TILES:
        if out_width % rows or width % depth:
            continue
        for per in (1, 2):
            splits = max(1, min(per * multiprocessors * rows // out_width, width // (4 * depth), 16))
            found[Config(rows, depth, splits, stages, warps)] = None
    return list(found)


def multiply(config: Config, x: Tensor, weight: Tensor, parts: Tensor, out: Tensor) -> None:
    """``out = x @ weight.T``; parts: float32, splits times as large as out."""
    (m, width), n = x.shape, len(weight)
    tiles = -(-width // (config.depth * config.splits))
    single = config.splits == 1
    _multiply[(n // config.rows, config.splits)](
        x, weight, out if single else parts, m, n, width, tiles * config.depth,
        BM=max(16, triton.next_power_of_2(m)), BN=config.rows, BK=config.depth,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if not single:
        _add[(triton.cdiv(m * n, 1024),)](parts, out, m * n, SPLITS=config.splits, BLOCK=1024)


def parts_for(found: list[Config], rows: int, out_width: int) -> Tensor:
    """Room for the parts of any of these."""
    return torch.empty(max(c.splits for c in found) * rows * out_width, device="cuda")

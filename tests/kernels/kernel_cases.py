"""Random caches for the kernel tests. All memory that may not be read is NaN, so reading it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from neo.runtime import cpu_kernels as ck
from neo.runtime import cpu_library
from neo.runtime import cpu_reference as reference
from neo.runtime.cpu_kernels import KVType, PagedCache

needs_library = pytest.mark.skipif(
    not cpu_library.available(), reason="the CPU kernels are not built here (make kernels)"
)

EPSILON = {KVType.FP32: 2.0**-24, KVType.FP16: 2.0**-11, KVType.BF16: 2.0**-8}  # of rounding to nearest
SMALLEST = {KVType.FP32: 2.0**-149, KVType.FP16: 2.0**-24, KVType.BF16: 2.0**-133}


@dataclass
class Case:
    cache: PagedCache
    q: np.ndarray  # of io_type
    io_type: KVType
    tables: np.ndarray
    lengths: np.ndarray
    scale: float

    def run(self, pool: ck.Pool) -> tuple[np.ndarray, np.ndarray]:
        """The kernel's output (as float64) and log-sum-exp."""
        out = np.full_like(self.q, np.nan) if self.io_type is not KVType.BF16 else np.zeros_like(self.q)
        lse = np.full(self.q.shape[:2], np.nan, np.float32)
        ck.decode_attention(pool, self.cache, self.q, out, self.tables, self.lengths, self.scale, lse)
        return reference.to_float64(out, self.io_type), lse

    def check(self, pool: ck.Pool) -> None:
        """Hold the kernel against float64.

        The bound: rounding to the output's type (half an ulp), plus eight roundings of fp32 at the size of
        the largest V, times 1 + the largest scale * |q| . |k|: an error in a score is a relative error in a
        weight.
        """
        out, lse = self.run(pool)
        q = reference.to_float64(self.q, self.io_type)
        expected, expected_lse = reference.decode_attention(
            self.cache, q, self.tables, self.lengths, self.scale
        )
        rounding = EPSILON[self.io_type] * np.abs(expected) * 1.01 + SMALLEST[self.io_type]
        for i, length in enumerate(self.lengths):
            if length == 0:
                assert not out[i].any()
                assert (lse[i] == -np.inf).all()
                continue
            keys, values = reference.gather(self.cache, self.tables[i], int(length))
            grouped = np.abs(q[i]).reshape(self.cache.kv_heads, -1, self.cache.head_dim)
            score = self.scale * np.einsum("hgd,thd->hgt", grouped, np.abs(keys)).max()
            single = 8 * EPSILON[KVType.FP32] * (1 + score)
            error = np.abs(out[i] - expected[i])
            assert (error <= rounding[i] + single * np.abs(values).max()).all(), (i, length, error.max())
            assert np.abs(lse[i] - expected_lse[i]).max() <= single * (1 + np.abs(expected_lse[i]).max())


def make_case(
    rng: np.random.Generator,
    lengths: Sequence[int],
    dtype: KVType = KVType.FP16,
    head_dim: int = 64,
    heads: tuple[int, int] = (4, 2),
    block_size: int = 16,
    io_type: KVType = KVType.FP32,
    spread: float = 1.0,
) -> Case:
    """Sequences of these lengths in scattered blocks, with poison around them. `spread` scales the scores."""
    q_heads, kv_heads = heads
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = 2 * sum(counts) + 1
    cache = PagedCache.allocate(num_blocks, kv_heads, head_dim, block_size, dtype)
    assert cache.memory is not None
    poison = reference.from_float(np.nan, dtype) if dtype is not KVType.BF16 else np.uint16(0x7FC0)
    cache.memory[:] = poison
    k, v = reference.planes(cache)
    order = rng.permutation(num_blocks).astype(np.int32)
    tables = np.full((len(lengths), max([*counts, 1]) + 1), -1, np.int32)  # an entry past the end is refused
    used = 0
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[i, :count] = order[used : used + count]
        used += count
        for b, block in enumerate(tables[i, :count]):
            filled = min(block_size, length - b * block_size)
            k[block, :, :, :filled] = reference.from_float(
                spread * rng.standard_normal((kv_heads, head_dim, filled)), dtype
            )
            v[block, :, :filled] = reference.from_float(
                rng.standard_normal((kv_heads, filled, head_dim)), dtype
            )
    q = reference.from_float(rng.standard_normal((len(lengths), q_heads, head_dim)), io_type)
    return Case(cache, q, io_type, tables, np.array(lengths, np.int32), 1 / np.sqrt(head_dim))

"""What the CPU kernels must compute, in numpy and float64: slow, plain, and used by tests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neo.runtime.cpu_kernels import Array, Ints, KVType, PagedCache

Floats = npt.NDArray[np.float64]


def to_float64(array: Array, dtype: KVType) -> Floats:
    """The values of an array of a `KVType` (bfloat16 is held in uint16)."""
    if dtype is KVType.BF16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def from_float(values: npt.ArrayLike, dtype: KVType) -> Array:
    """Round finite values to a `KVType`: to nearest, ties to even."""
    single = np.asarray(values, dtype=np.float32)
    if dtype is not KVType.BF16:
        return single.astype(dtype.numpy)
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def planes(cache: PagedCache) -> tuple[Array, Array]:
    """Views of a cache: K [block, head, head_dim, block_size], V [block, head, block_size, head_dim]."""
    if cache.memory is None:
        raise ValueError("this cache's memory is not numpy's")
    shape = (cache.num_blocks, cache.kv_heads, 2, cache.head_dim * cache.block_size)
    both = cache.memory[: int(np.prod(shape))].reshape(shape)
    k = both[:, :, 0].reshape(*shape[:2], cache.head_dim, cache.block_size)
    v = both[:, :, 1].reshape(*shape[:2], cache.block_size, cache.head_dim)
    return k, v


def gather(cache: PagedCache, table: Ints, length: int) -> tuple[Floats, Floats]:
    """K and V of one sequence's first `length` tokens, each [length, kv_heads, head_dim]."""
    k, v = planes(cache)
    blocks = table[: -(-length // cache.block_size)]
    shape = (-1, cache.kv_heads, cache.head_dim)
    keys = to_float64(k[blocks].transpose(0, 3, 1, 2).reshape(shape), cache.dtype)
    values = to_float64(v[blocks].transpose(0, 2, 1, 3).reshape(shape), cache.dtype)
    return keys[:length], values[:length]


def decode_attention(
    cache: PagedCache, q: Floats, block_tables: Ints, lengths: Ints, scale: float
) -> tuple[Floats, Floats]:
    """The output [batch, q_heads, head_dim] and its log-sum-exp [batch, q_heads]."""
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:2], -np.inf)
    group = q.shape[1] // cache.kv_heads
    for i, length in enumerate(lengths):
        if length == 0:
            continue
        keys, values = gather(cache, block_tables[i], int(length))
        grouped = q[i].reshape(cache.kv_heads, group, cache.head_dim)
        scores = scale * np.einsum("hgd,thd->hgt", grouped, keys)
        top = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        out[i] = np.einsum("hgt,thd->hgd", weights / total, values).reshape(q.shape[1:])
        lse[i] = (top + np.log(total)).reshape(-1)
    return out, lse

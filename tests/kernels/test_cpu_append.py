"""Appending to the paged cache: what is written, what is not, and attention over it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, needs_library

from neo.runtime import cpu_kernels as ck
from neo.runtime import cpu_reference as reference
from neo.runtime.cpu_kernels import KVType, PagedCache

pytestmark = needs_library


@pytest.fixture(scope="module")
def pool() -> Iterator[ck.Pool]:
    with ck.Pool(threads=2) as pool:
        yield pool


def tables_for(rng: np.random.Generator, lengths: list[int], block_size: int) -> tuple[np.ndarray, int]:
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 2
    order = rng.permutation(num_blocks).astype(np.int32)
    tables = np.full((len(lengths), max(counts)), -1, np.int32)
    at = 0
    for i, count in enumerate(counts):
        tables[i, :count] = order[at : at + count]
        at += count
    return tables, num_blocks


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    shape=st.sampled_from([(1, 16), (2, 64), (3, 80), (8, 128), (1, 256)]),
    block_size=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from(list(KVType)),
    from_float=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_append_then_attend(
    lengths: list[int],
    shape: tuple[int, int],
    block_size: int,
    dtype: KVType,
    from_float: bool,
    seed: int,
) -> None:
    """Prompts as one call, in any order of rows; then a decode step: one row per sequence."""
    rng = np.random.default_rng(seed)
    kv_heads, head_dim = shape
    tables, num_blocks = tables_for(rng, lengths, block_size)
    cache = PagedCache.allocate(num_blocks, kv_heads, head_dim, block_size, dtype)
    assert cache.memory is not None
    cache.memory[:] = np.uint16(0x7FC0) if dtype is KVType.BF16 else np.nan
    source = KVType.FP32 if from_float else dtype
    k, v = (
        reference.from_float(rng.standard_normal((sum(lengths), kv_heads, head_dim)), source) for _ in (0, 1)
    )
    sequences = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    last = positions == np.array(lengths)[sequences] - 1
    prompt = rng.permutation(np.flatnonzero(~last))
    with ck.Pool(threads=2) as pool:
        ck.append_kv(pool, cache, k[prompt], v[prompt], tables, positions[prompt], sequences[prompt])
        ck.append_kv(pool, cache, k[last], v[last], tables, positions[last])
        for i in range(len(lengths)):
            keys, values = reference.gather(cache, tables[i], lengths[i])
            for got, rows in ((keys, k), (values, v)):
                exact = reference.to_float64(rows[sequences == i], source)
                rounded = reference.to_float64(reference.from_float(exact, dtype), dtype)
                assert np.array_equal(got, rounded)
        q = rng.standard_normal((len(lengths), kv_heads, head_dim)).astype(np.float32)
        Case(cache, q, KVType.FP32, tables, np.array(lengths, np.int32), 0.1).check(pool)
    unused = np.setdiff1d(np.arange(num_blocks), tables[tables >= 0])
    rows = reference.to_float64(cache.memory, dtype).reshape(num_blocks, -1)
    assert np.isnan(rows[unused]).all()


@pytest.mark.parametrize("dtype", [KVType.FP16, KVType.BF16])
def test_rounding_of_special_values(pool: ck.Pool, dtype: KVType) -> None:
    values = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1e-8,
        65519.9,
        65520.0,
        1.00390625,
        1.01171875,
        1e38,
        -1e-45,
    ]
    rows = np.resize(np.array(values, np.float32), (1, 1, 16))
    cache = PagedCache.allocate(1, 1, 16, 8, dtype)
    table, position = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
    ck.append_kv(pool, cache, rows, rows, table, position)
    k, v = (x[0] for x in reference.gather(cache, table[0], 1))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = reference.to_float64(reference.from_float(rows[0], dtype), dtype)
    finite = ~np.isnan(rows[0])
    assert np.array_equal(k[finite], expected[finite])
    assert np.array_equal(v[finite], expected[finite])
    assert np.array_equal(np.signbit(k), np.signbit(expected))
    assert np.isnan(k[~finite]).all()


def test_rows_of_a_fused_projection(pool: ck.Pool) -> None:
    """k and v are slices of a fused qkv row: the stride between rows is larger than a row."""
    rng = np.random.default_rng(0)
    fused = rng.standard_normal((20, 8, 32)).astype(np.float32)
    cache = PagedCache.allocate(3, 2, 32, 8, KVType.FP32)
    tables = np.array([[2, 0, 1]], np.int32)
    sequences = np.zeros(20, np.int32)
    ck.append_kv(pool, cache, fused[:, 4:6], fused[:, 6:8], tables, np.arange(20, dtype=np.int32), sequences)
    keys, values = reference.gather(cache, tables[0], 20)
    assert np.array_equal(keys, fused[:, 4:6])
    assert np.array_equal(values, fused[:, 6:8])


def test_no_rows(pool: ck.Pool) -> None:
    cache = PagedCache.allocate(1, 3, 16, 8, KVType.FP32)
    rows = np.ones((4, 3, 16), np.float32)[np.zeros(0, np.int32)]
    ck.append_kv(pool, cache, rows, rows, np.zeros((1, 1), np.int32), np.zeros(0, np.int32))
    assert cache.memory is not None
    assert not cache.memory.any()


def test_refused_rows_write_nothing(pool: ck.Pool) -> None:
    cache = PagedCache.allocate(2, 1, 16, 8, KVType.FP32)
    rows = np.ones((2, 1, 16), np.float32)
    with pytest.raises(ValueError, match="positions"):
        ck.append_kv(pool, cache, rows, rows, np.array([[0], [1]], np.int32), np.array([3, 8], np.int32))
    assert cache.memory is not None
    assert not cache.memory.any()

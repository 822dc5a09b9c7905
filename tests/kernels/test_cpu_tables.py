"""Tables that outlive a batch: which row each query uses; and copying of blocks between memories."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import make_case, needs_library

from neo.runtime import cpu_kernels as ck
from neo.runtime import cpu_reference as reference
from neo.runtime.cpu_kernels import KVType
from neo.runtime.cpu_worker import copy_blocks

pytestmark = needs_library


@pytest.fixture(scope="module")
def pool() -> Iterator[ck.Pool]:
    with ck.Pool(threads=2) as pool:
        yield pool


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 1500), min_size=1, max_size=6),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
def test_queries_name_their_row(lengths: list[int], data: st.DataObject, seed: int) -> None:
    """Any queries over any rows, rows left out and used twice included, at any length up to the row's."""
    rng = np.random.default_rng(seed)
    case = make_case(rng, lengths, KVType.FP16, 64, (4, 2), 16)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    sequences = np.array(rows, np.int32)
    some = np.array([data.draw(st.integers(0, lengths[row])) for row in rows], np.int32)
    q = rng.standard_normal((len(rows), 4, 64)).astype(np.float32)
    out, plain = np.full_like(q, np.nan), np.full_like(q, np.nan)
    with ck.Pool(threads=2) as pool:
        ck.decode_attention(pool, case.cache, q, out, case.tables, some, sequences=sequences)
        ck.decode_attention(pool, case.cache, q, plain, case.tables[sequences], some)
        same = ck.read_cache(pool, case.cache, q, case.tables, some, sequences)
        assert same == ck.read_cache(pool, case.cache, q, case.tables[sequences], some)
    assert np.array_equal(out, plain)
    expected, _ = reference.decode_attention(case.cache, q, case.tables[sequences], some, 1 / 8)
    assert np.abs(out - expected).max() < 1e-4


def test_rows_of_other_sequences_are_not_looked_at(pool: ck.Pool) -> None:
    """A slot that nobody uses holds anything."""
    case = make_case(np.random.default_rng(0), [20, 40], KVType.FP32)
    wild = np.full((4, case.tables.shape[1]), 2**31 - 1, np.int32)
    wild[[3, 1]] = case.tables
    expected, _ = case.run(pool)
    out = np.empty_like(case.q)
    ck.decode_attention(
        pool, case.cache, case.q, out, wild, case.lengths, sequences=np.array([3, 1], np.int32)
    )
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("block_bytes", [1, 48, 4096, 300_000])
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_copied_blocks(block_bytes: int, threads: int) -> None:
    rng = np.random.default_rng(block_bytes)
    src = rng.integers(0, 256, 40 * block_bytes, np.uint8)
    dst = rng.integers(0, 256, 30 * block_bytes, np.uint8)
    expected = dst.reshape(30, -1).copy()
    sources = rng.integers(0, 40, 25).astype(np.int32)
    targets = rng.permutation(30)[:25].astype(np.int32)
    expected[targets] = src.reshape(40, -1)[sources]
    pool = ck.Pool(threads) if threads else None
    copy_blocks(pool, src.data, dst.data, block_bytes, sources, targets)
    assert np.array_equal(dst.reshape(30, -1), expected)
    if pool is not None:
        pool.close()


def test_refused_copies_copy_nothing(pool: ck.Pool) -> None:
    src, dst = bytearray(b"x" * 64), bytearray(b"y" * 32)
    none, good = np.empty(0, np.int32), np.array([1, 0], np.int32)
    copy_blocks(pool, src, dst, 16, none, none)
    for sources, targets, block, message in (
        ([1, 4], good, 16, r"src_blocks\[1\] is 4, there are 4"),
        ([1, -1], good, 16, r"src_blocks\[1\] is -1"),
        (good, [0, 2], 16, r"dst_blocks\[1\] is 2, there are 2"),
        (good, [0, -7], 16, r"dst_blocks\[1\] is -7"),
        (good, good[:1], 16, "must agree"),
        (good, good, 0, "block_bytes is 0"),
    ):
        for where in (pool, None):
            with pytest.raises(ValueError, match=message):
                copy_blocks(where, src, dst, block, np.array(sources, np.int32), np.array(targets, np.int32))
    assert dst == b"y" * 32

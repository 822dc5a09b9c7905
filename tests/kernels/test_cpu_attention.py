"""The kernel against a float64 reference, and what must not change its results."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, make_case, needs_library

from neo.runtime import cpu_kernels as ck
from neo.runtime.cpu_kernels import KVType

pytestmark = needs_library


@pytest.fixture(scope="module")
def pool() -> Iterator[ck.Pool]:
    with ck.Pool(threads=2) as pool:
        yield pool


def edge_lengths(block: int) -> list[int]:
    return [1, block - 1, block, block + 1, 0, 3 * block + 5, 4 * block, 131]


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", list(KVType))
def test_shapes(pool: ck.Pool, dtype: KVType, head_dim: int, block_size: int) -> None:
    rng = np.random.default_rng(head_dim + block_size)
    for heads in [(1, 1), (4, 4), (4, 2), (3, 1), (8, 2), (7, 1), (12, 2), (16, 1)]:
        make_case(rng, edge_lengths(block_size), dtype, head_dim, heads, block_size).check(pool)


@pytest.mark.parametrize("dtype", list(KVType))
@pytest.mark.parametrize("io_type", list(KVType))
def test_types_of_queries_and_outputs(pool: ck.Pool, dtype: KVType, io_type: KVType) -> None:
    rng = np.random.default_rng(1)
    make_case(rng, [5, 300, 1025], dtype, 96, (6, 2), 16, io_type).check(pool)


@pytest.mark.parametrize("dtype", list(KVType))
def test_lengths_from_one_to_thousands(pool: ck.Pool, dtype: KVType) -> None:
    rng = np.random.default_rng(2)
    lengths = [1, 5000, 17, 1023, 1024, 1025, 2048, 4097, 0, *rng.integers(1, 3000, 8).tolist()]
    make_case(rng, lengths, dtype, 128, (8, 2), 16).check(pool)


@pytest.mark.parametrize("block_size", [8, 32])
@pytest.mark.parametrize("dtype", list(KVType))
def test_lengths_around_every_cut(pool: ck.Pool, dtype: KVType, block_size: int) -> None:
    """Pieces have 256 tokens in sequences of up to 4096, and 1024 in longer ones."""
    lengths = [255, 256, 257, 512, 513, 1025, 4095, 4096, 4097, 5120, 5121]
    make_case(np.random.default_rng(block_size), lengths, dtype, 64, (4, 2), block_size).check(pool)


def test_a_sequence_that_grows_beyond_the_finer_cuts(pool: ck.Pool) -> None:
    """Token by token, beside one that gets shorter: each result is right, and that of the sequence alone."""
    rng = np.random.default_rng(12)
    case = make_case(rng, [4099, 4099], KVType.FP16, 64, (4, 2), 16)
    with ck.Pool(threads=1) as one:
        for length in range(4093, 4100):
            k, v = rng.standard_normal((2, 1, 2, 64)).astype(np.float32)
            ck.append_kv(pool, case.cache, k, v, case.tables, np.array([length - 1], np.int32))
            case.lengths[:] = length, 2 * 4096 - length
            case.check(pool)
            out, lse = case.run(pool)
            alone = Case(
                case.cache, case.q[:1], case.io_type, case.tables[:1], case.lengths[:1], case.scale
            ).run(one)
            assert np.array_equal(out[:1], alone[0])
            assert np.array_equal(lse[:1], alone[1])


@pytest.mark.parametrize("spread", [0.0, 1e-3, 10.0, 100.0])
def test_flat_and_sharp_scores(pool: ck.Pool, spread: float) -> None:
    """Scores of 0 and scores in the hundreds: the softmax's reference has to move, and far."""
    rng = np.random.default_rng(3)
    make_case(rng, [1, 40, 700, 3000], KVType.FP16, 128, (8, 2), 16, spread=spread).check(pool)


@pytest.mark.parametrize("rising", [True, False])
def test_scores_in_order(pool: ck.Pool, rising: bool) -> None:
    """Each block's scores above (or below) all before: the sums are rescaled at every segment, or never."""
    case = make_case(np.random.default_rng(4), [900], KVType.FP32, 64, (4, 1), 16)
    _, length = case.tables, 900
    order = np.arange(length, dtype=np.float32) / 4
    k = np.broadcast_to((order if rising else order[::-1])[:, None, None], (length, 1, 64)).copy()
    v = np.random.default_rng(5).standard_normal((length, 1, 64)).astype(np.float32)
    positions = np.arange(length, dtype=np.int32)
    ck.append_kv(pool, case.cache, k, v, case.tables, positions, np.zeros(length, np.int32))
    case.q = np.ones_like(case.q)
    case.check(pool)


def test_poison_inside_a_sequence_is_seen(pool: ck.Pool) -> None:
    """The other tests rest on this: NaN in a token that counts reaches the output."""
    rng = np.random.default_rng(6)
    for plane in (0, 1):
        case = make_case(rng, [40], KVType.FP16, 64, (2, 1), 16)
        both = case.cache.memory.reshape(case.cache.num_blocks, 2, -1)
        block = both[case.tables[0, 1], plane]
        (block.reshape(64, 16)[:, 3] if plane == 0 else block.reshape(16, 64)[3])[:] = np.nan
        out, _ = case.run(pool)
        assert np.isnan(out).all()


def test_empty_batch(pool: ck.Pool) -> None:
    case = make_case(np.random.default_rng(7), [3])
    out = np.empty((0, 4, 64), np.float32)
    ck.decode_attention(pool, case.cache, out, out, np.empty((0, 4), np.int32), np.empty(0, np.int32))


def test_strided_queries_and_outputs(pool: ck.Pool) -> None:
    """q as a part of a fused qkv row, the output into a wider buffer."""
    rng = np.random.default_rng(8)
    case = make_case(rng, [20, 33], KVType.FP16, 64, (4, 2), 16)
    expected, _ = case.run(pool)
    fused = np.zeros((2, 8, 64), np.float32)
    fused[:, 2:6] = case.q
    wide = np.full((2, 9, 80), 7.0, np.float32)
    ck.decode_attention(pool, case.cache, fused[:, 2:6], wide[:, 1:5, :64], case.tables, case.lengths)
    assert np.array_equal(wide[:, 1:5, :64], expected)
    wide[:, 1:5, :64] = 7.0
    assert (wide == 7.0).all()


def test_k_and_v_apart(pool: ck.Pool) -> None:
    """Any strides: here K of all blocks, then V of all blocks."""
    rng = np.random.default_rng(9)
    case = make_case(rng, [50, 7], KVType.FP16, 64, (4, 2), 16)
    expected, _ = case.run(pool)
    cache = case.cache
    plane = cache.head_dim * cache.block_size
    both = cache.memory.reshape(cache.num_blocks, cache.kv_heads, 2, plane)
    k, v = both[:, :, 0].copy(), both[:, :, 1].copy()
    apart = ck.PagedCache(
        k.ctypes.data, v.ctypes.data, cache.dtype, cache.num_blocks, 2, 64, 16, 2 * plane, plane
    )
    case.cache = apart
    assert np.array_equal(case.run(pool)[0], expected)


def _shuffled(case: Case, rng: np.random.Generator) -> Case:
    """The same sequences in other blocks."""
    order = rng.permutation(case.cache.num_blocks).astype(np.int32)
    cache = case.cache
    moved = ck.PagedCache.allocate(
        cache.num_blocks, cache.kv_heads, cache.head_dim, cache.block_size, cache.dtype
    )
    rows = moved.memory.reshape(cache.num_blocks, -1)
    rows[order] = cache.memory.reshape(cache.num_blocks, -1)
    tables = np.where(case.tables < 0, case.tables, order[case.tables])
    return Case(moved, case.q, case.io_type, tables, case.lengths, case.scale)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 1500) | st.sampled_from([256, 257, 4096, 4097]), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (6, 2), (8, 8), (5, 1)]),
    head_dim=st.sampled_from([32, 80, 128]),
    block_size=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from(list(KVType)),
    seed=st.integers(0, 2**32 - 1),
)
def test_neither_blocks_nor_threads_nor_neighbours_matter(
    lengths: list[int], heads: tuple[int, int], head_dim: int, block_size: int, dtype: KVType, seed: int
) -> None:
    """Equal to the last bit: blocks elsewhere, another number of threads, a sequence on its own."""
    rng = np.random.default_rng(seed)
    case = make_case(rng, lengths, dtype, head_dim, heads, block_size)
    with ck.Pool(threads=1) as one, ck.Pool(threads=3) as three:
        out, lse = case.run(one)
        case.check(one)
        for other in (case.run(three), _shuffled(case, rng).run(three)):
            assert np.array_equal(out, other[0])
            assert np.array_equal(lse, other[1])
        alone = Case(
            case.cache, case.q[-1:], case.io_type, case.tables[-1:], case.lengths[-1:], case.scale
        ).run(three)
        assert np.array_equal(out[-1:], alone[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_counts_cores_and_sleep(threads: int) -> None:
    case = make_case(np.random.default_rng(10), [900, 17, 2050], KVType.FP16, 64, (8, 4), 16)
    with ck.Pool(threads, cores=[0] * threads, spin_us=0) as pool:
        assert pool.threads == threads
        case.check(pool)
        with pool.step(), pool.step():
            for _ in range(50):
                case.run(pool)
        case.check(pool)


def test_calls_from_many_threads(pool: ck.Pool) -> None:
    """Calls that share a pool take turns; calls on pools of their own run together."""
    case = make_case(np.random.default_rng(11), [700, 1, 1300], KVType.BF16, 64, (8, 2), 16)
    expected, _ = case.run(pool)

    def shared(_: int) -> bool:
        return all(np.array_equal(case.run(pool)[0], expected) for _ in range(10))

    def own(_: int) -> bool:
        with ck.Pool(threads=2) as mine:
            return all(np.array_equal(case.run(mine)[0], expected) for _ in range(10))

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(shared, range(6)))
        assert all(threads.map(own, range(3)))

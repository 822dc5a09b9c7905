"""Bad arguments are refused with a message that names them; nothing crashes, nothing is written."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernel_cases import make_case, needs_library

from neo.runtime import cpu_kernels as ck
from neo.runtime import cpu_library
from neo.runtime.cpu_kernels import KVType, PagedCache

pytestmark = needs_library

BAD_ARGUMENT = 1


@pytest.fixture(scope="module")
def pool() -> Iterator[ck.Pool]:
    with ck.Pool(threads=2) as pool:
        yield pool


class Raw:
    """The structs of a good call, to be spoilt one field at a time, and the arrays behind them."""

    def __init__(self) -> None:
        self.case = make_case(np.random.default_rng(0), [20, 3], KVType.FP16, 64, (4, 2), 16)
        self.out = np.full_like(self.case.q, 5.0)
        self.cache = self.case.cache.struct()
        args = (self.case.q, self.out, self.case.tables, self.case.lengths, 0.1, None)
        self.decode = ck._decode_struct(self.case.cache, self.cache, *args)
        self.rows = np.ones((2, 2, 64), np.float32)
        self.positions = np.array([2, 1], np.int32)
        self.append = cpu_library.Append(
            cache=ctypes.pointer(self.cache),
            k=self.rows.ctypes.data,
            v=self.rows.ctypes.data,
            k_stride=128,
            v_stride=128,
            block_tables=self.case.tables.ctypes.data,
            table_stride=self.case.tables.shape[1],
            sequences=None,
            positions=self.positions.ctypes.data,
            rows=2,
            n_sequences=2,
            io_dtype=0,
        )


def status_and_message(name: str, *args: Any) -> tuple[int, str]:
    library = cpu_library.load()
    status = getattr(library, name)(*args)
    return status, library.neo_cpu_last_error().decode()


CACHE = [
    ("size", 8, "size"),
    ("k", None, "k and v"),
    ("v", None, "k and v"),
    ("dtype", 7, "dtype 7"),
    ("head_dim", 0, "head_dim"),
    ("head_dim", 72, "head_dim is 72"),
    ("head_dim", 512, "head_dim"),
    ("block_size", 24, "block_size is 24"),
    ("num_blocks", 0, "num_blocks"),
    ("num_blocks", 1, "the cache has 1 blocks"),
    ("kv_heads", 0, "kv_heads"),
    ("kv_heads", 3, "multiple of kv_heads"),
    ("head_stride", 100, "head_stride"),
    ("block_stride", 100, "block_stride"),
]
DECODE = [
    ("size", 1, "size"),
    ("cache", None, "cache must not be NULL"),
    ("q", None, "q and out"),
    ("out", None, "q and out"),
    ("lengths", None, "lengths must not be NULL"),
    ("block_tables", None, "block_tables must not be NULL"),
    ("table_stride", 1, "room for 16 tokens"),
    ("batch", -1, "batch is -1"),
    ("n_sequences", 1, "2 queries for 1 sequences"),
    ("q_heads", 0, "q_heads"),
    ("q_heads", 5, "multiple of kv_heads"),
    ("io_dtype", 3, "io_dtype 3"),
    ("scale", float("nan"), "scale"),
    ("scale", float("inf"), "scale"),
    ("q_stride", -1, "strides of q"),
    ("out_stride", 0, "out_stride"),
    ("out_head_stride", 63, "out_head_stride"),
]
APPEND = [
    ("size", 1, "size"),
    ("cache", None, "cache must not be NULL"),
    ("k", None, "k and v"),
    ("v", None, "k and v"),
    ("k_stride", -1, "strides"),
    ("block_tables", None, "block_tables and positions"),
    ("positions", None, "block_tables and positions"),
    ("rows", -1, "rows is -1"),
    ("rows", 3, "3 rows for 2 sequences"),
    ("table_stride", 0, "room for 0 tokens"),
    ("io_dtype", 2, "io_dtype is 2"),
]


@pytest.mark.parametrize(("field", "value", "message"), CACHE)
def test_bad_cache(pool: ck.Pool, field: str, value: Any, message: str) -> None:
    raw = Raw()
    setattr(raw.cache, field, value)
    status, said = status_and_message("neo_cpu_decode_attention", pool.handle, raw.decode)
    assert status == BAD_ARGUMENT
    assert message in said
    assert (raw.out == 5.0).all()
    if message != "multiple of kv_heads":
        status, said = status_and_message("neo_cpu_append_kv", pool.handle, raw.append)
        assert status == BAD_ARGUMENT


@pytest.mark.parametrize(("field", "value", "message"), DECODE)
def test_bad_decode(pool: ck.Pool, field: str, value: Any, message: str) -> None:
    raw = Raw()
    setattr(raw.decode, field, value)
    for name, args in (("neo_cpu_decode_attention", ()), ("neo_cpu_read_cache", (None,))):
        status, said = status_and_message(name, pool.handle, raw.decode, *args)
        assert status == BAD_ARGUMENT
        assert message in said
    assert (raw.out == 5.0).all()


@pytest.mark.parametrize(("field", "value", "message"), APPEND)
def test_bad_append(pool: ck.Pool, field: str, value: Any, message: str) -> None:
    raw = Raw()
    before = raw.case.cache.memory.tobytes()
    setattr(raw.append, field, value)
    status, said = status_and_message("neo_cpu_append_kv", pool.handle, raw.append)
    assert status == BAD_ARGUMENT
    assert message in said
    assert raw.case.cache.memory.tobytes() == before


def test_bad_numbers_in_arrays(pool: ck.Pool) -> None:
    case = make_case(np.random.default_rng(1), [20, 3])
    for bad in (-1, case.cache.num_blocks):
        tables = case.tables.copy()
        tables[0, 1] = bad
        with pytest.raises(ValueError, match=rf"block_tables\[0\]\[1\] is {bad}"):
            ck.decode_attention(pool, case.cache, case.q, case.q.copy(), tables, case.lengths)
    lengths = np.array([20, -3], np.int32)
    with pytest.raises(ValueError, match=r"lengths\[1\] is -3"):
        ck.decode_attention(pool, case.cache, case.q, case.q.copy(), case.tables, lengths)
    for bad in (-1, 2):
        sequences = np.array([0, bad], np.int32)
        with pytest.raises(ValueError, match=rf"sequences\[1\] is {bad}, there are 2"):
            ck.decode_attention(
                pool, case.cache, case.q, case.q.copy(), case.tables, case.lengths, sequences=sequences
            )
        with pytest.raises(ValueError, match=rf"sequences\[1\] is {bad}"):
            ck.read_cache(pool, case.cache, case.q, case.tables, case.lengths, sequences)
    rows = np.zeros((1, 2, 64), np.float32)
    one = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match=r"sequences\[0\] is 2"):
        ck.append_kv(pool, case.cache, rows, rows, case.tables, one, one + 2)
    with pytest.raises(ValueError, match=r"positions\[0\] is -1"):
        ck.append_kv(pool, case.cache, rows, rows, case.tables, one - 1, one)


def test_null_pools_and_arguments() -> None:
    raw = Raw()
    for name, args in (
        ("neo_cpu_decode_attention", (None, raw.decode)),
        ("neo_cpu_append_kv", (None, raw.append)),
        ("neo_cpu_pool_begin_step", (None,)),
        ("neo_cpu_pool_end_step", (None,)),
        ("neo_cpu_pool_create", (None, None)),
    ):
        status, said = status_and_message(name, *args)
        assert status == BAD_ARGUMENT
        assert "NULL" in said
    with ck.Pool(1) as pool:
        for name in ("neo_cpu_decode_attention", "neo_cpu_append_kv"):
            assert status_and_message(name, pool.handle, None)[0] == BAD_ARGUMENT
        assert status_and_message("neo_cpu_pool_end_step", pool.handle)[1] == "end_step without begin_step"
    cpu_library.load().neo_cpu_pool_destroy(None)
    cpu_library.load().neo_cpu_run(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": 5000}, "threads is 5000"),
        ({"threads": 2, "cores": [0]}, "1 cores"),
        ({"threads": 1, "cores": [-2]}, "cores"),
        ({"threads": 1, "spin_us": -1}, "spin_us"),
        ({"threads": 1, "prefetch": 9}, "prefetch 9"),
        ({"threads": 1, "segment": 48}, "segment is 48"),
    ],
)
def test_bad_pools(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.Pool(**options)


def test_bad_arrays(pool: ck.Pool) -> None:
    case = make_case(np.random.default_rng(2), [20, 3])
    good: dict[str, Any] = {
        "q": case.q,
        "out": case.q.copy(),
        "block_tables": case.tables,
        "lengths": case.lengths,
    }
    frozen = case.q.copy()
    frozen.flags.writeable = False
    spoilt = {
        "q": [case.q[:1], case.q[:, :, :32], case.q.astype(np.float64), case.q[0], case.q[:, :, ::-1]],
        "out": [case.q.astype(np.float16), case.q[:, :2].copy(), frozen],
        "block_tables": [case.tables.astype(np.int64), case.tables[0], case.tables[:1]],
        "lengths": [case.lengths.astype(np.int64), case.lengths[:1]],
        "lse": [np.zeros((2, 4)), np.zeros((2, 5), np.float32)],
    }
    for name, values in spoilt.items():
        for value in values:
            with pytest.raises(ValueError, match=r"q|out|lengths|block|lse"):
                ck.decode_attention(pool, case.cache, **{**good, name: value})
    closed = ck.Pool(1)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        ck.decode_attention(closed, case.cache, **good)
    with pytest.raises(ValueError, match="elements"):
        PagedCache.interleaved(np.zeros(10, np.float16), 1, 1, 16, 8, KVType.FP16)
    wrong, rows = replace(case.cache, head_dim=72), np.zeros((1, 2, 72), np.float32)
    with pytest.raises(ValueError, match="head_dim is 72"):
        ck.decode_attention(pool, wrong, rows, rows.copy(), case.tables[:1], case.lengths[:1])


def test_job_runs_on_another_thread(pool: ck.Pool) -> None:
    """The callback form: status and message in the struct, whatever thread ran it."""
    raw = Raw()
    job = cpu_library.Job(
        pool=pool.handle, append=ctypes.pointer(raw.append), decode=ctypes.pointer(raw.decode), status=9
    )
    run = cpu_library.load().neo_cpu_run

    def elsewhere() -> None:
        thread = threading.Thread(target=run, args=(ctypes.addressof(job),))
        thread.start()
        thread.join()

    elsewhere()
    assert (job.status, job.message) == (0, b"")
    assert not (raw.out == 5.0).any()
    raw.decode.batch = -1
    elsewhere()
    assert job.status == BAD_ARGUMENT
    assert job.message == b"batch is -1, must not be negative"

"""Decode attention on the CPU over a paged KV cache: the Python side of ``kernels/cpu``.

Arguments are numpy arrays, or `Rows` where the memory belongs to somebody else (torch, pinned buffers). Calls
release the GIL. numpy has no bfloat16: such arrays are uint16 and their type is said beside them.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from neo.runtime import cpu_library as c

Ints = npt.NDArray[np.int32]
Array = npt.NDArray[np.generic]


class KVType(IntEnum):
    """Element types of caches, queries and outputs (``neo_cpu_dtype``)."""

    FP32 = 0
    FP16 = 1
    BF16 = 2

    @property
    def bytes(self) -> int:
        """Bytes per element."""
        return 4 if self is KVType.FP32 else 2

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The numpy type that holds it; uint16 for bfloat16."""
        return np.dtype({KVType.FP32: np.float32, KVType.FP16: np.float16, KVType.BF16: np.uint16}[self])


class Prefetch(IntEnum):
    """How decode attention asks for memory before it needs it (``neo_cpu_prefetch``)."""

    AUTO = 0
    STARTS = 1
    WHOLE = 2


_BY_NUMPY = {kind.numpy: kind for kind in KVType}


@dataclass(frozen=True, slots=True)
class Rows:
    """[rows][heads][head_dim] elements at an address; last axis contiguous, strides in elements."""

    address: int
    dtype: KVType
    row_stride: int
    head_stride: int
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, array: Array, name: str = "array") -> Rows:
        """Describe a numpy array (uint16 means bfloat16). The caller keeps it alive."""
        if array.dtype not in _BY_NUMPY:
            raise ValueError(f"{name} has type {array.dtype}, must be float32, float16 or uint16 (bfloat16)")
        if array.ndim != 3:
            raise ValueError(f"{name} has {array.ndim} axes, must have 3: rows, heads, head_dim")
        rows, heads, dim = array.shape
        by = array.itemsize
        if array.size and array.strides[2] != by and dim > 1:
            raise ValueError(f"{name}: the last axis must be contiguous")
        return cls(
            array.ctypes.data,
            _BY_NUMPY[array.dtype],
            array.strides[0] // by,
            array.strides[1] // by,
            (rows, heads, dim),
        )


@dataclass(frozen=True)
class PagedCache:
    """K and V of one layer, in blocks; see ``kernels/cpu/neo_cpu.h`` for the layout."""

    k: int
    v: int
    dtype: KVType
    num_blocks: int
    kv_heads: int
    head_dim: int
    block_size: int
    block_stride: int
    head_stride: int
    memory: Array | None = None
    """Flat elements, if this object allocated them."""

    @classmethod
    def allocate(
        cls, num_blocks: int, kv_heads: int, head_dim: int, block_size: int, dtype: KVType
    ) -> PagedCache:
        """Zeroed cache in the fastest layout ([block][head][K, V]), on huge pages where there are any."""
        plane = head_dim * block_size
        bytes_ = max(1, 2 * plane * kv_heads * num_blocks * dtype.bytes)
        space = mmap.mmap(-1, bytes_)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                space.madvise(mmap.MADV_HUGEPAGE)
        memory: Array = np.frombuffer(space, dtype=dtype.numpy)
        return cls.interleaved(memory, num_blocks, kv_heads, head_dim, block_size, dtype)

    @classmethod
    def interleaved(
        cls, memory: Array, num_blocks: int, kv_heads: int, head_dim: int, block_size: int, dtype: KVType
    ) -> PagedCache:
        """Use `memory` (one layer's elements, contiguous) in the layout of `allocate`."""
        plane = head_dim * block_size
        if memory.dtype != dtype.numpy or memory.size < 2 * plane * kv_heads * num_blocks:
            raise ValueError(
                f"memory has {memory.size} elements of {memory.dtype}; "
                f"{num_blocks} blocks take {2 * plane * kv_heads * num_blocks} of {dtype.numpy}"
            )
        k = memory.ctypes.data
        return cls(
            k,
            k + plane * dtype.bytes,
            dtype,
            num_blocks,
            kv_heads,
            head_dim,
            block_size,
            2 * plane * kv_heads,
            2 * plane,
            memory,
        )

    def struct(self) -> c.Cache:
        """The C view of this cache."""
        return c.Cache(
            k=self.k,
            v=self.v,
            block_stride=self.block_stride,
            head_stride=self.head_stride,
            num_blocks=self.num_blocks,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            dtype=int(self.dtype),
        )


class Pool:
    """Threads for the kernels. Close it, or use it as a context manager.

    `threads` counts the calling thread; `cores[i]` is where worker i runs (worker 0 is the caller and is not
    moved); an idle worker spins for `spin_us` before it sleeps, and without limit inside `step()`. `prefetch`
    and `segment` (tokens: 32, 64, 128; 0 lets the library choose) tune decode attention to a processor.
    """

    def __init__(
        self,
        threads: int,
        cores: Sequence[int] | None = None,
        spin_us: int = 50,
        prefetch: Prefetch = Prefetch.AUTO,
        segment: int = 0,
    ) -> None:
        self._library = c.load()
        listed = (ctypes.c_int32 * len(cores))(*cores) if cores is not None else None
        options = c.PoolOptions(
            threads=threads,
            n_cores=0 if cores is None else len(cores),
            cores=listed,
            spin_us=spin_us,
            prefetch=int(prefetch),
            segment=segment,
        )
        handle = ctypes.c_void_p()
        self._handle: ctypes.c_void_p | None = None
        self.check(self._library.neo_cpu_pool_create(options, handle))
        self._handle = handle

    @property
    def handle(self) -> ctypes.c_void_p:
        """The C handle."""
        if self._handle is None:
            raise ValueError("the pool is closed")
        return self._handle

    @property
    def threads(self) -> int:
        """Threads that work, the calling one included."""
        return int(self._library.neo_cpu_pool_threads(self.handle))

    def check(self, status: int) -> None:
        """Raise for a status that is not success, with the library's message."""
        if status:
            c.raise_for(status, self._library.neo_cpu_last_error().decode())

    def begin(self) -> None:
        """Let idle workers not sleep any more, until the pool is closed."""
        self.check(self._library.neo_cpu_pool_begin_step(self.handle))

    @contextmanager
    def step(self) -> Iterator[None]:
        """While inside, idle workers do not sleep."""
        self.begin()
        try:
            yield
        finally:
            self.check(self._library.neo_cpu_pool_end_step(self.handle))

    def close(self) -> None:
        """Stop the threads. No call may be running."""
        if self._handle is not None:
            self._library.neo_cpu_pool_destroy(self._handle)
            self._handle = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


def target() -> str:
    """Which instruction set the library uses here: ``avx512``, ``avx2``, ``neon`` or ``unsupported``."""
    return str(c.load().neo_cpu_target().decode())


def version() -> str:
    """The library's version."""
    return str(c.load().neo_cpu_version().decode())


def _ints(array: Ints, name: str, axes: int) -> Ints:
    if array.dtype != np.int32 or array.ndim != axes:
        raise ValueError(f"{name} must be int32 with {axes} axes, has {array.dtype} and {array.ndim}")
    if array.size and array.strides[-1] != array.itemsize and array.shape[-1] > 1:
        raise ValueError(f"{name}: the last axis must be contiguous")
    return array


def _table(block_tables: Ints) -> tuple[int, int]:
    """Address and stride; a table without columns has stride 0, so that every entry is out of bounds."""
    rows, columns = block_tables.shape
    stride = block_tables.strides[0] // 4 if rows > 1 else columns
    if stride < columns:
        raise ValueError("block_tables: rows must not overlap")
    return block_tables.ctypes.data, stride if columns else 0


def _rows(value: Array | Rows, name: str, heads: int | None, cache: PagedCache) -> Rows:
    rows = value if isinstance(value, Rows) else Rows.of(value, name)
    if rows.shape[2] != cache.head_dim or (heads is not None and rows.shape[1] != heads):
        raise ValueError(
            f"{name} has shape {rows.shape}, the cache {heads or 'any'} heads of {cache.head_dim}"
        )
    return rows


def decode_attention(
    pool: Pool,
    cache: PagedCache,
    q: Array | Rows,
    out: Array | Rows,
    block_tables: Ints,
    lengths: Ints,
    scale: float | None = None,
    lse: npt.NDArray[np.float32] | None = None,
    sequences: Ints | None = None,
) -> None:
    """Attention of one new token per sequence over its cached tokens, written to `out`.

    q, out: [batch, q_heads, head_dim], both of one type, any of `KVType`; block_tables: int32
    [sequences, >= blocks]; sequences: int32 [batch], which row of `block_tables` each query uses, by default
    row i for query i, and then there are as many of each; lengths: int32 [batch], in tokens, 0 gives zeros;
    scale: 1 / sqrt(head_dim) if None; lse: float32 [batch, q_heads], receives the natural log of the sum of
    exponentials. Raises ValueError for bad arguments.
    """
    struct = cache.struct()
    args = _decode_struct(cache, struct, q, out, block_tables, lengths, scale, lse, sequences)
    pool.check(c.load().neo_cpu_decode_attention(pool.handle, args))


def read_cache(
    pool: Pool,
    cache: PagedCache,
    q: Array | Rows,
    block_tables: Ints,
    lengths: Ints,
    sequences: Ints | None = None,
) -> int:
    """Only read what `decode_attention` would, in the same order: the roof to hold it against.

    `q` gives batch and heads. Returns a checksum.
    """
    struct = cache.struct()
    args = _decode_struct(cache, struct, q, q, block_tables, lengths, None, None, sequences)
    checksum = ctypes.c_int32()
    pool.check(c.load().neo_cpu_read_cache(pool.handle, args, checksum))
    return checksum.value


def _decode_struct(
    cache: PagedCache,
    struct: c.Cache,
    q: Array | Rows,
    out: Array | Rows,
    block_tables: Ints,
    lengths: Ints,
    scale: float | None,
    lse: npt.NDArray[np.float32] | None,
    sequences: Ints | None = None,
) -> c.Decode:
    queries, outputs = _rows(q, "q", None, cache), _rows(out, "out", None, cache)
    if queries.shape != outputs.shape or queries.dtype != outputs.dtype:
        raise ValueError(
            f"q is {queries.shape} {queries.dtype.name}, out {outputs.shape} {outputs.dtype.name}: must agree"
        )
    batch, heads, _ = queries.shape
    _ints(lengths, "lengths", 1)
    _ints(block_tables, "block_tables", 2)
    rows = block_tables.shape[:1] if sequences is None else _ints(sequences, "sequences", 1).shape
    if lengths.shape != (batch,) or rows != (batch,):
        what = "block tables" if sequences is None else "sequences"
        raise ValueError(f"{batch} queries, {len(lengths)} lengths, {rows[0]} {what}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")
    if lse is not None and (
        lse.dtype != np.float32 or lse.shape != (batch, heads) or not lse.flags.c_contiguous
    ):
        raise ValueError(f"lse must be contiguous float32 of shape {(batch, heads)}")
    address, stride = _table(block_tables)
    return c.Decode(
        cache=ctypes.pointer(struct),
        q=queries.address,
        out=outputs.address,
        lse=None if lse is None else lse.ctypes.data,
        q_stride=queries.row_stride,
        q_head_stride=queries.head_stride,
        out_stride=outputs.row_stride,
        out_head_stride=outputs.head_stride,
        block_tables=address,
        table_stride=stride,
        sequences=None if sequences is None else sequences.ctypes.data,
        lengths=lengths.ctypes.data,
        batch=batch,
        n_sequences=len(block_tables),
        q_heads=heads,
        io_dtype=int(queries.dtype),
        scale=1.0 / math.sqrt(cache.head_dim) if scale is None else scale,
    )


def append_kv(
    pool: Pool,
    cache: PagedCache,
    k: Array | Rows,
    v: Array | Rows,
    block_tables: Ints,
    positions: Ints,
    sequences: Ints | None = None,
) -> None:
    """Write rows of K and V as tokens `positions` of their sequences.

    k, v: [rows, kv_heads, head_dim] in float32 or the cache's type; positions: int32 [rows]; sequences: int32
    [rows], which row of `block_tables` each belongs to, by default row i to sequence i. Rounds to the cache's
    type. Raises ValueError, with nothing written, for bad arguments.
    """
    keys, values = _rows(k, "k", cache.kv_heads, cache), _rows(v, "v", cache.kv_heads, cache)
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"k is {keys.shape} {keys.dtype.name}, v {values.shape} {values.dtype.name}: must agree"
        )
    rows = keys.shape[0]
    for rows_, name in ((keys, "k"), (values, "v")):
        if rows and cache.kv_heads > 1 and rows_.head_stride != cache.head_dim:
            raise ValueError(f"{name}: heads must follow one another")
    _ints(positions, "positions", 1)
    _ints(block_tables, "block_tables", 2)
    given = [positions] if sequences is None else [positions, _ints(sequences, "sequences", 1)]
    if any(array.shape != (rows,) for array in given):
        raise ValueError(f"{rows} rows need as many positions and sequences")
    address, stride = _table(block_tables)
    struct = cache.struct()
    args = c.Append(
        cache=ctypes.pointer(struct),
        k=keys.address,
        v=values.address,
        k_stride=keys.row_stride,
        v_stride=values.row_stride,
        block_tables=address,
        table_stride=stride,
        sequences=None if sequences is None else sequences.ctypes.data,
        positions=positions.ctypes.data,
        rows=rows,
        n_sequences=len(block_tables),
        io_dtype=int(keys.dtype),
    )
    pool.check(c.load().neo_cpu_append_kv(pool.handle, args))

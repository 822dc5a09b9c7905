"""Arguments of the CPU library from torch tensors and numpy arrays.

This runs per layer and step, so it does as little Python as it can: structs are made once and filled again
and again, addresses are taken the shortest way.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neo.runtime import cpu_library as c
from neo.runtime.backend import Ints
from neo.runtime.kv_memory import KVMemory

_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # neo_cpu_dtype
_INT32 = np.dtype(np.int32)
_BYTE = ctypes.c_char


class _View:
    """A memory as the library sees it, and what its calls need again and again."""

    __slots__ = ("address", "pointer", "scale", "struct")

    def __init__(self, memory: KVMemory) -> None:
        plane = memory.head_dim * memory.block_size
        self.address = memory.tensor.data_ptr()
        self.struct = c.Cache(
            k=self.address,
            v=self.address + plane * memory.tensor.element_size(),
            block_stride=2 * plane * memory.kv_heads,
            head_stride=2 * plane,
            num_blocks=memory.blocks,
            kv_heads=memory.kv_heads,
            head_dim=memory.head_dim,
            block_size=memory.block_size,
            dtype=_CODE[memory.dtype],
        )
        self.pointer = ctypes.pointer(self.struct)
        self.scale = 1.0 / math.sqrt(memory.head_dim)


def _view(memory: KVMemory) -> _View:
    view = memory.view
    if view is None:
        view = memory.view = _View(memory)
    return view  # type: ignore[no-any-return]


class Slot:
    """One set of argument structs, linked once and used for one call or job after another."""

    __slots__ = ("append", "append_at", "copy", "copy_at", "decode", "decode_at", "job")

    def __init__(self) -> None:
        self.append, self.decode, self.copy, self.job = c.Append(), c.Decode(), c.Copy(), c.Job()
        self.append_at = ctypes.pointer(self.append)
        self.decode_at = ctypes.pointer(self.decode)
        self.copy_at = ctypes.pointer(self.copy)


def _address(values: Ints, name: str, count: int) -> int:
    """Where `count` contiguous int32 are."""
    if isinstance(values, np.ndarray):
        if values.dtype != _INT32 or values.shape != (count,) or not values.flags.c_contiguous:
            raise ValueError(f"{name} must be {count} contiguous int32, is {values.shape} {values.dtype}")
        return _of_numpy(values)
    if values.dtype != torch.int32 or values.shape != (count,) or not values.is_contiguous():
        raise ValueError(f"{name} must be {count} contiguous int32, is {tuple(values.shape)} {values.dtype}")
    return values.data_ptr()


def _of_numpy(values: np.ndarray[Any, Any]) -> int:
    try:
        return ctypes.addressof(_BYTE.from_buffer(values.data))  # a third of the time that .ctypes takes
    except (TypeError, ValueError):  # read-only, rows apart, or empty
        return int(values.ctypes.data)


def _table(tables: Ints) -> tuple[int, int, int]:
    """Address, entries between rows, rows. Without columns the stride is 0: every entry is out of bounds."""
    if isinstance(tables, np.ndarray):
        good = tables.dtype == _INT32 and tables.ndim == 2
        strides = tuple(s // 4 for s in tables.strides)
    else:
        good = tables.dtype == torch.int32 and tables.ndim == 2
        strides = tables.stride()
    if not good:
        raise ValueError(f"tables must be int32 [slots, width], are {tuple(tables.shape)} {tables.dtype}")
    rows, width = tables.shape
    stride = strides[0] if rows > 1 else width
    if (width > 1 and strides[1] != 1) or stride < width:
        raise ValueError(f"tables: entries of a row must be contiguous and rows apart, strides are {strides}")
    address = _of_numpy(tables) if isinstance(tables, np.ndarray) else tables.data_ptr()
    return address, stride if width else 0, rows


def _check_rows(rows: Tensor, name: str, memory: KVMemory) -> None:
    if rows.ndim != 3 or rows.shape[2] != memory.head_dim or not rows.is_cpu or rows.dtype not in _CODE:
        raise ValueError(
            f"{name} must be [rows, heads, {memory.head_dim}] floats of at most 32 bits in host memory, "
            f"is {tuple(rows.shape)} {rows.dtype} on {rows.device}"
        )


def fill_append(
    args: c.Append, memory: KVMemory, k: Tensor, v: Tensor, tables: Ints, slots: Ints, positions: Ints
) -> tuple[object, ...]:
    """Describe an append; returns what must stay alive."""
    _check_rows(k, "k", memory)
    _check_rows(v, "v", memory)
    rows, heads, dim = k.shape
    if k.shape != v.shape or heads != memory.kv_heads:
        raise ValueError(
            f"k is {tuple(k.shape)} and v {tuple(v.shape)}: must agree, with {memory.kv_heads} heads"
        )
    kind = k.dtype
    if kind is not v.dtype or (kind is not memory.dtype and kind is not torch.float32):
        kind = memory.dtype
        k, v = k.to(kind), v.to(kind)
    k_strides, v_strides = k.stride(), v.stride()
    if k_strides[1] != dim or k_strides[2] != 1:
        k = k.contiguous()
        k_strides = k.stride()
    if v_strides[1] != dim or v_strides[2] != 1:
        v = v.contiguous()
        v_strides = v.stride()
    args.cache = _view(memory).pointer
    args.k, args.v = k.data_ptr(), v.data_ptr()
    args.k_stride, args.v_stride = k_strides[0], v_strides[0]
    args.block_tables, args.table_stride, args.n_sequences = _table(tables)
    args.sequences = _address(slots, "slots", rows)
    args.positions = _address(positions, "positions", rows)
    args.rows = rows
    args.io_dtype = _CODE[kind]
    return memory, k, v, tables, slots, positions


def fill_decode(
    args: c.Decode, memory: KVMemory, q: Tensor, out: Tensor, tables: Ints, slots: Ints, lengths: Ints
) -> tuple[object, ...]:
    """Describe decode attention; returns what must stay alive."""
    _check_rows(q, "q", memory)
    _check_rows(out, "out", memory)
    if q.shape != out.shape or q.dtype is not out.dtype:
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype}, out {tuple(out.shape)} {out.dtype}: must agree")
    rows, heads, _ = q.shape
    q_strides, out_strides = q.stride(), out.stride()
    if q_strides[2] != 1:
        q = q.contiguous()
        q_strides = q.stride()
    if out_strides[2] != 1:
        raise ValueError(f"out: the last axis must be contiguous, strides are {out_strides}")
    view = _view(memory)
    args.cache = view.pointer
    args.q, args.out = q.data_ptr(), out.data_ptr()
    args.q_stride, args.q_head_stride = q_strides[0], q_strides[1]
    args.out_stride, args.out_head_stride = out_strides[0], out_strides[1]
    args.block_tables, args.table_stride, args.n_sequences = _table(tables)
    args.sequences = _address(slots, "slots", rows)
    args.lengths = _address(lengths, "lengths", rows)
    args.batch, args.q_heads = rows, heads
    args.io_dtype = _CODE[q.dtype]
    args.scale = view.scale
    return memory, q, out, tables, slots, lengths


def fill_copy(
    args: c.Copy, src: KVMemory, dst: KVMemory, src_blocks: Ints, dst_blocks: Ints
) -> tuple[object, ...]:
    """Describe a copy; returns what must stay alive."""
    if (
        src.tensor.shape[1:] != dst.tensor.shape[1:]
        or src.block_size != dst.block_size
        or src.dtype != dst.dtype
    ):
        raise ValueError(
            f"blocks of {tuple(src.tensor.shape[1:])} {src.dtype} cannot be copied to "
            f"{tuple(dst.tensor.shape[1:])} {dst.dtype}"
        )
    count = len(src_blocks)
    args.src, args.dst = _view(src).address, _view(dst).address
    args.block_bytes = src.block_bytes
    args.src_blocks = _address(src_blocks, "src_blocks", count)
    args.dst_blocks = _address(dst_blocks, "dst_blocks", count)
    args.src_count, args.dst_count, args.count = src.blocks, dst.blocks, count
    return src, dst, src_blocks, dst_blocks

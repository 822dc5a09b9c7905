"""Copies between the tiers and the hand-over of rows to the host: CUDA kernels on torch tensors.

As in `neo.runtime.cuda_kernels`, every function describes its arguments once and returns a `Launch`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from neo.runtime import cuda_library as c
from neo.runtime.cuda_kernels import Cache, Launch, float_rows, int_numbers


def gather(cache: Cache, tables: Tensor, entries: Tensor, k: Tensor, v: Tensor) -> Launch:
    """K and V of tokens in the cache as rows [rows, kv_heads, head_dim], contiguous.

    `entries`, int32 [count, 4] on the device: the first `count` tokens of block `index` of row `slot` of
    `tables` become rows from `row` on; its columns are slot, index, row, count.
    """
    heads, dim = cache.struct.kv_heads, cache.struct.head_dim
    for name, rows in (("k", k), ("v", v)):
        if rows.shape[1:] != (heads, dim) or rows.dtype != cache.blocks.dtype or not rows.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(rows.shape)} {rows.dtype}, must be contiguous "
                f"[rows, {heads}, {dim}] {cache.blocks.dtype}"
            )
    if entries.ndim != 2 or entries.shape[1] != 4:
        raise ValueError(f"entries are {tuple(entries.shape)}, must be [count, 4]")
    args = c.Gather(
        cache=ctypes.pointer(cache.struct),
        block_tables=tables.data_ptr(),
        table_stride=max(tables.stride(0), tables.shape[1]),
        entries=int_numbers(entries, "entries", entries.numel()),
        k=k.data_ptr(),
        v=v.data_ptr(),
        count=len(entries),
    )
    return Launch("neo_cuda_gather", args, (cache, tables, entries, k, v))


def copy_blocks(
    src: Tensor,
    dst: Tensor,
    src_blocks: Tensor,
    dst_blocks: Tensor,
    count_at: Tensor | None = None,
    ctas: int = 0,
    engines: bool = False,
) -> Launch:
    """Block dst_blocks[i] of dst [blocks, ...] becomes block src_blocks[i] of src; either may be pinned.

    One kernel of `ctas` thread blocks, for lists in device or pinned memory, of which `count_at` (int32 [1])
    says how many pairs count; or, with `engines`, the copy engines, for lists in host memory, read when it is
    called.
    """
    count = src_blocks.numel()
    if dst_blocks.numel() != count or src.shape[1:] != dst.shape[1:] or src.dtype != dst.dtype:
        raise ValueError(
            f"blocks {tuple(src.shape)} {src.dtype} to {tuple(dst.shape)} {dst.dtype}, "
            f"{count} to {dst_blocks.numel()} of them: must agree"
        )
    if not (src.is_contiguous() and dst.is_contiguous()):
        raise ValueError("src and dst must be contiguous")
    args = c.Copy(
        src=src.data_ptr(),
        dst=dst.data_ptr(),
        block_bytes=src[0].numel() * src.element_size() if len(src) else 16,
        src_blocks=int_numbers(src_blocks, "src_blocks", count),
        dst_blocks=int_numbers(dst_blocks, "dst_blocks", count),
        count_at=None if count_at is None else int_numbers(count_at, "count_at", 1),
        count=count,
        ctas=ctas,
    )
    name = "neo_cuda_copy_runs" if engines else "neo_cuda_copy_blocks"
    return Launch(name, args, (src, dst, src_blocks, dst_blocks, count_at))


def shared_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory that both sides see, cleared: pinned where the device is a GPU."""
    zeros = torch.zeros(shape, dtype=dtype)
    return zeros.pin_memory() if device.type == "cuda" else zeros


class Channel:
    """A hand-over channel: numbers that only grow, in pinned memory and on the device.

    ``request``, ``answer`` and ``error`` are addresses for the host's side (`cpu_library.Stage`).
    """

    _LINE = 32  # int32 in 128 bytes

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._state = torch.zeros(4, dtype=torch.int32, device=device)
        self._flags = shared_zeros((3 * self._LINE,), torch.int32, self._state.device)
        self.request, self.answer, self.error = (
            self._flags.data_ptr() + i * 4 * self._LINE for i in range(3)
        )
        self.struct = c.Channel(
            state=self._state.data_ptr(), request=self.request, answer=self.answer, error=self.error
        )

    @property
    def requested(self) -> int:
        """The last number that the device asked for; the next step's first is one more (mod 2**32)."""
        return int(self._flags[0]) & 0xFFFFFFFF

    @property
    def failed(self) -> bool:
        """Whether an answer did not come in time."""
        return bool(self._flags[2 * self._LINE])

    def reset(self) -> None:
        """Reopen it, with counts at 0. The device and the host's side must be idle."""
        self._flags.zero_()
        self._state.zero_()
        if self._state.is_cuda:
            torch.cuda.synchronize(self._state.device)


def post_rows(
    channel: Channel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Tensor,
    rows_at: Tensor | None = None,
    ctas: int = 0,
) -> Launch:
    """Rows [q | k | v] to pinned `packed` [>= rows, >= width], then the request's number; see neo_cuda.h.

    q [rows, heads, dim], k and v [rows, kv heads, dim], heads side by side. `rows_at`: int32 [1], how many
    rows count.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        float_rows(tensor, name, 3)
        if tensor.stride(1) != tensor.shape[2] or tensor.dtype != q.dtype or len(tensor) != len(q):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}: "
                "heads must lie side by side, and agree with q"
            )
    float_rows(packed, "packed", 2)
    by = q.element_size()
    args = c.Post(
        channel=ctypes.pointer(channel.struct),
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        q_stride=q.stride(0) * by,
        k_stride=k.stride(0) * by,
        v_stride=v.stride(0) * by,
        packed=packed.data_ptr(),
        packed_stride=packed.stride(0) * by,
        rows_at=None if rows_at is None else int_numbers(rows_at, "rows_at", 1),
        rows=len(q),
        q_bytes=q.shape[1] * q.shape[2] * by,
        kv_bytes=k.shape[1] * k.shape[2] * by,
        ctas=ctas,
    )
    if packed.dtype != q.dtype or len(packed) < len(q):
        raise ValueError(
            f"packed is {tuple(packed.shape)} {packed.dtype}, too small or of another type than q"
        )
    return Launch("neo_cuda_post_rows", args, (channel, q, k, v, packed, rows_at))


def await_rows(
    channel: Channel,
    packed: Tensor,
    out: Tensor,
    timeout_s: float,
    rows_at: Tensor | None = None,
    ctas: int = 0,
) -> Launch:
    """Wait for the answer to the last post, then rows of pinned `packed` to `out`, both [rows, width]."""
    float_rows(packed, "packed", 2)
    float_rows(out, "out", 2)
    if packed.dtype != out.dtype or len(packed) < len(out) or packed.shape[1] < out.shape[1]:
        raise ValueError(
            f"packed is {tuple(packed.shape)} {packed.dtype}, out {tuple(out.shape)} {out.dtype}"
        )
    by = out.element_size()
    args = c.Await(
        channel=ctypes.pointer(channel.struct),
        packed=packed.data_ptr(),
        packed_stride=packed.stride(0) * by,
        out=out.data_ptr(),
        out_stride=out.stride(0) * by,
        rows_at=None if rows_at is None else int_numbers(rows_at, "rows_at", 1),
        rows=len(out),
        row_bytes=out.shape[1] * by,
        ctas=ctas,
        timeout_us=round(timeout_s * 1e6),
    )
    return Launch("neo_cuda_await_rows", args, (channel, packed, out, rows_at))

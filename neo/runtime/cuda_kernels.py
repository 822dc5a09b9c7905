"""The CUDA kernels on torch tensors: arguments are described once and launched again and again.

Every function here fills a struct of `neo.runtime.cuda_library` from tensors and returns a `Launch`: calling
it launches the kernel on a stream and does no more Python than that. The launch keeps the tensors alive; what
changes between calls is what lies in their memory. All of it can be captured in a CUDA graph.

Layer-blocks are `KVMemory`'s on both tiers: a tensor [blocks, kv_heads, 2, head_dim * block_size]. Copies and
the hand-over to the host are in `neo.runtime.cuda_transfers`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neo.runtime import cuda_library as c
from neo.runtime.cpu_library import Sized

CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""``neo_cuda_dtype`` of torch's types."""
NO_SCALE = c.Scale()


def current_stream() -> int:
    """Handle of torch's current stream. A step asks hundreds of times: torch's own objects take 3 us each."""
    if _RAW_STREAM is None:
        return int(torch.cuda.current_stream().cuda_stream)
    return int(_RAW_STREAM(torch._C._cuda_getDevice()))


_RAW_STREAM: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""What torch's own compiled code uses; builds without CUDA do not have it."""


class Launch:
    """A kernel with its arguments; ``args`` may be changed between calls."""

    __slots__ = ("_function", "_keep", "args")

    def __init__(self, function: str, args: Sized, keep: Sequence[object]) -> None:
        self._function = getattr(c.load(), function)
        self._keep = keep
        self.args = args

    def __call__(self, stream: int | None = None) -> None:
        """Launch on a stream's handle (None: torch's current one). ValueError for refused arguments."""
        if stream is None:
            stream = current_stream()
        status = self._function(self.args, stream)
        if status:
            c.check(status)


def float_rows(tensor: Tensor, name: str, axes: int) -> None:
    """Refuse what has not so many axes of floats, the last contiguous."""
    if tensor.ndim != axes or tensor.dtype not in CODE or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        raise ValueError(
            f"{name} must have {axes} axes of 16 or 32 bit floats, the last contiguous; "
            f"is {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
        )


def int_numbers(tensor: Tensor, name: str, count: int) -> int:
    """Address of `count` contiguous int32; others are refused."""
    if tensor.dtype != torch.int32 or tensor.numel() < count or not tensor.is_contiguous():
        raise ValueError(f"{name} must be {count} contiguous int32, is {tuple(tensor.shape)} {tensor.dtype}")
    return tensor.data_ptr()


def _table(tables: Tensor) -> tuple[int, int]:
    """Address and entries between rows of one layer's block tables, int32 [slots, width]."""
    if tables.dtype != torch.int32 or tables.ndim != 2 or tables.stride(1) != 1:
        raise ValueError(f"tables must be int32 [slots, width], are {tuple(tables.shape)} {tables.dtype}")
    return tables.data_ptr(), max(tables.stride(0), tables.shape[1])


@dataclass(frozen=True, slots=True)
class Cache:
    """Layer-blocks on the device, and the C view of them."""

    blocks: Tensor
    struct: c.Cache


def cache_of(blocks: Tensor, block_size: int) -> Cache:
    """The cache in layer-blocks [blocks, kv_heads, 2, head_dim * block_size]."""
    if blocks.ndim != 4 or blocks.shape[2] != 2 or blocks.shape[3] % block_size or not blocks.is_contiguous():
        raise ValueError(
            f"blocks are {tuple(blocks.shape)}, must be contiguous "
            f"[blocks, kv_heads, 2, head_dim * {block_size}]"
        )
    struct = c.Cache(
        data=blocks.data_ptr(),
        num_blocks=blocks.shape[0],
        kv_heads=blocks.shape[1],
        head_dim=blocks.shape[3] // block_size,
        block_size=block_size,
        dtype=CODE[blocks.dtype],
    )
    return Cache(blocks, struct)


def decode_workspace(cache: Cache, rows: int, q_heads: int, ctas: int = 0, stages: int = 0) -> int:
    """Bytes of workspace for decode attention of so many rows on the current device."""
    args = c.Decode(cache=ctypes.pointer(cache.struct), rows=rows, q_heads=q_heads, ctas=ctas, stages=stages)
    size = ctypes.c_size_t()
    c.check(c.load().neo_cuda_decode_workspace(args, size))
    return size.value


@dataclass(frozen=True, slots=True)
class Attention:
    """Decode attention: ``plan`` once for all layers with the same lengths, then ``attend`` for each."""

    plan: Launch
    attend: Launch


def decode(
    cache: Cache,
    q: Tensor,
    out: Tensor,
    tables: Tensor,
    lengths: Tensor,
    workspace: Tensor,
    slots: Tensor | None = None,
    scale: float | None = None,
    ctas: int = 0,
    stages: int = 0,
    early: bool = False,
) -> Attention:
    """Attention of q [rows, heads, head_dim] over the first lengths[i] tokens of slots[i] (None: row i).

    `workspace`: uint8 of at least `decode_workspace` bytes, for one call at a time. `scale` None:
    1/sqrt(head_dim). `early`: all that is read but q and the newest token of each row was there before the
    kernel ahead on the stream began.
    """
    float_rows(q, "q", 3)
    float_rows(out, "out", 3)
    rows, heads, dim = q.shape
    if (
        out.shape != q.shape
        or dim != cache.struct.head_dim
        or {CODE[q.dtype], CODE[out.dtype]} != {cache.struct.dtype}
    ):
        raise ValueError(
            f"q is {tuple(q.shape)} {q.dtype}, out {tuple(out.shape)} {out.dtype}: "
            "must agree, and with the cache"
        )
    address, stride = _table(tables)
    args = c.Decode(
        cache=ctypes.pointer(cache.struct),
        q=q.data_ptr(),
        out=out.data_ptr(),
        q_stride=q.stride(0),
        q_head_stride=q.stride(1),
        out_stride=out.stride(0),
        out_head_stride=out.stride(1),
        block_tables=address,
        table_stride=stride,
        slots=None if slots is None else int_numbers(slots, "slots", rows),
        lengths=int_numbers(lengths, "lengths", rows),
        workspace=workspace.data_ptr() if workspace.numel() else None,
        workspace_bytes=workspace.numel() * workspace.element_size(),
        rows=rows,
        q_heads=heads,
        ctas=ctas,
        stages=stages,
        scale=dim**-0.5 if scale is None else scale,
        early=early,
    )
    keep = (cache, q, out, tables, lengths, workspace, slots)
    return Attention(
        Launch("neo_cuda_decode_plan", args, keep), Launch("neo_cuda_decode_attention", args, keep)
    )


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> Launch:
    """``hidden += delta`` (unless None), ``out = norm(hidden) * weight``; [rows, width], contiguous."""
    rows, width = hidden.shape
    for name, tensor, shape in (
        ("hidden", hidden, (rows, width)),
        ("delta", delta, (rows, width)),
        ("weight", weight, (width,)),
        ("out", out, (rows, width)),
    ):
        if tensor is not None and (
            tensor.shape != shape or tensor.dtype != hidden.dtype or not tensor.is_contiguous()
        ):
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, must be contiguous {shape}")
    args = c.Norm(
        hidden=hidden.data_ptr(),
        delta=None if delta is None else delta.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        width=width,
        dtype=CODE[hidden.dtype],
        eps=eps,
    )
    return Launch("neo_cuda_add_rms_norm", args, (hidden, delta, weight, out))


def scale_of(hidden: Tensor, eps: float) -> c.Scale:
    """The scales that a norm gives the rows of ``hidden`` [rows, width], contiguous; it must stay alive."""
    if hidden.ndim != 2 or not hidden.is_contiguous():
        raise ValueError(f"hidden is {tuple(hidden.shape)}, must be contiguous [rows, width]")
    return c.Scale(hidden.data_ptr(), hidden.shape[1], eps)


def silu_mul(gate_up: Tensor, out: Tensor) -> Launch:
    """``out [rows, width] = silu(gate_up[:, :width]) * gate_up[:, width:]``; contiguous.

    ``args.scale``, 1 at first, multiplies rows of ``gate_up`` (`scale_of`); likewise in `qkv_rope_append`.
    """
    rows, width = out.shape
    if gate_up.shape != (rows, 2 * width) or gate_up.dtype != out.dtype:
        raise ValueError(
            f"gate_up is {tuple(gate_up.shape)} {gate_up.dtype}, out {tuple(out.shape)} {out.dtype}"
        )
    if not (gate_up.is_contiguous() and out.is_contiguous()):
        raise ValueError("gate_up and out must be contiguous")
    args = c.Silu(
        gate_up=gate_up.data_ptr(), out=out.data_ptr(), rows=rows, width=width, dtype=CODE[out.dtype]
    )
    return Launch("neo_cuda_silu_mul", args, (gate_up, out))


def rope_angles(positions: Tensor, frequencies: Tensor, scale: float, cos: Tensor, sin: Tensor) -> Launch:
    """Scaled cosines and sines [rows, dim], contiguous, of int32 positions [rows] times float32 [dim]."""
    rows, dim = cos.shape
    if frequencies.shape != (dim,) or frequencies.dtype != torch.float32 or not frequencies.is_contiguous():
        raise ValueError(
            f"frequencies are {tuple(frequencies.shape)} {frequencies.dtype}, must be float32 ({dim},)"
        )
    if sin.shape != cos.shape or sin.dtype != cos.dtype or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(
            f"cos is {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype}: must agree"
        )
    args = c.Angles(
        positions=int_numbers(positions, "positions", rows),
        frequencies=frequencies.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        rows=rows,
        head_dim=dim,
        dtype=CODE[cos.dtype],
        scale=scale,
    )
    return Launch("neo_cuda_rope_angles", args, (positions, frequencies, cos, sin))


@dataclass(frozen=True, slots=True)
class QkvWeights:
    """What a layer adds to its projection: bias [(q + 2 kv heads) * dim], norms [dim] of q and k; or None."""

    bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6


def qkv_rope_append(
    cache: Cache,
    qkv: Tensor,
    weights: QkvWeights,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    tables: Tensor | None,
    slots: Tensor | None,
    positions: Tensor | None,
) -> Launch:
    """Bias, norms and rotation of a fused projection [rows, (q + 2 kv heads) * dim], and append to the cache.

    cos, sin: [rows, 1, dim] or [rows, dim], contiguous, sin signed as in `neo.runtime.rope.Rope`. q [rows,
    q heads, dim], k and v [rows, kv heads, dim] or None: heads side by side, rows may lie apart. Rows with
    slots[i] < 0 are not appended; without tables none is.
    """
    float_rows(qkv, "qkv", 2)
    float_rows(q, "q", 3)
    rows, heads, dim = q.shape
    kv_heads = cache.struct.kv_heads
    kind = qkv.dtype
    if (
        qkv.shape != (rows, (heads + 2 * kv_heads) * dim)
        or dim != cache.struct.head_dim
        or CODE[kind] != cache.struct.dtype
    ):
        raise ValueError(f"qkv is {tuple(qkv.shape)} {kind}, does not fit q {tuple(q.shape)} and the cache")
    strides = {t.stride(0) for t in (k, v) if t is not None}
    for name, tensor, shape in (
        ("q", q, (rows, heads, dim)),
        ("k", k, (rows, kv_heads, dim)),
        ("v", v, (rows, kv_heads, dim)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != kind or tensor.stride(1) != dim):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, must be {shape} {kind}, heads side by side"
            )
    if len(strides) > 1:
        raise ValueError(f"rows of k and v must be equally far apart, strides are {sorted(strides)}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.numel() != rows * dim or tensor.dtype != kind or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, must be contiguous ({rows}, {dim}) {kind}"
            )
    address, table_stride = (None, 0) if tables is None else _table(tables)
    args = c.Qkv(
        cache=ctypes.pointer(cache.struct),
        qkv=qkv.data_ptr(),
        qkv_stride=qkv.stride(0),
        bias=_pointer(weights.bias),
        q_norm=_pointer(weights.q_norm),
        k_norm=_pointer(weights.k_norm),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        q_out=q.data_ptr(),
        k_out=_pointer(k),
        v_out=_pointer(v),
        q_stride=q.stride(0),
        kv_stride=strides.pop() if strides else 0,
        block_tables=address,
        table_stride=table_stride,
        slots=None if slots is None else int_numbers(slots, "slots", rows),
        positions=None if positions is None else int_numbers(positions, "positions", rows),
        rows=rows,
        q_heads=heads,
        eps=weights.eps,
    )
    keep = (cache, qkv, weights, cos, sin, q, k, v, tables, slots, positions)
    return Launch("neo_cuda_qkv_rope_append", args, keep)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

"""Linear layers between the buffers of a step on the GPU: our kernel for few rows, torch for more."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from neo.runtime import cuda_kernels as kernels
from neo.runtime import cuda_library as c

MOST_ROWS = 64
"""That the kernel takes; up to as many, a product waits for its weights alone."""
ROWS_VARIABLE = "NEO_CUDA_LINEAR_ROWS"
"""Environment: up to how many rows the kernel is used instead of torch, 0 to `MOST_ROWS` (default)."""
_CAPABILITY = 90  # older devices have neither clusters nor launches that overlap, which are what it gains by
_KINDS = (torch.float16, torch.bfloat16)


def rows_of_kernel() -> int:
    """Up to how many rows the kernel is used on this device; 0: never."""
    if c.describe().capability < _CAPABILITY:
        return 0
    return max(0, min(MOST_ROWS, int(os.environ.get(ROWS_VARIABLE, MOST_ROWS))))


class Product:
    """``out[:n] = x[:n] @ weight.T (+ bias)`` for weights of one shape, between two buffers.

    Args:
        x: [rows, width].
        weight: [columns, width], any of those it will be called with: they are all laid out like this one.
        out: [rows, columns].
        most: rows up to which the kernel is used, see `rows_of_kernel`.
    """

    __slots__ = ("_kernel", "_most", "_out", "_x")

    def __init__(self, x: Tensor, weight: Tensor, out: Tensor, most: int) -> None:
        self._x, self._out = x, out
        self._most = most if _fits(x, weight, out) else 0
        few = min(len(x), self._most)
        self._kernel = kernels.linear(x[:few], weight, None, out[:few]) if few else None

    def __call__(self, n: int, weight: Tensor, bias: Tensor | None) -> None:
        """Of the first ``n`` rows, on the current stream."""
        if self._kernel is not None and n <= self._most:
            args = self._kernel.args
            args.rows, args.weight = n, weight.data_ptr()
            args.bias = None if bias is None else bias.data_ptr()
            self._kernel()
        elif bias is None:
            torch.mm(self._x[:n], weight.t(), out=self._out[:n])
        else:
            torch.addmm(bias, self._x[:n], weight.t(), out=self._out[:n])


def _fits(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether the kernel takes them: see neo_cuda.h."""
    columns, width = weight.shape
    return (
        x.dtype in _KINDS
        and columns % 16 == 0
        and width % 8 == 0
        and all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (x, weight, out))
    )

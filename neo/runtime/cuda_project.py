"""Products of few rows by the kernel of our own, ``neo_cuda_project_rows``, and how long they take here.

Unlike a library's, the kernel has the first of its weights on their way while the kernel ahead on the stream
still runs. It is worth that on devices whose kernels can overlap and whose blocks form clusters.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from neo.runtime import cuda_library as c
from neo.runtime.cuda_kernels import CODE

MOST_ROWS = 64
"""That the kernel takes."""
VARIABLE = "NEO_CUDA_PROJECT"
"""Environment: with 0, products are left to the libraries."""
_CAPABILITY = 90
_REPLAYS = 7


def usable(rows: int, columns: int, width: int) -> bool:
    """Whether the kernel takes such a product on this device."""
    if os.environ.get(VARIABLE) == "0" or not 0 < rows <= MOST_ROWS or columns % 16 or width % 8:
        return False
    try:
        return int(c.describe().capability) >= _CAPABILITY
    except (c.CudaKernelsMissingError, c.CudaKernelError):
        return False


class Kernel:
    """Products with weights [columns, width] of a type, of up to `MOST_ROWS` contiguous rows."""

    __slots__ = ("_args", "_launch")

    def __init__(self, columns: int, width: int, dtype: torch.dtype) -> None:
        self._launch = c.load().neo_cuda_project_rows
        self._args = c.Project(
            x_stride=width,
            weight_stride=width,
            out_stride=columns,
            columns=columns,
            width=width,
            dtype=CODE[dtype],
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``out = x @ weight.T (+ bias)`` on torch's current stream; operands are not looked at again."""
        args = self._args
        args.x, args.weight, args.out = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        args.bias = None if bias is None else bias.data_ptr()
        args.rows = len(x)
        status = self._launch(args, torch.cuda.current_stream().cuda_stream)
        if status:
            c.check(status)

    def seconds(
        self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, out: Tensor, launches: int
    ) -> float:
        """Of one product, as the median of replays of a graph of so many, the weights in turn.

        The device should have nothing else to do. Waits for it; not while a graph is being captured.
        """
        turn = itertools.cycle(weights)
        self(x, next(turn), bias, out)  # once outside of a graph, for the driver to load the kernel
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                self(x, next(turn), bias, out)
        return statistics.median([_replay(graph) for _ in range(_REPLAYS)][1:]) / launches


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds that it took."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    events[0].record()
    graph.replay()
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1])) * 1e-3

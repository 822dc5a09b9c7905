"""Captured steps: launched once for a size, replayed with other numbers in the inputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neo.runtime.cuda_linear import padded_rows
from neo.runtime.cuda_rows import Layout
from neo.runtime.cuda_sender import Sender
from neo.runtime.step_inputs import BatchInputs, StepInputs

_KEPT = 192
"""Graphs; the one that was not used for longest goes first. Some 15 numbers of rows, without relayed decodes
or with one of five numbers of them, and KV that comes, goes, both or neither, are 360, not all of which a
run meets; to capture one takes as long as several steps. They share their memory, that of logits too."""


class Graphs:
    """CUDA graphs by key. All share one memory pool, so no two of them may run at once."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor | None]] = OrderedDict()
        self._generation = 0
        self._pool: Any = None

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()
        self._pool = None  # it lives as long as a graph in it

    def replay(
        self, key: Hashable, generation: int, launch: Callable[[], Tensor | None]
    ) -> Callable[[], Tensor | None]:
        """What replays the graph of ``key`` on the current stream and gives what ``launch`` gave.

        ``launch`` is called to capture it where it is not known, or known from another ``generation``.
        """
        if generation != self._generation:
            self.clear()
            self._generation = generation
        if key not in self._known:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            stream.synchronize()
            # What other threads do on the device meanwhile is their affair.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                logits = launch()
            self._known[key] = (graph, logits)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        graph, logits = self._known[key]

        def run() -> Tensor | None:
            graph.replay()
            return logits

        return run


def padded(batches: Sequence[BatchInputs], most: Sequence[int], decodes: int) -> list[Layout]:
    """Layouts of sub-batches of decodes, the GPU's first, padded as far as ``most`` rows allow.

    Relayed ones are the last. ``decodes``: on the GPU at most, those of nobody included.
    """
    found = []
    for batch, rows in zip(batches, most, strict=True):
        gpu, cpu = padded_rows(len(batch.gpu)), padded_rows(len(batch.cpu))
        lanes = 0
        if batch.relay is not None:
            lanes = 1 << (batch.relay.lanes - 1).bit_length()
            if gpu:  # products are tuned for some numbers of rows: all of them together should be one
                together = padded_rows(len(batch.gpu) + lanes) - lanes
                gpu = together if together <= decodes else gpu
        if gpu > decodes or gpu + cpu + lanes > rows:
            gpu, cpu = len(batch.gpu), len(batch.cpu)
        found.append(Layout(gpu + cpu + lanes, 0, gpu, gpu, cpu, gpu + cpu, lanes))
    return found


def valid_rows(logits: Tensor, inputs: StepInputs, layouts: Sequence[Layout], sender: Sender) -> Tensor:
    """The rows of padded sub-batches that are somebody's, in the order of ``inputs.sampled``."""
    if len(logits) == len(inputs.sampled):
        return logits
    index, first = [], 0
    for batch, at in zip(inputs.batches, layouts, strict=True):
        index += [first + np.arange(len(batch.gpu)), first + at.cpu + np.arange(len(batch.cpu))]
        if (relay := batch.relay) is not None:
            ending = [row - relay.row for row in batch.sampled if row >= relay.row]
            index.append(first + at.relay + np.array(ending, dtype=np.int64))
        first += at.rows
    return logits.index_select(0, sender.send(np.concatenate(index).astype(np.int32)))

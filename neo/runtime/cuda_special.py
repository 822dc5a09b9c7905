"""Special rows (``neo.runtime.cuda_step``) on the device: their tables, what they append, who attends."""

from __future__ import annotations

import numpy as np
import torch

from neo.runtime import cuda_kernels as kernels
from neo.runtime.cuda_rows import Rows
from neo.runtime.cuda_sender import Sender
from neo.runtime.cuda_step import Special
from neo.runtime.step_inputs import BatchInputs


class SpecialRows:
    """A step's: streamed decodes and chunks bound for the host. Made on the stream that computes.

    Args:
        special: what they are.
        batch: the sub-batch that has them.
        rows: its buffers.
        sender: to the device.
    """

    def __init__(self, special: Special, batch: BatchInputs, rows: Rows, sender: Sender) -> None:
        self._rows, self._batch = rows, batch
        self._streams = special.streams
        self.prefixed = special.prefixed
        device = rows.model.device
        self._tables = sender.send(special.tables)
        chunks = batch.chunks[len(batch.chunks) - (special.tables.shape[1] - special.streams) :]
        slots = np.concatenate(
            [
                np.arange(special.streams, dtype=np.int32),
                *(np.full(c.length, special.streams + i, dtype=np.int32) for i, c in enumerate(chunks)),
            ]
        )
        positions = [batch.stream.positions, batch.spill.positions]
        self._slots = sender.send(slots.astype(np.int32))
        self._positions = sender.send(np.concatenate(positions).astype(np.int32))
        self._attention: kernels.Attention | None = None
        if n := special.streams:
            at = slice(batch.stream.row, batch.stream.row + n)
            lengths = sender.send(batch.stream.lengths)
            size = kernels.decode_workspace(rows.cache, n, rows.heads)
            workspace = torch.zeros(max(16, size), dtype=torch.uint8, device=device)
            self._attention = kernels.decode(
                rows.cache, rows.q[at], rows.out[at], self._tables[0], lengths, workspace
            )
            self._attention.plan()

    def table(self, layer: int) -> tuple[int, int]:
        """Address of their tables of a layer, and entries between its rows."""
        return self._tables.data_ptr() + 4 * layer * self._tables.stride(0), self._tables.stride(1)

    def append(self, layer: int) -> None:
        """New KV of streamed decodes, then of chunks."""
        batch, n, table = self._batch, self._streams, self.table(layer)
        slots, positions = self._slots, self._positions
        if n:
            self._rows.append(batch.stream.row, n, slots[:n], positions[:n], table)
        if rest := len(slots) - n:
            self._rows.append(batch.spill.row, rest, slots[n:], positions[n:], table)

    def attend(self, layer: int) -> None:
        """Attention of streamed decodes."""
        if self._attention is not None:
            self._attention.attend.args.block_tables = self.table(layer)[0]
            self._attention.attend()

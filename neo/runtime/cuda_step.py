"""What a step on the GPU needs beside its rows: blocks to copy, and KV that passes through staging blocks.

*Special* rows are streamed decodes and prefill chunks bound for the host. Their block tables, [layers,
special rows, blocks], name the blocks of the GPU's memory where their KV is while the step computes with it:
the request's own in the layers that live on the GPU, staging blocks in the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch

from neo.core.blocks import blocks_for
from neo.core.plan import StepPlan
from neo.runtime import cuda_transfers as transfers
from neo.runtime.block_tables import BlockTables, Copies, Ints
from neo.runtime.kv_memory import KVMemory
from neo.runtime.step_inputs import BatchInputs

_NOTHING: Ints = np.empty(0, dtype=np.int32)


class Way(Enum):
    """The copies of a layer, in the order of their operations."""

    OUT = auto()  # swapped out, ahead of PRE
    IN = auto()  # swapped in, ahead of GPU_ATTN
    STREAM = auto()  # into staging blocks, ahead of GPU_ATTN
    SPILL = auto()  # to the host behind PRE: moves ordered so, and what passed through staging blocks


@dataclass(frozen=True, slots=True)
class Special:
    """Rows whose KV is not where the tables say while the step runs.

    Attributes:
        tables: int32 [layers, rows, blocks] on the host.
        streams: how many rows are streamed decodes; they come first. The others are chunks.
        prefixed: whether anything must be copied in before new KV can be appended.
    """

    tables: Ints
    streams: int
    prefixed: bool


def special_rows(
    batch: BatchInputs, plan: StepPlan, tables: BlockTables, standing: Ints
) -> tuple[Special | None, list[tuple[Ints, Ints]], list[tuple[Ints, Ints]]]:
    """The special rows of sub-batch 0, and per layer what is streamed in and what is written back.

    ``standing``: staging blocks [buffers, blocks] that are always there.
    """
    layers, size = tables.layers, tables.block_size
    empty = [(_NOTHING, _NOTHING)] * layers
    spilled = batch.chunks[len(batch.chunks) - _spilled(batch) :]
    streams = batch.stream
    if not len(streams) and not spilled:
        return None, empty, empty
    slots = [*streams.slots.tolist(), *(c.slot for c in spilled)]
    starts = [*streams.positions.tolist(), *(c.start for c in spilled)]
    ends = [*streams.lengths.tolist(), *(c.start + c.length for c in spilled)]
    rooms = [blocks_for(n, size) for n in ends]
    total, ring = sum(rooms), plan.ring or len(standing)
    buffers = tables.stage(ring * total).reshape(ring, total) if plan.ring else standing
    if total > buffers.shape[1]:
        raise AssertionError(f"{total} blocks to stage, the buffer has {buffers.shape[1]}")
    found = np.zeros((layers, len(slots), max(rooms)), dtype=np.int32)
    into: list[tuple[Ints, Ints]] = []
    back: list[tuple[Ints, Ints]] = []
    uses = 0
    for layer in range(layers):
        offset, used = 0, False
        ins: list[tuple[Ints, Ints]] = []
        outs: list[tuple[Ints, Ints]] = []
        for i, (slot, start, room) in enumerate(zip(slots, starts, rooms, strict=True)):
            resident = i < len(streams) and tables.gpu.held[layer, slot]
            if resident:
                found[layer, i, :room] = tables.gpu.tables[layer, slot, :room]
            else:
                mine = buffers[uses % ring, offset : offset + room]
                found[layer, i, :room] = mine
                host = tables.cpu.tables[layer, slot]
                have, first = blocks_for(start, size), start // size
                ins.append((host[:have], mine[:have]))
                outs.append((mine[first:], host[first:room]))
                used = True
            offset += room
        uses += used
        into.append(_joined(ins))
        back.append(_joined(outs))
    prefixed = any(len(pair[0]) for pair in into) or bool(len(streams))
    return Special(found, len(streams), prefixed), into, back


def _spilled(batch: BatchInputs) -> int:
    """How many chunks are bound for the host; they come last."""
    if not len(batch.spill):
        return 0
    return sum(c.row >= batch.spill.row for c in batch.chunks)


def _joined(pairs: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    if not pairs:
        return _NOTHING, _NOTHING
    return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])


class LayerCopies:
    """All block copies of a step that is launched operation by operation; each a call per way and layer.

    The copy engines make them. Kernels would keep multiprocessors from products that are launched meanwhile,
    and those wait for the last of theirs.
    """

    def __init__(self, gpu: KVMemory, cpu: KVMemory) -> None:
        one = torch.zeros(1, dtype=torch.int32)
        to_host = transfers.copy_blocks(gpu.tensor, cpu.tensor, one, one, engines=True)
        to_gpu = transfers.copy_blocks(cpu.tensor, gpu.tensor, one, one, engines=True)
        self._launch = {Way.OUT: to_host, Way.SPILL: to_host, Way.IN: to_gpu, Way.STREAM: to_gpu}
        self._lists: dict[tuple[Way, int], tuple[Ints, Ints]] = {}

    def begin(
        self,
        copies: Copies,
        layers: int,
        into: Sequence[tuple[Ints, Ints]],
        back: Sequence[tuple[Ints, Ints]],
    ) -> None:
        """The lists of a step."""
        self._lists.clear()
        for layer in range(layers):
            for way, pairs in (
                (Way.OUT, [copies.swap_out.at(layer)]),
                (Way.IN, [copies.swap_in.at(layer)]),
                (Way.STREAM, [into[layer]]),
                (Way.SPILL, [copies.behind.at(layer), back[layer]]),
            ):
                source, target = _joined(pairs)
                if len(source):
                    self._lists[way, layer] = source, target

    def run(self, way: Way, layer: int, stream: int | None = None) -> None:
        """Copy what is to be copied, on a stream's handle."""
        found = self._lists.get((way, layer))
        if found is None:
            return
        source, target = (np.ascontiguousarray(numbers, dtype=np.int32) for numbers in found)
        launch = self._launch[way]
        launch.args.src_blocks, launch.args.dst_blocks = source.ctypes.data, target.ctypes.data
        launch.args.count = len(source)
        launch(stream)

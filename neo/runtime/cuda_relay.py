"""Relayed decodes of the ``cuda`` executor: rows that wait in a layer, the host's attention between steps.

A kernel per layer lets rows change places (``kernels/cuda/relay.cu``): those that did the layer's PRE leave
their residual stream in device memory and q, k, v in pinned memory; those that left it there a step before
come back, with what the CPU has made of it meanwhile. Each layer has a channel of its own, posted to once a
step and answered in the next: no kernel waits for the CPU unless it takes longer than a whole step.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from neo.runtime import cpu_library as cpu
from neo.runtime import cuda_kernels as kernels
from neo.runtime import cuda_library as c
from neo.runtime.block_tables import Ints, TierBlocks
from neo.runtime.cuda_host import TIMEOUT_S, Submitted
from neo.runtime.cuda_kernels import Launch
from neo.runtime.cuda_rows import Rows
from neo.runtime.cuda_transfers import Channel, shared_zeros
from neo.runtime.kv_memory import KVMemory
from neo.runtime.model import Model
from neo.runtime.native_args import fill_append, fill_decode
from neo.runtime.step_inputs import RelayRows

_STAGE = re.compile(r"^layer 0, stage (\d+): ")  # of a hand-over that failed: all layers are stages of one
_IN_FLIGHT = 3  # jobs whose arguments are kept: of the step that runs, of one behind it, and one to spare


class Relay:
    """What lies in every layer, and the kernel that exchanges it.

    Args:
        model: on the GPU.
        rows: of the sub-batch that has relayed decodes.
        lanes: rows of them at most.

    Attributes:
        packed: [layers, lanes, (heads + 2 kv_heads) head_dim], pinned: what the device writes.
        answer: [layers, lanes, heads head_dim], pinned: what it reads.
        channels: of the layers.
        asked: steps that have posted, or will: the number of each channel.
    """

    def __init__(self, model: Model, rows: Rows, lanes: int) -> None:
        config, device, dtype = model.config, model.device, model.dtype
        self.layers, self.lanes = config.layers, lanes
        self._rows = rows
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        shape = (config.layers, lanes)
        self.packed = shared_zeros((*shape, width), dtype, device)
        self.answer = shared_zeros((*shape, config.heads * config.head_dim), dtype, device)
        self.channels = [Channel(device) for _ in range(config.layers)]
        self.asked = 0
        self._kept = torch.zeros((*shape, config.hidden), dtype=dtype, device=device)
        count = config.layers * lanes
        self._positions = torch.zeros(count, dtype=torch.int32, device=device)
        self._hosts = [shared_zeros((count,), torch.int32, device) for _ in range(2)]
        self._cos, self._sin = (
            torch.zeros((count, config.head_dim), dtype=dtype, device=device) for _ in range(2)
        )
        rotary = model.rotary
        self._angles = kernels.rope_angles(self._positions, rotary.signed, rotary.scale, self._cos, self._sin)
        self._launch = self._describe()

    def _describe(self) -> Launch:
        rows, by = self._rows, self._kept.element_size()
        args = c.Relay(
            q_stride=rows.q.stride(0) * by,
            k_stride=rows.k.stride(0) * by,
            v_stride=rows.v.stride(0) * by,
            packed_stride=self.packed.stride(1) * by,
            came_stride=self.answer.stride(1) * by,
            out_stride=rows.attended.stride(0) * by,
            hidden_stride=rows.hidden.stride(0) * by,
            kept_stride=self._kept.stride(1) * by,
            angle_stride=rows.cos.stride(0) * by,
            next_stride=self._cos.stride(0) * by,
            timeout_us=round(TIMEOUT_S * 1e6),
            q_bytes=self.answer.shape[2] * by,
            kv_bytes=(self.packed.shape[2] - self.answer.shape[2]) // 2 * by,
            hidden_bytes=self._kept.shape[2] * by,
        )
        # Not itself: what goes in a circle gives its memory back late.
        keep = (rows, self.packed, self.answer, self.channels, self._kept, self._cos, self._sin)
        return Launch("neo_cuda_relay_rows", args, keep)

    def begin(self, given: RelayRows, row: int, lanes: int) -> None:
        """The next step's, in ``lanes`` rows from ``row`` on, some of them nobody's, on this stream."""
        self._hosts.reverse()
        host = self._hosts[0].numpy().reshape(self.layers, self.lanes)
        host[:, : given.lanes] = given.lengths[: self.layers] - 1
        self._positions.copy_(self._hosts[0], non_blocking=True)
        args, rows, by = self._launch.args, self._rows, self._kept.element_size()
        args.rows = lanes
        for name, buffer in (
            ("q", rows.q),
            ("k", rows.k),
            ("v", rows.v),
            ("out", rows.attended),
            ("hidden", rows.hidden),
            ("cos", rows.cos),
            ("sin", rows.sin),
        ):
            setattr(args, name, buffer.data_ptr() + row * buffer.stride(0) * by)

    def turn(self, stream: int | None = None) -> None:
        """Angles of every layer's rows. ``stream``: its handle, None for torch's current one."""
        self._angles(stream)

    def exchange(self, layer: int, stream: int | None = None) -> None:
        """Between a layer's PRE and its POST."""
        args, by = self._launch.args, self._kept.element_size()
        args.channel = ctypes.pointer(self.channels[layer].struct)
        args.packed = self.packed.data_ptr() + layer * self.packed.stride(0) * by
        args.came = self.answer.data_ptr() + layer * self.answer.stride(0) * by
        args.kept = self._kept.data_ptr() + layer * self._kept.stride(0) * by
        behind = layer + 1
        args.angle_bytes = 0 if behind == self.layers else self._cos.shape[1] * by
        if behind < self.layers:
            first = behind * self.lanes * self._cos.stride(0) * by
            args.next_cos, args.next_sin = self._cos.data_ptr() + first, self._sin.data_ptr() + first
        self._launch(stream)


class _Run(NamedTuple):
    """Neighbouring lanes of a layer: attention of one of the host's stages."""

    layer: int
    first: int
    lanes: int


class _Arguments:
    """A job's structs, described once; a step changes what differs.

    One stage a layer; further ones where its lanes have gaps.
    """

    def __init__(self, relay: Relay, memory: KVMemory, heads: int) -> None:
        layers, lanes = relay.layers, relay.lanes
        most = layers * (1 + lanes // 2)
        dim, kv_heads = memory.head_dim, memory.kv_heads
        self.numbers: Ints = np.zeros((3, layers, lanes), dtype=np.int32)  # slots, positions, lengths
        self.first = [numbers.ctypes.data for numbers in self.numbers]
        self.stages = (cpu.Stage * most)()
        self.appends, self.decodes = (cpu.Append * most)(), (cpu.Decode * most)()
        self.times = np.zeros((most, 2), dtype=np.int64)
        table = np.zeros((1, 1), dtype=np.int32)
        packed = relay.packed[0, :1]
        q = packed[:, : heads * dim].view(1, heads, dim)
        k = packed[:, heads * dim : (heads + kv_heads) * dim].view(1, kv_heads, dim)
        out, one = relay.answer[0, :1].view(1, heads, dim), self.numbers[0, 0, :1]
        by = packed.element_size()
        self.keep = [table, packed, out]
        self.row_bytes = (relay.packed.stride(1) * by, relay.answer.stride(1) * by)
        self.k_at, self.v_at = heads * dim * by, (heads + kv_heads) * dim * by
        for stage, append, decode in zip(self.stages, self.appends, self.decodes, strict=True):
            fill_append(append, memory, k, k, table, one, one)
            append.k_stride = append.v_stride = relay.packed.stride(1)  # of one row torch need not know it
            fill_decode(decode, memory, q, out, table, one, one)
            decode.q_stride, decode.out_stride = relay.packed.stride(1), relay.answer.stride(1)
            for struct in (stage, append, decode):  # those of an array do not know theirs
                struct.size = ctypes.sizeof(struct)
        self.handover = cpu.Handover(stages=self.stages, layers=1, times=self.times.ctypes.data)
        self.job = cpu.Job(handover=ctypes.pointer(self.handover))

    def describe(self, index: int, run: _Run, relay: Relay, tables: Ints, address: int) -> None:
        """What a stage appends and attends to, by the tables [layers, slots, width] at ``address``."""
        stage, append, decode = self.stages[index], self.appends[index], self.decodes[index]
        if not run.lanes:
            stage.append = stage.decode = None
            return
        at = run.layer * relay.lanes + run.first
        packed_row, answer_row = self.row_bytes
        packed, answer = relay.packed.data_ptr() + at * packed_row, relay.answer.data_ptr() + at * answer_row
        append.k, append.v = packed + self.k_at, packed + self.v_at
        decode.q, decode.out = packed, answer
        append.block_tables = decode.block_tables = address + run.layer * tables.strides[0]
        append.table_stride = decode.table_stride = tables.strides[1] // tables.itemsize
        append.n_sequences = decode.n_sequences = tables.shape[1]
        slots, positions, lengths = (first + 4 * at for first in self.first)
        append.sequences = decode.sequences = slots
        append.positions, decode.lengths = positions, lengths
        append.rows = decode.batch = run.lanes
        stage.append, stage.decode = ctypes.pointer(append), ctypes.pointer(decode)


class HostRelay:
    """The host's side: what its threads are told before a step.

    Args:
        relay: the device's side.
        memory: the host tier's KV memory, pinned.
        tier: its block tables.
        heads: of queries.
    """

    def __init__(self, relay: Relay, memory: KVMemory, tier: TierBlocks, heads: int) -> None:
        self.relay, self.tier = relay, tier
        self._ring = [_Arguments(relay, memory, heads) for _ in range(_IN_FLIGHT)]

    def job(self, rows: RelayRows) -> Submitted:
        """CPU attention of all layers for a step; it waits for what the step before has posted."""
        self._ring.append(self._ring.pop(0))
        own, relay, tables = self._ring[0], self.relay, self.tier.tables
        slots, positions, lengths = own.numbers
        slots[:, : rows.lanes] = rows.slots[1:]
        lengths[:, : rows.lanes] = rows.lengths[1:]
        positions[:, : rows.lanes] = rows.lengths[1:] - 1
        runs = _runs(slots[:, : rows.lanes] >= 0)
        address = tables.ctypes.data
        for i, run in enumerate(runs):
            stage, channel = own.stages[i], relay.channels[run.layer]
            begins = i == 0 or runs[i - 1].layer != run.layer
            ends = i + 1 == len(runs) or runs[i + 1].layer != run.layer
            stage.request = channel.request if begins and relay.asked else None
            stage.answer = channel.answer if ends else None
            stage.first = relay.asked & 0xFFFFFFFF
            own.describe(i, run, relay, tables, address)
        own.handover.n_stages = len(runs)
        own.job.status = 0
        relay.asked += 1
        told = Submitted(relay.channels, own.job)
        told.keep.append(tables)  # when they grow, these are nobody else's
        told.times = lambda: layer_times(runs, own.times, relay.layers)[:, None]
        told.place = lambda said: _STAGE.sub(lambda found: f"layer {runs[int(found[1])].layer}: ", said)
        return told


def _runs(there: np.ndarray) -> list[_Run]:
    """Neighbouring lanes by layer, of bools [layers, lanes]; an empty run where a layer has none."""
    found: list[_Run] = []
    for layer, lanes in enumerate(there.tolist()):
        before = len(found)
        first: int | None = None
        for lane, taken in enumerate([*lanes, False]):
            if taken and first is None:
                first = lane
            elif not taken and first is not None:
                found.append(_Run(layer, first, lane - first))
                first = None
        if len(found) == before:
            found.append(_Run(layer, 0, 0))
    return found


def layer_times(runs: Sequence[_Run], times: np.ndarray, layers: int) -> np.ndarray:
    """When each layer's attention began and ended, nanoseconds [layers, 2]."""
    found = np.zeros((layers, 2), dtype=np.int64)
    for i, run in enumerate(runs):
        if i == 0 or runs[i - 1].layer != run.layer:
            found[run.layer, 0] = times[i, 0]
        found[run.layer, 1] = times[i, 1]
    return found

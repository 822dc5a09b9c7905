"""What a step computes on, as arrays: tokens, positions, slots and lengths of a plan's rows.

Rows of a sub-batch stand in this order, so that each role is one run of rows: chunks whose KV stays on the
GPU, GPU decodes, streamed decodes, chunks bound for the CPU, CPU decodes, relayed decodes. Requests that are
swapped in during the step come last among the GPU decodes, and their chunks behind them: a block that is
still on its way would overwrite what PRE wrote into it, so their new KV is appended *late*, when attention
has waited for the copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from neo.core.blocks import blocks_for
from neo.core.plan import PrefillChunk, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.runtime.block_tables import BlockTables, Ints

Longs = npt.NDArray[np.int64]


class Tokens(Protocol):
    """Where a request's known tokens are: prompt, then generated."""

    @property
    def prompt(self) -> Sequence[int]:
        """As the client gave it."""
        ...

    @property
    def tokens(self) -> Sequence[int]:
        """Generated so far."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """A prefill chunk's place: ``length`` rows from ``row`` on, tokens from ``start`` on.

    ``staged`` is its row of the staging tables, -1 where its prefix needs no streaming.
    """

    slot: int
    row: int
    start: int
    length: int
    staged: int = -1


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Decodes in the rows ``row .. row + len(slots)``: slot, and KV tokens with the new one."""

    row: int
    slots: Ints
    lengths: Ints

    @property
    def positions(self) -> Ints:
        """Position of each new token."""
        return self.lengths - np.int32(1)

    @property
    def rows(self) -> slice:
        """Their rows in the sub-batch."""
        return slice(self.row, self.row + len(self.slots))

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class Append:
    """New KV of the rows ``row .. row + len(slots)``: whose it is and where it goes."""

    row: int
    slots: Ints
    positions: Ints

    @property
    def rows(self) -> slice:
        """Their rows in the sub-batch."""
        return slice(self.row, self.row + len(self.slots))

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class Staged:
    """KV that passes through the staging buffer in this step, one entry per staging row.

    Attributes:
        slots: whose it is.
        blocks: blocks it has on the host, to be copied.
        room: blocks set aside in the buffer, for this step's token too.
        host_layers: bit mask of the layers in which it is streamed.
    """

    slots: tuple[int, ...]
    blocks: tuple[int, ...]
    room: tuple[int, ...]
    host_layers: tuple[int, ...]


NOBODY = -1


@dataclass(frozen=True, slots=True)
class RelayRows:
    """Relayed decodes: in each layer others, in the rows ``row .. row + lanes``.

    Attributes:
        row: the first.
        slots: int32 [layers + 1, lanes], by layers that a request has behind it; NOBODY where there is none.
        lengths: likewise, KV tokens with the new one; 1 where there is nobody.
    """

    row: int
    slots: Ints
    lengths: Ints

    @property
    def lanes(self) -> int:
        """Rows in each layer."""
        return int(self.slots.shape[1])

    @property
    def rows(self) -> slice:
        """Their rows in the sub-batch."""
        return slice(self.row, self.row + self.lanes)

    def coming(self, layer: int) -> Ints:
        """Lanes whose attention of a layer runs on the CPU in this step."""
        return np.nonzero(self.slots[layer + 1] != NOBODY)[0].astype(np.int32)


@dataclass(frozen=True, slots=True)
class BatchInputs:
    """One sub-batch."""

    tokens: Longs  # [rows]
    positions: Longs  # [rows]
    chunks: tuple[ChunkRows, ...]
    gpu: DecodeRows
    stream: DecodeRows
    cpu: DecodeRows
    append: Append  # to the GPU's cache, in PRE
    late: Append  # likewise, in GPU_ATTN
    late_streams: frozenset[int]  # which of ``stream`` append late
    spill: Append  # to the CPU's cache, by SWAP_OUT
    sampled: tuple[int, ...]  # rows that yield a token
    relay: RelayRows | None = None


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A whole step; ``sampled`` names the requests of all sampled rows, in their order."""

    batches: tuple[BatchInputs, ...]
    sampled: tuple[str, ...]
    staged: Staged


def prepare(plan: StepPlan, tables: BlockTables, known: Mapping[str, Tokens]) -> StepInputs:
    """The inputs of an applied plan, after ``tables.begin(plan)``."""
    swapped_in = frozenset([m.request.id for m in plan.moves if m.dst is Tier.GPU])
    builder = _Builder(tables, known, swapped_in)
    batches = tuple([builder.batch(b) for b in plan.batches])
    staged = (
        Staged(*(tuple(column) for column in zip(*builder.staged, strict=True))) if builder.staged else NONE
    )
    return StepInputs(batches, tuple(builder.sampled), staged)


NONE = Staged((), (), (), ())
_NOTHING: Ints = np.empty(0, dtype=np.int32)


def pending_token(slot: int) -> int:
    """Stands for the token of a slot that the step before has not sampled yet: less than 0."""
    return -1 - slot


class _Builder:
    def __init__(self, tables: BlockTables, known: Mapping[str, Tokens], swapped_in: frozenset[str]) -> None:
        self.tables = tables
        self.known = known
        self.swapped_in = swapped_in
        self.sampled: list[str] = []
        self.staged: list[tuple[int, int, int, int]] = []

    def batch(self, batch: SubBatch) -> BatchInputs:
        tokens: list[int] = []
        sampled: list[int] = []
        late = self.swapped_in
        on_gpu = [c for c in batch.prefill if c.dst is Tier.GPU]
        chunks = [self.chunk(c, tokens, sampled) for c in on_gpu if c.request.id not in late]
        decodes = sorted(batch.gpu_decode, key=lambda r: r.id in late) if late else batch.gpu_decode
        gpu = self.decodes(decodes, tokens, sampled)
        last = [self.chunk(c, tokens, sampled) for c in on_gpu if c.request.id in late]
        stream = self.decodes(batch.stream_decode, tokens, sampled)
        for r in batch.stream_decode:
            have = blocks_for(r.computed, self.tables.block_size)
            room = blocks_for(r.computed + 1, self.tables.block_size)
            self.staged.append((self.tables.slot(r.id), have, room, r.host_layers))
        leaving = len(tokens)
        spilled = [self.chunk(c, tokens, sampled) for c in batch.prefill if c.dst is Tier.CPU]
        cpu = self.decodes(batch.cpu_decode, tokens, sampled)
        relay = self.relayed(batch.relay_decode, tokens, sampled) if batch.relay_decode else None
        runs = [_positions(chunks), gpu.positions, _positions(last), stream.positions, _positions(spilled)]
        runs += [cpu.positions, _NOTHING if relay is None else relay.lengths[0] - 1]
        positions = np.concatenate(runs).astype(np.int64)
        slots = np.concatenate([_slots(chunks), gpu.slots, _slots(last)])
        early = stream.row - sum([c.length for c in last]) - sum([r.id in late for r in batch.gpu_decode])
        return BatchInputs(
            np.array(tokens, dtype=np.int64),
            positions,
            (*chunks, *last, *spilled),
            gpu,
            stream,
            cpu,
            _append(0, slots[:early], positions),
            _append(early, slots[early:], positions),
            frozenset([i for i, r in enumerate(batch.stream_decode) if r.id in late]),
            _append(leaving, _slots(spilled), positions),
            tuple(sampled),
            relay,
        )

    def chunk(self, chunk: PrefillChunk, tokens: list[int], sampled: list[int]) -> ChunkRows:
        r, row = chunk.request, len(tokens)
        known = self.known[r.id]
        stop = chunk.start + chunk.length
        tokens.extend(known.prompt[chunk.start : stop])
        if stop > r.prompt_tokens:  # after a preemption what was generated is computed again
            tokens.extend(known.tokens[max(0, chunk.start - r.prompt_tokens) : stop - r.prompt_tokens])
        if len(tokens) - row != chunk.length:
            raise AssertionError(f"request {r.id}: {len(tokens) - row} of {chunk.length} tokens are known")
        if stop == r.known:
            sampled.append(len(tokens) - 1)
            self.sampled.append(r.id)
        slot, staged = self.tables.slot(r.id), -1
        if chunk.dst is Tier.CPU and chunk.start:
            staged = len(self.staged)
            blocks = blocks_for(chunk.start, self.tables.block_size)
            self.staged.append((slot, blocks, blocks, r.host_layers))
        return ChunkRows(slot, row, chunk.start, chunk.length, staged)

    def decodes(self, requests: Sequence[Request], tokens: list[int], sampled: list[int]) -> DecodeRows:
        row = len(tokens)
        found = [self.tables.slot(r.id) for r in requests]
        tokens.extend([self.token(r, slot) for r, slot in zip(requests, found, strict=True)])
        sampled.extend(range(row, len(tokens)))
        self.sampled.extend([r.id for r in requests])
        slots = np.array(found, dtype=np.int32)
        return DecodeRows(row, slots, np.array([r.computed + 1 for r in requests], dtype=np.int32))

    def token(self, request: Request, slot: int) -> int:
        """The token that a decode begins with."""
        known = self.known[request.id].tokens
        at = request.computed - request.prompt_tokens
        return known[at] if at < len(known) else pending_token(slot)

    def relayed(self, requests: Sequence[Request], tokens: list[int], sampled: list[int]) -> RelayRows:
        """Rows of those that begin a token, and who stands in them in the layers behind."""
        row, layers = len(tokens), self.tables.layers
        lanes = [self.tables.lane(r.id) for r in requests]
        slots = np.full((layers + 1, max(lanes) + 1), NOBODY, dtype=np.int32)
        lengths = np.ones_like(slots)
        mine = [0] * slots.shape[1]
        ending = []
        for r, lane in zip(requests, lanes, strict=True):
            slot = self.tables.slot(r.id)
            slots[r.relay_layers, lane] = slot
            lengths[r.relay_layers, lane] = r.computed + 1
            if r.relay_layers == 0:
                mine[lane] = self.token(r, slot)
            elif r.relay_layers == layers:
                ending.append((row + lane, r.id))
        tokens.extend(mine)
        for at, request_id in sorted(ending):
            sampled.append(at)
            self.sampled.append(request_id)
        return RelayRows(row, slots, lengths)


def _positions(chunks: Sequence[ChunkRows]) -> Ints:
    runs = [np.arange(c.start, c.start + c.length, dtype=np.int32) for c in chunks]
    return np.concatenate(runs) if runs else _NOTHING


def _slots(chunks: Sequence[ChunkRows]) -> Ints:
    runs = [np.full(c.length, c.slot, dtype=np.int32) for c in chunks]
    return np.concatenate(runs) if runs else _NOTHING


def _append(row: int, slots: Ints, positions: Longs) -> Append:
    return Append(row, slots, positions[row : row + len(slots)].astype(np.int32))

"""Which physical layer-block holds what: the engine's side of the scheduler's block accounting.

The scheduler counts layer-blocks; here they have numbers. Each tier is one flat array of layer-blocks, any of
which may hold any layer of any request, so that counts that fit always fit. A live request with KV has a
*slot*, and per tier and layer a row of block numbers: ``tables[layer, slot, j]``. Tables persist over steps;
kernels get them with the slots of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from neo.core.blocks import blocks_for
from neo.core.plan import EvictMode, KVMove, MoveOrder, StepPlan
from neo.core.request import Request, Tier

Ints = npt.NDArray[np.int32]
_NOTHING: Ints = np.empty(0, dtype=np.int32)


class TierBlocks:
    """One tier's block numbers: who holds which, and which are free.

    Attributes:
        tables: int32 [layers, slots, width].
        held: int32 [layers, slots], blocks in use of each row.
    """

    def __init__(self, tier: Tier, total: int, layers: int, slots: int, width: int) -> None:
        self.tier = tier
        self.total = total
        self.tables: Ints = np.zeros((layers, slots, width), dtype=np.int32)
        self.held: Ints = np.zeros((layers, slots), dtype=np.int32)
        self._free: Ints = np.arange(total, dtype=np.int32)[::-1].copy()
        self._count = total
        self._columns: Ints = np.empty((layers, 0), dtype=np.int32)  # leaving in this step, by layer
        self._changes: list[tuple[int, int, int]] | None = None

    def watch(self) -> None:
        """From now on remember which entries of the tables change."""
        self._changes = []

    def changes(self) -> list[tuple[int, int, int]]:
        """Entries written since last asked: (slot, start, stop), in some or all layers."""
        found, self._changes = self._changes or [], []
        return found

    def wrote(self, slot: int, start: int, stop: int) -> None:
        """Remember entries that were written."""
        if self._changes is not None:
            self._changes.append((slot, start, stop))

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return self._count

    def take(self, count: int) -> Ints:
        """Numbers of ``count`` free blocks."""
        if count > self._count:
            raise AssertionError(f"{self.tier} memory: {count} layer-blocks wanted, {self._count} are free")
        self._count -= count
        return self._free[self._count : self._count + count][::-1].copy()

    def give_back(self, blocks: Ints) -> None:
        """Make ``blocks`` free again."""
        self._free[self._count : self._count + len(blocks)] = blocks
        self._count += len(blocks)

    def leave(self, columns: Ints) -> None:
        """Blocks [layers, n] that a copy leaves: those of a layer may hold new KV of that layer at once."""
        self._columns = np.concatenate((self._columns, columns), axis=1)

    def settle(self) -> None:
        """What left and was not taken again is free from the next step on."""
        if self._columns.size:
            self.give_back(self._columns.ravel())
            self._columns = self._columns[:, :0]

    def reserve(self, slots: int, width: int) -> None:
        """Make room for that many slots and blocks per row; contents stay."""
        layers, old_slots, old_width = self.tables.shape
        if slots <= old_slots and width <= old_width:
            return
        tables = np.zeros((layers, max(slots, old_slots), max(width, old_width)), dtype=np.int32)
        tables[:, :old_slots, :old_width] = self.tables
        held = np.zeros((layers, tables.shape[1]), dtype=np.int32)
        held[:, :old_slots] = self.held
        self.tables, self.held = tables, held

    def grow(self, slot: int, blocks: int) -> None:
        """Let all rows of a slot (all of one length) hold ``blocks`` blocks."""
        have = int(self.held[0, slot])
        if blocks <= have:
            return
        layers, more = len(self.held), blocks - have
        again = min(more, self._columns.shape[1])
        if again:
            self.tables[:, slot, have : have + again] = self._columns[:, :again]
            self._columns = self._columns[:, again:]
        fresh = self.take((more - again) * layers)
        self.tables[:, slot, have + again : blocks] = fresh.reshape(layers, more - again)
        self.held[:, slot] = blocks
        self.wrote(slot, have, blocks)

    def grow_some(self, slot: int, layers: npt.NDArray[np.integer], blocks: int) -> None:
        """The same for the rows of some layers."""
        have = int(self.held[layers[0], slot]) if len(layers) else blocks
        if blocks > have:
            new = self.take((blocks - have) * len(layers)).reshape(len(layers), blocks - have)
            self.tables[layers, slot, have:blocks] = new
            self.held[layers, slot] = blocks
            self.wrote(slot, have, blocks)

    def row(self, layer: int, slot: int) -> Ints:
        """The blocks of one row (a view)."""
        return self.tables[layer, slot, : self.held[layer, slot]]

    def pop(self, slot: int, layers: slice) -> tuple[Ints, Ints]:
        """Empty the rows of ``layers``: (the layers that had blocks, their blocks [layers, blocks])."""
        held = self.held[layers, slot]
        having = np.nonzero(held)[0].astype(np.int32) + np.int32(layers.start or 0)
        blocks = self.tables[having, slot, : held.max(initial=0)]
        self.held[layers, slot] = 0
        return having, blocks

    def drop(self, slot: int, layers: slice = slice(None)) -> None:
        """Free the rows of ``layers``."""
        self.give_back(self.pop(slot, layers)[1].ravel())


class CopyList:
    """Block copies between the tiers in one direction, by layer."""

    def __init__(self) -> None:
        self._parts: list[tuple[Ints, Ints, Ints]] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, layers: Ints, sources: Ints, targets: Ints) -> None:
        """Copy ``sources[i]`` to ``targets[i]`` when it is the turn of ``layers[i]``."""
        self._parts.append((layers, sources, targets))

    def at(self, layer: int) -> tuple[Ints, Ints]:
        """Source and target blocks of one layer."""
        found = [(s[layers == layer], t[layers == layer]) for layers, s, t in self._parts]
        if not found:
            return _NOTHING, _NOTHING
        return np.concatenate([s.ravel() for s, _ in found]), np.concatenate([t.ravel() for _, t in found])

    def counts(self, layers: int) -> Ints:
        """How many blocks are copied in each of ``layers`` layers."""
        found: Ints = np.zeros(layers, dtype=np.int32)
        for having, sources, _ in self._parts:
            found[having] += np.int32(sources.shape[1])
        return found

    def stacked(self, layers: int) -> tuple[Ints, Ints]:
        """``at`` of all layers, [layers, (source, target), most], 0 where there is none; and ``counts``."""
        counts = self.counts(layers)
        found: Ints = np.zeros((layers, 2, counts.max(initial=0)), dtype=np.int32)
        used = np.zeros(layers, dtype=np.int64)
        for having, sources, targets in self._parts:
            rows, width = having[:, None], sources.shape[1]
            columns = used[rows] + np.arange(width)
            found[rows, 0, columns], found[rows, 1, columns] = sources, targets
            used[having] += width
        return found, counts


@dataclass(slots=True)
class Copies:
    """Block copies of a step."""

    swap_out: CopyList = field(default_factory=CopyList)  # ahead of the layer's PRE
    swap_in: CopyList = field(default_factory=CopyList)
    behind: CopyList = field(default_factory=CopyList)  # to the CPU behind the layer's PRE


class BlockTables:
    """The block tables of both tiers, kept in step with the scheduler's accounts.

    ``begin`` takes blocks as ``Scheduler.plan_step`` accounted them, ``commit`` frees what the step leaves
    behind, ``release`` what an ended request held.
    """

    def __init__(self, layers: int, block_size: int, gpu_total: int, cpu_total: int, slots: int = 64) -> None:
        self.layers = layers
        self.block_size = block_size
        width = 16
        self.gpu = TierBlocks(Tier.GPU, gpu_total, layers, slots, width)
        self.cpu = TierBlocks(Tier.CPU, cpu_total, layers, slots, width)
        self._slots: dict[str, int] = {}
        self._lanes: dict[str, int] = {}
        self._free_slots = list(range(slots))[::-1]
        self._resting: list[int] = []  # given up, with rows that CPU attention of a running step may read
        self._leaving: list[tuple[TierBlocks, Ints]] = []  # freed when the step has run
        self._behind: list[tuple[int, slice]] = []  # (slot, layers) whose GPU rows go when the step has run

    def slot(self, request_id: str) -> int:
        """The slot of a request that has one."""
        return self._slots[request_id]

    def lane(self, request_id: str) -> int:
        """The row among relayed decodes that a request within a relayed token has, in every layer."""
        return self._lanes[request_id]

    @property
    def owners(self) -> tuple[str, ...]:
        """Requests that have a slot."""
        return tuple(self._slots)

    def held(self, request_id: str, tier: Tier) -> int:
        """Layer-blocks that a request holds on a tier, for integrity checks."""
        slot = self._slots.get(request_id)
        return 0 if slot is None else int(self._tier(tier).held[:, slot].sum())

    def _tier(self, tier: Tier) -> TierBlocks:
        return self.gpu if tier is Tier.GPU else self.cpu

    def _slot_of(self, request: Request, blocks: int) -> int:
        """The slot of a request, a new one if need be, with rows wide enough for ``blocks`` blocks."""
        slot = self._slots.get(request.id)
        if slot is None:
            if not self._free_slots:
                have = self.gpu.tables.shape[1]
                self._free_slots = list(range(have, 2 * have))[::-1]
                self._reserve(2 * have, 0)
            slot = self._slots[request.id] = self._free_slots.pop()
        if blocks > self.gpu.tables.shape[2]:
            self._reserve(0, max(blocks, 2 * self.gpu.tables.shape[2]))
        return slot

    def reserve_room(self, slots: int, width: int) -> None:
        """Make room for so many requests of so many blocks, so that tables need not grow when they come."""
        have = self.gpu.tables.shape[1]
        if slots > have:
            self._free_slots = [*range(have, slots)[::-1], *self._free_slots]
        self._reserve(slots, width)

    def _reserve(self, slots: int, width: int) -> None:
        self.gpu.reserve(slots, width)
        self.cpu.reserve(slots, width)

    def reserve(self, request: Request, tier: Tier) -> None:
        """Give a request that no scheduler knows its blocks, for what it has computed and one token more."""
        need = blocks_for(request.computed + 1, self.block_size)
        self._tier(tier).grow(self._slot_of(request, need), need)

    # -- a step -------------------------------------------------------------------------------------------

    def begin(self, plan: StepPlan) -> Copies:
        """Take the blocks of an applied plan, in the order of ``Scheduler``; what is to be copied."""
        copies = Copies()
        for e in plan.evict:
            if e.mode is EvictMode.RECOMPUTE:
                self.release(e.request.id)
        for e in plan.evict:
            if e.mode is EvictMode.SWAP:
                self._move(KVMove(e.request, Tier.CPU), copies)
        for m in plan.moves:
            if m.order is MoveOrder.BEFORE:
                self._move(m, copies)
        for batch in plan.batches:
            for c in batch.prefill:
                need = blocks_for(c.start + c.length, self.block_size)
                self._tier(c.dst).grow(self._slot_of(c.request, need), need)
            for r in batch.decodes:
                self._grow_decode(r)
            for lane, r in enumerate([r for r in batch.relay_decode if not r.relay_layers]):
                self._lanes[r.id] = lane  # who begins together stays together, so nobody else gets it
                self._grow_decode(r)
        for m in plan.moves:
            if m.order is MoveOrder.AFTER:
                self._copy_behind(m, copies)
        return copies

    def stage(self, count: int) -> Ints:
        """Numbers of ``count`` GPU blocks for this step's staging buffers."""
        blocks = self.gpu.take(count)
        self._leaving.append((self.gpu, blocks))
        return blocks

    def _grow_decode(self, request: Request) -> None:
        if request.computed % self.block_size:
            return
        need = request.computed // self.block_size + 1
        slot = self._slot_of(request, need)
        if request.tier is not None:
            self._tier(request.tier).grow(slot, need)
            return
        on_host = np.array([request.host_layers >> layer & 1 for layer in range(self.layers)], dtype=bool)
        self.cpu.grow_some(slot, np.nonzero(on_host)[0], need)
        self.gpu.grow_some(slot, np.nonzero(~on_host)[0], need)

    def _move(self, move: KVMove, copies: Copies) -> None:
        """Rows of these layers that are on the other tier change over."""
        slot = self._slots[move.request.id]
        to_host = move.dst is Tier.CPU
        source, target = (self.gpu, self.cpu) if to_host else (self.cpu, self.gpu)
        having, blocks = source.pop(slot, slice(*(move.layers or (0, self.layers))))
        width = blocks.shape[-1]
        new = target.take(blocks.size).reshape(-1, width)
        target.tables[having, slot, :width] = new
        target.held[having, slot] = width
        target.wrote(slot, 0, width)
        (copies.swap_out if to_host else copies.swap_in).add(having, blocks, new)
        if to_host and len(having) == self.layers:
            source.leave(blocks)
        else:
            self._leaving.append((source, blocks.ravel()))

    def _copy_behind(self, move: KVMove, copies: Copies) -> None:
        """This step's token moves along, and the GPU's rows stay in use until the step ends."""
        slot = self._slots[move.request.id]
        start, stop = move.layers or (0, self.layers)
        layers: Ints = np.arange(start, stop, dtype=np.int32)
        need = int(self.gpu.held[start, slot])
        self.cpu.grow_some(slot, layers, need)
        copies.behind.add(layers, self.gpu.tables[layers, slot, :need], self.cpu.tables[layers, slot, :need])
        self._behind.append((slot, slice(start, stop)))

    def commit(self) -> None:
        """Free the sources of the latest step's copies, before another one begins.

        The step may still run if whatever uses these blocks waits for that; the step before it has ended.
        """
        self._free_slots += self._resting
        self._resting.clear()
        self.gpu.settle()
        for tier, blocks in self._leaving:
            tier.give_back(blocks)
        for slot, layers in self._behind:
            self.gpu.drop(slot, layers)
        self._leaving.clear()
        self._behind.clear()

    def release(self, request_id: str) -> None:
        """Free all that a request holds; nothing happens if it holds nothing.

        The host reads its tables where they are: a slot with rows there is nobody's until ``commit``. The
        device has a copy, brought up to date behind the step that runs.
        """
        slot = self._slots.pop(request_id, None)
        if slot is None:
            return
        self._lanes.pop(request_id, None)
        rests = bool(self.cpu.held[:, slot].any())
        self.gpu.drop(slot)
        self.cpu.drop(slot)
        (self._resting if rests else self._free_slots).append(slot)

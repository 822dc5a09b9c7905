"""Block tables against a model that keeps what every block holds, token by token, in plain dicts."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch", reason="neo.runtime needs torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from support import Chaos, make_scheduler, toy_model

from neo.core.blocks import blocks_for
from neo.core.plan import StepPlan
from neo.core.request import Request, Tier
from neo.core.scheduler import Scheduler, StepResult
from neo.runtime.block_tables import BlockTables, Copies, CopyList, TierBlocks


class Token(NamedTuple):
    """One token's KV in one layer."""

    request: str
    layer: int
    position: int


class Memory:
    """What the blocks of both tiers hold: (block, place in it) -> token. Copies and writes, nothing else."""

    def __init__(self, tables: BlockTables, layers: int, size: int) -> None:
        self.tables, self.layers, self.size = tables, layers, size
        self.cells: dict[Tier, dict[tuple[int, int], Token]] = {tier: {} for tier in Tier}

    def row(self, request: str, tier: Tier, layer: int) -> list[int]:
        blocks = self.tables.gpu if tier is Tier.GPU else self.tables.cpu
        return [int(b) for b in blocks.row(layer, self.tables.slot(request))]

    def write(self, request: str, tier: Tier, layer: int, positions: range) -> None:
        row = self.row(request, tier, layer)
        for p in positions:
            self.cells[tier][row[p // self.size], p % self.size] = Token(request, layer, p)

    def copy(self, copies: CopyList, layer: int, src: Tier, dst: Tier) -> None:
        """Reads all before it writes any, as copies of a layer run in any order."""
        moved = [
            (int(target), place, self.cells[src].get((int(source), place)))
            for source, target in zip(*copies.at(layer), strict=True)
            for place in range(self.size)
        ]
        for block, place, token in moved:
            if token is None:
                self.cells[dst].pop((block, place), None)
            else:
                self.cells[dst][block, place] = token

    def step(self, plan: StepPlan, copies: Copies, swap_in_early: bool) -> None:
        """A step in the order of the StepGraph; swap-ins run at any time before their layer's attention."""
        late = {m.request.id for m in plan.moves if m.dst is Tier.GPU}
        if swap_in_early:
            for layer in range(self.layers):
                self.copy(copies.swap_in, layer, Tier.CPU, Tier.GPU)
        for layer in range(self.layers):
            self.copy(copies.swap_out, layer, Tier.GPU, Tier.CPU)
            self.compute(plan, layer, {r for r in self.tables.owners if r not in late})
            if not swap_in_early:
                self.copy(copies.swap_in, layer, Tier.CPU, Tier.GPU)
            self.compute(plan, layer, late)
            self.copy(copies.behind, layer, Tier.GPU, Tier.CPU)

    def compute(self, plan: StepPlan, layer: int, who: set[str]) -> None:
        """New KV of this layer."""
        for batch in plan.batches:
            for c in batch.prefill:
                if c.request.id in who:
                    self.write(c.request.id, c.dst, layer, range(c.start, c.start + c.length))
            for r in batch.decodes:
                if r.id in who:
                    on_host = bool(r.host_layers >> layer & 1)
                    tier = Tier.CPU if on_host else Tier.GPU
                    self.write(r.id, tier, layer, range(r.computed, r.computed + 1))
            for r in batch.relay_decode:  # a layer's KV comes with its attention, a step behind its PRE
                if r.relay_layers == layer + 1:
                    self.write(r.id, Tier.CPU, layer, range(r.computed, r.computed + 1))

    def check(self, requests: list[Request]) -> None:
        """Every computed token of every layer is where the request's table says."""
        for r in requests:
            for layer in range(self.layers):
                tier = Tier.CPU if r.host_layers >> layer & 1 else Tier.GPU
                row = self.row(r.id, tier, layer) if r.computed else []
                assert len(row) == blocks_for(r.computed + bool(r.relay_layers), self.size)
                got = [self.cells[tier].get((row[p // self.size], p % self.size)) for p in range(r.computed)]
                assert got == [Token(r.id, layer, p) for p in range(r.computed)], f"{r.id} layer {layer}"


def check_books(tables: BlockTables, scheduler: Scheduler) -> None:
    """No block has two owners, none is lost, and the scheduler counts the same."""
    for tier, blocks in ((Tier.GPU, tables.gpu), (Tier.CPU, tables.cpu)):
        held = [
            int(b)
            for name in tables.owners
            for layer in range(tables.layers)
            for b in blocks.row(layer, tables.slot(name))
        ]
        numbers = blocks.take(blocks.free)
        blocks.give_back(numbers[::-1])
        free = [int(b) for b in numbers]
        assert sorted(held + free) == list(range(blocks.total))
        counts = {name: tables.held(name, tier) for name in tables.owners if tables.held(name, tier)}
        assert counts == scheduler.view.pools[tier].holders()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 4),
    size=st.sampled_from([1, 3, 4]),
    gpu=st.integers(4, 30),
    cpu=st.integers(0, 30),
    early=st.booleans(),
)
def test_kv_is_where_the_tables_say(
    seed: int, layers: int, size: int, gpu: int, cpu: int, early: bool
) -> None:
    """Random plans of everything the plan language has; two slots and narrow rows to begin with."""
    rnd = Random(seed)
    scheduler = make_scheduler(
        Chaos(seed, staging_layers=1), gpu=gpu, cpu=cpu, model=toy_model(layers), block_size=size
    )
    pools = scheduler.view.pools
    tables = BlockTables(layers, size, pools[Tier.GPU].total, pools[Tier.CPU].total, slots=2)
    memory = Memory(tables, layers, size)
    for i in range(8):
        scheduler.add(Request(f"r{i}", rnd.randint(1, 25), rnd.randint(2, 12)))
    for now in range(30):
        if rnd.random() < 0.1 and scheduler.view.requests:
            scheduler.abort(rnd.choice(list(scheduler.view.requests)), now)
        planned = scheduler.plan_step(now)
        for request in scheduler.ended:
            tables.release(request.id)
        scheduler.ended.clear()
        if planned is None:
            continue
        copies = tables.begin(planned.plan)
        memory.step(planned.plan, copies, early)
        scheduler.finish_step(planned, StepResult(now + 0.5))
        tables.commit()
        for request in scheduler.ended:
            tables.release(request.id)
        scheduler.ended.clear()
        memory.check([r for r in scheduler.view.requests.values() if r.computed])
        check_books(tables, scheduler)


# -- one tier -----------------------------------------------------------------------------------------------


def tier(total: int = 12, layers: int = 2, slots: int = 3, width: int = 4) -> TierBlocks:
    return TierBlocks(Tier.GPU, total, layers, slots, width)


def test_more_than_there_is_is_a_bug_that_is_told() -> None:
    blocks = tier(total=5)
    blocks.take(4)
    with pytest.raises(AssertionError, match="gpu memory: 2 layer-blocks wanted, 1 are free"):
        blocks.take(2)
    assert blocks.free == 1


def test_what_is_given_back_is_taken_again() -> None:
    blocks = tier()
    first = blocks.take(12)
    assert sorted(first.tolist()) == list(range(12))
    blocks.give_back(first[3:6])
    assert sorted(blocks.take(3).tolist()) == sorted(first[3:6].tolist())


def test_rows_grow_and_keep_what_they_have() -> None:
    blocks = tier()
    blocks.grow(1, 2)
    before = [blocks.row(layer, 1).tolist() for layer in range(2)]
    blocks.grow(1, 2)
    blocks.reserve(7, 9)
    blocks.grow(1, 3)
    after = [blocks.row(layer, 1).tolist() for layer in range(2)]
    assert [row[:2] for row in after] == before
    assert blocks.free == 12 - 6
    assert blocks.tables.shape == (2, 7, 9)
    blocks.drop(1)
    assert blocks.free == 12
    assert blocks.row(0, 1).tolist() == []


def test_rows_of_some_layers() -> None:
    blocks = tier(layers=4)
    blocks.grow_some(0, np.array([1, 3]), 2)
    assert [len(blocks.row(layer, 0)) for layer in range(4)] == [0, 2, 0, 2]
    having, taken = blocks.pop(0, slice(1, 3))
    assert having.tolist() == [1]
    assert taken.shape == (1, 2)
    assert [len(blocks.row(layer, 0)) for layer in range(4)] == [0, 0, 0, 2]
    blocks.grow_some(0, np.array([], dtype=int), 5)
    assert blocks.free == 12 - 4


def test_blocks_that_a_copy_leaves_serve_the_same_layer_at_once_and_others_when_the_step_is_over() -> None:
    """The copy of layer l runs before PRE of layer l writes: within a layer, a block may change hands."""
    blocks = tier(total=8)
    blocks.grow(0, 3)
    _, columns = blocks.pop(0, slice(None))
    blocks.leave(columns)
    blocks.grow(1, 2)
    for layer in range(2):
        assert blocks.row(layer, 1).tolist() == columns[layer, :2].tolist()
    assert blocks.free == 2
    blocks.settle()
    assert blocks.free == 4


def test_staged_blocks_are_free_when_the_step_is_over() -> None:
    tables = BlockTables(2, 4, 10, 10)
    assert len(set(tables.stage(7).tolist())) == 7
    assert tables.gpu.free == 3
    tables.commit()
    assert tables.gpu.free == 10


@pytest.mark.parametrize(("tier", "rests"), [(Tier.CPU, True), (Tier.GPU, False)])
def test_a_slot_whose_rows_the_host_may_be_reading_is_nobodys_until_the_commit(
    tier: Tier, rests: bool
) -> None:
    tables = BlockTables(2, 4, 10, 10, slots=3)
    first, second, third = (Request(name, 4, 4) for name in "abc")
    tables.reserve(first, tier)
    slot = tables.slot("a")
    row = tables.cpu.tables[:, slot].copy()
    tables.release("a")
    tables.reserve(second, Tier.CPU)
    assert (tables.slot("b") != slot) == rests
    if rests:
        np.testing.assert_array_equal(tables.cpu.tables[:, slot], row)
        tables.commit()
        tables.reserve(third, Tier.CPU)
        assert tables.slot("c") == slot


def test_slots_are_as_many_as_there_are_requests() -> None:
    tables = BlockTables(2, 4, 200, 0, slots=2)
    requests = [Request(f"r{i}", 4 + 40 * (i == 3), 4) for i in range(9)]
    for r in requests:
        r.computed = r.prompt_tokens
        tables.reserve(r, Tier.GPU)
    assert len({tables.slot(r.id) for r in requests}) == 9
    rows = {r.id: tables.gpu.row(1, tables.slot(r.id)).tolist() for r in requests}
    assert [len(rows[r.id]) for r in requests] == [blocks_for(r.computed + 1, 4) for r in requests]
    assert len({b for row in rows.values() for b in row}) == sum(map(len, rows.values()))
    tables.release("r3")
    tables.release("r3")
    assert tables.held("r3", Tier.GPU) == 0
    assert "r3" not in tables.owners

"""What is done at start, so that no request waits for it: libraries load, and graphs are captured."""

from __future__ import annotations

from collections.abc import Sequence

from neo.core.blocks import blocks_for
from neo.core.request import Request, Tier
from neo.core.specs import ModelSpec
from neo.core.view import SystemView
from neo.runtime.engine import Engine
from neo.runtime.measure import Bench

_MOST_STEPS = 96
"""Steps of decodes alone that are run at most, each of which takes some 50 ms to capture."""
_TABLE_BYTES = 64 << 20
"""Of a tier's block tables, for which room is made at start. Wider ones grow when a request needs it."""


def prepare_engine(engine: Engine, model: ModelSpec) -> None:
    """Run made-up steps of the sizes that the executor prepares for; nothing of them is left.

    An executor says so by a tuple ``sizes``; others need nothing. For an engine that has no requests yet.
    Where the policy relays, and there is host memory to do so, steps with relayed decodes are run too.
    """
    sizes: tuple[int, ...] = getattr(engine.executor, "sizes", ())
    if not sizes:
        return
    view = engine.scheduler.view
    limits, pool = view.limits, view.pools[Tier.GPU]
    bench = Bench(engine.executor, model, limits.block_size)
    relayed = _relayed_shapes(view, sizes) if getattr(engine.scheduler.policy, "relays", False) else []
    # Graphs know where tables are: they should not have to grow when requests come.
    slots = limits.max_seqs + (2 * relayed[0][0] + 1 if relayed else 0)
    slots += slots // 8 + 16  # of requests on the host that have just ended
    most = max([view.pools[tier].tokens for tier in Tier])
    width = blocks_for(min(engine.options.max_model_len, most), limits.block_size)
    widest = _TABLE_BYTES // (4 * model.layers * max(slots, 1))
    engine.executor.tables.reserve_room(slots, min(width, widest))
    longest = min(limits.max_batch_tokens, pool.tokens, engine.options.max_model_len - 1)
    if longest > 0:
        bench.prefill(0, longest)
    if longest > 1:
        bench.prefill(longest // 2, longest - longest // 2)
    for count in reversed(sizes):  # tables grow with the first, and graphs know where they are
        if count <= pool.blocks:
            bench.decode([1] * count, Tier.GPU)
    relay = _Relay(bench, model.layers)
    for rows, decodes in relayed[: max(0, _MOST_STEPS - len(sizes) - 1) // 2]:  # one more begins
        relay.step(rows, decodes)
        relay.step(rows, decodes, arriving=True)
    relay.end()


def _relayed_shapes(view: SystemView, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Numbers of relayed rows and of GPU decodes beside them, of which no two are padded to the same.

    Those of the most rows come first: as many are relayed as pay, and those beside them fill the GPU.
    """
    limits, gpu, cpu = view.limits, view.pools[Tier.GPU], view.pools[Tier.CPU]
    found = []
    # Two tokens may be under way, and one moves.
    rows = min(limits.relay_rows, limits.max_seqs, (cpu.blocks - 2) // 2)
    while rows > 0:
        lanes = 1 << (rows - 1).bit_length()
        most = min(sizes[-1], gpu.blocks - 1, limits.max_batch_tokens - rows)
        counts = {min(sizes[-1], most), *(size - lanes for size in sizes)}
        found += [(rows, count) for count in sorted(counts, reverse=True) if 0 < count <= most]
        rows = lanes // 2
    return found


class _Relay:
    """Steps in which some relayed decodes come back from the host and some leave, as in the midst of a run.

    One group of them is under way, and the next begins when it is at its last layer.
    """

    def __init__(self, bench: Bench, layers: int) -> None:
        self._bench, self._layers = bench, layers
        self._within: list[Request] = []
        self._rows = self._decodes = 0

    def step(self, rows: int, decodes: int, arriving: bool = False) -> None:
        """A step with so many relayed rows, and decodes beside them."""
        if rows != self._rows:
            self._begin(rows, self._decodes or decodes)
        self._decodes = decodes
        if all(r.relay_layers == self._layers for r in self._within):
            self._within += self._group()
        self._bench.relayed(decodes, self._within, arriving)
        self._bench.release([r for r in self._within if not r.relay_layers])
        self._within = [r for r in self._within if r.relay_layers]

    def _begin(self, rows: int, decodes: int) -> None:
        """A group of another size begins, in a step like the latest; who is under way is given up then."""
        before, self._rows = self._within, rows
        self._within = self._group()
        self._bench.relayed(decodes, [*before, *self._within])
        self._bench.release(before)

    def _group(self) -> list[Request]:
        return [self._bench.decoding(1, Tier.CPU) for _ in range(self._rows)]

    def end(self) -> None:
        """Give up who is within a token, as if they had been aborted."""
        self._bench.release(self._within)

"""What is done at start, so that no request waits for it: libraries load, and graphs are captured."""

from __future__ import annotations

from neo.core.request import Tier
from neo.core.specs import ModelSpec
from neo.runtime.engine import Engine
from neo.runtime.measure import Bench


def prepare_engine(engine: Engine, model: ModelSpec) -> None:
    """Run made-up steps of the sizes that the executor prepares for; nothing of them is left.

    An executor says so by a tuple ``sizes``; others need nothing. For an engine that has no requests yet.
    """
    sizes: tuple[int, ...] = getattr(engine.executor, "sizes", ())
    if not sizes:
        return
    limits, pool = engine.scheduler.view.limits, engine.scheduler.view.pools[Tier.GPU]
    bench = Bench(engine.executor, model, limits.block_size)
    longest = min(limits.max_batch_tokens, pool.tokens, engine.options.max_model_len - 1)
    if longest > 0:
        bench.prefill(0, longest)
    if longest > 1:
        bench.prefill(longest // 2, longest - longest // 2)
    for count in reversed(sizes):  # tables grow with the first, and graphs know where they are
        if count <= pool.blocks:
            bench.decode([1] * count, Tier.GPU)

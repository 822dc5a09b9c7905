"""How many layer-blocks the decodes of a plan need for their next tokens."""

from __future__ import annotations

from collections.abc import Sequence

from neo.core.plan import StepPlan
from neo.core.request import Request, Tier
from neo.core.view import SystemView


def growing(view: SystemView, decodes: Sequence[Request]) -> int:
    """How many of these decodes need a new block (whole model) for one more token."""
    size = view.limits.block_size
    return [r.computed % size for r in decodes].count(0)


def new_layer_blocks(view: SystemView, plan: StepPlan, steps: int = 1) -> list[tuple[Tier, str, int]]:
    """(tier, request id, layer-blocks) for one token of each decode, or for the ``steps - 1`` after it."""
    size, layers = view.limits.block_size, view.model.layers
    grown: list[tuple[Tier, str, int]] = []
    for batch in plan.batches:
        if steps == 1:
            begin = [r for r in batch.relay_decode if not r.relay_layers]
            needs = [(r, 1) for r in (*batch.decodes, *begin) if not r.computed % size]
        else:
            needs = [(r, -(-(r.computed + steps) // size) - (r.computed // size + 1)) for r in batch.decodes]
        for r, blocks in needs:
            if not blocks:
                continue
            if r.tier is not None:
                grown.append((r.tier, r.id, blocks * layers))
            else:
                on_host = r.host_layers.bit_count()
                grown.append((Tier.CPU, r.id, blocks * on_host))
                grown.append((Tier.GPU, r.id, blocks * (layers - on_host)))
    return grown


def repeats_fit(view: SystemView, plan: StepPlan, steps: int) -> bool:
    """Whether an applied decode-only plan can run ``steps`` times with the blocks that are free."""
    size, layers = view.limits.block_size, view.model.layers
    gpu, cpu = view.pools[Tier.GPU], view.pools[Tier.CPU]
    staged = sum([-(-(r.computed + steps) // size) for b in plan.batches for r in b.stream_decode])
    if not plan.ring and staged > gpu.staging_blocks:
        return False
    gpu_free = gpu.free - plan.ring * staged
    most = (steps // size + 1) * layers  # of one request, whatever its length
    on_gpu = most * sum([len(b.gpu_decode) + len(b.stream_decode) for b in plan.batches])
    on_cpu = most * sum([len(b.cpu_decode) + len(b.stream_decode) for b in plan.batches])
    if on_gpu <= gpu_free and on_cpu <= cpu.free:
        return True
    need = {Tier.GPU: 0, Tier.CPU: 0}
    for tier, _, count in new_layer_blocks(view, plan, steps):
        need[tier] += count
    return need[Tier.GPU] <= gpu_free and need[Tier.CPU] <= cpu.free

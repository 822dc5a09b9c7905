"""A step of ``neo`` with relayed CPU decodes: one pass over the weights serves both tiers.

Two sub-batches read the weights twice. Where a step is little but reading them, CPU decodes had better go
with sub-batch 0, a layer a step (``SubBatch.relay_decode``): the CPU attends for all of them while the step
runs. Room that becomes free on the GPU is for those on the host, as in any step of ``neo``: the oldest that
is between two tokens takes it. If none is, those who wait may have it, rather than nobody.
"""

from __future__ import annotations

from neo.core.plan import Evict, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.policy.neo_draft import Draft


def relayed(draft: Draft) -> StepPlan:
    """The draft's sub-batch 0 with relayed decodes: all that are within a token, and some that begin one."""
    chunks, decodes = tuple(draft.chunks), draft.gpu_decodes
    members = (*draft.within, *_begin(draft))
    while not (chunks or decodes or members) and draft.cpu_candidates:
        victim = draft.cpu_candidates.pop()  # host memory is full of requests that cannot grow
        draft.evict.append(Evict(victim))
        draft.cpu_free += draft.cpu.held(victim.id)
        members = tuple(_begin(draft))
    if not (chunks or decodes or members):
        return StepPlan(reject=tuple(draft.reject), why="nothing to run")
    ring = draft.ring if any(c.dst is Tier.CPU for c in chunks) else 0
    batch = SubBatch(chunks, decodes, relay_decode=members)
    why = f"{len(members)} relayed" if members else "gpu-only"
    return StepPlan((batch,), tuple(draft.moves), tuple(draft.evict), tuple(draft.reject), why, ring=ring)


def _begin(draft: Draft) -> list[Request]:
    """Who begins a token: the oldest that host memory has room for."""
    view = draft.view
    rows = min(draft.rows_to_begin(), view.limits.max_batch_tokens - draft.tokens0())
    moving = {m.request.id for m in draft.moves}
    found: list[Request] = []
    for r in draft.cpu_candidates:
        if len(found) >= rows:
            break
        growth = view.growth(r)
        if growth <= draft.cpu_free and r.id not in moving:
            draft.cpu_free -= growth
            found.append(r)
    return found

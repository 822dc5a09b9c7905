"""A step of ``neo`` with relayed CPU decodes: one pass over the weights serves both tiers.

Two sub-batches read the weights twice. Where a step is little but reading them, CPU decodes had better go
with sub-batch 0, a layer a step (``SubBatch.relay_decode``): the CPU attends for all of them while it runs.
The oldest of them take the room that becomes free on the GPU, as in any step of ``neo``, so nobody is
overtaken: what the host does for a request is done when its turn comes.
"""

from __future__ import annotations

from neo.core.plan import Evict, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.policy.neo_draft import Draft
from neo.policy.relay_target import Goal


def relayed(draft: Draft, goal: Goal) -> StepPlan:
    """The draft's sub-batch 0 with relayed decodes: all that are within a token, and some that begin one."""
    within = [r for r in draft.view.cpu_decodes if r.relay_layers]
    members = tuple(within + _begin(draft, goal, within))
    chunks, decodes = tuple(draft.chunks), draft.gpu_decodes
    while not (chunks or decodes or members) and draft.cpu_candidates:
        victim = draft.cpu_candidates.pop()  # host memory is full of requests that cannot grow
        draft.evict.append(Evict(victim))
        draft.cpu_free += draft.cpu.held(victim.id)
        members = tuple(_begin(draft, goal, within))
    if not (chunks or decodes or members):
        return StepPlan(reject=tuple(draft.reject), why="nothing to run")
    ring = draft.ring if any(c.dst is Tier.CPU for c in chunks) else 0
    batch = SubBatch(chunks, decodes, relay_decode=members)
    why = f"{len(members)} of {goal.hosted} relayed" if members else "gpu-only"
    return StepPlan((batch,), tuple(draft.moves), tuple(draft.evict), tuple(draft.reject), why, ring=ring)


def _begin(draft: Draft, goal: Goal, within: list[Request]) -> list[Request]:
    """Who begins a token: the oldest, in every step as many, so that the layers have equal numbers."""
    view = draft.view
    rows = min(-(-goal.hosted // (draft.layers + 1)), view.limits.relay_rows)
    found: list[Request] = []
    for r in draft.cpu_candidates:
        if len(found) >= rows or len(within) + len(found) >= goal.hosted:
            break
        growth = view.growth(r)
        if growth <= draft.cpu_free and not any(m.request is r for m in draft.moves):
            draft.cpu_free -= growth
            found.append(r)
    return found

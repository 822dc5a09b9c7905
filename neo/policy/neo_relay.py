"""A step of ``neo`` with relayed CPU decodes: one pass over the weights serves both tiers.

Two sub-batches read the weights twice. Where a step is little but reading them, CPU decodes had better go
with sub-batch 0, a layer a step (``SubBatch.relay_decode``): the CPU attends for all of them while the step
runs. A step full of prompts takes ten times as long, and the CPU would be idle for most of it: there, where
that is estimated to do more, relayed decodes stand still, and as many of the others on the host as stay
hidden get a whole token in the second sub-batch. Prompts may come for ever: once the oldest has waited
``patience_s`` for a token, relayed decodes go on, until it has one. Room that becomes free on the GPU is for
those on the host, as in any step of ``neo``: the oldest that is between two tokens takes it. If none is,
those who wait may have it, rather than nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

from neo.core.plan import Evict, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.policy.neo_choice import pipelined, rates
from neo.policy.neo_draft import Draft


def relayed(draft: Draft) -> StepPlan:
    """The draft's sub-batch 0 with relayed decodes: all that are within a token, and some that begin one.

    Beside prompts, two sub-batches without them if that is better; but not before the first has begun a
    token: whether to go on relaying is told from there being such.
    """
    prompts = draft.chunks and draft.cpu_candidates and draft.within
    plan = _beside_prompts(draft) if prompts else None
    late = _late(draft, draft.within)  # whoever begins beside them would stand still behind them
    if plan is not None and not late and not _late(draft, draft.cpu_candidates):
        return plan
    chunks, decodes = tuple(draft.chunks), draft.gpu_decodes
    members = (*draft.within, *(() if plan is not None and late else _begin(draft)))
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


def _late(draft: Draft, people: Sequence[Request]) -> bool:
    """Whether the oldest of these has waited too long for a token."""
    last = people[0].last_token_s if people else None
    return last is not None and draft.view.now - last > draft.options.patience_s


def _beside_prompts(draft: Draft) -> StepPlan | None:
    """Two sub-batches; None if relayed decodes had better go on. The draft stays as it was."""
    before = (draft.cpu_free, list(draft.cpu_candidates), list(draft.evict))
    draft.place_cpu_decodes()
    count, plan = sum(map(len, draft.cpu_decodes)), None
    if count:
        tokens = (len(draft.within) + draft.rows_to_begin()) / (draft.layers + 1)
        rate, relaying = rates(draft, tokens)
        if rate > relaying:
            plan = pipelined(draft, f"{count} beside prompts: {rate:.0f} > {relaying:.0f} relayed")
    draft.cpu_free, draft.cpu_candidates, draft.evict = before
    draft.cpu_decodes, draft.cpu_kv = ([], []), [0, 0]
    return plan


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

"""Step 6 of ``neo``: with the CPU decodes, or without them; see ``neo.policy.neo``."""

from __future__ import annotations

from neo.core.plan import Evict, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.policy.neo_draft import Draft


def choose(draft: Draft) -> StepPlan:
    """The pipelined step, or the GPU-only one if that is estimated to be faster."""
    first, second = draft.cpu_decodes
    chunks, decodes = tuple(draft.chunks), draft.gpu_decodes
    gpu_only = SubBatch(chunks, decodes)
    if not gpu_only.sequences:
        return _without_gpu_work(draft)
    if not (first or second):
        return _plan(draft, (gpu_only,), "gpu-only")
    rate, alone = rates(draft)
    if alone * _crowding(draft) >= rate and not draft.forced:
        return _plan(draft, (gpu_only,), f"gpu-only: {alone:.0f} >= {rate:.0f} pipelined")
    return pipelined(draft, f"pipelined: {rate:.0f} > {alone:.0f} gpu-only")


def pipelined(draft: Draft, why: str) -> StepPlan:
    """The step with the draft's CPU decodes."""
    first, second = draft.cpu_decodes
    batches: tuple[SubBatch, ...] = (SubBatch(tuple(draft.chunks), draft.gpu_decodes, tuple(first)),)
    if second:
        batches += (SubBatch(cpu_decode=tuple(second)),)
    return _plan(draft, batches, why)


def rates(draft: Draft, relayed: float = 0.0) -> tuple[float, float]:
    """Estimated worth per second with the CPU decodes, and without them; see ``NeoOptions.worth``.

    ``relayed``: tokens that relayed decodes bring without them.
    """
    times, (first, second) = draft.times, draft.cpu_decodes
    prefilled = sum([c.length for c in draft.chunks])
    own = len(draft.gpu_decodes) + prefilled
    rows = len(draft.gpu_decodes) + len(draft.chunks)
    cpu0 = times.cpu_stage(len(first), draft.cpu_kv[0])
    cpu1 = times.cpu_stage(len(second), draft.cpu_kv[1])
    linear0 = times.linear(own + len(first))
    extra = len(first) + len(second)
    if second:
        layer = max(linear0, cpu1) + max(times.linear(len(second)) + draft.attention_s, cpu0)
    else:
        layer = linear0 + max(draft.attention_s, cpu0)
    together = draft.layers * layer + times.around(own + extra, rows + extra, rows + extra)
    alone = draft.layers * (times.linear(own) + draft.attention_s) + times.around(own, rows, rows)
    if draft.options.worth == "requests":  # one token comes out of each, and none of an unfinished prompt
        prefilled = sum([c.length == c.request.remaining_prefill for c in draft.chunks])
    decode = _decode_worth(draft) if draft.options.worth == "time" else 1.0
    worth = prefilled + decode * len(draft.gpu_decodes)
    return (worth + decode * extra) / together, (worth + decode * relayed) / alone


def _decode_worth(draft: Draft) -> float:
    """GPU time of a decode in a full GPU-only step, over that of a prefill token."""
    times = draft.times
    kv = sum(draft.cpu_kv) + sum([r.computed for r in draft.gpu_decodes])
    count = len(draft.cpu_decodes[0]) + len(draft.cpu_decodes[1]) + len(draft.gpu_decodes)
    full = max(1, draft.gpu.tokens * count // max(kv, 1))
    budget = max(draft.prefill_budget(), 1)
    decode = (times.linear(full) + times.gpu_attention((), full, draft.gpu.tokens)) / full
    return decode / (times.linear(budget) / budget)


def _crowding(draft: Draft) -> float:
    """By which factor CPU decodes must raise a step's worth per second."""
    outlook = None if draft.options.eager else draft.outlook
    if outlook is None:
        return 1.0
    extra = len(draft.cpu_decodes[0]) + len(draft.cpu_decodes[1])
    return outlook.crowding(extra, len(draft.gpu_decodes) + len(draft.chunks))


def _without_gpu_work(draft: Draft) -> StepPlan:
    """Nothing for the GPU to hide the CPU behind: run CPU decodes in one batch, or free their memory."""
    view, runnable = draft.view, list[Request]()
    for r in draft.cpu_candidates[: min(view.limits.max_seqs, view.limits.max_batch_tokens)]:
        growth = view.growth(r)
        if growth <= draft.cpu_free:
            draft.cpu_free -= growth
            runnable.append(r)
    while draft.cpu_candidates and not runnable:
        victim = draft.cpu_candidates.pop()
        draft.evict.append(Evict(victim))
        draft.cpu_free += draft.cpu.held(victim.id)
        runnable = [r for r in draft.cpu_candidates[:1] if view.growth(r) <= draft.cpu_free]
    if runnable:
        return _plan(draft, (SubBatch(cpu_decode=tuple(runnable)),), "CPU decodes alone")
    return _plan(draft, (), "nothing to run")


def _plan(draft: Draft, batches: tuple[SubBatch, ...], why: str) -> StepPlan:
    if not batches:
        return StepPlan(reject=tuple(draft.reject), why=why)
    ring = draft.ring if any(c.dst is Tier.CPU for c in batches[0].prefill) else 0
    return StepPlan(batches, tuple(draft.moves), tuple(draft.evict), tuple(draft.reject), why, ring=ring)

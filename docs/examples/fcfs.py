"""First come, first served, all KV on the GPU: a complete policy."""

from neo.core.plan import Evict, PrefillChunk, Reject, StepPlan, SubBatch
from neo.core.request import State, Tier


class FCFS:
    """Serves requests in order of arrival; preempts the newest when GPU blocks run out."""

    def plan(self, view, cost):
        """Decide the next step."""
        gpu, limits = view.pools[Tier.GPU], view.limits
        running = sorted((*view.prefilling, *view.gpu_decodes), key=lambda r: r.sequence)
        free = gpu.free - sum(view.growth(r, r.remaining_prefill) for r in running)
        tokens = limits.max_batch_tokens - len(view.gpu_decodes)
        evict, reject, chunks = [], [], []
        while free < 0:  # the newest makes room; the oldest alone always fits
            victim = running.pop()
            free += gpu.held(victim.id) + view.growth(victim, victim.remaining_prefill)
            evict.append(Evict(victim))
        for r in () if evict else view.waiting:
            if reason := view.never_fits(r):
                reject.append(Reject(r, reason))
            elif len(running) < limits.max_seqs and view.growth(r, r.remaining_prefill) <= free:
                free -= view.growth(r, r.remaining_prefill)
                running.append(r)
            else:
                break
        for r in running:
            if r.state is not State.DECODE and tokens > 0:
                chunks.append(PrefillChunk(r, r.computed, min(r.remaining_prefill, tokens)))
                tokens -= chunks[-1].length
        batch = SubBatch(tuple(chunks), tuple(r for r in running if r.state is State.DECODE))
        return StepPlan((batch,) if batch.sequences else (), evict=tuple(evict), reject=tuple(reject))

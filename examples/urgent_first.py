"""A policy of one's own, served: requests with a higher ``priority`` are computed first.

    neo serve --policy examples/urgent_first.py:UrgentFirst
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "Once upon a time", "priority": 5}'

The same file runs in the simulator (``neo simulate -p examples/urgent_first.py:UrgentFirst``), which is where
to find out what it does to everybody else. How to write one: docs/write-a-policy.md.
"""

from neo.core.plan import PrefillChunk, Reject, StepPlan, SubBatch
from neo.core.request import Tier


class UrgentFirst:
    """All KV on the GPU; a request is admitted only with room to its end, so nobody is ever preempted."""

    def plan(self, view, cost):
        """Decide the next step."""
        gpu, limits = view.pools[Tier.GPU], view.limits
        decodes, prefills = tuple(view.gpu_decodes), list(view.prefilling)
        running = (*decodes, *prefills)
        free = gpu.total - sum(self.blocks(view, r) for r in running)
        reject = []
        for r in sorted(view.waiting, key=lambda r: (-r.priority, r.arrival_s)):
            if reason := view.never_fits(r):
                reject.append(Reject(r, reason))
            elif self.blocks(view, r) <= free and len(decodes) + len(prefills) < limits.max_seqs:
                free -= self.blocks(view, r)
                prefills.append(r)
        tokens, chunks = limits.max_batch_tokens - len(decodes), []
        for r in sorted(prefills, key=lambda r: (-r.priority, r.arrival_s)):
            if tokens > 0:
                chunks.append(PrefillChunk(r, r.computed, min(r.remaining_prefill, tokens)))
                tokens -= chunks[-1].length
        batch = SubBatch(tuple(chunks), decodes)
        return StepPlan((batch,) if batch.sequences else (), reject=tuple(reject))

    def blocks(self, view, request):
        """Layer-blocks that a request holds at its end."""
        return -(-request.peak_kv_tokens // view.limits.block_size) * view.model.layers

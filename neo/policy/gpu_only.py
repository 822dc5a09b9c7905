"""``gpu-only``: continuous batching with all KV on the GPU, first come first served."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from neo.core.growth import growing
from neo.core.plan import Evict, PrefillChunk, Reject, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.core.view import SystemView
from neo.cost.interface import CostModel
from neo.policy.checks import in_range

FOREVER = 1 << 40  # steps


@dataclass(frozen=True, slots=True)
class GpuOnlyOptions:
    """Options of ``gpu-only``."""

    prefill: Literal["chunked", "whole"] = field(
        default="chunked", metadata={"help": "chunked (vLLM-like) or whole prompts (SwiftLLM-like)"}
    )
    token_budget: int = field(
        default=2048, metadata={"help": "tokens of a chunked step, at most max_batch_tokens (vLLM V1: 2048)"}
    )
    watermark: float = field(
        default=0.01,
        metadata={"help": "share of GPU blocks kept free when a request is admitted (vLLM: 0.01)"},
    )

    def __post_init__(self) -> None:
        in_range("token_budget", self.token_budget, 1)
        in_range("watermark", self.watermark, 0, 0.9)


class GpuOnly:
    """Every decode runs in every step; what is left of the budget goes to prefill.

    When blocks run out, the newest request is preempted and later recomputed (vLLM's policy). In whole-prompt
    mode a prompt is prefilled in one step; only a preempted request that has outgrown ``max_batch_tokens``
    is recomputed in chunks.
    """

    Options = GpuOnlyOptions

    def __init__(self, options: GpuOnlyOptions | None = None) -> None:
        self.options = options or GpuOnlyOptions()

    def plan(self, view: SystemView, cost: CostModel) -> StepPlan:
        """Decide the next step."""
        decodes = view.gpu_decodes
        pool = view.pools[Tier.GPU]
        layers = view.model.layers
        need = growing(view, decodes) * layers
        budget = self.step_tokens(view) - len(decodes)
        chunks: list[PrefillChunk] = []
        slots = view.limits.max_seqs - len(decodes)
        for r in view.prefilling:
            if budget <= 0 or len(chunks) >= slots:
                break
            length = min(r.remaining_prefill, budget)
            chunks.append(PrefillChunk(r, r.computed, length))
            need += view.growth(r, length)
            budget -= length
        if need > pool.free:
            return self._preempt(view, list(decodes), chunks, need)
        reject = self._admit(view, chunks, need, budget) if view.waiting else ()
        if not chunks:
            if not decodes:
                return StepPlan(reject=reject, why="nothing runs")
            repeat = 0 if reject else FOREVER
            return StepPlan((SubBatch(gpu_decode=decodes),), reject=reject, why="decode", repeat=repeat)
        return StepPlan(
            (SubBatch(tuple(chunks), decodes),), reject=reject, why="mixed" if decodes else "prefill"
        )

    def step_tokens(self, view: SystemView) -> int:
        """Token budget of a step."""
        most = view.limits.max_batch_tokens
        return most if self.options.prefill == "whole" else min(self.options.token_budget, most)

    def _admit(
        self, view: SystemView, chunks: list[PrefillChunk], need: int, budget: int
    ) -> tuple[Reject, ...]:
        """Append chunks of waiting requests while tokens, sequences and blocks last; returns rejections."""
        pool = view.pools[Tier.GPU]
        reject: list[Reject] = []
        slots = view.limits.max_seqs - len(view.gpu_decodes) - len(chunks)
        # What prefills under way still need is theirs.
        free = pool.free - need - sum([view.growth(c.request, c.request.remaining_prefill) for c in chunks])
        free += sum([view.growth(c.request, c.length) for c in chunks])
        busy = bool(chunks or view.gpu_decodes)
        for r in view.waiting:
            if budget <= 0 or slots <= 0:
                break
            if reason := self.unservable(view, r):
                reject.append(Reject(r, reason))
                continue
            length = r.remaining_prefill
            if self.options.prefill == "whole" and length > budget and length <= view.limits.max_batch_tokens:
                break
            blocks = view.layer_blocks(length)
            if blocks > free - (int(pool.total * self.options.watermark) if busy else 0):
                break
            length = min(length, budget)
            chunks.append(PrefillChunk(r, 0, length))
            budget -= length
            slots -= 1
            free -= blocks
            busy = True
        return tuple(reject)

    def unservable(self, view: SystemView, request: Request) -> str | None:
        """Why a waiting request can never be served; None if it can."""
        most = view.limits.max_batch_tokens
        if self.options.prefill == "whole" and request.prompt_tokens > most:
            return f"prompt of {request.prompt_tokens} tokens, a step takes max_batch_tokens = {most}"
        return view.never_fits(request)

    def _preempt(
        self, view: SystemView, decodes: list[Request], chunks: list[PrefillChunk], need: int
    ) -> StepPlan:
        """Evict the newest requests until the others' new KV fits."""
        pool = view.pools[Tier.GPU]
        free = pool.free
        evict: list[Evict] = []
        while need > free:
            if chunks and (not decodes or chunks[-1].request.sequence > decodes[-1].sequence):
                chunk = chunks.pop()
                victim, growth = chunk.request, view.growth(chunk.request, chunk.length)
            else:
                victim = decodes.pop()
                growth = view.growth(victim)
            if not (chunks or decodes):
                raise AssertionError(f"{victim.id} alone does not fit: it should have been rejected")
            evict.append(Evict(victim))
            free += pool.held(victim.id)
            need -= growth
        batch = SubBatch(tuple(chunks), tuple(decodes))
        return StepPlan((batch,), evict=tuple(evict), why=f"blocks ran out, {len(evict)} preempted")

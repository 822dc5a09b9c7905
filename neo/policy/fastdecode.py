"""``fastdecode``: all decode attention on the CPU, with NEO's pipelining (FastDecode+ in the NEO paper)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from neo.core.blocks import blocks_for
from neo.core.plan import Evict, PrefillChunk, Reject, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.core.view import SystemView
from neo.cost.interface import CostModel
from neo.policy.checks import in_range
from neo.policy.estimate import StageTimes


@dataclass(frozen=True, slots=True)
class FastDecodeOptions:
    """Options of ``fastdecode``."""

    prefill: Literal["chunked", "whole"] = field(
        default="chunked", metadata={"help": "chunked, or whole prompts as published"}
    )
    token_budget: int = field(default=2048, metadata={"help": "tokens of a chunked step"})
    watermark: float = field(
        default=0.01, metadata={"help": "share of CPU blocks kept free when a request is admitted"}
    )

    def __post_init__(self) -> None:
        in_range("token_budget", self.token_budget, 1)
        in_range("watermark", self.watermark, 0, 0.9)


class FastDecode:
    """The GPU does the dense work and prefill attention; every KV token lives in host memory.

    Every decode runs in every step, hidden or not: that is what distinguishes it from ``neo``. Decodes are
    spread over two sub-batches so that CPU and GPU wait for each other as little as possible; one sub-batch
    is used where that is estimated to be faster. The newest request is preempted when host memory runs out.
    """

    staging_layers = 1
    Options = FastDecodeOptions

    def __init__(self, options: FastDecodeOptions | None = None) -> None:
        self.options = options or FastDecodeOptions()
        self._times: StageTimes | None = None

    def plan(self, view: SystemView, cost: CostModel) -> StepPlan:
        """Decide the next step."""
        if self._times is None or not self._times.fits(cost):
            self._times = StageTimes(cost, view.model)
        pool = view.pools[Tier.CPU]
        decodes, under_way, evict = list(view.cpu_decodes), list(view.prefilling), []
        # What prefills under way still need is theirs.
        need = sum([view.growth(r) for r in decodes])
        need += sum([view.growth(r, r.remaining_prefill) for r in under_way])
        free = pool.free
        while need > free and len(decodes) + len(under_way) > 1:
            group = max((g for g in (decodes, under_way) if g), key=lambda g: g[-1].sequence)
            victim = group.pop()
            evict.append(Evict(victim))
            free += pool.held(victim.id)
            need -= view.growth(victim, victim.remaining_prefill)
        waiting = () if evict else view.waiting
        chunks, reject = self._prefill(view, decodes, [*under_way, *waiting], free - need)
        if not (chunks or decodes):
            return StepPlan(reject=reject, why="nothing runs")
        batches = self._split(view, self._times, chunks, decodes)
        why = f"{len(batches)} sub-batches" + (f", {len(evict)} preempted" if evict else "")
        return StepPlan(batches, evict=tuple(evict), reject=reject, why=why)

    def _prefill(
        self, view: SystemView, decodes: list[Request], candidates: list[Request], free: int
    ) -> tuple[tuple[PrefillChunk, ...], tuple[Reject, ...]]:
        """Chunks under way, then of waiting requests, all bound for the CPU; and rejections."""
        limits, pool = view.limits, view.pools[Tier.CPU]
        whole = self.options.prefill == "whole"
        budget = limits.max_batch_tokens if whole else min(self.options.token_budget, limits.max_batch_tokens)
        budget = min(max(1, budget - len(decodes)), limits.max_batch_tokens - len(decodes))
        slots = limits.max_seqs - len(decodes)
        staging = view.pools[Tier.GPU].staging_blocks
        chunks: list[PrefillChunk] = []
        reject: list[Reject] = []
        for r in candidates:
            if budget <= 0 or slots <= 0:
                break
            length = min(r.remaining_prefill, budget)
            if r.computed == 0:
                if reason := self._unservable(view, r):
                    reject.append(Reject(r, reason))
                    continue
                if whole and length < r.remaining_prefill <= limits.max_batch_tokens:
                    break
                blocks = view.layer_blocks(r.remaining_prefill)
                spare = int(pool.total * self.options.watermark) if chunks or decodes else 0
                if blocks > free - spare:
                    break
                free -= blocks
            staged = blocks_for(r.computed + length, limits.block_size)
            if staged > staging:
                break
            staging -= staged
            chunks.append(PrefillChunk(r, r.computed, length, Tier.CPU))
            budget -= length
            slots -= 1
        return tuple(chunks), tuple(reject)

    def _unservable(self, view: SystemView, request: Request) -> str | None:
        most = view.limits.max_batch_tokens
        if self.options.prefill == "whole" and request.prompt_tokens > most:
            return f"prompt of {request.prompt_tokens} tokens, a step takes max_batch_tokens = {most}"
        staging = view.pools[Tier.GPU].staging_blocks
        need = blocks_for(request.peak_kv_tokens, view.limits.block_size)
        if need > staging:
            return f"needs {need} blocks in the GPU's staging buffer, which has {staging}"
        return view.never_fits(request, (Tier.CPU,))

    @staticmethod
    def _split(
        view: SystemView, times: StageTimes, chunks: tuple[PrefillChunk, ...], decodes: list[Request]
    ) -> tuple[SubBatch, ...]:
        """Each decode to the sub-batch with more CPU slack; one sub-batch if that is faster."""
        one = SubBatch(chunks, cpu_decode=tuple(decodes))
        if not decodes or (len(decodes) == 1 and not chunks):
            return (one,)
        prefill_tokens = sum([c.length for c in chunks])
        attention = times.gpu_attention(tuple([(c.start, c.length) for c in chunks]), 0, 0)
        parts: tuple[list[Request], list[Request]] = ([], [])
        kv, cpu = [0, 0], [0.0, 0.0]
        linear = [times.linear(prefill_tokens), 0.0]
        for r in decodes:
            which = 1 if linear[0] - cpu[1] >= linear[1] + attention - cpu[0] else 0
            parts[which].append(r)
            kv[which] += r.computed + 1
            cpu[which] = times.cpu_stage(len(parts[which]), kv[which])
            linear[which] = times.linear(len(parts[which]) + (0 if which else prefill_tokens))
        together = times.linear(prefill_tokens + len(decodes)) + max(
            attention, times.cpu_stage(len(decodes), sum(kv))
        )
        apart = max(linear[0], cpu[1]) + max(linear[1] + attention, cpu[0])
        if apart >= together or not parts[1] or not (chunks or parts[0]):
            return (one,)
        return SubBatch(chunks, cpu_decode=tuple(parts[0])), SubBatch(cpu_decode=tuple(parts[1]))

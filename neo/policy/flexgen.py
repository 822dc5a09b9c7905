"""``flexgen``: offline batching with a static placement, after FlexGen (arXiv 2303.06865).

Before the first step a search over the cost model finds how many requests to batch, which share of their KV
lives on the host, and whether that share's attention runs on the CPU or its KV is streamed to the GPU, for
most tokens per second at the request lengths it is told (``neo.policy.flexgen_search``). That is then fixed.

Requests are served in blocks: a block is filled (all its prompts prefilled), then all of it is decoded until
the last request has ended; only then does the next begin. Every request has room for all it may become, so
nobody is ever preempted. FlexGen's weights and activations may live on the host or on disk too, and its
blocks go through the model layer by layer in several GPU batches; here weights stay on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from neo.core.blocks import blocks_for
from neo.core.errors import InputError
from neo.core.plan import PrefillChunk, Reject, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.core.view import SystemView
from neo.cost.interface import CostModel
from neo.policy.checks import in_range
from neo.policy.flexgen_search import Placement, Problem, search
from neo.policy.gpu_only import FOREVER


@dataclass(frozen=True, slots=True)
class FlexGenOptions:
    """Options of ``flexgen``."""

    prompt_tokens: int = field(default=512, metadata={"help": "prompt length to plan for (FlexGen: 512)"})
    output_tokens: int = field(default=32, metadata={"help": "output length to plan for (FlexGen: 32)"})
    attention: Literal["search", "cpu", "stream"] = field(
        default="search",
        metadata={"help": "where attention over KV on the host runs: the CPU, or streamed to the GPU"},
    )
    ring: int = field(default=2, metadata={"help": "GPU buffers of one layer's KV each that streams rotate"})

    def __post_init__(self) -> None:
        in_range("prompt_tokens", self.prompt_tokens, 1)
        in_range("output_tokens", self.output_tokens, 1)
        in_range("ring", self.ring, 1, 64)


class FlexGen:
    """See the module's description."""

    Options = FlexGenOptions

    def __init__(self, options: FlexGenOptions | None = None) -> None:
        if find_spec("scipy") is None:
            raise InputError("policy 'flexgen' needs scipy: pip install 'neo-serve[policies]'")
        self.options = options or FlexGenOptions()
        self._placement: Placement | None = None

    def placement(self, view: SystemView, cost: CostModel) -> Placement:
        """The static decision for this system, searched at the first call."""
        if self._placement is None:
            o = self.options
            way = None if o.attention == "search" else o.attention
            ring = min(o.ring, view.model.layers)
            self._placement = search(Problem.of(view, cost, o.prompt_tokens, o.output_tokens, ring, way))
        return self._placement

    def plan(self, view: SystemView, cost: CostModel) -> StepPlan:
        """Decide the next step: fill the block, or decode all of it."""
        placement = self.placement(view, cost)
        ring = min(self.options.ring, view.model.layers)
        reject: tuple[Reject, ...] = ()
        if not any(r.generated > 1 for r in (*view.gpu_decodes, *view.cpu_decodes)):
            chunks, reject = _Block(view, placement, ring, view.running).fill()
            if chunks:
                staged = int(any(c.dst is Tier.CPU for c in chunks))  # each layer's KV leaves before the next
                return StepPlan((SubBatch(chunks),), reject=reject, why="the block fills", ring=staged)
        if not (view.gpu_decodes or view.cpu_decodes):
            return StepPlan(reject=reject, why="nothing runs")
        repeat = 0 if reject else FOREVER
        if placement.attention == "stream" and view.cpu_decodes:
            batch = SubBatch(gpu_decode=view.gpu_decodes, stream_decode=view.cpu_decodes)
            return StepPlan((batch,), reject=reject, why="the block decodes", repeat=repeat, ring=ring)
        batch = SubBatch(gpu_decode=view.gpu_decodes, cpu_decode=view.cpu_decodes)
        return StepPlan((batch,), reject=reject, why="the block decodes", repeat=repeat)


class _Block:
    """The requests that run, and what they have reserved; blocks here are of all layers."""

    def __init__(self, view: SystemView, placement: Placement, ring: int, running: Iterable[Request]) -> None:
        self.view = view
        self.placement = placement
        self.ring = ring
        self.streams = placement.attention == "stream"
        self.members: dict[Tier, int] = {Tier.GPU: 0, Tier.CPU: 0}
        self.count = 0
        self.staging = 0  # blocks of one layer
        for r in running:
            self._reserve(r, r.tier or Tier.GPU)

    def _peak(self, request: Request) -> int:
        return blocks_for(request.peak_kv_tokens, self.view.limits.block_size)

    def _staged(self, request: Request) -> int:
        """Staging that a request on the host needs: for its prefill, and where it is streamed, all along."""
        if self.streams:
            return self.ring * self._peak(request)
        return blocks_for(request.prompt_tokens, self.view.limits.block_size)

    def _reserve(self, request: Request, tier: Tier) -> None:
        self.count += 1
        self.members[tier] += self._peak(request)
        if tier is Tier.CPU:
            self.staging = self._staging_with(request)

    def _staging_with(self, request: Request) -> int:
        more = self._staged(request)
        return self.staging + more if self.streams else max(self.staging, more)

    def _fits(self, request: Request, tier: Tier) -> bool:
        view, peak = self.view, self._peak(request)
        gpu, cpu, layers = view.pools[Tier.GPU].total, view.pools[Tier.CPU].total, view.model.layers
        if tier is Tier.GPU:
            return (self.members[Tier.GPU] + peak) * layers + self.staging <= gpu
        on_gpu = self.members[Tier.GPU] * layers + self._staging_with(request)
        return (self.members[Tier.CPU] + peak) * layers <= cpu and on_gpu <= gpu

    def _tier(self, request: Request) -> Tier | None:
        """Where a request goes: to the host up to its share, elsewhere if it does not fit there."""
        peak, (gpu, cpu) = self._peak(request), (self.members[Tier.GPU], self.members[Tier.CPU])
        first = Tier.CPU if cpu + peak <= self.placement.host * (gpu + cpu + peak) + 1e-9 else Tier.GPU
        for tier in (first, Tier.GPU if first is Tier.CPU else Tier.CPU):
            if self._fits(request, tier):
                return tier
        return None

    def fill(self) -> tuple[tuple[PrefillChunk, ...], tuple[Reject, ...]]:
        """Chunks under way, then of waiting requests while the block has room; and rejections."""
        view, budget = self.view, self.view.limits.max_batch_tokens
        chunks: list[PrefillChunk] = []
        reject: list[Reject] = []
        for r in view.prefilling:
            budget -= self._chunk(chunks, r, r.tier or Tier.GPU, budget)
        for r in view.waiting:
            if budget <= 0 or self.count >= self.placement.requests:
                break
            tier = self._tier(r)
            if tier is None:
                if self._never(r):
                    reject.append(Reject(r, self._reason(r)))
                    continue
                break
            self._reserve(r, tier)
            budget -= self._chunk(chunks, r, tier, budget)
        return self._staged_chunks(chunks), tuple(reject)

    @staticmethod
    def _chunk(chunks: list[PrefillChunk], request: Request, tier: Tier, budget: int) -> int:
        length = min(request.remaining_prefill, budget)
        if length > 0:
            chunks.append(PrefillChunk(request, request.computed, length, tier))
        return length

    def _staged_chunks(self, chunks: list[PrefillChunk]) -> tuple[PrefillChunk, ...]:
        """As many chunks as fit the staging buffer together; the first always does."""
        view, size = self.view, self.view.limits.block_size
        room = view.pools[Tier.GPU].total - self.members[Tier.GPU] * view.model.layers
        kept = []
        for c in chunks:
            staged = blocks_for(c.start + c.length, size) if c.dst is Tier.CPU else 0
            if staged > room:
                break
            room -= staged
            kept.append(c)
        return tuple(kept)

    def _never(self, request: Request) -> bool:
        """Whether a request fits neither tier even alone."""
        return _Block(self.view, self.placement, self.ring, ())._tier(request) is None

    def _reason(self, request: Request) -> str:
        view = self.view
        if reason := view.never_fits(request, (Tier.GPU, Tier.CPU)):
            return reason
        return (
            f"needs {self._staged(request)} blocks of GPU memory in transit, "
            f"the gpu pool has {view.pools[Tier.GPU].total} layer-blocks"
        )

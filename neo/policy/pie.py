"""``pie``: performance-transparent swapping with adaptive expansion, after Pie (arXiv 2411.09317).

The paper's, as far as its abstract tells: layers run in a known order, so the KV of some of them can live on
the host and be fetched ahead of its use while other layers compute; that is invisible as long as moving takes
no longer than computing; the share on the host grows and shrinks so that it is as large as is useful.

Ours, a reconstruction (the paper's own rule was not at hand): *levels*. At level h every decode has the same
h of L layers on the host, evenly spread (``neo.policy.pie_layers``), and streams them through a ring of r
buffers, so that a KV block takes L - h + r layer-blocks of GPU memory instead of L. Per step:

1. Everything as in ``gpu-only``: all decodes, then prefill, the newest preempted when room runs out.
2. *Expand* when memory is short (requests wait for it, or decodes will soon find no block), to the next
   level, if the cost model says that a decode step with memory full hides its transfers. Prompts are
   computed on the GPU; their host layers leave behind the first decode steps.
3. *Contract* when transfers stall the present step, or when all would fit at the next lower level with some
   room to spare (hysteresis).

Moves take at most half of the link's idle time of a step. The level is not kept anywhere: it is where the
requests' layers are. Observed times enter by the cost model, which a calibrated one corrects.
While nobody is on the host and nothing is to go there, the plan is that of ``gpu-only``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from neo.core.plan import StepPlan
from neo.core.view import SystemView
from neo.cost.interface import CostModel
from neo.policy.checks import in_range
from neo.policy.gpu_only import GpuOnly, GpuOnlyOptions
from neo.policy.pie_draft import Draft
from neo.policy.pie_hiding import Hiding


@dataclass(frozen=True, slots=True)
class PieOptions:
    """Options of ``pie``."""

    prefill: Literal["chunked", "whole"] = field(
        default="chunked", metadata={"help": "chunked, or whole prompts"}
    )
    token_budget: int = field(default=2048, metadata={"help": "tokens of a chunked step"})
    watermark: float = field(default=0.01, metadata={"help": "share of a tier's blocks kept free for growth"})
    ring: int = field(default=2, metadata={"help": "GPU buffers of one layer's KV each that streams rotate"})
    expand_stall: float = field(
        default=0.01,
        metadata={"help": "expand while a decode step gets at most this share longer, memory full"},
    )
    contract_stall: float = field(
        default=0.1,
        metadata={"help": "contract when a decode step is this share longer than its computation"},
    )
    hysteresis: float = field(
        default=0.1, metadata={"help": "share of GPU blocks that must stay free at a lower level to go there"}
    )
    min_gain: float = field(
        default=0.2, metadata={"help": "do not expand where what can be hidden gives less memory than this"}
    )

    def __post_init__(self) -> None:
        in_range("token_budget", self.token_budget, 1)
        in_range("watermark", self.watermark, 0, 0.9)
        in_range("ring", self.ring, 1, 64)
        in_range("expand_stall", self.expand_stall, 0)
        in_range("contract_stall", self.contract_stall, self.expand_stall)
        in_range("hysteresis", self.hysteresis, 0, 0.9)
        in_range("min_gain", self.min_gain, 0)


class Pie:
    """See the module's description."""

    Options = PieOptions

    def __init__(self, options: PieOptions | None = None) -> None:
        self.options = options or PieOptions()
        o = self.options
        self._gpu_only = GpuOnly(GpuOnlyOptions(o.prefill, o.token_budget, o.watermark))
        self._hiding: Hiding | None = None

    def plan(self, view: SystemView, cost: CostModel) -> StepPlan:
        """Decide the next step."""
        if self._hiding is None or not self._hiding.times.fits(cost):
            o = self.options
            self._hiding = Hiding(view, cost, o.ring, o.expand_stall, o.min_gain)
        if not view.split_decodes:
            return self._resident(view, self._hiding)
        draft = Draft(view, self._hiding, self.options)
        tokens = self._gpu_only.step_tokens(view)
        draft.place_running(tokens)
        if not (draft.evict or draft.moves):
            draft.admit(self._gpu_only)
            draft.change_level(tokens)
        return draft.plan()

    def _resident(self, view: SystemView, hiding: Hiding) -> StepPlan:
        """The plan of ``gpu-only``; and behind it, the first layers to the host if that is due."""
        base = self._gpu_only.plan(view, hiding.times.cost)
        decodes = view.gpu_decodes
        if base.evict or not decodes or not hiding.highest(len(decodes)):
            return base
        draft = Draft(view, hiding, self.options)
        tokens = self._gpu_only.step_tokens(view)
        draft.place_running(tokens)
        draft.chunks = [c for b in base.batches for c in b.prefill]
        admitted = [c for c in draft.chunks if c.request.computed == 0]
        draft.gpu_free -= sum([view.layer_blocks(c.length) for c in admitted])
        draft.blocked = (
            len(view.waiting) > len(admitted) + len(base.reject)
            and len(decodes) + len(draft.chunks) < view.limits.max_seqs
        )
        draft.change_level(tokens)
        if draft.moves:
            return replace(base, moves=tuple(draft.moves), repeat=0, why=f"{base.why}, cpu gets layers")
        if base.repeat:
            growth = len(decodes) * view.model.layers
            blocks = -draft.shortage(tokens) // growth
            return replace(base, repeat=max(0, (blocks - 1) * view.limits.block_size))
        return base

"""``neo``: partial offload, asymmetric pipelining, load-aware scheduling (NEO, MLSys 2025, section 3.2).

Each step, the six steps of the paper:

1. two empty sub-batches;
2. every GPU-resident decode into sub-batch 0; swap out (newest first) until the GPU holds all new KV, or
   swap in (oldest first) if there is room; never both;
3. prefills, first come first served, into sub-batch 0; their KV stays on the GPU if it fits, else goes to
   the CPU, and so does that of all behind it;
4. CPU-resident decodes: each into the sub-batch with more CPU slack, while the CPU stays hidden;
5. CPU-bound prefills out of sub-batch 0 again while the CPU stays hidden, newest first;
6. the GPU-only alternative (sub-batch 0 without CPU decodes) if it is estimated to do more per second.

Step 3 sends no more requests to the CPU than shorten the mean time in the system (``HostTarget``), and step
6 runs CPU decodes only if they do: below saturation a larger batch delays those who run by more than it
spares those who wait. KV on its way to the CPU takes free GPU blocks for the step, not a layer set aside.

In step 6 the paper minimises T / batch size: a request that yields a token counts one, a whole prompt as
much as a decode (``worth=requests``). If every token of a prompt counts (``tokens``), CPU decodes never pay
under a heavy prefill load. By default (``time``) a token weighs the GPU time it would take without offload.

Where nothing lives on the CPU and the GPU has room for all that comes, the plan is that of ``gpu-only``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from neo.core.plan import StepPlan
from neo.core.request import Tier
from neo.core.view import SystemView
from neo.cost.interface import CostModel
from neo.policy.checks import in_range
from neo.policy.estimate import StageTimes
from neo.policy.gpu_only import GpuOnly, GpuOnlyOptions
from neo.policy.host_target import HostTarget
from neo.policy.neo_choice import choose
from neo.policy.neo_draft import Draft
from neo.policy.neo_relay import relayed
from neo.policy.relay_target import Goal, RelayTarget


@dataclass(frozen=True, slots=True)
class NeoOptions:
    """Options of ``neo``; those marked [artifact] are choices of the published code, not of the paper."""

    prefill: Literal["chunked", "whole"] = field(
        default="chunked", metadata={"help": "chunked, or whole prompts as published"}
    )
    token_budget: int = field(
        default=2048, metadata={"help": "tokens of prefill and GPU decodes in a chunked step"}
    )
    watermark: float = field(
        default=0.01,
        metadata={"help": "share of a tier's blocks kept free for growth when a request is admitted"},
    )
    swap_in_limit: float = field(
        default=0.99, metadata={"help": "swap in only up to this share of the GPU blocks [artifact: 0.95]"}
    )
    min_linear_tokens: int = field(
        default=128,
        metadata={"help": "drop no CPU-bound prefill below this many tokens in sub-batch 0 [artifact]"},
    )
    worth: Literal["time", "requests", "tokens"] = field(
        default="time",
        metadata={
            "help": "what a step is judged by: the GPU time its tokens would take without offload, the "
            "requests that get a token, as published, or all its tokens"
        },
    )
    eager: bool = field(
        default=False,
        metadata={
            "help": "prefill to the CPU whenever the GPU is full, through a staging layer set aside for it, "
            "as published, not only when that shortens the mean time in the system"
        },
    )
    skip_longer: bool = field(
        default=True, metadata={"help": "once a CPU decode is skipped, skip all at least as long [artifact]"}
    )
    cpu_launch_s: float = field(
        default=0.0,
        metadata={"help": "constant added to the estimated CPU time per layer [artifact: 0.0008]"},
    )
    patience_s: float = field(
        default=10.0,
        metadata={
            "help": "the oldest CPU request runs, hidden or not, and relayed ones go on beside prompts, once "
            "one has waited this long for a token"
        },
    )
    relay: bool = field(
        default=True,
        metadata={
            "help": "relay CPU decodes, a layer a step beside one pass over the weights, where that is "
            "estimated to serve more requests than two sub-batches and to make them wait no longer; not with "
            "prefill=whole or eager=true"
        },
    )
    faithful: bool = field(
        default=False,
        metadata={
            "help": "prefill=whole worth=requests eager=true patience_s=1e9 swap_in_limit=0.95 relay=false, "
            "each unless given beside it"
        },
    )

    # Applied where options are read (neo.policy.registry): only there it is known which were given.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "faithful": {
            "prefill": "whole",
            "worth": "requests",
            "eager": True,
            "patience_s": 1e9,
            "swap_in_limit": 0.95,
            "relay": False,
        }
    }

    def __post_init__(self) -> None:
        if self.faithful and not any(getattr(self, k) == v for k, v in self.PRESETS["faithful"].items()):
            raise ValueError("faithful=true, but no option that it stands for is as published")
        in_range("token_budget", self.token_budget, 1)
        in_range("watermark", self.watermark, 0, 0.9)
        in_range("swap_in_limit", self.swap_in_limit, 0.01, 1)
        in_range("min_linear_tokens", self.min_linear_tokens, 0)
        in_range("cpu_launch_s", self.cpu_launch_s, 0)
        in_range("patience_s", self.patience_s, 0)


class Neo:
    """See the module's description."""

    Options = NeoOptions

    def __init__(self, options: NeoOptions | None = None) -> None:
        self.options = options or NeoOptions()
        o = self.options
        self._gpu_only = GpuOnly(GpuOnlyOptions(o.prefill, o.token_budget, o.watermark))
        self.relays = o.relay and o.prefill == "chunked" and not o.eager
        self.staging_layers = int(o.eager)  # else KV on its way to the CPU takes blocks when it needs them
        self._times: StageTimes | None = None
        self._target: HostTarget | None = None
        self._relay: RelayTarget | None = None

    def plan(self, view: SystemView, cost: CostModel) -> StepPlan:
        """Decide the next step."""
        if self._times is None or self._target is None or not self._times.fits(cost):
            self._times = StageTimes(cost, view.model, self.options.cpu_launch_s)
            self._target = HostTarget(self._times)
            self._relay = RelayTarget(self._times, self._target)
        if not view.cpu_decodes and not any(r.tier is Tier.CPU for r in view.prefilling):
            plan = self._gpu_only.plan(view, cost)
            if not plan.evict and (not view.waiting or self._admits_all(view, plan)):
                return plan
        goal = self._goal(view)
        draft = Draft(view, self._times, self._target, self.options, goal)
        draft.place_gpu_decodes()
        draft.place_prefills()
        if goal is not None:
            return relayed(draft)
        draft.place_cpu_decodes()
        draft.drop_prefills()
        return choose(draft)

    def _goal(self, view: SystemView) -> Goal | None:
        """What to aim at where CPU decodes are to be relayed; None where two sub-batches do better."""
        if not view.limits.relay_rows:
            return None
        goal = None
        if self.relays and self._relay is not None:
            goal = self._relay.look(view, min(self.options.token_budget, view.limits.max_batch_tokens))
        if goal is None and view.relaying:
            return Goal(0, 0)  # tokens that were begun go on to their end
        return goal

    @staticmethod
    def _admits_all(view: SystemView, plan: StepPlan) -> bool:
        """Whether it is not memory that keeps requests waiting: all are served, or the budget is full."""
        chunks = [c for b in plan.batches for c in b.prefill]
        admitted = sum([c.request.computed == 0 for c in chunks])
        return admitted + len(plan.reject) == len(view.waiting) or bool(
            chunks and chunks[-1].length < chunks[-1].request.remaining_prefill
        )

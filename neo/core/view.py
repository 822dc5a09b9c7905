"""SystemView: what a policy may look at. Read-only by contract, and cheap: no queue is copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from neo.core.blocks import BlockPool, blocks_for
from neo.core.errors import InputError
from neo.core.plan import StepPlan
from neo.core.request import Request, Tier
from neo.core.specs import HardwareSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets of one step.

    ``max_batch_tokens`` is the activation budget: memory for that many rows of dense work is set aside.
    """

    block_size: int = 16
    max_seqs: int = 256
    max_batch_tokens: int = 8192
    max_preemptions: int = 10_000  # of one request; a policy must not preempt it again beyond this
    relay_rows: int = 16  # rows that relayed decodes may add to a layer

    def __post_init__(self) -> None:
        for name in ("block_size", "max_seqs", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"limits: {name} must be at least 1, got {getattr(self, name)}")
        if self.relay_rows < 0:
            raise InputError(f"limits: relay_rows must be at least 0, got {self.relay_rows}")


class SystemView:
    """The state a policy plans from.

    Attributes:
        now: seconds on the driver's clock.
        requests: every live request by id.
        waiting: requests without KV, in the order in which they should be served (preempted ones first).
        prefilling: requests whose known tokens have KV in part, by admission.
        gpu_decodes, cpu_decodes, split_decodes: decoding requests by where their KV lives, by admission.
        relaying: how many of the decodes on the CPU are within a relayed token, at some layer.
        pools: block accounting of both tiers.
        in_flight: the plan that is running now, if this one is planned ahead.
    """

    __slots__ = (
        "cpu_decodes",
        "gpu_decodes",
        "hardware",
        "in_flight",
        "limits",
        "model",
        "now",
        "pools",
        "prefilling",
        "relaying",
        "requests",
        "split_decodes",
        "waiting",
    )

    def __init__(
        self,
        model: ModelSpec,
        hardware: HardwareSpec,
        limits: Limits,
        pools: Mapping[Tier, BlockPool],
        requests: Mapping[str, Request],
        waiting: Collection[Request],
        prefilling: Collection[Request],
    ) -> None:
        self.now = 0.0
        self.model = model
        self.hardware = hardware
        self.limits = limits
        self.pools = pools
        self.requests = requests
        self.waiting = waiting
        self.prefilling = prefilling
        self.gpu_decodes: tuple[Request, ...] = ()
        self.cpu_decodes: tuple[Request, ...] = ()
        self.split_decodes: tuple[Request, ...] = ()
        self.relaying = 0
        self.in_flight: StepPlan | None = None

    @property
    def running(self) -> tuple[Request, ...]:
        """All requests that hold KV."""
        return (*self.prefilling, *self.gpu_decodes, *self.cpu_decodes, *self.split_decodes)

    def layer_blocks(self, tokens: int) -> int:
        """Layer-blocks that ``tokens`` tokens of KV take when all layers are on one tier."""
        return blocks_for(tokens, self.limits.block_size) * self.model.layers

    def growth(self, request: Request, tokens: int = 1) -> int:
        """Further layer-blocks, over all tiers, when ``tokens`` more tokens of ``request`` get KV."""
        size = self.limits.block_size
        have = -(-request.computed // size)
        return (-(-(request.computed + tokens) // size) - have) * self.model.layers

    def never_fits(self, request: Request, tiers: Collection[Tier] = (Tier.GPU,)) -> str | None:
        """Why ``request`` can never be served with its KV on any one of ``tiers``; None if it can."""
        need = blocks_for(request.peak_kv_tokens, self.limits.block_size)
        best = max(tiers, key=lambda t: self.pools[t].blocks)
        have = self.pools[best].blocks
        if need <= have:
            return None
        names = " or ".join(tiers)
        return (
            f"{need} KV blocks for {request.prompt_tokens} prompt and {request.max_tokens} output tokens, "
            f"but the {names} pool has {have} ({have * self.limits.block_size} tokens)"
        )

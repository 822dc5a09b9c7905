"""StepPlan: what a policy decides for one step. Frozen; a plan refers to requests, it never changes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from neo.core.request import Request, Tier


class MoveOrder(StrEnum):
    """When a layer's copy runs, relative to that layer's computation."""

    BEFORE = (
        "before"  # layer l's copy ends before this step uses layer l: its source is free, its target readable
    )
    AFTER = "after"  # layer l's copy starts after layer l's attention; this step's new token moves along


class EvictMode(StrEnum):
    """How a request loses its place in GPU memory."""

    RECOMPUTE = "recompute"  # drop its KV, back to the front of the queue; known tokens are prefilled again
    SWAP = "swap"  # its KV leaves for the CPU before the step, it has no role in it


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute known tokens ``start .. start+length`` of a request; their KV goes to (or stays on) ``dst``.

    For ``dst`` CPU the KV leaves the GPU layer by layer behind the layer's PRE, through the staging
    blocks; a chunk with ``start`` > 0 then has its prefix streamed back for its attention.
    """

    request: Request
    start: int
    length: int
    dst: Tier = Tier.GPU


@dataclass(frozen=True, slots=True)
class SubBatch:
    """Requests that go through the layers together.

    ``relay_decode`` requests do not: each is at a layer of its own, and every step takes it to the next one.
    With L layers a token takes L + 1 steps. The first embeds it and does layer 0's PRE; every further one
    takes up a layer behind its CPU attention, which ran beside this step's other layers, and does its POST
    and the next layer's PRE; the last one samples. The GPU reads its weights for them once, with everybody's.
    """

    prefill: tuple[PrefillChunk, ...] = ()
    gpu_decode: tuple[Request, ...] = ()
    cpu_decode: tuple[Request, ...] = ()
    stream_decode: tuple[Request, ...] = ()  # GPU attention; host layers' KV is streamed ahead of use
    relay_decode: tuple[Request, ...] = ()  # CPU attention between two layers, one layer a step

    @property
    def decodes(self) -> tuple[Request, ...]:
        """Decodes that go through all layers in this step."""
        return self.gpu_decode + self.cpu_decode + self.stream_decode

    @property
    def tokens(self) -> int:
        """Rows of its dense work."""
        decodes = len(self.gpu_decode) + len(self.cpu_decode) + len(self.stream_decode)
        if self.relay_decode:
            decodes += relay_rows(self.relay_decode)
        return decodes + sum(c.length for c in self.prefill) if self.prefill else decodes

    @property
    def sequences(self) -> int:
        """Requests in it that go through all layers."""
        return len(self.prefill) + len(self.gpu_decode) + len(self.cpu_decode) + len(self.stream_decode)


def relay_rows(requests: Iterable[Request]) -> int:
    """Rows that relayed decodes add to each layer: as many as there are in the fullest one."""
    return max(Counter([r.relay_layers for r in requests]).values(), default=0)


@dataclass(frozen=True, slots=True)
class KVMove:
    """Copy a request's KV of the layers ``start .. stop`` (default: all) to the tier ``dst``.

    Target blocks are taken when the step starts; source blocks are freed when each copy completes. Layers
    that are no range take several moves, of the same tier and order.
    """

    request: Request
    dst: Tier
    layers: tuple[int, int] | None = None
    order: MoveOrder = MoveOrder.BEFORE


@dataclass(frozen=True, slots=True)
class Evict:
    """Preempt a request."""

    request: Request
    mode: EvictMode = EvictMode.RECOMPUTE


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse a request that can never fit; ``reason`` holds the numbers."""

    request: Request
    reason: str


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: 0 batches (idle), 1 (sequential) or 2 (asymmetric pipeline), and what moves beside them.

    ``repeat``: for how many further steps the same decision holds, if nobody arrives or ends and the pools
    can give every block that is needed. A promise that only a decode-only plan without moves may make.

    ``ring``: staging buffers for KV on its way in this step, taken from free GPU blocks while it runs (at
    most one per layer). 0: those that the policy's ``staging_layers`` set aside for good.
    """

    batches: tuple[SubBatch, ...] = ()
    moves: tuple[KVMove, ...] = ()
    evict: tuple[Evict, ...] = ()
    reject: tuple[Reject, ...] = ()
    why: str = ""
    repeat: int = 0
    ring: int = 0

    @property
    def idle(self) -> bool:
        """Whether the plan does nothing at all."""
        return not (self.batches or self.moves or self.evict or self.reject)

    def host_layers_at_use(self, layers: int) -> dict[str, int]:
        """By request id, for requests with a move ordered before use: bit mask of layers then on the CPU."""
        masks: dict[str, int] = {}
        for m in self.moves:
            if m.order is MoveOrder.BEFORE:
                start, stop = m.layers or (0, layers)
                moved = ((1 << (stop - start)) - 1) << start
                host = masks.get(m.request.id, m.request.host_layers)
                masks[m.request.id] = host | moved if m.dst is Tier.CPU else host & ~moved
        return masks


IDLE = StepPlan(why="idle")

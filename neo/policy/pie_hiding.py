"""Whether transfers of ``pie`` hide behind computation: Pie's condition, from the cost model."""

from __future__ import annotations

from typing import NamedTuple

from neo.core.graph import OpKind, Work
from neo.core.request import Tier
from neo.core.templates import LOOK_AHEAD
from neo.core.view import SystemView
from neo.cost.interface import CostModel
from neo.policy.estimate import StageTimes
from neo.policy.pie_layers import levels, masks

_COPY_BYTES = 1 << 26  # a copy long enough that its start-up does not matter


class Decode(NamedTuple):
    """A decode step's times in one layer, in seconds: what computes, and one layer's KV on its way."""

    pre: float
    attention: float
    post: float
    stream: float

    @property
    def layer(self) -> float:
        """One layer without waiting."""
        return self.pre + self.attention + self.post


def seconds_streamed(step: Decode, mask: int, layers: int, ring: int) -> float:
    """Length of all layers when those of ``mask`` are streamed through ``ring`` buffers.

    The recurrence of the StepGraph: a transfer starts when the one before it has ended and its buffer has
    been read, by the streamed layer ``ring`` before; attention waits for its layer's transfer.
    """
    gpu = link = 0.0
    read: list[float] = []  # end of each layer's attention
    streamed: list[int] = []
    furthest = max(LOOK_AHEAD, ring)
    for layer in range(layers):
        ready = gpu + step.pre
        if mask >> layer & 1:
            last = max(layer - furthest, streamed[-ring] if len(streamed) >= ring else -1)
            if last >= 0 and read[last] > link:
                link = read[last]
            streamed.append(layer)
            link += step.stream
            if link > ready:
                ready = link
        read.append(ready + step.attention)
        gpu = read[layer] + step.post
    return gpu


class Hiding:
    """Which levels the link can hide. Valid for one cost model and one ``version`` of it.

    Pools and limits of a system do not change, so they are read from the view once.
    """

    def __init__(self, view: SystemView, cost: CostModel, ring: int, stall: float, gain: float) -> None:
        self.times = StageTimes(cost, view.model)
        self.ring = ring
        self._stall = stall
        self._gain = gain
        self._layers = view.model.layers
        self._tokens_bytes = view.model.kv_bytes_per_token_layer
        self._block = view.limits.block_size
        self._pools = (view.pools[Tier.GPU].total, view.pools[Tier.CPU].total)
        self._pre: dict[int, float] = {}
        self._highest: dict[int, int] = {}
        self._rising = self._levels_that_give_more()
        copy = float(cost.seconds(OpKind.SWAP_OUT, Work(bytes=_COPY_BYTES, beside_bytes=_COPY_BYTES)))
        self.copy_byte_s = copy / _COPY_BYTES

    def decode(self, sequences: int, blocks: int) -> Decode:
        """A decode step of that many sequences with that many KV blocks in all."""
        pre = self._pre.get(sequences)
        if pre is None:
            pre = self._pre[sequences] = float(self.times.cost.seconds(OpKind.PRE, Work(sequences)))
        tokens = blocks * self._block
        attention = self.times.gpu_attention((), sequences, tokens)
        post = self.times.linear(sequences) - pre
        return Decode(pre, attention, post, self.stream(tokens))

    def stream(self, tokens: int) -> float:
        """Seconds that one layer's KV of so many tokens takes to the GPU."""
        return float(self.times.cost.seconds(OpKind.STREAM, Work(bytes=tokens * self._tokens_bytes)))

    def hidden(self, step: Decode, level: int, stall: float) -> bool:
        """Whether a level makes a step at most ``stall`` (a share) longer."""
        if level == 0:
            return True
        most = (1.0 + stall) * self._layers * step.layer
        if level * step.stream > most:
            return False
        return seconds_streamed(step, masks(self._layers)[level], self._layers, self.ring) <= most

    def room(self, level: int) -> int:
        """KV blocks of running requests that fit at a level, ring included, if all are at it."""
        gpu, cpu = self._pools
        if level == 0:
            return gpu // self._layers
        return min(gpu // (self._layers - level + self.ring), cpu // level)

    def highest(self, sequences: int) -> int:
        """The highest level that so many sequences hide when they fill the memory it gives them; or 0.

        Judged with memory full, and without the prefill that will often run beside it: what is hidden then
        stays hidden as KV grows. 0 also where all that can be hidden frees too little to matter.
        """
        known = self._highest.get(sequences)
        if known is None:
            rising = self._rising
            low, high = 0, len(rising)  # what is hidden at a level is at the lower ones, that stream less
            while low < high:
                middle = (low + high) // 2
                level = rising[middle]
                if self.hidden(self.decode(sequences, self.room(level)), level, self._stall):
                    low = middle + 1
                else:
                    high = middle
            known = rising[low - 1] if low else 0
            if self.room(known) < (1.0 + self._gain) * self.room(0):
                known = 0
            self._highest[sequences] = known
        return known

    def _levels_that_give_more(self) -> list[int]:
        """Levels above 0 up to where host memory is the limit."""
        found, most = [], 0
        for level in levels(self._layers, self.ring)[1:]:
            room = self.room(level)
            if room <= most:
                break
            found.append(level)
            most = room
        return found

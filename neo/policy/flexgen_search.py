"""The search of ``flexgen``: how many requests a block has, where their KV is, where attention runs.

As in FlexGen (arXiv 2303.06865, section 4.3): block sizes are enumerated, and for each a linear program finds
the share of KV on each tier that makes a layer fastest within the memory of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from neo.core.blocks import blocks_for
from neo.core.graph import OpKind, Work
from neo.core.request import Tier
from neo.core.specs import ModelSpec
from neo.core.view import SystemView
from neo.cost.interface import CostModel
from neo.policy.estimate import StageTimes

Attention = Literal["cpu", "stream"]

_GROWTH = 1.15  # ratio of neighbouring block sizes tried: finer steps change the result by less than that


class Placement(NamedTuple):
    """The result: the policy's whole decision, fixed for good.

    ``host`` is the share of a block's KV on the host, ``attention`` where that share's attention runs,
    ``seconds`` the estimated time of a whole block, prefill included.
    """

    requests: int
    host: float
    attention: Attention
    seconds: float


class _Identity:
    """A cost model as a key: models need not be hashable."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.cost is self.cost

    def __hash__(self) -> int:
        return id(self.cost)


@dataclass(frozen=True, slots=True)
class Problem:
    """What the search depends on. Tokens per request are those planned for; blocks are layer-blocks."""

    cost: _Identity
    model: ModelSpec
    prompt: int
    output: int
    block_size: int
    step_tokens: int
    most: int
    gpu_blocks: int
    cpu_blocks: int
    ring: int
    attention: Attention | None = None

    @classmethod
    def of(
        cls,
        view: SystemView,
        cost: CostModel,
        prompt: int,
        output: int,
        ring: int,
        attention: Attention | None,
    ) -> Problem:
        """The problem that a system and its cost model pose."""
        limits = view.limits
        return cls(
            _Identity(cost),
            view.model,
            prompt,
            output,
            limits.block_size,
            limits.max_batch_tokens,
            min(limits.max_seqs, limits.max_batch_tokens),
            view.pools[Tier.GPU].total,
            view.pools[Tier.CPU].total,
            ring,
            attention,
        )

    @property
    def request_blocks(self) -> int:
        """KV blocks of one request at its end."""
        return blocks_for(self.prompt + self.output - 1, self.block_size)


@lru_cache(maxsize=64)
def search(problem: Problem) -> Placement:
    """The placement with the most tokens per second; one request wholly on the GPU if nothing else fits."""
    block = _Block(problem)
    ways: tuple[Attention, ...] = ("cpu", "stream") if problem.attention is None else (problem.attention,)
    best = Placement(1, 0.0, ways[0], block.seconds(1, 0.0, ways[0]))
    for requests in _sizes(problem.most):
        for way in ways:
            host = block.best_share(requests, way)
            if host is None:
                continue
            found = Placement(requests, host, way, block.seconds(requests, host, way))
            if found.requests / found.seconds > best.requests / best.seconds:
                best = found
    return best


def _sizes(most: int) -> list[int]:
    sizes, size = [], 1
    while size < most:
        sizes.append(size)
        size = max(size + 1, int(size * _GROWTH))
    return [*sizes, most]


class _Block:
    """Times of a block of equal requests, in seconds."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.times = StageTimes(problem.cost.cost, problem.model)
        self.layers = problem.model.layers
        self.kv = problem.prompt + problem.output // 2  # tokens of a request, on average over its decoding

    def copy(self, kind: OpKind, tokens: int) -> float:
        """One layer's KV of so many tokens over the link."""
        size = tokens * self.p.model.kv_bytes_per_token_layer
        return float(self.p.cost.cost.seconds(kind, Work(bytes=size)))

    def attention(self, requests: int) -> float:
        return self.times.gpu_attention((), requests, requests * self.kv)

    def on_host(self, requests: int, way: Attention) -> float:
        """Attention of the requests on the host, or their KV's way to the GPU, in one layer."""
        if not requests:
            return 0.0
        if way == "cpu":
            return self.times.cpu_stage(requests, requests * self.kv)
        return self.copy(OpKind.STREAM, requests * self.kv)

    def best_share(self, requests: int, way: Attention) -> float | None:
        """The share on the host that makes a decode step's layer fastest; None if no share fits memory.

        Linear program over (share x, seconds t of a layer's attention): minimise t, where each tier's part
        takes no longer than t and fits its memory.
        """
        from scipy.optimize import linprog  # type: ignore[import-untyped]

        p, every = self.p, self.attention(requests)
        none = self.attention(0)
        first, last = self.on_host(1, way), self.on_host(requests, way)
        slope = (last - first) * requests / max(requests - 1, 1)  # affine through 1 and all requests
        kv = requests * p.request_blocks * self.layers
        if way == "cpu":  # the tiers' attention runs side by side
            gpu = ([-(every - none), -1.0], -every)
            host = ([slope, -1.0], slope / requests - first)
            staged = blocks_for(min(p.prompt, p.step_tokens), p.block_size)
            memory = ([-float(kv), 0.0], float(p.gpu_blocks - staged - kv))
        else:  # transfers run beside everything, and all attention on the GPU
            linear = self.times.linear(requests)
            gpu = ([0.0, -1.0], -every)
            host = ([slope, -1.0], slope / requests - first + linear)
            staged = p.ring * requests * p.request_blocks
            memory = ([float(staged - kv), 0.0], float(p.gpu_blocks - kv))
        rows = [gpu, host, memory, ([float(kv), 0.0], float(p.cpu_blocks))]
        # Seconds of a layer and thousands of blocks do not go well together in one program.
        rows = [(row, bound) if row[1] else ([row[0] / kv, 0.0], bound / kv) for row, bound in rows]
        unit = max(every, last, first)
        rows = [([row[0] / unit, row[1]], b / unit) if row[1] else (row, b) for row, b in rows]
        # Among equally fast shares, the smallest.
        result = linprog(
            [1e-6, 1.0],
            [r for r, _ in rows],
            [b for _, b in rows],
            bounds=[(0, 1), (0, None)],
            method="highs",
        )
        shares = [0.0] if kv <= p.gpu_blocks else []  # nothing on the host needs no staging either
        if result.status == 0:
            shares.append(float(result.x[0]))
        return min(shares, key=lambda share: self.seconds(requests, share, way), default=None)

    def seconds(self, requests: int, host: float, way: Attention) -> float:
        """Prefill and all decode steps of a block."""
        p, times = self.p, self.times
        away = round(requests * host)
        linear, attention = times.linear(requests), self.attention(requests - (away if way == "cpu" else 0))
        if way == "cpu":
            layer = linear + max(attention, self.on_host(away, way))
        else:
            layer = max(linear + attention, self.on_host(away, way))
        decode = self.layers * layer + times.around(requests, requests, requests)
        tokens = min(p.step_tokens, requests * p.prompt)
        chunks = ((0, p.prompt),) * max(1, tokens // p.prompt)
        spilled = self.copy(OpKind.SWAP_OUT, round(tokens * host)) if away else 0.0
        one = max(times.linear(tokens) + times.gpu_attention(chunks, 0, 0), spilled)
        prefill = self.layers * one + times.around(tokens, len(chunks), len(chunks))
        return prefill * requests * p.prompt / tokens + decode * (p.output - 1)

"""Books: where each request is, and who holds which blocks, as plans are applied and committed.

The mechanical half of the Scheduler: what a plan that has been checked does to queues and pools when it is
applied, and what its step's end does. Nothing is decided here, and nothing is checked again.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from operator import attrgetter
from types import MappingProxyType

from neo.core.blocks import BlockPool
from neo.core.growth import new_layer_blocks
from neo.core.plan import EvictMode, KVMove, MoveOrder, StepPlan
from neo.core.request import FinishReason, Request, State, Tier
from neo.core.specs import HardwareSpec, ModelSpec
from neo.core.validate import leaves_whole, moved_blocks
from neo.core.view import Limits, SystemView

_ADMISSION = attrgetter("sequence")


class Books:
    """Queues, pools, and the view that policies get of them.

    Attributes:
        requests: every live request by id.
        view: what the policy sees (always current).
        ended: requests that ended since the driver last emptied this list.
        admitted: requests that ever came.
        source_blocks: sources of copies (tier, request, layer-blocks) that are freed when the step ends.
    """

    def __init__(
        self, model: ModelSpec, hardware: HardwareSpec, limits: Limits, gpu: BlockPool, cpu: BlockPool
    ) -> None:
        self.requests: dict[str, Request] = {}
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._prefilling: dict[str, Request] = {}
        self._decodes: dict[Tier | None, list[Request]] = {Tier.GPU: [], Tier.CPU: [], None: []}
        self.view = SystemView(
            model,
            hardware,
            limits,
            MappingProxyType({Tier.GPU: gpu, Tier.CPU: cpu}),
            self.requests,
            self._waiting.values(),
            self._prefilling.values(),
        )
        self.ended: list[Request] = []
        self.admitted = 0
        self._making_room: list[tuple[Tier, str, int]] = []  # the same, freed before the step's new KV
        self.source_blocks: list[tuple[Tier, str, int]] = []
        self._all_layers = (1 << model.layers) - 1

    def admit(self, request: Request) -> None:
        """A new request joins the end of the queue."""
        request.sequence = self.admitted
        self.admitted += 1
        self.requests[request.id] = request
        self._waiting[request.id] = request

    def apply(self, plan: StepPlan, now: float) -> None:
        """Take what a checked plan needs, and move its requests to where it has them."""
        for x in plan.reject:
            x.request.detail = x.reason
            self.end(x.request, State.REJECTED, FinishReason.REJECTED, now)
        for e in plan.evict:
            e.request.preemptions += 1
            if e.mode is EvictMode.RECOMPUTE:
                self._recompute(e.request)
        for e in plan.evict:  # behind those that free blocks without a copy, whatever order the plan has
            if e.mode is EvictMode.SWAP:
                self._start_move(KVMove(e.request, Tier.CPU))
        for m in plan.moves:
            self._start_move(m)
        self._release_sources(self._making_room)  # the graph orders a layer's new KV behind its copies
        for batch in plan.batches:
            for c in batch.prefill:
                self._start_chunk(c.request, c.length, c.dst, now)
        for tier, owner, count in new_layer_blocks(self.view, plan):
            self.view.pools[tier].take(owner, count)

    def _start_chunk(self, request: Request, length: int, dst: Tier, now: float) -> None:
        self.view.pools[dst].take(request.id, self.view.growth(request, length))
        if request.state is State.WAITING:
            del self._waiting[request.id]
            self._prefilling[request.id] = request
            request.state = State.PREFILL
            request.tier = dst
            request.host_layers = self._all_layers if dst is Tier.CPU else 0
            if request.scheduled_s is None:
                request.scheduled_s = now

    # -- KV that moves ------------------------------------------------------------------------------------

    def _recompute(self, request: Request) -> None:
        """Drop a request's KV and put it back at the front of the queue."""
        self._leave_group(request)
        for pool in self.view.pools.values():
            pool.release(request.id)
        self._end_relay(request)
        request.state = State.WAITING
        request.computed = 0
        request.tier = None
        request.host_layers = 0
        self._waiting[request.id] = request
        self._waiting.move_to_end(request.id, last=False)

    def _start_move(self, move: KVMove) -> None:
        """Take the target blocks; a move ordered before use also changes where the request lives."""
        view = self.view
        src = Tier.GPU if move.dst is Tier.CPU else Tier.CPU
        after = move.order is MoveOrder.AFTER
        start, stop = move.layers or (0, view.model.layers)
        mask = ((1 << (stop - start)) - 1) << start
        if not after:
            mask &= ~move.request.host_layers if move.dst is Tier.CPU else move.request.host_layers
        blocks = moved_blocks(view, move, after) // (stop - start) * mask.bit_count()
        view.pools[move.dst].take(move.request.id, blocks)
        if not after:
            early = leaves_whole(move, view.model.layers)
            (self._making_room if early else self.source_blocks).append((src, move.request.id, blocks))
            self._relocate(move.request, mask, move.dst)

    def _relocate(self, request: Request, mask: int, dst: Tier) -> None:
        decoding = request.state is State.DECODE
        if decoding:
            self._leave_group(request)
        host = request.host_layers | mask if dst is Tier.CPU else request.host_layers & ~mask
        request.host_layers = host
        request.tier = Tier.GPU if host == 0 else Tier.CPU if host == self._all_layers else None
        if decoding:
            self._join_group(request)

    def _release_sources(self, sources: list[tuple[Tier, str, int]]) -> None:
        for tier, owner, count in sources:
            self.view.pools[tier].release(owner, count)
        sources.clear()

    def complete_moves(self, plan: StepPlan) -> None:
        """Copies have arrived: their sources are free, and what moved behind its layer lives on the host."""
        self._release_sources(self.source_blocks)
        for m in plan.moves:
            if m.order is MoveOrder.AFTER:
                start, stop = m.layers or (0, self.view.model.layers)
                blocks = moved_blocks(self.view, m, False)
                self.view.pools[Tier.GPU].release(m.request.id, blocks)
                self._relocate(m.request, ((1 << (stop - start)) - 1) << start, Tier.CPU)

    # -- committing ---------------------------------------------------------------------------------------

    def commit_decodes(self, plan: StepPlan, steps: int) -> list[Request]:
        """Each decode has one more token a step; those at their length limit."""
        ended = []
        for batch in plan.batches:
            for r in batch.decodes:
                r.computed += steps
                r.generated += steps
                if r.generated >= r.max_tokens:
                    ended.append(r)
            for r in batch.cpu_decode:
                r.cpu_steps += steps
        return ended

    def commit_relay(self, plan: StepPlan) -> tuple[list[Request], list[Request]]:
        """Relayed decodes are a layer further; those that have one more token, and of these the last one."""
        yielding, ended = [], []
        for batch in plan.batches:
            for r in batch.relay_decode:
                if r.relay_layers == 0:
                    self.view.relaying += 1
                r.relay_layers += 1
                if r.relay_layers > self.view.model.layers:
                    self._end_relay(r)
                    r.computed += 1
                    r.generated += 1
                    r.cpu_steps += 1
                    yielding.append(r)
                    if r.generated >= r.max_tokens:
                        ended.append(r)
        return yielding, ended

    def commit_chunks(self, plan: StepPlan, yielding: list[Request]) -> list[Request]:
        """Chunks have their KV. Fills ``yielding`` with requests that get a token; those at their limit."""
        ended = []
        for batch in plan.batches:
            for c in batch.prefill:
                r = c.request
                r.computed += c.length
                if r.computed < r.known:
                    continue
                del self._prefilling[r.id]
                r.state = State.DECODE
                r.generated += 1
                yielding.append(r)
                self._join_group(r)
                if r.generated >= r.max_tokens:
                    ended.append(r)
        return ended

    def end(self, request: Request, state: State, reason: FinishReason, now: float) -> None:
        """A request leaves for good."""
        self.leave(request, state, reason)
        request.finish_s = now
        self.ended.append(request)

    def leave(self, request: Request, state: State, reason: FinishReason) -> None:
        """Take a request out of its queue and its blocks back; the driver is told with ``end``."""
        self._leave_group(request)
        self._end_relay(request)
        for pool in self.view.pools.values():
            pool.release(request.id)
        request.state = state
        request.finish_reason = reason
        request.tier = None
        request.host_layers = 0
        del self.requests[request.id]

    def _end_relay(self, request: Request) -> None:
        """A request that may be within a relayed token is so no more."""
        if request.relay_layers:
            request.relay_layers = 0
            self.view.relaying -= 1

    def _join_group(self, request: Request) -> None:
        group = self._decodes[request.tier]
        if group and group[-1].sequence > request.sequence:
            insort(group, request, key=_ADMISSION)
        else:
            group.append(request)
        self._publish(request.tier)

    def _leave_group(self, request: Request) -> None:
        if request.state is State.WAITING:
            del self._waiting[request.id]
        elif request.state is State.PREFILL:
            del self._prefilling[request.id]
        else:
            self._decodes[request.tier].remove(request)
            self._publish(request.tier)

    def _publish(self, tier: Tier | None) -> None:
        members = tuple(self._decodes[tier])
        if tier is Tier.GPU:
            self.view.gpu_decodes = members
        elif tier is Tier.CPU:
            self.view.cpu_decodes = members
        else:
            self.view.split_decodes = members

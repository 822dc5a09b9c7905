"""One step of ``pie`` in the making, while some requests have layers on the host; see ``neo.policy.pie``."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from neo.core.blocks import blocks_for
from neo.core.plan import Evict, KVMove, MoveOrder, PrefillChunk, Reject, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.core.view import SystemView
from neo.policy.gpu_only import GpuOnly
from neo.policy.pie_hiding import Decode, Hiding
from neo.policy.pie_layers import levels, masks, ranges

if TYPE_CHECKING:
    from neo.policy.pie import PieOptions

_LINK_SHARE = 0.5  # of a step's idle link time that changes of level may take: streams come first


def by_admission(request: Request) -> int:
    """Sort key."""
    return request.sequence


class Draft:
    """A step in the making: decodes, prefills, and the moves that change levels."""

    def __init__(self, view: SystemView, hiding: Hiding, options: PieOptions) -> None:
        self.view = view
        self.hiding = hiding
        self.options = options
        self.layers = view.model.layers
        self.size = view.limits.block_size
        self.ring = options.ring
        self.masks = masks(self.layers)
        self.gpu, self.cpu = view.pools[Tier.GPU], view.pools[Tier.CPU]
        self.decodes = sorted((*view.gpu_decodes, *view.split_decodes), key=by_admission)
        self.level = max([r.host_layers.bit_count() for r in view.split_decodes], default=0)
        self.chunks: list[PrefillChunk] = []
        self.moves: list[KVMove] = []
        self.evict: list[Evict] = []
        self.reject: list[Reject] = []
        self.resident: set[str] = set()  # streamed requests that come back to the GPU whole
        self.gpu_free, self.cpu_free = self.gpu.free, self.cpu.free
        self.blocked = False  # whether memory keeps somebody waiting
        self.stalled = False

    # -- what runs ----------------------------------------------------------------------------------------

    def place_running(self, step_tokens: int) -> None:
        """Every decode, and chunks of prefills under way; the newest are preempted where room is short."""
        for r in self.decodes:
            self._grow(r, 1)
        budget = step_tokens - len(self.decodes)
        slots = self.view.limits.max_seqs - len(self.decodes)
        for r in self.view.prefilling:
            if budget <= 0 or len(self.chunks) >= slots:
                break
            length = min(r.remaining_prefill, budget)
            self.chunks.append(PrefillChunk(r, r.computed, length))
            self.gpu_free -= self.view.growth(r, length)
            budget -= length
        while self.gpu_free < 0 or self.cpu_free < 0:
            if len(self.decodes) + len(self.chunks) == 1:
                self._bring_back(self.decodes[0])
                return
            self._preempt_newest()

    def _grow(self, request: Request, sign: int) -> None:
        """Take (or with sign -1 give back) what a decode needs in this step, its staging included."""
        host = request.host_layers.bit_count()
        blocks = request.computed // self.size + 1
        if request.computed % self.size == 0:
            self.gpu_free -= sign * (self.layers - host)
            self.cpu_free -= sign * host
        if host:
            self.gpu_free -= sign * self.ring * blocks

    def _preempt_newest(self) -> None:
        if self.chunks and (not self.decodes or self.chunks[-1].request.sequence > self.decodes[-1].sequence):
            chunk = self.chunks.pop()
            victim = chunk.request
            self.gpu_free += self.view.growth(victim, chunk.length)
        else:
            victim = self.decodes.pop()
            self._grow(victim, -1)
        self.evict.append(Evict(victim))
        self.gpu_free += self.gpu.held(victim.id)
        self.cpu_free += self.cpu.held(victim.id)

    def _bring_back(self, request: Request) -> None:
        """The last one left, and host memory cannot hold its layers: alone it fits on the GPU."""
        self._grow(request, -1)
        self._move(request, 0)

    # -- who is admitted ----------------------------------------------------------------------------------

    def admit(self, rules: GpuOnly) -> None:
        """Chunks of waiting requests, first come first served, by the rules of ``gpu-only``."""
        view, limits = self.view, self.view.limits
        budget = rules.step_tokens(view) - len(self.decodes) - sum([c.length for c in self.chunks])
        slots = limits.max_seqs - len(self.decodes) - len(self.chunks)
        under_way = sum([view.growth(c.request, c.request.remaining_prefill) for c in self.chunks])
        free = self.gpu_free - under_way + sum([view.growth(c.request, c.length) for c in self.chunks])
        spare = int(self.gpu.total * self.options.watermark)
        for r in view.waiting:
            if budget <= 0 or slots <= 0:
                return
            if reason := rules.unservable(view, r):
                self.reject.append(Reject(r, reason))
                continue
            length = r.remaining_prefill
            if self.options.prefill == "whole" and budget < length <= limits.max_batch_tokens:
                return
            blocks = view.layer_blocks(length)
            if blocks > free - (spare if self.decodes or self.chunks else 0):
                self.blocked = True
                return
            length = min(length, budget)
            self.chunks.append(PrefillChunk(r, 0, length))
            self.gpu_free -= view.layer_blocks(length)
            free -= blocks
            budget -= length
            slots -= 1

    # -- the level ----------------------------------------------------------------------------------------

    def time(self) -> Decode:
        """This step's decodes in one layer; ``stream`` is the KV of those at a level above 0."""
        blocks = [r.computed // self.size + 1 for r in self.decodes]
        streamed = [b for b, r in zip(blocks, self.decodes, strict=True) if r.host_layers]
        step = self.hiding.decode(len(self.decodes), sum(blocks))
        return step._replace(stream=self.hiding.stream(sum(streamed) * self.size))

    def change_level(self, step_tokens: int) -> None:
        """Move layers out while memory is short and the link hides it, or in when it is not."""
        if not self.decodes:
            return
        step = self.time()
        self.stalled = not self.hiding.hidden(step, self.level, self.options.contract_stall)
        idle = self.layers * step.layer - self.level * step.stream
        budget = max(0.0, _LINK_SHARE * idle) / self.hiding.copy_byte_s  # bytes
        budget /= self.size * self.view.model.kv_bytes_per_token_layer  # layer-blocks
        short = self.shortage(step_tokens)
        if short > 0:
            if not self.stalled:
                self._expand(short, int(budget))
        elif self.level and (self.stalled or self._roomy()):
            self._contract(int(budget))

    def shortage(self, step_tokens: int) -> int:
        """Layer-blocks missing for growth, and for as many waiting prompts as one step takes."""
        per_block = self.layers - self.level + (self.ring if self.level else 0)
        wanted = int(self.gpu.total * self.options.watermark) + len(self.decodes) * per_block
        if self.blocked:
            tokens = 0
            for r in islice(self.view.waiting, self.view.limits.max_seqs):
                tokens += r.known
                wanted += self.view.layer_blocks(r.known)
                if tokens >= step_tokens:
                    break
        return wanted - self.gpu_free

    def _next_level(self) -> int:
        """The next higher level, or the present one while some decodes are below it; hidden when full."""
        highest = self.hiding.highest(len(self.decodes))
        target = self.level
        if not target or all(r.host_layers.bit_count() >= target for r in self.decodes):
            target = max(target, self.ring) + 1
        return target if target <= highest else 0

    def _expand(self, short: int, budget: int) -> None:
        """Layers of the oldest decodes leave behind this step, until enough is free or the link is full."""
        target = self._next_level()
        if not target:
            return
        for r in self.decodes:
            host = r.host_layers.bit_count()
            if host >= target:
                continue
            blocks = blocks_for(r.computed + 1, self.size)
            moved = blocks * (target - host)
            if moved > self.cpu_free - int(self.cpu.total * self.options.watermark):
                break
            self._move(r, target, MoveOrder.AFTER)
            self.cpu_free -= moved
            short -= moved - (0 if host else self.ring * blocks)
            budget -= moved
            if short <= 0 or budget <= 0:
                break

    def _roomy(self) -> bool:
        """Whether all would fit at the next lower level, and some more."""
        lower = self._lower()
        if self.view.waiting or lower is None:
            return False
        blocks = sum([r.computed // self.size + 2 for r in self.decodes])
        need = blocks * (self.layers - lower + (self.ring if lower else 0))
        need += sum([self.view.layer_blocks(c.request.known) for c in self.chunks])
        return need <= (1.0 - self.options.hysteresis) * self.gpu.total

    def _lower(self) -> int | None:
        below = [level for level in levels(self.layers, self.ring) if level < self.level]
        return below[-1] if below else None

    def _contract(self, budget: int) -> None:
        """Layers of the oldest decodes come back to the GPU ahead of this step."""
        lower = self._lower()
        if lower is None:
            return
        room = self.gpu_free - int(self.gpu.total * self.options.watermark)
        for r in self.decodes:
            host = r.host_layers.bit_count()
            if host <= lower:
                continue
            moved = blocks_for(r.computed, self.size) * (host - lower)
            grown = 0 if r.computed % self.size else host - lower
            if moved + grown > room:
                break
            self._move(r, lower)
            room -= moved + grown
            budget -= moved
            if budget <= 0:
                break

    def _move(self, request: Request, level: int, order: MoveOrder = MoveOrder.BEFORE) -> None:
        """All layers in which a request differs from a level."""
        wanted = self.masks[level]
        change = request.host_layers ^ wanted
        dst = Tier.CPU if wanted & change else Tier.GPU
        self.moves += [KVMove(request, dst, part, order) for part in ranges(change)]
        if order is MoveOrder.BEFORE and not wanted:
            self.resident.add(request.id)

    # -- the plan -----------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """What has been decided."""
        on_gpu: list[Request] = []
        streamed: list[Request] = []
        for r in self.decodes:
            (on_gpu if not r.host_layers or r.id in self.resident else streamed).append(r)
        batch = SubBatch(tuple(self.chunks), tuple(on_gpu), stream_decode=tuple(streamed))
        reject = tuple(self.reject)
        if not batch.sequences:
            return StepPlan(reject=reject, why="nothing runs")
        why = f"{self.level} of {self.layers} layers on the host" if self.level else "resident"
        if self.evict:
            why += f", {len(self.evict)} preempted"
        elif self.moves:
            why += f", {self.moves[0].dst} gets more"
        elif self.stalled:
            why += ", transfers stall"
        ring = self.ring if streamed else 0
        return StepPlan((batch,), tuple(self.moves), tuple(self.evict), reject, why, ring=ring)

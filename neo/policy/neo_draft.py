"""The two sub-batches of a step of ``neo`` in the making: steps 2 to 5 of ``neo.policy.neo``."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from neo.core.blocks import blocks_for
from neo.core.growth import growing
from neo.core.plan import Evict, KVMove, PrefillChunk, Reject, relay_rows
from neo.core.request import Request, Tier
from neo.core.view import SystemView
from neo.policy.estimate import StageTimes
from neo.policy.host_target import HostTarget, Outlook

if TYPE_CHECKING:
    from neo.policy.neo import NeoOptions
    from neo.policy.relay_target import Goal


class Draft:
    """The two sub-batches of one step in the making.

    With a ``goal`` there is one sub-batch, and CPU decodes are relayed: see ``neo.policy.neo_relay``.
    """

    def __init__(
        self,
        view: SystemView,
        times: StageTimes,
        target: HostTarget,
        options: NeoOptions,
        goal: Goal | None = None,
    ) -> None:
        self.goal = goal
        self.view = view
        self.times = times
        self.target = target
        self.options = options
        self.gpu, self.cpu = view.pools[Tier.GPU], view.pools[Tier.CPU]
        self.layers = view.model.layers
        self.gpu_decodes: tuple[Request, ...] = view.gpu_decodes
        self.moves: list[KVMove] = []
        self.evict: list[Evict] = []
        self.reject: list[Reject] = []
        self.chunks: list[PrefillChunk] = []
        self.cpu_decodes: tuple[list[Request], list[Request]] = ([], [])
        self.cpu_kv = [0, 0]
        self.cpu_candidates: list[Request] = [r for r in view.cpu_decodes if not r.relay_layers]
        self.gpu_free = self.gpu.free
        # What CPU-bound prefills under way still need is theirs.
        under_way = [r for r in view.prefilling if r.tier is Tier.CPU]
        self.cpu_free = self.cpu.free - sum([view.growth(r, r.remaining_prefill) for r in under_way])
        # Blocks of one layer that KV may take on its way to the CPU: set aside for good, or free ones.
        self.ring = 0 if self.gpu.staging_layers else 1
        self.staging = self.gpu.staging_blocks
        self.attention_s = 0.0
        self.forced = self._starving()
        self.within = [r for r in view.cpu_decodes if r.relay_layers]  # whose relayed token goes on
        self.relayed_rows = relay_rows(self.within)

    # -- step 2 -------------------------------------------------------------------------------------------

    def place_gpu_decodes(self) -> None:
        """GPU decodes into sub-batch 0; swap out what no longer fits, or swap in what does."""
        under_way = [r for r in self.view.prefilling if r.tier is Tier.GPU]
        need = growing(self.view, self.gpu_decodes) * self.layers
        need += sum([self.view.growth(r, r.remaining_prefill) for r in under_way])
        if need > self.gpu_free:
            self._make_room(need, under_way)
        else:
            self.gpu_free -= need
            self._swap_in()

    def _make_room(self, need: int, under_way: list[Request]) -> None:
        """Newest decodes leave for the CPU; where that is full too, they (then prefills) are preempted."""
        stay = list(self.gpu_decodes)
        while need > self.gpu_free and len(stay) + len(under_way) > 1:
            if not stay:
                victim = under_way.pop()
                self.evict.append(Evict(victim))
                need -= self.view.growth(victim, victim.remaining_prefill)
                self.gpu_free += self.gpu.held(victim.id)
                continue
            victim = stay.pop()
            blocks = self.gpu.held(victim.id)
            growth = self.view.growth(victim)
            if blocks + growth <= self.cpu_free:
                self.moves.append(KVMove(victim, Tier.CPU))
                self.cpu_free -= blocks
                self.cpu_candidates.append(victim)
            else:
                self.evict.append(Evict(victim))
            self.gpu_free += blocks
            need -= growth
        self.cpu_candidates.sort(key=lambda r: r.sequence)
        self.gpu_decodes = tuple(stay)
        self.gpu_free -= need

    def _swap_in(self) -> None:
        room = self.gpu_free
        if self.gpu.used:
            room -= int((1.0 - self.options.swap_in_limit) * self.gpu.total)
        limits = self.view.limits
        slots = min(limits.max_seqs, limits.max_batch_tokens - self.relayed_rows) - len(self.gpu_decodes)
        slots = max(0, slots)
        count = 0
        for r in self.cpu_candidates[:slots]:
            blocks = self.view.layer_blocks(r.computed + 1)
            if blocks > room:
                break
            room -= blocks
            self.gpu_free -= blocks
            self.moves.append(KVMove(r, Tier.GPU))
            count += 1
        if count:
            self.gpu_decodes += tuple(self.cpu_candidates[:count])
            del self.cpu_candidates[:count]

    # -- step 3 -------------------------------------------------------------------------------------------

    def place_prefills(self) -> None:
        """Prefills under way, then waiting ones, into sub-batch 0."""
        view = self.view
        budget = self.prefill_budget()
        slots = view.limits.max_seqs - len(self.gpu_decodes)
        if self.ring:
            self.staging = self._free_at_start()
        gone = {e.request.id for e in self.evict}
        admits = not self.evict
        for r in view.prefilling:
            if r.id in gone:
                continue
            length = min(r.remaining_prefill, budget)
            if length <= 0 or slots <= 0:
                break
            if r.tier is Tier.CPU and not self._stage(r.computed + length):
                admits = admits and not self.ring  # blocks that become free are for this one
                continue
            self.chunks.append(PrefillChunk(r, r.computed, length, r.tier or Tier.GPU))
            budget -= length
            slots -= 1
        if admits:
            self._admit(budget, slots)

    def _free_at_start(self) -> int:
        """GPU layer-blocks free when the step begins: what moves out leaves too late for staging."""
        gone = sum([self.gpu.held(e.request.id) for e in self.evict])
        come = [self.view.layer_blocks(m.request.computed) for m in self.moves if m.dst is Tier.GPU]
        return max(0, self.gpu.free + gone - sum(come))

    def _stage(self, tokens: int) -> bool:
        """Take the staging room of a request's KV on its way to the CPU; False if there is too little."""
        blocks = blocks_for(tokens, self.view.limits.block_size)
        if blocks > self.staging or self.ring * blocks > self.gpu_free:
            return False
        self.staging -= blocks
        self.gpu_free -= self.ring * blocks
        return True

    def prefill_budget(self) -> int:
        """Tokens of prefill that a step may have: those left by decodes, with some for CPU decodes."""
        limits = self.view.limits
        decodes = len(self.gpu_decodes)
        beside = min(len(self.cpu_candidates), limits.max_batch_tokens // 2)
        if self.goal is not None:
            beside = max(beside, self.relayed_rows)
        room = limits.max_batch_tokens - decodes - beside
        if self.options.prefill == "whole":
            return room
        return max(0, min(room, self.options.token_budget - decodes))

    def rows_to_begin(self) -> int:
        """How many relayed decodes begin: in every step as many, so that layers are evenly filled."""
        if self.goal is None:
            return 0
        members = min(self.goal.served, len(self.within) + len(self.cpu_candidates))
        rows = min(-(-members // (self.layers + 1)), self.view.limits.relay_rows)
        return max(0, min(rows, members - len(self.within)))

    def _admit(self, budget: int, slots: int) -> None:
        view = self.view
        room: int | None = None  # how many more may go to the CPU; asked for when the first would
        # The GPU's next room is for a starving request, or, unless eager, for whoever is on the CPU already:
        # those who come after may not overtake.
        there = self.view.cpu_decodes if self.goal is None else self.cpu_candidates
        to_cpu = self.forced or bool(there and not self.options.eager)
        watermark = int(self.gpu.total * self.options.watermark)
        cpu_watermark = int(self.cpu.total * self.options.watermark)
        for r in view.waiting:
            if budget <= 0 or slots <= 0:
                break
            if reason := self._unservable(r):
                self.reject.append(Reject(r, reason))
                continue
            known = r.remaining_prefill
            whole = self.options.prefill == "whole" and known > budget
            if whole and (known <= view.limits.max_batch_tokens or self.chunks):
                break
            length = min(known, budget)
            blocks = view.layer_blocks(known)
            spare = watermark if self.chunks or self.gpu_decodes else 0
            if blocks <= self.gpu_free - spare and not to_cpu:
                self.gpu_free -= blocks
                dst = Tier.GPU
            else:
                room = self._host_room() if room is None else room
                if room <= 0:
                    break
                to_cpu = True
                spare = cpu_watermark if self.cpu_candidates or self.chunks else 0
                if blocks > self.cpu_free - spare or view.never_fits(r, (Tier.CPU,)):
                    break
                if not self._stage(length):
                    break
                self.cpu_free -= blocks
                room -= 1
                dst = Tier.CPU
            self.chunks.append(PrefillChunk(r, 0, length, dst))
            budget -= length
            slots -= 1

    def _host_room(self) -> int:
        """How many more requests may be sent to the CPU."""
        view = self.view
        if self.options.eager:
            return len(view.waiting)
        there = len(self.cpu_candidates) + sum([r.tier is Tier.CPU for r in view.prefilling])
        if self.goal is not None:
            return self.goal.hosted - there - view.relaying
        outlook = self.outlook
        return outlook.on_host() - there if outlook is not None else 0

    @cached_property
    def outlook(self) -> Outlook | None:
        """What to expect of the system as it is."""
        budget = self.view.limits.max_batch_tokens
        if self.options.prefill != "whole":
            budget = min(budget, self.options.token_budget)
        return self.target.look(self.view, budget)

    def _starving(self) -> bool:
        if not self.cpu_candidates or self.goal is not None:
            return False
        last = self.cpu_candidates[0].last_token_s
        return last is not None and self.view.now - last > self.options.patience_s

    def _unservable(self, request: Request) -> str | None:
        most = self.view.limits.max_batch_tokens
        if self.options.prefill == "whole" and request.prompt_tokens > most:
            return f"prompt of {request.prompt_tokens} tokens, a step takes max_batch_tokens = {most}"
        # The CPU tier is no help: on its way there, KV must fit the staging buffer, a layer of the GPU pool.
        return self.view.never_fits(request)

    # -- step 4 -------------------------------------------------------------------------------------------

    def place_cpu_decodes(self) -> None:
        """CPU decodes, oldest first, each into the sub-batch with more slack while the CPU stays hidden."""
        times, limits = self.times, self.view.limits
        self._time_attention()
        tokens = [len(self.gpu_decodes) + sum([c.length for c in self.chunks]), 0]
        slots = limits.max_seqs - len(self.gpu_decodes) - len(self.chunks)
        slots = min(slots, limits.max_batch_tokens - tokens[0])
        counts, kv = [0, 0], self.cpu_kv
        # What the CPU may take beside sub-batch 0 and beside sub-batch 1.
        hide0, hide1 = self.attention_s, times.linear(tokens[0])
        cpu0 = cpu1 = 0.0
        first = self._fill_second(slots, hide1)
        if first:
            counts[1] = tokens[1] = first
            cpu1 = times.cpu_stage(first, kv[1])
            hide0 += times.linear(first)
            slots -= first
        cells = [times.cpu_cell(1, 0), times.cpu_cell(1, 0)]
        rest, at = self.cpu_candidates[first:], 0
        while at < len(rest) and slots > 0:
            r = rest[at]
            at += 1
            if r.sequence > self.cpu_candidates[-1].sequence:
                break  # the rest has been preempted
            length = r.computed + 1
            growth = self.layers if r.computed % limits.block_size == 0 else 0
            if growth > self.cpu_free and not self._free_cpu_blocks(r):
                continue
            forced = self.forced and not (counts[0] or counts[1])
            which = 1 if forced or hide1 - cpu1 >= hide0 - cpu0 else 0
            n, tokens_read = counts[which] + 1, kv[which] + length
            cell = cells[which]
            if n >= cell[4] or tokens_read >= cell[5]:
                cell = cells[which] = times.cpu_cell(n, tokens_read)
            after = cell[0] + n * (cell[1] + cell[3] * tokens_read) + cell[2] * tokens_read
            wider = times.linear(tokens[which] + 1)
            if which and (forced or (after <= hide1 and cpu0 <= self.attention_s + wider)):
                cpu1, hide0 = after, self.attention_s + wider
            elif not which and after <= hide0 and cpu1 <= wider:
                cpu0, hide1 = after, wider
            else:
                if self.options.skip_longer:
                    bound = min(r.computed, cell.most_kv(n, hide1 if which else hide0) - kv[which])
                    rest, at = [x for x in rest[at:] if x.computed < bound], 0
                continue
            self.cpu_decodes[which].append(r)
            tokens[which] += 1
            counts[which] = n
            kv[which] = tokens_read
            self.cpu_free -= growth
            slots -= 1

    def _fill_second(self, slots: int, hide1: float) -> int:
        """How many of the oldest candidates go into sub-batch 1 before sub-batch 0 has more slack.

        What one by one gives too; but the slacks are monotone in the number taken, so that a bisection over
        prefix sums finds it with a few questions to the cost model.
        """
        times, size = self.times, self.view.limits.block_size
        kv = [0]

        def taken(count: int) -> bool:
            if count >= len(kv):
                more = [r.computed + 1 for r in self.cpu_candidates[len(kv) - 1 : count]]
                kv.extend(list(accumulate(more, initial=kv[-1]))[1:])
            slack1 = hide1 - times.cpu_stage(count - 1, kv[count - 1])
            slack0 = times.linear(count - 1) + self.attention_s
            return slack1 >= slack0 and times.cpu_stage(count, kv[count]) <= hide1

        most = min(slots, len(self.cpu_candidates))
        if self.forced or most < 1 or not taken(1):
            return 0
        low = 1
        while low < most and taken(min(2 * low, most)):
            low = min(2 * low, most)
        high = min(2 * low - 1, most)
        while low < high:
            middle = (low + high + 1) // 2
            if taken(middle):
                low = middle
            else:
                high = middle - 1
        chosen = self.cpu_candidates[:low]
        growth = self.layers * [r.computed % size for r in chosen].count(0)
        if growth > self.cpu_free:
            return 0  # one by one, then: someone has to make room
        self.cpu_decodes[1].extend(chosen)
        self.cpu_kv[1] = kv[low]
        self.cpu_free -= growth
        return low

    def _free_cpu_blocks(self, request: Request) -> bool:
        """Host memory is full: preempt the newest CPU request so that an older one can grow."""
        victim = self.cpu_candidates[-1]
        if victim is request or any(m.request is victim for m in self.moves):
            return False
        self.cpu_candidates.pop()
        self.evict.append(Evict(victim))
        self.cpu_free += self.cpu.held(victim.id)
        return True

    def _time_attention(self) -> None:
        chunks = tuple([(c.start, c.length) for c in self.chunks])
        kv = sum([r.computed for r in self.gpu_decodes]) + len(self.gpu_decodes)
        self.attention_s = self.times.gpu_attention(chunks, len(self.gpu_decodes), kv)

    # -- step 5 -------------------------------------------------------------------------------------------

    def drop_prefills(self) -> None:
        """CPU-bound prefills leave again, newest first, while the CPU stays hidden."""
        times = self.times
        first, second = self.cpu_decodes
        cpu0 = times.cpu_stage(len(first), self.cpu_kv[0])
        cpu1 = times.cpu_stage(len(second), self.cpu_kv[1])
        linear1 = times.linear(len(second))
        tokens = self.tokens0()
        while self.chunks and self.chunks[-1].dst is Tier.CPU:
            chunk = self.chunks[-1]
            if tokens - chunk.length < self.options.min_linear_tokens or cpu1 > times.linear(
                tokens - chunk.length
            ):
                break
            self.chunks.pop()
            attention = self.attention_s
            self._time_attention()
            if cpu0 > linear1 + self.attention_s:
                self.chunks.append(chunk)
                self.attention_s = attention
                break
            tokens -= chunk.length

    def tokens0(self) -> int:
        """Rows of sub-batch 0, relayed decodes aside."""
        return len(self.gpu_decodes) + sum([c.length for c in self.chunks]) + len(self.cpu_decodes[0])

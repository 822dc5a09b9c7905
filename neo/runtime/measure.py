"""Runs steps of chosen shapes on an executor and tells what each of their operations took.

Where an executor replays a step in one piece (``neo.runtime.executor.Replaying``) its operations overlap, and
events around each would tell times that no step of an engine takes. There the step is timed as a whole, then
without its attention, then also without HEAD, without POST and without PRE: an operation takes what the step
gets shorter by. So the operations add up to the step, with whatever overlap and caches it had, which neither
events nor one operation's own replay in a chain would give; how PRE, POST and HEAD share theirs is of less
weight, as steps have all three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neo.core.blocks import blocks_for
from neo.core.graph import OpKind, StepGraph
from neo.core.pipeline import compile
from neo.core.plan import KVMove, PrefillChunk, StepPlan, SubBatch
from neo.core.request import Request, State, Tier
from neo.core.specs import ModelSpec
from neo.runtime.choice import Choice
from neo.runtime.executor import Executor, Replaying, operation_names
from neo.runtime.sampler_state import SamplerState
from neo.runtime.sampling import Sampler
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.step_inputs import StepInputs, prepare

Measured = dict[str, list[float]]
"""By ``KIND:sub-batch``: seconds of one operation, the mean over the step, for each measured run."""

WHOLE = "STEP"
"""In ``Measured``, of a step that was replayed: seconds of all of it."""

_APART = (OpKind.GPU_ATTN, OpKind.HEAD, OpKind.POST, OpKind.PRE)  # the order in which they are left out


@dataclass(slots=True)
class _Known:
    request: Request
    prompt: Sequence[int]
    tokens: Sequence[int]
    state: SamplerState


class Bench:
    """Steps of made-up requests on a real executor, outside any scheduler.

    Args:
        executor: its block tables must hold nobody; it needs no standing staging buffers.
        model: shape of the model it runs.
        block_size: tokens of a block.
        repeats: runs of each step.
        seed: of token ids.
        replayed: time steps as they are replayed, where the executor does that.
    """

    def __init__(
        self,
        executor: Executor,
        model: ModelSpec,
        block_size: int,
        repeats: int = 1,
        seed: int = 0,
        replayed: bool = False,
    ) -> None:
        self.executor = executor
        self.replaying = executor if replayed and isinstance(executor, Replaying) else None
        self.model = model
        self.block_size = block_size
        self.repeats = repeats
        self._random = np.random.default_rng(seed)
        self._sampler = Sampler(model.vocab)
        self._known: dict[str, _Known] = {}
        self._made = 0

    # -- shapes of steps ----------------------------------------------------------------------------------

    def decode(self, lengths: Sequence[int], tier: Tier) -> Measured:
        """One sub-batch of decodes that read ``lengths`` KV tokens each, the new ones included."""
        members = tuple([self.decoding(n, tier) for n in lengths])
        batch = SubBatch(gpu_decode=members) if tier is Tier.GPU else SubBatch(cpu_decode=members)
        return self.run(lambda: StepPlan((batch,)), members)

    def whole(self, lengths: Sequence[int]) -> list[float]:
        """Seconds of a step of GPU decodes as it is replayed, for each run; none where it is not."""
        members = tuple([self.decoding(n, Tier.GPU) for n in lengths])
        plan = StepPlan((SubBatch(gpu_decode=members),))
        runs = [self._once(plan, apart=False).get(WHOLE, []) for _ in range(self.repeats)]
        self.release(members)
        return [seconds for run in runs for seconds in run]

    def prefill(self, start: int, length: int, tier: Tier = Tier.GPU) -> Measured:
        """One chunk."""
        request = self.request(start + length, start, tier)
        ring = 1 if tier is Tier.CPU else 0  # a buffer of the step's own for the prefix that is streamed
        plan = StepPlan((SubBatch((PrefillChunk(request, start, length, tier),)),), ring=ring)
        return self.run(lambda: plan, (request,))

    def mixed(self, chunks: Mapping[Tier, int], decodes: Mapping[Tier, int]) -> Measured:
        """One sub-batch: a first chunk of a tier's prompt tokens each, and decodes that read one token."""
        prompts = [(self.request(n, 0, tier), n, tier) for tier, n in chunks.items() if n]
        members = {tier: tuple([self.decoding(1, tier) for _ in range(n)]) for tier, n in decodes.items()}
        batch = SubBatch(
            tuple([PrefillChunk(r, 0, n, tier) for r, n, tier in prompts]),
            members.get(Tier.GPU, ()),
            members.get(Tier.CPU, ()),
        )
        of_chunks = [r for r, _, _ in prompts]
        return self.run(
            lambda: StepPlan((batch,)), (*of_chunks, *members.get(Tier.GPU, ()), *members.get(Tier.CPU, ()))
        )

    def swap(self, tokens: int, beside: Tier = Tier.GPU) -> tuple[Measured, Measured]:
        """A decode on a tier, beside which KV of ``tokens`` tokens moves: to the host, and back."""
        runs, mover = self.decoding(1, beside), self.decoding(tokens, Tier.GPU)
        batch = SubBatch(gpu_decode=(runs,)) if beside is Tier.GPU else SubBatch(cpu_decode=(runs,))
        found: tuple[list[Measured], list[Measured]] = ([], [])
        for _ in range(self.repeats):
            for i, dst in enumerate((Tier.CPU, Tier.GPU)):
                plan = StepPlan((batch,), (KVMove(mover, dst),))
                found[i].append(self._once(plan))
                mover.tier = dst
                mover.host_layers = (1 << self.model.layers) - 1 if dst is Tier.CPU else 0
        self.release((runs, mover))
        return _joined(found[0]), _joined(found[1])

    def company(self, sequences: int, kv_tokens: int) -> tuple[Measured, Measured, Measured, Measured]:
        """CPU decodes that read ``kv_tokens`` in all: alone; beside KV of as many tokens that leaves the GPU,
        that comes to it, and both at once.

        A copy takes longer than the attention, so that no layer's attention runs without one beside it.
        """
        members = tuple([self.decoding(max(1, kv_tokens // sequences), Tier.CPU) for _ in range(sequences)])
        batch = SubBatch(cpu_decode=members)
        one, other = self.decoding(kv_tokens, Tier.GPU), self.decoding(kv_tokens, Tier.CPU)
        found: tuple[list[Measured], ...] = ([], [], [], [])
        whole = (1 << self.model.layers) - 1
        for _ in range(self.repeats):
            for i, movers in enumerate(((), (one,), (one,), (one, other), (one, other))):
                moves = []
                for mover in movers:
                    dst = Tier.CPU if mover.tier is Tier.GPU else Tier.GPU
                    moves.append(KVMove(mover, dst))
                moves.sort(key=lambda m: m.dst is Tier.GPU)  # what leaves makes room
                measured = self._once(StepPlan((batch,), tuple(moves)))
                if i < 4:  # the last brings both back
                    found[i].append(measured)
                for move in moves:
                    move.request.tier = move.dst
                    move.request.host_layers = whole if move.dst is Tier.CPU else 0
        self.release((*members, one, other))
        alone, out, into, both = found
        return _joined(alone), _joined(out), _joined(into), _joined(both)

    def relayed(self, decodes: int, relay: Sequence[Request], arriving: bool = False) -> Measured:
        """A step of GPU decodes that read one token, beside relayed ones: made-up requests on the host, which
        are a layer further when it has run.

        ``arriving``: one of the GPU's is swapped in ahead of it, and reads two.
        """
        members = [self.decoding(1, Tier.GPU) for _ in range(decodes - arriving)]
        moves: tuple[KVMove, ...] = ()
        if arriving:
            mover = self.decoding(2, Tier.CPU)
            mover.tier, mover.host_layers = Tier.GPU, 0  # where it is when the step uses it
            members.append(mover)
            moves = (KVMove(mover, Tier.GPU),)
        batch = SubBatch(gpu_decode=tuple(members), relay_decode=tuple(relay))
        found = self._once(StepPlan((batch,), moves))
        for request in relay:
            request.relay_layers = (request.relay_layers + 1) % (self.model.layers + 1)
        self.release(members)
        return found

    # -- made-up requests -----------------------------------------------------------------------------------

    def decoding(self, kv_tokens: int, tier: Tier) -> Request:
        """A request whose next token makes ``kv_tokens`` of KV."""
        request = self.request(max(1, kv_tokens - 1), max(1, kv_tokens) - 1, tier)
        request.state = State.DECODE
        request.generated = 1
        return request

    def request(self, prompt: int, computed: int, tier: Tier) -> Request:
        """A request with KV of ``computed`` tokens on a tier."""
        self._made += 1
        request = Request(f"m{self._made}", prompt, 1 << 20)
        request.computed, request.tier = computed, tier
        request.state = State.PREFILL
        request.host_layers = (1 << self.model.layers) - 1 if tier is Tier.CPU else 0
        ids = self._random.integers(0, self.model.vocab, prompt + 1).tolist()
        state = SamplerState(SamplingParams(temperature=0.0), (), self.model.vocab, 0)
        self._known[request.id] = _Known(request, ids[:-1], ids[-1:], state)
        if computed:
            self.executor.tables.reserve(request, tier)
        return request

    # -- running --------------------------------------------------------------------------------------------

    def run(self, plan: Callable[[], StepPlan], members: Sequence[Request]) -> Measured:
        """Run a plan again and again."""
        found = [self._once(plan()) for _ in range(self.repeats)]
        self.release(members)
        return _joined(found)

    def _once(self, plan: StepPlan, apart: bool = True) -> Measured:
        """Run a step; ``apart``: what its operations take is wanted, too, where it is replayed."""
        tables = self.executor.tables
        graph = compile(plan, self.model, self.block_size)
        copies = tables.begin(plan)
        inputs = prepare(plan, tables, self._known)
        if self.replaying is not None and self.replaying.replays(plan, inputs):
            found = self._replay(self.replaying, graph, inputs, _APART if apart else ())
            tables.commit()
            return found
        times = self.executor.run(plan, graph, inputs, copies, self._sample)
        tables.commit()
        counts = graph.template.counts
        return {
            name: [seconds / count]
            for name, seconds, count in zip(operation_names(graph), times.seconds, counts, strict=True)
        }

    def _replay(
        self, executor: Replaying, graph: StepGraph, inputs: StepInputs, kinds: Sequence[OpKind]
    ) -> Measured:
        """A replayed step's seconds, and what it gets shorter by without ``kinds``; EMBED is what is left."""
        choice = Choice(self._sampler, self._known, at_once=False)  # as where steps are queued
        # From the least on: the whole step comes last, and leaves rows and KV as they should be.
        left_out = [frozenset(kinds[:count]) for count in range(len(kinds), -1, -1)]
        seconds = [executor.replay(graph, inputs, choice, without) for without in left_out]
        whole = {WHOLE: [seconds[-1]]}
        if not kinds:
            return whole
        took = {OpKind.EMBED: seconds[0]}
        for kind, without, beside in zip(reversed(kinds), seconds, seconds[1:], strict=False):
            took[kind] = max(0.0, beside - without)
        template = graph.template
        return whole | {
            name: [took.get(kind, 0.0) / count]
            for name, kind, count in zip(operation_names(graph), template.kinds, template.counts, strict=True)
        }

    def _sample(self, logits: Any, requests: tuple[str, ...]) -> None:
        self._sampler.sample(logits, [self._known[r].state for r in requests])

    def release(self, members: Sequence[Request]) -> None:
        """Forget requests, and free what they hold. No step runs: their slots need not rest."""
        for request in members:
            self.executor.tables.release(request.id)
            del self._known[request.id]
        self.executor.tables.commit()

    def blocks(self, kv_tokens: int) -> int:
        """Blocks of a sequence of that length."""
        return blocks_for(kv_tokens, self.block_size)


def _joined(found: Sequence[Measured]) -> Measured:
    return {name: [run[name][0] for run in found] for name in found[0]}

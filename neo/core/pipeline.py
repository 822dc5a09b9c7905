"""compile(plan): the operations of a step, their resources and their order.

Sequential step (one sub-batch), per layer::

    GPU   PRE ─────────── GPU_ATTN ── POST
    CPU      └ SEND ─ CPU_ATTN ─ RECV ┘

Asymmetric pipeline (two sub-batches, NEO section 3.1): sub-batch 0 holds all GPU attention, sub-batch 1 only
CPU decodes. While the CPU does attention of sub-batch 1, the GPU does POST and next-layer PRE of sub-batch
0; while the CPU does the (short) attention of sub-batch 0, the GPU does POST, PRE of sub-batch 1 and
GPU_ATTN of sub-batch 0::

    GPU   PRE0 PRE1 GA0 │ POST0 PRE0' │ POST1 PRE1' GA0' │ ...
    CPU        CA0      │    CA1      │        CA0'      │ ...

Relayed decodes (in a sequential step) have their CPU attention of all layers, each request's of its own
layer, beside the whole step: their rows left for the CPU in the step before, join the others for a layer's
POST and leave again behind the next layer's PRE::

    GPU   PRE GA │ POST PRE' GA' │ POST' PRE'' GA'' │ ...
    CPU   CA0 CA1 CA2 ...

Copies run beside that: moves ordered before the layer that needs them, KV bound for the CPU behind the PRE
that made it (through the staging layer, which the next layer's PRE needs back), streamed KV ahead of the
attention that reads it.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

from neo.core.blocks import blocks_for
from neo.core.graph import RELAY, OpKind, StepGraph, Template, Work
from neo.core.plan import EvictMode, KVMove, MoveOrder, StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.core.specs import ModelSpec
from neo.core.templates import Shape, WorkKey, template_for


def compile(plan: StepPlan, model: ModelSpec, block_size: int = 16, staging_layers: int = 1) -> StepGraph:
    """The StepGraph of a validated plan with at least one sub-batch, before it is applied.

    ``staging_layers`` is the number of staging buffers that streamed layers rotate through, unless the plan
    brings its own (``ring``). Sizes in the graph's works are per layer and over all tensor-parallel ranks;
    copies move whole blocks.
    """
    batch = plan.batches[0]
    if (
        len(plan.batches) == 1
        and not (plan.moves or plan.evict or batch.cpu_decode or batch.stream_decode or batch.relay_decode)
        and all(c.dst is Tier.GPU for c in batch.prefill)
    ):
        return _compile_gpu_only(batch, model)
    return _Compiler(plan, model, block_size, max(1, staging_layers)).graph()


def sampled_rows(batch: SubBatch, layers: int) -> int:
    """Requests of a sub-batch that get a token from this step."""
    done = sum(c.length == c.request.remaining_prefill for c in batch.prefill)
    if batch.relay_decode:
        done += sum([r.relay_layers == layers for r in batch.relay_decode])
    return done + len(batch.gpu_decode) + len(batch.cpu_decode) + len(batch.stream_decode)


def kv_read(decodes: tuple[Request, ...]) -> int:
    """KV tokens that the attention of these decodes reads in one layer, the new ones included."""
    return sum([r.computed for r in decodes]) + len(decodes)


def _compile_gpu_only(batch: SubBatch, model: ModelSpec) -> StepGraph:
    """The common case, without the general one's bookkeeping; a test holds the two against each other."""
    decodes = batch.gpu_decode
    chunks = tuple([(c.start, c.length) for c in batch.prefill])
    tokens = len(decodes) + sum([c[1] for c in chunks])
    rows = sampled_rows(batch, model.layers) if chunks else len(decodes)
    template = _gpu_only_template(model.layers, rows > 0, model.tp > 1)
    dense = Work(tokens)
    kv = sum([r.computed for r in decodes]) + len(decodes)
    attention = Work(tokens, len(decodes), kv, 0, chunks)
    works = [Work(tokens, len(decodes) + len(chunks)), dense, dense, attention, dense]
    if model.tp > 1:
        works.append(Work(tokens, bytes=allreduce_bytes(tokens, model)))
    if rows:
        works.append(Work(rows, rows))
    return StepGraph(template, tuple(works))


@lru_cache(maxsize=256)
def _gpu_only_template(layers: int, head: bool, allreduce: bool) -> Template:
    """The template whose works ``_compile_gpu_only`` lists by heart."""
    template, keys = template_for(Shape(layers, head=head, allreduce=allreduce))
    order = (OpKind.SCHEDULE, OpKind.EMBED, OpKind.PRE, OpKind.GPU_ATTN, OpKind.POST)
    expected = order + (OpKind.ALLREDUCE,) * allreduce + (OpKind.HEAD,) * head
    assert tuple(k[0] for k in keys) == expected
    return template


def allreduce_bytes(tokens: int, model: ModelSpec) -> int:
    """Bytes that each rank contributes per layer: partial sums after attention and after the FFN."""
    return 2 * tokens * model.hidden * model.dtype_bytes


def send_bytes(rows: int, model: ModelSpec) -> int:
    """Bytes of q, k and v of ``rows`` decodes, per layer."""
    return rows * model.head_dim * (model.heads + 2 * model.kv_heads) * model.dtype_bytes


def recv_bytes(rows: int, model: ModelSpec) -> int:
    """Bytes of the attention output of ``rows`` decodes, per layer."""
    return rows * model.head_dim * model.heads * model.dtype_bytes


class _Compiler:
    """Gathers the numbers of a plan; one instance per plan."""

    def __init__(self, plan: StepPlan, model: ModelSpec, block_size: int, ring: int) -> None:
        self.plan = plan
        self.model = model
        self.block_size = block_size
        self.ring = plan.ring or ring
        self.block_bytes = block_size * model.kv_bytes_per_token_layer
        self.batches = plan.batches
        self.tokens = [b.tokens for b in plan.batches]
        self.sequences = sum([b.sequences + len(b.relay_decode) for b in plan.batches])
        self.rows = sum([sampled_rows(b, model.layers) for b in plan.batches])
        relayed = plan.batches[0].relay_decode
        self.coming = [r for r in relayed if r.relay_layers]  # at POST of their layers
        self.going = sum([r.relay_layers < model.layers for r in relayed])  # to PRE of the layers behind
        self.at_use = plan.host_layers_at_use(model.layers)
        self.runs = self.stream_runs()
        self.into = self.out = self.spilled = 0
        if plan.moves or plan.evict:
            self.into = self.moved_bytes(Tier.GPU, MoveOrder.BEFORE)
            self.out = self.moved_bytes(Tier.CPU, MoveOrder.BEFORE)
            self.spilled = self.moved_bytes(Tier.CPU, MoveOrder.AFTER)
        self.spilled += self.new_kv_bytes()

    def graph(self) -> StepGraph:
        template, keys = template_for(self.shape())
        works = [self.work(key) for key in keys]
        return StepGraph(template, tuple(self.with_contention(keys, template.counts, works)))

    def shape(self) -> Shape:
        first = self.batches[0]
        streams = any(nbytes for _, nbytes in self.runs)
        return Shape(
            layers=self.model.layers,
            pipelined=len(self.batches) == 2,
            attention=bool(first.prefill or first.gpu_decode or first.stream_decode),
            cpu0=bool(first.cpu_decode),
            cpu1=len(self.batches) == 2 and bool(self.batches[1].cpu_decode),
            relay_out=self.going > 0,
            relay_in=bool(self.coming),
            swap_out=self.out > 0,
            swap_in=self.into > 0,
            spill=self.spilled > 0,
            streams=tuple((n, nbytes > 0) for n, nbytes in self.runs) if streams else (),
            ring=self.ring,
            allreduce=self.model.tp > 1,
            head=self.rows > 0,
        )

    def host_layers(self, request: Request) -> int:
        """Bit mask of a request's layers on the CPU when this step uses them."""
        return self.at_use.get(request.id, request.host_layers)

    # -- sizes, per layer ---------------------------------------------------------------------------------

    def request_bytes(self, request: Request, extra_tokens: int = 0) -> int:
        return blocks_for(request.computed + extra_tokens, self.block_size) * self.block_bytes

    def move_bytes(self, move: KVMove) -> int:
        """Average over all layers of what a move copies (a layer range moves less than the whole)."""
        start, stop = move.layers or (0, self.model.layers)
        extra = 1 if move.order is MoveOrder.AFTER else 0
        return self.request_bytes(move.request, extra) * (stop - start) // self.model.layers

    def moved_bytes(self, dst: Tier, order: MoveOrder) -> int:
        total = sum([self.move_bytes(m) for m in self.plan.moves if m.dst is dst and m.order is order])
        if dst is Tier.CPU and order is MoveOrder.BEFORE:
            leaving = [e.request for e in self.plan.evict if e.mode is EvictMode.SWAP]
            layers = self.model.layers
            total += sum(
                [self.request_bytes(r) * (layers - r.host_layers.bit_count()) // layers for r in leaving]
            )
        return total

    def new_kv_bytes(self) -> int:
        """New KV that leaves behind its PRE: of CPU-bound prefill, and of streamed decodes' host layers."""
        token = self.model.kv_bytes_per_token_layer
        total = 0
        for batch in self.batches:
            total += token * sum([c.length for c in batch.prefill if c.dst is Tier.CPU])
            if batch.stream_decode:
                host = sum([self.host_layers(r).bit_count() for r in batch.stream_decode])
                total += -(-host * token // self.model.layers)
        return total

    def stream_runs(self) -> tuple[tuple[int, int], ...]:
        """KV streamed in per layer for GPU attention, as runs of equal layers: (layers, bytes).

        That is prefixes of CPU-bound chunks, and the host layers of streamed decodes.
        """
        layers, token = self.model.layers, self.model.kv_bytes_per_token_layer
        prefix = token * sum([c.start for b in self.batches for c in b.prefill if c.dst is Tier.CPU])
        streamed = [r for b in self.batches for r in b.stream_decode]
        if not streamed:
            return ((layers, prefix),)
        by_mask: dict[int, int] = {}
        for request in streamed:
            mask = self.host_layers(request)
            by_mask[mask] = by_mask.get(mask, 0) + self.request_bytes(request)
        per_layer = [prefix] * layers
        for mask, size in by_mask.items():
            for layer in range(layers):
                if mask >> layer & 1:
                    per_layer[layer] += size
        return tuple((len(list(g)), nbytes) for nbytes, g in groupby(per_layer))

    # -- works --------------------------------------------------------------------------------------------

    def work(self, key: WorkKey) -> Work:
        kind, index, variant = key
        model = self.model
        if kind is OpKind.SCHEDULE:
            return Work(sum(self.tokens), self.sequences)
        if kind is OpKind.EMBED:
            return Work(sum(self.tokens))
        if kind is OpKind.HEAD:
            return Work(self.rows, self.rows)
        if kind is OpKind.STREAM:
            return Work(bytes=self.runs[variant][1])
        if kind is OpKind.SWAP_IN:
            return Work(bytes=self.into)
        if kind is OpKind.SWAP_OUT:
            return Work(bytes=self.spilled if index == 0 else self.out)
        if index == RELAY:
            return self.relay_work(kind)
        tokens = self.tokens[index]
        if kind is OpKind.PRE or kind is OpKind.POST:
            return Work(tokens)
        batch = self.batches[index]
        rows = len(batch.cpu_decode)
        if kind is OpKind.GPU_ATTN:
            chunks = tuple([(c.start, c.length) for c in batch.prefill])
            decodes = batch.gpu_decode + batch.stream_decode
            return Work(tokens, len(decodes), kv_read(decodes), 0, chunks)
        if kind is OpKind.CPU_ATTN:
            return Work(rows, rows, kv_read(batch.cpu_decode))
        if kind is OpKind.SEND:
            return Work(rows, rows, bytes=send_bytes(rows, model))
        if kind is OpKind.RECV:
            return Work(rows, rows, bytes=recv_bytes(rows, model))
        return Work(tokens, bytes=allreduce_bytes(tokens, model))

    def relay_work(self, kind: OpKind) -> Work:
        """Of a layer on average: layers differ in who is there. Their attention is all there at once."""
        layers = self.model.layers
        if kind is OpKind.SEND:
            rows = -(-self.going // layers)
            return Work(rows, rows, bytes=send_bytes(rows, self.model))
        rows = -(-len(self.coming) // layers)
        if kind is OpKind.RECV:
            return Work(rows, rows, bytes=recv_bytes(rows, self.model))
        return Work(rows, rows, -(-kv_read(tuple(self.coming)) // layers), layers=layers)

    def with_contention(
        self, keys: tuple[WorkKey, ...], counts: tuple[int, ...], works: list[Work]
    ) -> list[Work]:
        """Tell copies what goes the other way in their layer, and CPU attention what all copies move.

        Several operations that share such company split it in proportion to their own size. What only some
        layers copy (streams) keeps company with the other way's bytes of the whole step, by size.
        """
        all_works = list(zip(keys, counts, works, strict=True))
        into = sum([n * w.bytes for k, n, w in all_works if k[0] in _TO_GPU])
        out = sum([n * w.bytes for k, n, w in all_works if k[0] in _TO_HOST])
        layers = self.model.layers
        kv = sum([w.kv_tokens for k, w in zip(keys, works, strict=True) if k[0] is OpKind.CPU_ATTN])
        result = []
        for (kind, _, _), w in zip(keys, works, strict=True):
            if kind in _TO_GPU and into:
                w = w._replace(beside_bytes=out * w.bytes // into)
            elif kind in _TO_HOST and out:
                w = w._replace(beside_bytes=into * w.bytes // out)
            elif kind is OpKind.CPU_ATTN and kv:
                w = w._replace(beside_bytes=(into + out) * w.kv_tokens // (kv * layers))
            result.append(w)
        return result


_TO_GPU = frozenset({OpKind.RECV, OpKind.SWAP_IN, OpKind.STREAM})
_TO_HOST = frozenset({OpKind.SEND, OpKind.SWAP_OUT})


def bytes_moved(graph: StepGraph) -> tuple[int, int]:
    """Bytes that a step copies (to the GPU, to the host), over all layers."""
    into = out = 0
    for kind, count, work in zip(graph.template.kinds, graph.template.counts, graph.works, strict=True):
        if kind in _TO_GPU:
            into += count * work.bytes
        elif kind in _TO_HOST:
            out += count * work.bytes
    return into, out

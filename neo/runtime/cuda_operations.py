"""The GPU's operations of the ``cuda`` executor, launched in a StepGraph's order.

They run on one stream, copies on a stream per direction, ordered by events where the graph says so. RECV is
launched right ahead of the POST that needs it. For each step: ``begin``, then ``prepare`` and ``launch``; or,
of decodes alone, ``prepare_decodes`` and a graph that ``captured`` has launched once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from neo.core.graph import RELAY, RESOURCE_OF, OpKind, Resource, Template
from neo.core.plan import StepPlan
from neo.runtime.block_tables import BlockTables, Copies, Ints
from neo.runtime.cuda_attention import Prefill
from neo.runtime.cuda_copies import FixedCopies
from neo.runtime.cuda_host import HandOver, HostAttention, Submitted
from neo.runtime.cuda_linear import Tuned
from neo.runtime.cuda_memory import TableMirror
from neo.runtime.cuda_program import COPIES, ORDERED, Step, program
from neo.runtime.cuda_relay import HostRelay, Relay
from neo.runtime.cuda_rows import Layout, Rows
from neo.runtime.cuda_sender import Sender
from neo.runtime.cuda_special import SpecialRows
from neo.runtime.cuda_step import LayerCopies, Way, special_rows
from neo.runtime.cuda_timeline import Timeline
from neo.runtime.executor import Sample
from neo.runtime.kv_memory import KVMemory
from neo.runtime.model import Model
from neo.runtime.step_inputs import BatchInputs, StepInputs

_WAY = {(OpKind.SWAP_OUT, -1): Way.OUT, (OpKind.SWAP_OUT, 0): Way.SPILL}
_WAY |= {(OpKind.SWAP_IN, -1): Way.IN, (OpKind.STREAM, 0): Way.STREAM}


class Operations:
    """Buffers of both sub-batches and what a step does with them; see the module's description.

    Made and used with ``main`` as the current stream.

    Args:
        model: on the GPU.
        tables: of both tiers.
        memory: KV memory of the GPU and of the host.
        main: the stream of everything but copies.
        most: rows and decodes of a step at most.
        tuned: the model's matrix products.
        relay_lanes: rows of relayed decodes at most, among others of a step.
        standing: staging blocks [buffers, blocks] that are always there.

    Attributes:
        host: does CPU attention; set by who made it, where the host has KV memory.
        rows, mirror, streams: buffers by sub-batch, block tables on the device, streams of copies.
        fixed: what captured steps copy.
        timeline: where operations of the step that is launched are measured, if they are.
        told: what the host was told of it.
    """

    def __init__(
        self,
        model: Model,
        tables: BlockTables,
        memory: tuple[KVMemory, KVMemory],
        main: torch.cuda.Stream,
        most: tuple[int, int],
        tuned: Tuned,
        relay_lanes: int,
        standing: Ints,
    ) -> None:
        self.model, self.tables, self.tuned = model, tables, tuned
        self._standing = standing
        self._main = main
        config, device = model.config, model.device
        (gpu, cpu), (rows, decodes) = memory, most
        self.streams = {Resource.H2D: new_stream(device), Resource.D2H: new_stream(device)}
        self.rows = [Rows(model, gpu, rows + relay_lanes, decodes, tuned.layers)]
        self._over: list[HandOver] = []
        self._relay: Relay | None = None
        self._host_relay: HostRelay | None = None
        self._beside = new_stream(device)  # of what is done for relayed decodes while others attend
        self._exchanged: torch.cuda.Event | None = None
        if tables.cpu.total:
            self.rows.append(Rows(model, gpu, decodes, 0, tuned.layers))
            for own in self.rows:
                over = HandOver(decodes, config.heads, config.kv_heads, config.head_dim, model.dtype, device)
                over.describe(own.q, own.k, own.v, own.attended)
                self._over.append(over)
            if relay_lanes:
                self._relay = Relay(model, self.rows[0], relay_lanes)
                self._host_relay = HostRelay(self._relay, cpu, tables.cpu, config.heads)
        self.host: HostAttention | None = None
        self.sender = Sender(device)
        self.mirror = TableMirror(tables.gpu, self.sender)
        self._copying = LayerCopies(gpu, cpu)
        self.fixed = FixedCopies(gpu, cpu, config.layers, self.sender)
        self._prefill = Prefill(model, gpu, self.sender)
        self._capturing = False
        self._rooms: list[Tensor] = []  # of captured steps' logits; the last is the largest
        self._special: SpecialRows | None = None
        self.timeline: Timeline | None = None
        self.told: Submitted | None = None
        self._handlers: dict[OpKind, Callable[[int, int], None]] = {
            OpKind.EMBED: self._embed,
            OpKind.PRE: self._pre,
            OpKind.GPU_ATTN: self._gpu_attention,
            OpKind.SEND: self._send,
            OpKind.POST: self._post,
            OpKind.HEAD: self._head,
        }

    def close(self) -> None:
        """Stop the host's threads and drop the buffers; may be called again."""
        if self.host is not None:
            self.host.close()
            self.host = None
        self.rows, self._over, self._relay, self._host_relay, self._rooms = [], [], None, None, []

    def begin(self, inputs: StepInputs, sample: Sample) -> None:
        """The next step's inputs, and what chooses its tokens."""
        self.sender.begin()
        self.mirror.update()
        tables = self.mirror.tables
        self._tables = tables.data_ptr(), 4 * tables.stride(0), tables.stride(1)
        self._inputs, self._sample = inputs, sample

    def prepare_decodes(self, layouts: Sequence[Layout], copies: Copies | None) -> None:
        """Inputs and the host's part of a step of decodes alone, padded as its graph is.

        ``copies``: what it moves, if anything.
        """
        inputs = self._inputs
        self.fill(inputs, layouts)
        if copies is not None:
            self.fixed.begin(copies)
        self._reserve_logits(sum([at.rows for at in layouts]))
        self._special, self.timeline, self._layouts = None, None, layouts
        self._prefill.begin(inputs.batches[0], None)
        self._submit(inputs, layouts, counted=True)

    def _submit(self, inputs: StepInputs, layouts: Sequence[Layout], counted: bool) -> None:
        """Tell the host what the device will ask for.

        ``counted``: rows are padded, and the device reads how many of them count.
        """
        parts = []
        for i, (batch, at) in enumerate(zip(inputs.batches, layouts, strict=True)):
            if len(batch.cpu):
                counts = self.rows[i].inputs.device_counts.data_ptr() if counted else None
                self._over[i].place(at.cpu, at.cpu_rows, counts)
                parts.append((self._over[i], batch.cpu))
        self.told = self.host.submit(parts) if parts and self.host is not None else None
        if (relayed := inputs.batches[0].relay) is not None:
            assert self._relay is not None
            assert self._host_relay is not None
            assert self.host is not None
            self._relay.begin(relayed, layouts[0].relay, layouts[0].relay_rows)
            self.told = self.host.submit_relay(self._host_relay, relayed)

    def captured(self, template: Template, without: frozenset[OpKind] = frozenset()) -> Tensor | None:
        """Launch a step while its stream is being captured; logits of all rows, nobody's too.

        ``without``: kinds of operations that are left out, for who wants to know what they take; no logits
        without HEAD.
        """
        self._logits: Tensor | None = None
        self._capturing = True
        try:
            self.launch(template, without)
        finally:
            self._capturing = False
        return self._logits

    def _measure(self, step: Step, layer: int, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
        if self.timeline is None:
            return nullcontext()
        return self.timeline.measure(step, None if step.offset is None else layer, stream)

    def launch(self, template: Template, without: frozenset[OpKind] = frozenset()) -> None:
        """Every operation, in program order, but for those of some kinds.

        Streams of copies fork from the main one, on which their lists and what the step before did are on
        their way, and join it again: what comes behind the step finds all of it done.
        """
        copied, sections = program(template)
        forked = [self.streams[r] for r in {RESOURCE_OF[k]: None for k in template.kinds if k in COPIES}]
        for stream in forked:
            stream.wait_event(self._main.record_event())
        self._copied, self._arriving = copied, OpKind.SWAP_IN in template.kinds
        self._waiting: dict[int, tuple[Step, int]] = {}  # RECVs that are launched ahead of their POST
        self._latest: dict[tuple[OpKind, int], list[torch.cuda.Event]] = {}
        self._exchanged = None
        for repeat, first_layer, steps in sections:
            for layer_of_section in range(first_layer, first_layer + repeat):
                for step in steps:
                    if step.kind in without:
                        continue
                    layer = -1 if step.offset is None else layer_of_section + step.offset
                    self._issue(step, layer, copied)
        for stream in forked:  # whether or not anything has waited for its last copy
            self._main.wait_event(stream.record_event())

    def fill(self, inputs: StepInputs, layouts: Sequence[Layout]) -> None:
        """The numbers of every sub-batch's rows, to the device."""
        for rows, batch, at in zip(self.rows, inputs.batches, layouts, strict=False):
            rows.inputs.fill(batch, at)
            rows.inputs.send()

    def prepare(self, plan: StepPlan, copies: Copies, copied: bool, timeline: Timeline | None) -> None:
        """Inputs, lists and the host's part of the step, on their way before its first operation."""
        inputs, self.timeline = self._inputs, timeline
        layouts = [_layout(b) for b in inputs.batches]
        first = inputs.batches[0]
        self._special, special = None, None
        self._late = (
            self.sender.send(first.late.slots),
            self.sender.send(first.late.positions),
        )
        if copied:
            special, into, back = special_rows(first, plan, self.tables, self._standing)
            self._copying.begin(copies, self.model.config.layers, into, back)
            self._special = (
                None if special is None else SpecialRows(special, first, self.rows[0], self.sender)
            )
        self.fill(inputs, layouts)
        self._submit(inputs, layouts, counted=False)
        self._prefill.begin(first, special)
        self._layouts = layouts

    def _issue(self, step: Step, layer: int, copied: bool) -> None:
        kind, batch = step.kind, step.batch
        if kind in COPIES:
            if not (kind is OpKind.SWAP_OUT and batch == 0 and self._deferred):
                self._copy(step, layer)
            return
        if copied:
            for event in self._events(step.waits):
                self._main.wait_event(event)
        if batch == RELAY:
            self._exchange(step, layer)
            return
        if kind is OpKind.RECV:
            self._waiting[batch] = (step, layer)
            return
        with self._measure(step, layer, self._main):
            self._handlers[kind](batch, layer)
        if kind is OpKind.PRE and self._layouts[0].relay_rows:
            self._exchanged = None
            self._beside.wait_event(self._main.record_event())
        if copied and kind in ORDERED:
            self._latest.setdefault((kind, batch), []).append(self._main.record_event())
        if kind is OpKind.GPU_ATTN and self._deferred:
            self._spill(layer)

    def _exchange(self, step: Step, layer: int) -> None:
        """Relayed rows that come and go: both in one kernel, beside the others' attention."""
        assert self._relay is not None
        if self._exchanged is None:
            with self._measure(step, layer, self._beside):
                self._relay.exchange(layer, self._beside.cuda_stream)
            self._exchanged = self._beside.record_event()

    def _events(self, waits: Sequence[tuple[OpKind, int, int]]) -> list[torch.cuda.Event]:
        found = []
        for kind, batch, lag in waits:
            events = self._latest.get((kind, batch))
            if events is not None and len(events) > lag:
                found.append(events[-1 - lag])
        return found

    def _copy(self, step: Step, layer: int) -> None:
        """One way's copies of a layer, on the stream of their direction."""
        stream = self.streams[RESOURCE_OF[step.kind]]
        for event in self._events(step.waits):
            stream.wait_event(event)
        if step.kind is OpKind.STREAM:  # what was written to these staging blocks must have left them
            for event in self._latest.get((OpKind.SWAP_OUT, 0), ())[-1:]:
                stream.wait_event(event)
        copies = self.fixed if self._capturing else self._copying
        with self._measure(step, layer, stream):
            copies.run(_WAY[step.kind, step.batch], layer, stream.cuda_stream)
        self._latest.setdefault((step.kind, step.batch), []).append(stream.record_event())

    def _spill(self, layer: int) -> None:
        """What was appended with attention goes to the host behind it."""
        stream = self.streams[Resource.D2H]
        stream.wait_event(self._main.record_event())
        self._copying.run(Way.SPILL, layer, stream.cuda_stream)
        self._latest.setdefault((OpKind.SWAP_OUT, 0), []).append(stream.record_event())

    @property
    def _deferred(self) -> bool:
        """Whether new KV of special rows waits for what is copied in, and so for GPU_ATTN."""
        return self._special is not None and self._special.prefixed

    def _table(self, layer: int) -> tuple[int, int]:
        """Address of a layer's block table on the device, and entries between its rows."""
        address, by_layer, by_row = self._tables
        return address + layer * by_layer, by_row

    # -- the GPU's operations -----------------------------------------------------------------------------

    def _embed(self, _batch: int, _layer: int) -> None:
        for rows, at in zip(self.rows, self._layouts, strict=False):
            rows.begin(at, self.mirror.latest)
        if self._layouts[0].relay_rows and self._relay is not None:
            self._relay.turn()

    def _pre(self, batch: int, layer: int) -> None:
        """PRE of a sub-batch."""
        weights = self.model.weights.layers[layer]
        self.rows[batch].pre(layer, weights, self._table(layer), layer == 0)
        if batch == 0 and self._special is not None and not self._special.prefixed:
            self._special.append(layer)

    def _gpu_attention(self, batch: int, layer: int) -> None:
        rows, late = self.rows[batch], self._inputs.batches[batch].late
        if self._capturing and self._arriving:  # whose is on the device: another step's with every replay
            rows.append_late(self._table(layer))
        elif len(late):
            rows.append(late.row, len(late), *self._late, self._table(layer))
        special = self._special
        if special is not None and special.prefixed:
            special.append(layer)
        self._prefill.run(rows, self._table(layer), None if special is None else special.table(layer))
        rows.attend(layer, self._table(layer), early=not self._copied)
        if special is not None:
            special.attend(layer)

    def _send(self, batch: int, _layer: int) -> None:
        """q, k and v of CPU decodes to the host."""
        post = self._over[batch].post
        assert post is not None
        post()

    def _receive(self, batch: int, _layer: int) -> None:
        wait = self._over[batch].wait
        assert wait is not None
        wait()

    def _post(self, batch: int, layer: int) -> None:
        """POST of a sub-batch, behind the answer of its CPU attention."""
        if (awaited := self._waiting.pop(batch, None)) is not None:
            with self._measure(*awaited, self._main):
                self._receive(batch, layer)
        if self._exchanged is not None:
            self._main.wait_event(self._exchanged)
        self.rows[batch].post(layer, self.model.weights.layers[layer])

    def _head(self, _batch: int, _layer: int) -> None:
        if self._capturing:
            self._logits = self._all_logits()
            return
        ends = []
        for rows, batch in zip(self.rows, self._inputs.batches, strict=False):
            if batch.sampled:
                index = self.sender.send(np.array(batch.sampled, dtype=np.int32))
                ends.append(rows.ended(index))
        self.choose(self._logits_of(ends))

    def choose(self, logits: Tensor) -> None:
        """Tokens of the step's sampled rows; those chosen on the device are noted for the step behind it."""
        tokens = self._sample(logits, self._inputs.sampled)
        if tokens is not None:
            self.mirror.note([self.tables.slot(r) for r in self._inputs.sampled], tokens)

    def _all_logits(self) -> Tensor:
        """Of every row, nobody's too."""
        return self._logits_of([rows.ended() for rows, _ in zip(self.rows, self._layouts, strict=False)])

    def _logits_of(self, hidden: list[Tensor]) -> Tensor:
        product = self._head_product if self._capturing else self.tuned.head.linear
        return self.model.logits(torch.cat(hidden) if len(hidden) > 1 else hidden[0], product)

    def _reserve_logits(self, rows: int) -> None:
        """Room for the logits of captured steps of so many rows; those captured before keep theirs."""
        if not self._rooms or len(self._rooms[-1]) < rows:
            vocab, dtype = len(self.model.weights.head), self.model.dtype
            self._rooms.append(torch.empty((rows, vocab), dtype=dtype, device=self.model.device))

    def _head_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Where all graphs write: a step's are read before the next one runs, and they are large."""
        out = self._rooms[-1][: len(x)]
        self.tuned.head(x, weight, None, out)
        return out


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of this device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _layout(batch: BatchInputs) -> Layout:
    cpu, relay = batch.cpu, batch.relay
    relayed = (0, 0) if relay is None else (relay.row, relay.lanes)
    return Layout(len(batch.tokens), batch.gpu.row, len(batch.gpu), cpu.row, len(cpu), *relayed)

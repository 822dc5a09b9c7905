"""Templates: which operations a step of a given shape has, in which order, after which others.

See ``neo.core.pipeline`` for the picture. Order matters only within a resource; across resources the
dependencies decide.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from neo.core.graph import NO_BATCH, RELAY, Dep, OpKind, Section, Template, TemplateOp

WorkKey = tuple[OpKind, int, int]  # kind, sub-batch, variant (streams: which run of layers)

LOOK_AHEAD = 16  # layers that a stream may run ahead; bounds how many end times a step's timing remembers


class Shape(NamedTuple):
    """What distinguishes one template from another.

    ``streams`` lists runs of consecutive layers as (layers, whether KV is streamed in them).
    """

    layers: int
    pipelined: bool = False
    attention: bool = True  # GPU attention in sub-batch 0
    cpu0: bool = False  # CPU decodes in sub-batch 0
    cpu1: bool = False
    relay_out: bool = False  # relayed decodes leave a layer's PRE for the CPU
    relay_in: bool = False  # others come back for its POST
    swap_out: bool = False  # moves to the CPU ahead of use
    swap_in: bool = False
    spill: bool = False  # new KV that goes to the CPU behind PRE
    streams: tuple[tuple[int, bool], ...] = ()
    ring: int = 1  # staging buffers that streamed layers rotate through
    allreduce: bool = False
    head: bool = True


@lru_cache(maxsize=4096)
def template_for(shape: Shape) -> tuple[Template, tuple[WorkKey, ...]]:
    """The template of a shape, and the key of each of its work entries."""
    return _Builder(shape).build()


class _Builder:
    def __init__(self, shape: Shape) -> None:
        self.s = shape
        self.keys: dict[WorkKey, int] = {}
        runs = shape.streams or ((shape.layers, False),)
        self.stream_run = [i if on else None for i, (n, on) in enumerate(runs) for _ in range(n)]
        self.streamed = [layer for layer, run in enumerate(self.stream_run) if run is not None]

    def build(self) -> tuple[Template, tuple[WorkKey, ...]]:
        sections = self.pipelined() if self.s.pipelined else self.sequential()
        keys = tuple(self.keys)
        counts = [0] * len(keys)
        for section in sections:
            for op in section.ops:
                counts[op.work] += section.repeat
        serial = not (
            self.s.pipelined
            or self.s.cpu0
            or self.s.relay_out
            or self.s.relay_in
            or self.s.swap_out
            or self.s.swap_in
            or self.s.spill
            or any(on for _, on in self.s.streams)
        )
        template = Template(
            tuple(s for s in sections if s.repeat), tuple(k[0] for k in keys), tuple(counts), serial
        )
        return template, keys

    def op(
        self, kind: OpKind, batch: int, deps: Iterable[Dep], offset: int | None = 0, variant: int = 0
    ) -> TemplateOp:
        work = self.keys.setdefault((kind, batch, variant), len(self.keys))
        return TemplateOp(kind, batch, tuple(deps), work, offset)

    def start(self) -> list[TemplateOp]:
        return [
            self.op(OpKind.SCHEDULE, NO_BATCH, (), None),
            self.op(OpKind.EMBED, NO_BATCH, (Dep(OpKind.SCHEDULE, NO_BATCH),), None),
        ]

    def layer_end(self, batch: int) -> Dep:
        return Dep(OpKind.ALLREDUCE if self.s.allreduce else OpKind.POST, batch)

    def head(self) -> list[TemplateOp]:
        if not self.s.head:
            return []
        outputs = [self.layer_end(0), self.layer_end(1)] if self.s.pipelined else [self.layer_end(0)]
        return [self.op(OpKind.HEAD, NO_BATCH, outputs, None)]

    def ahead(self, layer: int, offset: int) -> list[TemplateOp]:
        """Copies to the GPU that layer ``layer`` needs; listed early so that they run ahead of it."""
        ops = []
        ready = (Dep(OpKind.SCHEDULE, NO_BATCH),)
        if self.s.swap_in:
            ops.append(self.op(OpKind.SWAP_IN, NO_BATCH, ready, offset))
        run = self.stream_run[layer]
        if run is not None:
            deps = (*ready, Dep(OpKind.GPU_ATTN, 0, self.lag(layer)))
            ops.append(self.op(OpKind.STREAM, 0, deps, offset, variant=run))
        return ops

    def lag(self, layer: int) -> int:
        """Attentions from the one that last read the buffer of streamed ``layer`` to the latest one."""
        back = bisect_left(self.streamed, layer) - self.s.ring
        last_read = self.streamed[back] if back >= 0 else -1
        return min(layer - 1 - last_read, max(LOOK_AHEAD, self.s.ring) - 1)

    def pre(self, batch: int) -> list[TemplateOp]:
        """PRE of a sub-batch with what directly follows it: rows to the host, new KV to the host."""
        s = self.s
        deps = [self.layer_end(batch), Dep(OpKind.EMBED, NO_BATCH)]
        if batch == 0:
            deps += [Dep(OpKind.SWAP_OUT, NO_BATCH)] if s.swap_out else []
            deps += [Dep(OpKind.SWAP_OUT, 0)] if s.spill else []
        ops = [self.op(OpKind.PRE, batch, deps)]
        if s.cpu1 if batch else s.cpu0:
            ops.append(self.op(OpKind.SEND, batch, (Dep(OpKind.PRE, batch),)))
        if batch == 0 and s.spill:
            ops.append(self.op(OpKind.SWAP_OUT, 0, (Dep(OpKind.PRE, 0),)))
        return ops

    def swap_out(self) -> list[TemplateOp]:
        ready = (Dep(OpKind.SCHEDULE, NO_BATCH),)
        return [self.op(OpKind.SWAP_OUT, NO_BATCH, ready)] if self.s.swap_out else []

    def gpu_attention(self) -> list[TemplateOp]:
        if not self.s.attention:
            return []
        deps = [Dep(OpKind.PRE, 0)]
        deps += [Dep(OpKind.SWAP_IN, NO_BATCH)] if self.s.swap_in else []
        deps += [Dep(OpKind.STREAM, 0)] if self.s.streams else []
        return [self.op(OpKind.GPU_ATTN, 0, deps)]

    def cpu_attention(self, batch: int, offset: int = 0) -> list[TemplateOp]:
        if not (self.s.cpu1 if batch else self.s.cpu0):
            return []
        return [self.op(OpKind.CPU_ATTN, batch, (Dep(OpKind.SEND, batch),), offset)]

    def recv(self, batch: int, offset: int = 0) -> list[TemplateOp]:
        if not (self.s.cpu1 if batch else self.s.cpu0):
            return []
        return [self.op(OpKind.RECV, batch, (Dep(OpKind.CPU_ATTN, batch),), offset)]

    def relay(self) -> list[TemplateOp]:
        """Rows that leave for the CPU, attention of those that left in a step before, and their way back.

        That attention waits for nothing of this step: it begins with it and goes ahead of the GPU.
        """
        ops = []
        if self.s.relay_in:
            ops.append(self.op(OpKind.CPU_ATTN, RELAY, (Dep(OpKind.SCHEDULE, NO_BATCH),)))
            deps = [Dep(OpKind.CPU_ATTN, RELAY), Dep(OpKind.PRE, 0)]  # rows go as others come: both at once
            ops.append(self.op(OpKind.RECV, RELAY, deps))
        if self.s.relay_out:
            ops.append(self.op(OpKind.SEND, RELAY, (Dep(OpKind.PRE, 0),)))
        return ops

    def post(self, batch: int, offset: int = 0) -> list[TemplateOp]:
        deps = [Dep(OpKind.PRE, batch)]
        deps += [Dep(OpKind.RECV, RELAY)] if batch == 0 and self.s.relay_in else []
        deps += [Dep(OpKind.GPU_ATTN, 0)] if batch == 0 and self.s.attention else []
        deps += [Dep(OpKind.RECV, batch)] if (self.s.cpu1 if batch else self.s.cpu0) else []
        ops = [self.op(OpKind.POST, batch, deps, offset)]
        if self.s.allreduce:
            ops.append(self.op(OpKind.ALLREDUCE, batch, (Dep(OpKind.POST, batch),), offset))
        return ops

    def repeated(self, layers: range, ops_of: Callable[[int], list[TemplateOp]]) -> list[Section]:
        """Sections for a range of layers, equal neighbours merged."""
        sections = []
        for _, group in groupby(layers, key=lambda layer: self.signature(layer)):
            same = list(group)
            sections.append(Section(tuple(ops_of(same[0])), len(same), same[0]))
        return sections

    def signature(self, layer: int) -> object:
        following = layer if self.s.pipelined else layer + 1
        if following == self.s.layers:
            return "last"
        run = self.stream_run[following]
        return None if run is None else (run, self.lag(following))

    def sequential(self) -> list[Section]:
        def layer_ops(layer: int) -> list[TemplateOp]:
            following = self.ahead(layer + 1, 1) if layer + 1 < self.s.layers else []
            return [
                *self.swap_out(),
                *self.pre(0),
                *self.cpu_attention(0),
                *self.gpu_attention(),
                *following,
                *self.relay(),
                *self.recv(0),
                *self.post(0),
            ]

        first = [*self.start(), *self.ahead(0, 0)]
        moving = self.s.swap_in or any(on for _, on in self.s.streams)
        layers = range(self.s.layers)
        if moving:
            body = self.repeated(layers, layer_ops)
        else:
            body = [Section(tuple(layer_ops(self.s.layers - 1)), self.s.layers, 0)]
        return [Section(tuple(first)), *body, Section(tuple(self.head()), 1, self.s.layers)]

    def pipelined(self) -> list[Section]:
        s = self.s
        first = [
            *self.start(),
            *self.ahead(0, 0),
            *self.swap_out(),
            *self.pre(0),
            *self.cpu_attention(0),
            *self.pre(1),
            *self.gpu_attention(),
            *self.recv(0),
        ]

        def layer_ops(layer: int) -> list[TemplateOp]:
            return [
                *self.swap_out(),
                *self.ahead(layer, 0),
                *self.cpu_attention(1, -1),
                *self.post(0, -1),
                *self.pre(0),
                *self.recv(1, -1),
                *self.cpu_attention(0),
                *self.post(1, -1),
                *self.pre(1),
                *self.gpu_attention(),
                *self.recv(0),
            ]

        body = self.repeated(range(1, s.layers), layer_ops)
        last = [*self.cpu_attention(1), *self.post(0), *self.recv(1), *self.post(1), *self.head()]
        return [Section(tuple(first)), *body, Section(tuple(last), 1, s.layers - 1)]

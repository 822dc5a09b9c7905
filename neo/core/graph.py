"""StepGraph: the operations of one step, in the compact periodic form both executors share.

A transformer step is a prologue, one layer's operations repeated, and an epilogue. The graph keeps just
that: a ``Template`` (which operations, on which resource, after which others; shared between all steps of
the same shape) and one ``Work`` per template operation (the numbers of this step).

Order. Operations of one resource run in the order in which the graph lists them (as on a CUDA stream).
A dependency names an operation kind and sub-batch and means *the most recent one before this operation in
program order*; where there was none yet, it is no constraint. This is what makes the layer loop implicit:
``PRE`` depends on ``POST`` and thereby on the previous layer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class OpKind(StrEnum):
    """The kinds of operations a step is made of."""

    SCHEDULE = "SCHEDULE"  # host: planning the step and preparing its inputs
    EMBED = "EMBED"  # token embedding
    PRE = "PRE"  # norm, QKV projection, rotary, KV append (to blocks still being swapped in: with GPU_ATTN)
    GPU_ATTN = "GPU_ATTN"  # prefill and decode attention on the GPU
    SEND = "SEND"  # q, k, v rows of CPU decodes to the host
    CPU_ATTN = "CPU_ATTN"  # decode attention on the CPU
    RECV = "RECV"  # its output rows back to the GPU
    POST = "POST"  # output projection and feed-forward network
    SWAP_OUT = "SWAP_OUT"  # one layer's KV blocks, GPU to host
    SWAP_IN = "SWAP_IN"  # one layer's KV blocks, host to GPU
    STREAM = "STREAM"  # one layer's KV into a staging buffer, ahead of its use
    ALLREDUCE = "ALLREDUCE"  # tensor parallel: sum of partial outputs over the ranks
    HEAD = "HEAD"  # final norm, logits, sampling


class Resource(StrEnum):
    """What an operation occupies while it runs; each runs one operation at a time, in program order."""

    HOST = "host"  # the scheduler's thread
    GPU = "gpu"
    CPU = "cpu"  # the CPU attention pool
    H2D = "h2d"
    D2H = "d2h"
    LINK = "link"  # between GPUs


RESOURCE_OF: dict[OpKind, Resource] = {
    OpKind.SCHEDULE: Resource.HOST,
    OpKind.EMBED: Resource.GPU,
    OpKind.PRE: Resource.GPU,
    OpKind.GPU_ATTN: Resource.GPU,
    OpKind.SEND: Resource.D2H,
    OpKind.CPU_ATTN: Resource.CPU,
    OpKind.RECV: Resource.H2D,
    OpKind.POST: Resource.GPU,
    OpKind.SWAP_OUT: Resource.D2H,
    OpKind.SWAP_IN: Resource.H2D,
    OpKind.STREAM: Resource.H2D,
    OpKind.ALLREDUCE: Resource.LINK,
    OpKind.HEAD: Resource.GPU,
}


class Work(NamedTuple):
    """How much one operation does (in one layer, over all tensor-parallel ranks): numbers, never tensors.

    When the simulator advances several equal decode steps at once, ``kv_tokens`` is a numpy integer array
    with one entry per step; a cost model that sets ``vectorized`` then returns an array of that length.
    """

    tokens: int = 0  # rows of the dense work: new tokens of this step
    sequences: int = (
        0  # sequences of decode attention; rows that HEAD samples; requests that SCHEDULE handles
    )
    kv_tokens: int = 0  # KV tokens read by decode attention, summed over sequences, the new ones included
    bytes: int = 0  # bytes a copy or ALLREDUCE moves
    chunks: tuple[tuple[int, int], ...] = ()  # prefill chunks (start, length) of GPU_ATTN
    beside_bytes: int = (
        0  # copies: bytes going the other way in this layer; CPU_ATTN: bytes of all its copies
    )
    layers: int = 1  # CPU_ATTN: layers that the CPU's threads serve in one run, with as much work each


NO_BATCH = (
    -1
)  # the sub-batch of operations that belong to none: planning, embedding, moves ahead of use, HEAD


RELAY = 2  # the sub-batch of what is done for relayed decodes alone


class Dep(NamedTuple):
    """'After the most recent ``kind`` of sub-batch ``batch``', or the ``lag``-th before that one."""

    kind: OpKind
    batch: int = 0
    lag: int = 0


@dataclass(frozen=True, slots=True)
class TemplateOp:
    """One operation of a template.

    ``work`` indexes the graph's works; ``layer_offset`` is relative to the iteration's layer, None for
    operations that belong to no layer.
    """

    kind: OpKind
    batch: int
    deps: tuple[Dep, ...]
    work: int
    layer_offset: int | None = 0

    @property
    def resource(self) -> Resource:
        """What it occupies."""
        return RESOURCE_OF[self.kind]


@dataclass(frozen=True, slots=True)
class Section:
    """Operations repeated ``repeat`` times; iteration i works on layer ``first_layer + i``."""

    ops: tuple[TemplateOp, ...]
    repeat: int = 1
    first_layer: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """The shape of a graph, shared by all steps that have it.

    Attributes:
        sections: the operations, in program order.
        kinds: per work entry, its operation kind.
        counts: per work entry, how often it runs in the whole step.
        serial: every operation waits for the one before it, so a step takes the sum of its operations.
    """

    sections: tuple[Section, ...]
    kinds: tuple[OpKind, ...]
    counts: tuple[int, ...]
    serial: bool


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of an expanded graph; ``deps`` are indices into the expanded list."""

    index: int
    kind: OpKind
    layer: int | None
    batch: int
    resource: Resource
    deps: tuple[int, ...]
    work: int


@dataclass(frozen=True, slots=True, eq=False)
class StepGraph:
    """The operations of a step: a shared template and this step's work numbers."""

    template: Template
    works: tuple[Work, ...]

    def expand(self) -> Iterator[Op]:
        """Every operation with its layer and explicit dependencies, in program order.

        For the ``op`` level, timelines, engines and tests; the ``step`` level never expands.
        """
        latest: dict[tuple[OpKind, int], list[int]] = {}
        index = 0
        for section in self.template.sections:
            for i in range(section.repeat):
                for op in section.ops:
                    deps = []
                    for dep in op.deps:
                        done = latest.get((dep.kind, dep.batch), ())
                        if len(done) > dep.lag:
                            deps.append(done[-1 - dep.lag])
                    layer = None if op.layer_offset is None else section.first_layer + i + op.layer_offset
                    yield Op(index, op.kind, layer, op.batch, op.resource, tuple(deps), op.work)
                    latest.setdefault((op.kind, op.batch), []).append(index)
                    index += 1

"""What the ``cuda`` executor does of a template: its operations, and what each waits for on other streams."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from neo.core.graph import OpKind, Template

COPIES = frozenset({OpKind.SWAP_OUT, OpKind.SWAP_IN, OpKind.STREAM})
ORDERED = COPIES | {OpKind.PRE, OpKind.GPU_ATTN}
"""What an operation of another stream may wait for."""
_SKIPPED = frozenset({OpKind.SCHEDULE, OpKind.CPU_ATTN, OpKind.ALLREDUCE})


class Step(NamedTuple):
    """One operation of a template; ``waits`` are of other streams: (kind, sub-batch, lag)."""

    kind: OpKind
    batch: int
    offset: int | None
    work: int
    waits: tuple[tuple[OpKind, int, int], ...]


@lru_cache(maxsize=4096)
def program(template: Template) -> tuple[bool, tuple[tuple[int, int, tuple[Step, ...]], ...]]:
    """Whether anything is copied, and sections as (repeat, first layer, operations)."""
    sections = []
    for section in template.sections:
        steps = []
        for op in section.ops:
            if op.kind in _SKIPPED:
                continue
            copy = op.kind in COPIES
            waits = [
                (d.kind, d.batch, d.lag) for d in op.deps if d.kind in ORDERED and (copy or d.kind in COPIES)
            ]
            steps.append(Step(op.kind, op.batch, op.layer_offset, op.work, tuple(waits)))
        sections.append((section.repeat, section.first_layer, tuple(steps)))
    return any(k in COPIES for k in template.kinds), tuple(sections)


@lru_cache(maxsize=4096)
def work_of(template: Template, kind: OpKind, batch: int) -> int:
    """Index of the work of an operation kind of a sub-batch."""
    return next(op.work for s in template.sections for op in s.ops if op.kind is kind and op.batch == batch)

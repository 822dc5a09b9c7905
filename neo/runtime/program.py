"""What an executor on host threads does of a template: what moves something, and what each waits for.

SEND, RECV and ALLREDUCE move nothing where both tiers are one memory, SCHEDULE is over when a step begins:
they are fused into their neighbours. What waits for RECV waits for the attention behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from neo.core.graph import RESOURCE_OF, OpKind, Resource, Template
from neo.runtime.backend import Ticket
from neo.runtime.errors import EngineError
from neo.runtime.executor import FAULTS

FUSED = frozenset({OpKind.SCHEDULE, OpKind.SEND, OpKind.RECV, OpKind.ALLREDUCE})
_OTHERS = frozenset({Resource.CPU, Resource.H2D, Resource.D2H})  # what a worker runs
_ALIAS = {OpKind.RECV: OpKind.CPU_ATTN}  # fused: RECV has ended when the attention has


class Step(NamedTuple):
    """One operation of a template, with the worker operations it must wait for: (kind, sub-batch, lag)."""

    kind: OpKind
    batch: int
    offset: int | None
    work: int
    resource: Resource
    waits: tuple[tuple[OpKind, int, int], ...]


Issued = tuple[Step, int | None, Ticket]
"""A worker's operation, its layer and its job."""


@lru_cache(maxsize=4096)
def program(template: Template) -> tuple[tuple[int, int, tuple[Step, ...]], ...]:
    """Sections as (repeat, first layer, operations that do something)."""
    sections = []
    for section in template.sections:
        steps = []
        for op in section.ops:
            if op.kind in FUSED:
                continue
            waits = [
                (_ALIAS.get(d.kind, d.kind), d.batch, d.lag)
                for d in op.deps
                if RESOURCE_OF[d.kind] in _OTHERS and d.kind is not OpKind.SEND
            ]
            steps.append(Step(op.kind, op.batch, op.layer_offset, op.work, op.resource, tuple(waits)))
        sections.append((section.repeat, section.first_layer, tuple(steps)))
    return tuple(sections)


def fault(step: Step, layer: int | None, error: Exception) -> EngineError:
    """What to raise when an operation of a layer could not be done."""
    where = "" if layer is None else f" of layer {layer}, sub-batch {step.batch},"
    return EngineError(f"{step.kind}{where} failed: {error}")


def wait_for(tickets: Sequence[Ticket], issued: Sequence[Issued]) -> None:
    """Return when these jobs have ended; EngineError, naming the operation that failed, if one has failed."""
    for ticket in tickets:
        try:
            ticket.worker.wait(ticket)
        except FAULTS as error:
            raise _blame(ticket, issued, error) from error


def _blame(awaited: Ticket, issued: Sequence[Issued], error: Exception) -> EngineError:
    """Of the first job that failed, in program order: those behind it only fail because it did."""
    for step, layer, ticket in issued:
        if ticket.done:
            try:
                ticket.worker.wait(ticket)
            except FAULTS as first:
                return fault(step, layer, first)
        elif ticket is awaited:
            return fault(step, layer, error)
    raise AssertionError("a job that was never issued")

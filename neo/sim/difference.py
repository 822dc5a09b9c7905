"""How a plan differs from the one that a run log holds, in words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from neo.core.logreader import ROLES, BatchLine, LogReader, RoleLine, StepLine
from neo.core.plan import StepPlan, SubBatch
from neo.core.request import Request

_MOST_NAMED = 3  # requests named in a message


class Differences:
    """Compares the steps of a log, in order, with plans; knows the members that a line says changes to.

    Args:
        reader: the log, for the place in messages.
        added: ids of requests that the log has added so far.
    """

    def __init__(self, reader: LogReader, added: Collection[str]) -> None:
        self._reader = reader
        self._added = added
        self._last: dict[tuple[int, str], tuple[Request, ...]] = {}

    def first(self, line: StepLine, plan: StepPlan) -> str | None:
        """The first difference; None if the plan is the logged one (``why`` is not compared).

        Raises:
            InputError: the line contradicts itself or the lines before it.
        """
        if len(line.batches) != len(plan.batches):
            return f"the log has {len(line.batches)} sub-batches, the policy plans {len(plan.batches)}"
        for i, (logged, planned) in enumerate(zip(line.batches, plan.batches, strict=True)):
            what = self._prefill(line, logged, planned) or self._roles(line, i, logged, planned)
            if what is not None:
                return f"sub-batch {i}, {what}"
        rows: tuple[tuple[str, tuple[Any, ...], list[tuple[Any, ...]]], ...] = (
            (
                "moves",
                line.moves,
                [(m.request.id, str(m.dst), *(m.layers or ()), str(m.order)) for m in plan.moves],
            ),
            ("evict", line.evict, [(e.request.id, str(e.mode)) for e in plan.evict]),
            ("reject", line.reject, [(r.request.id, r.reason) for r in plan.reject]),
        )
        for name, logged_rows, planned_rows in rows:
            if list(logged_rows) != planned_rows:
                return f"{name}: {_first_unequal(logged_rows, planned_rows)}"
        if line.ring != plan.ring:
            return f"ring: the log has {line.ring} buffers, the policy {plan.ring}"
        return None

    def _prefill(self, line: StepLine, logged: BatchLine, planned: SubBatch) -> str | None:
        chunks = [(c.request.id, c.start, c.length, str(c.dst)) for c in planned.prefill]
        if list(logged.prefill) == chunks:
            return None
        self._check_added(line, [c[0] for c in logged.prefill])
        return f"prefill: {_first_unequal(logged.prefill, chunks)}"

    def _roles(self, line: StepLine, index: int, logged: BatchLine, planned: SubBatch) -> str | None:
        for role in ROLES:
            members: tuple[Request, ...] = getattr(planned, role)
            before = self._last.get((index, role), ())
            said = logged.roles.get(role)
            if members is before and members and said == RoleLine(len(members)):
                continue
            was, now = [r.id for r in before], [r.id for r in members]
            expected = self._members(
                line, f"sub-batch {index}, {role}", was, said or RoleLine(0), said is None
            )
            if set(expected) != set(now):
                return f"{role}: {_set_difference(expected, now)}"
            joined = [x for x in now if x not in set(was)]
            if said is not None and list(said.add) != joined:
                return f"{role}: {_first_unequal([(x,) for x in said.add], [(x,) for x in joined])}"
            self._last[index, role] = members
        return None

    def _members(
        self, line: StepLine, place: str, before: list[str], said: RoleLine, absent: bool
    ) -> list[str]:
        """The members of a role that a line gives as changes against the step before."""
        if absent and before:
            raise self._reader.error(f"{place} is missing; it had {len(before)} requests", line.line)
        self._check_added(line, said.add)
        old, drop = set(before), set(said.drop)
        if not drop <= old or old & set(said.add):
            wrong = sorted(drop - old) + sorted(old & set(said.add))
            raise self._reader.error(f"{place}: request {wrong[0]!r} cannot leave or join here", line.line)
        now = [x for x in before if x not in drop] + list(said.add)
        if len(now) != said.n:
            raise self._reader.error(f"{place}: n is {said.n}, its changes give {len(now)}", line.line)
        return now

    def _check_added(self, line: StepLine, ids: Sequence[str]) -> None:
        for name in ids:
            if name not in self._added:
                raise self._reader.error(f"request {name!r} was never added", line.line)


def _first_unequal(logged: Sequence[tuple[Any, ...]], planned: Sequence[tuple[Any, ...]]) -> str:
    """The first entry that differs."""
    for mine, theirs in zip(logged, planned, strict=False):
        if mine != theirs:
            return f"the log has {_shown(mine)}, the policy {_shown(theirs)}"
    if len(logged) > len(planned):
        return f"the log has {_shown(logged[len(planned)])}, the policy has no such entry"
    return f"the policy has {_shown(planned[len(logged)])}, the log has no such entry"


def _shown(entry: tuple[Any, ...]) -> str:
    return " ".join(str(x) for x in entry)


def _set_difference(logged: Sequence[str], planned: Sequence[str]) -> str:
    parts = []
    for mine, theirs, whose in ((logged, planned, "the log"), (planned, logged, "the policy's plan")):
        only = [x for x in mine if x not in set(theirs)]
        if only:
            names = ", ".join(only[:_MOST_NAMED]) + (", ..." if len(only) > _MOST_NAMED else "")
            parts.append(f"only in {whose}: {len(only)} of {len(mine)} ({names})")
    return "; ".join(parts)

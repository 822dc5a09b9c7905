"""The run log: one JSON object a line, written by simulator and engine alike, read by ``neo validate``.

Lines, by ``"type"``:

- ``run``: what ran (policy, options, model, hardware, limits, pools, cost model).
- ``add``: a request entered the scheduler: ``t``, ``id``, ``prompt``, ``max_tokens``, ``priority``.
- ``end``: a request ended before its length limit: ``t``, ``id``, ``reason``.
- ``step``: ``t`` start, ``end``, ``steps`` (repetitions), ``why``, ``batches``, and where present ``moves``,
  ``evict``, ``reject``. In a batch, ``prefill`` lists [id, start, length, tier]; each decode role holds ``n``
  requests and how its membership differs from the same role in the step before: ``add``, ``drop`` (ids).

Times are seconds on the driver's clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TextIO

from neo.core.plan import StepPlan
from neo.core.request import Request

_ROLES = ("gpu_decode", "cpu_decode", "stream_decode")
_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class RunLog:
    """Writes a run log to an open text file."""

    def __init__(self, file: TextIO, header: Mapping[str, Any]) -> None:
        self._write = file.write
        self._last: dict[tuple[int, str], tuple[Request, ...]] = {}
        self._line({"type": "run", **header})

    def _line(self, record: Mapping[str, Any]) -> None:
        self._write(_dumps(record) + "\n")

    def add(self, now: float, request: Request) -> None:
        """A request entered the scheduler."""
        record: dict[str, Any] = {
            "type": "add",
            "t": now,
            "id": request.id,
            "prompt": request.prompt_tokens,
            "max_tokens": request.max_tokens,
        }
        if request.priority:
            record["priority"] = request.priority
        self._line(record)

    def end(self, now: float, request_id: str, reason: str) -> None:
        """A request ended before its length limit."""
        self._line({"type": "end", "t": now, "id": request_id, "reason": reason})

    def step(self, plan: StepPlan, start: float, end: float, steps: int) -> None:
        """A step (or ``steps`` repetitions of it) ran."""
        record: dict[str, Any] = {"type": "step", "t": start, "end": end, "steps": steps, "why": plan.why}
        record["batches"] = [self._batch(plan, i) for i in range(len(plan.batches))]
        if plan.moves:
            record["moves"] = [[m.request.id, m.dst, *(m.layers or ()), m.order] for m in plan.moves]
        if plan.evict:
            record["evict"] = [[e.request.id, e.mode] for e in plan.evict]
        if plan.reject:
            record["reject"] = [[r.request.id, r.reason] for r in plan.reject]
        self._line(record)

    def _batch(self, plan: StepPlan, index: int) -> dict[str, Any]:
        batch = plan.batches[index]
        record: dict[str, Any] = {}
        if batch.prefill:
            record["prefill"] = [[c.request.id, c.start, c.length, c.dst] for c in batch.prefill]
        for role in _ROLES:
            members: tuple[Request, ...] = getattr(batch, role)
            before = self._last.get((index, role), ())
            if members is before:
                if members:
                    record[role] = {"n": len(members)}
                continue
            self._last[index, role] = members
            now_ids, old_ids = {r.id for r in members}, {r.id for r in before}
            entry: dict[str, Any] = {"n": len(members)}
            if added := [r.id for r in members if r.id not in old_ids]:
                entry["add"] = added
            if dropped := [r.id for r in before if r.id not in now_ids]:
                entry["drop"] = dropped
            record[role] = entry
        return record

"""The run log: one JSON object a line, written by simulator and engine alike, read by ``neo validate``.

Lines, by ``"type"``:

- ``run``: what ran (policy, options, model, hardware, limits, pools, cost model).
- ``add``: a request entered the scheduler: ``t``, ``id``, ``prompt``, ``max_tokens``, ``priority``.
- ``end``: a request was told to end before its length limit: ``t``, ``id``, ``reason``. In a running step it
  ends with the step; if that brings its last token anyway, it finishes with reason ``length``.
- ``step``: ``t`` (when it was planned), ``end``, ``steps`` (repetitions), ``why``, ``batches``, and where
  present ``moves``, ``evict``, ``reject``, ``ring`` (if not 0: staging buffers taken for this step). In a
  batch, ``prefill`` lists [id, start, length, tier]; each decode role holds ``n`` requests and how its
  membership differs from the same role in the step before: ``add``, ``drop`` (ids). Steps of an engine may
  also have ``start`` (from when on it is counted, where that is not ``t``: at the end of the step before,
  whose clearing up is part of it), ``stopped`` (id: reason of requests that ended before their length
  limit), ``ops`` (measured: ``KIND:sub-batch`` to [operations, seconds in all]) and ``cost`` (the factors of
  a cost model that learns, if this step changed them: what is planned once it has ended follows them).

Times are seconds on the driver's clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii as _quote
from typing import Any, TextIO

from neo.core.learning import learning
from neo.core.plan import StepPlan, SubBatch
from neo.core.request import Request

_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class RunLog:
    """Writes a run log to an open text file.

    Args:
        file: where to.
        header: the ``run`` line.
        cost: the cost model that is planned with: what it learns is part of the log.
    """

    def __init__(self, file: TextIO, header: Mapping[str, Any], cost: object = None) -> None:
        self._write = file.write
        self._learning = learning(cost)
        self._version = self._learning.version if self._learning is not None else 0
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

    def step(
        self,
        plan: StepPlan,
        planned_s: float,
        end: float,
        steps: int = 1,
        *,
        start: float | None = None,
        stopped: Mapping[str, str] | None = None,
        ops: Mapping[str, tuple[int, float]] | None = None,
    ) -> None:
        """A step (or ``steps`` repetitions of it) ran; see the module's description for the fields."""
        # Formatted by hand: this line is written for every step, and is most of the log.
        batches = ",".join([self._batch(batch, i) for i, batch in enumerate(plan.batches)])
        line = (
            f'{{"type":"step","t":{planned_s!r},"end":{end!r},"steps":{steps},"why":{_quote(plan.why)},'
            f'"batches":[{batches}]'
        )
        if plan.moves:
            moves = [[m.request.id, m.dst, *(m.layers or ()), m.order] for m in plan.moves]
            line += f',"moves":{_dumps(moves)}'
        if plan.evict:
            line += f',"evict":{_dumps([[e.request.id, e.mode] for e in plan.evict])}'
        if plan.reject:
            line += f',"reject":{_dumps([[r.request.id, r.reason] for r in plan.reject])}'
        if plan.ring:
            line += f',"ring":{plan.ring}'
        for name, given in (("start", start), ("stopped", stopped), ("ops", ops)):
            if given:
                line += f',"{name}":{_dumps(given)}'
        if self._learning is not None and self._learning.version != self._version:
            self._version = self._learning.version
            line += f',"cost":{_dumps(dict(self._learning.factors))}'
        self._write(line + "}\n")

    def _batch(self, batch: SubBatch, index: int) -> str:
        parts = []
        if batch.prefill:
            chunks = [f'[{_quote(c.request.id)},{c.start},{c.length},"{c.dst}"]' for c in batch.prefill]
            parts.append(f'"prefill":[{",".join(chunks)}]')
        roles = (
            ("gpu_decode", batch.gpu_decode),
            ("cpu_decode", batch.cpu_decode),
            ("stream_decode", batch.stream_decode),
            ("relay_decode", batch.relay_decode),
        )
        for role, members in roles:
            before = self._last.get((index, role), ())
            if members is before or members == before:
                if members:
                    parts.append(f'"{role}":{{"n":{len(members)}}}')
                continue
            self._last[index, role] = members
            now_set, old_set = set(members), set(before)
            entry = f'"{role}":{{"n":{len(members)}'
            if added := [_quote(r.id) for r in members if r not in old_set]:
                entry += f',"add":[{",".join(added)}]'
            if dropped := [_quote(r.id) for r in before if r not in now_set]:
                entry += f',"drop":[{",".join(dropped)}]'
            parts.append(entry + "}")
        return "{" + ",".join(parts) + "}"

"""Reading what a run left behind: its log (``steps.jsonl``, see ``neo.core.runlog``) and ``requests.csv``.

Both are read line by line; whatever is wrong is an InputError that names file and line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from neo.core.errors import InputError
from neo.core.request import FinishReason, Tier

LOG_FILE = "steps.jsonl"
FORMAT = 1  # of the run log; a header without the key "format" is of this one
ROLES = ("gpu_decode", "cpu_decode", "stream_decode", "relay_decode")
_COLUMNS = ("request_id", "arrival_s", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s", "e2e_s")


@dataclass(frozen=True, slots=True)
class AddLine:
    """A request entered the scheduler."""

    line: int
    t: float
    id: str
    prompt: int
    max_tokens: int
    priority: int = 0


@dataclass(frozen=True, slots=True)
class EndLine:
    """A request was told to end, or was rejected."""

    line: int
    t: float
    id: str
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class RoleLine:
    """A decode role: how many requests, and how they differ from the same role in the step before."""

    n: int
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A sub-batch; ``prefill`` holds (id, start, length, tier)."""

    prefill: tuple[tuple[str, int, int, str], ...] = ()
    roles: Mapping[str, RoleLine] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepLine:
    """A step that ran (or ``steps`` repetitions of it): the plan, its times in seconds, what was measured.

    ``moves`` holds (id, tier, [first layer, end layer,] order), ``evict`` (id, mode), ``reject``
    (id, reason), ``ring`` the plan's, ``ops`` by (kind, sub-batch) the number of operations and their
    seconds in all, ``cost`` the factors that a cost model took from the step.
    """

    line: int
    t: float
    end: float
    steps: int
    batches: tuple[BatchLine, ...]
    moves: tuple[tuple[Any, ...], ...] = ()
    evict: tuple[tuple[Any, ...], ...] = ()
    reject: tuple[tuple[Any, ...], ...] = ()
    start: float | None = None
    stopped: Mapping[str, FinishReason] = field(default_factory=dict)
    ops: Mapping[tuple[str, int], tuple[int, float]] = field(default_factory=dict)
    ring: int = 0
    cost: Mapping[str, float] = field(default_factory=dict)


Entry = AddLine | EndLine | StepLine


@dataclass(frozen=True, slots=True)
class RequestRow:
    """A line of ``requests.csv``; times in seconds, None where the cell is empty."""

    line: int
    id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    reason: FinishReason | None


class _LineError(ValueError):
    """What is wrong with a line, before its place is known."""


class LogReader:
    """A run log, opened: its header now, its entries by iteration (once).

    Attributes:
        header: the ``run`` line.
        line: number of the line read last.
        cut: whether the last line was cut off, as when the run was killed (known once all is read).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0
        self.cut = False
        self._lines = self._records()
        self.header = next(self._lines, {})
        if self.header.get("type") != "run":
            raise self.error("not the header of a run log (an object of type 'run')")
        written = self.header.get("format", FORMAT)
        if written != FORMAT:
            raise self.error(f"a run log of format {written!r}; this version of neo reads format {FORMAT}")

    def error(self, what: str, line: int | None = None) -> InputError:
        """An InputError about a line, the one read last unless said otherwise."""
        return InputError(f"{self.path}:{max(1, line or self.line)}: {what}")

    def __iter__(self) -> Iterator[Entry]:
        for record in self._lines:
            try:
                yield _entry(record, self.line)
            except _LineError as wrong:
                raise self.error(str(wrong)) from wrong

    def _records(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open(encoding="utf-8") as file:
                yield from self._parsed(file)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            self.line += 1
            raise self.error(f"not UTF-8: {error.reason}") from error

    def _parsed(self, file: TextIO) -> Iterator[dict[str, Any]]:
        for text in file:
            self.line += 1
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                if self.line > 1 and not text.endswith("\n"):
                    self.cut = True
                    return
                raise self.error(f"not JSON: {error}") from error
            if not isinstance(record, dict):
                raise self.error("not a JSON object")
            yield record


def _entry(record: dict[str, Any], line: int) -> Entry:
    kind = record.get("type")
    if kind == "step":
        return _step(record, line)
    if kind == "add":
        sizes = [_whole(record, key, 1) for key in ("prompt", "max_tokens")]
        priority = _whole(record, "priority", None) if "priority" in record else 0
        return AddLine(line, _number(record, "t"), _text(record, "id"), sizes[0], sizes[1], priority)
    if kind == "end":
        reason = _reason(record.get("reason"))
        return EndLine(line, _number(record, "t"), _text(record, "id"), reason)
    if kind == "run":
        raise _LineError("a second header: two logs in one file?")
    raise _LineError(f"unknown type of line {kind!r}")


def _step(record: dict[str, Any], line: int) -> StepLine:
    t, end = _number(record, "t"), _number(record, "end")
    start = _number(record, "start") if "start" in record else None
    if end < (t if start is None else max(t, start)):
        raise _LineError(f"the step ends at {end!r}, before it starts")
    return StepLine(
        line,
        t,
        end,
        _whole(record, "steps", 1),
        tuple([_batch(b) for b in _list(record, "batches")]),
        _rows(record, "moves"),
        _rows(record, "evict"),
        _rows(record, "reject"),
        start,
        {i: _reason(reason) for i, reason in _object(record, "stopped").items()},
        {_op_key(k): _op_times(k, v) for k, v in _object(record, "ops").items()},
        _whole(record, "ring", 0) if "ring" in record else 0,
        {part: _factor(part, value) for part, value in _object(record, "cost").items()},
    )


def _batch(record: Any) -> BatchLine:
    if not isinstance(record, dict) or not record.keys() <= {"prefill", *ROLES}:
        raise _LineError(f"a batch is an object with prefill, {', '.join(ROLES)}, got {_short(record)}")
    chunks = []
    for chunk in _list(record, "prefill") if "prefill" in record else ():
        match chunk:
            case [str(name), int(start), int(length), str(tier)] if tier in set(Tier):
                chunks.append((name, start, length, tier))
            case _:
                raise _LineError(f"prefill: expected [id, start, length, tier], got {_short(chunk)}")
    roles = {}
    for role in ROLES:
        if role in record:
            members = _object(record, role)
            roles[role] = RoleLine(_whole(members, "n", 0), _ids(members, "add"), _ids(members, "drop"))
    return BatchLine(tuple(chunks), roles)


def _rows(record: dict[str, Any], name: str) -> tuple[tuple[Any, ...], ...]:
    rows = _list(record, name) if name in record else []
    for row in rows:
        if not isinstance(row, list) or not row or not isinstance(row[0], str):
            raise _LineError(f"{name}: expected [id, ...], got {_short(row)}")
    return tuple([tuple(row) for row in rows])


def _op_key(key: str) -> tuple[str, int]:
    kind, colon, batch = key.rpartition(":")
    try:
        return kind, int(batch) if colon else _bad_op(key)
    except ValueError:
        return kind, _bad_op(key)


def _bad_op(key: str) -> int:
    raise _LineError(f"ops: expected KIND:sub-batch, got {key!r}")


def _op_times(key: str, value: Any) -> tuple[int, float]:
    match value:
        case [int(count), int(seconds) | float(seconds)] if count >= 0 and 0 <= seconds < math.inf:
            return count, float(seconds)
    raise _LineError(f"ops, {key}: expected [operations, seconds], got {_short(value)}")


def _factor(part: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
        raise _LineError(f"cost, {part}: expected a factor, got {_short(value)}")
    return float(value)


def _ids(record: dict[str, Any], key: str) -> tuple[str, ...]:
    found = _list(record, key) if key in record else []
    if not all(isinstance(x, str) for x in found):
        raise _LineError(f"{key}: expected a list of request ids, got {_short(found)}")
    return tuple(found)


def _number(record: dict[str, Any], key: str) -> float:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _LineError(f"{key}: expected a number, got {_short(value)}")
    return float(value)


def _whole(record: dict[str, Any], key: str, least: int | None) -> int:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise _LineError(f"{key}: expected a whole number{bound}, got {_short(value)}")
    return value


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise _LineError(f"{key}: expected a text, got {_short(value)}")
    return value


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        raise _LineError(f"{key}: expected a list, got {_short(value)}")
    return value


def _object(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key, {})
    if not isinstance(value, dict):
        raise _LineError(f"{key}: expected an object, got {_short(value)}")
    return value


def _reason(value: Any) -> FinishReason:
    try:
        return FinishReason(value)
    except ValueError as error:
        raise _LineError(f"reason: expected one of {', '.join(FinishReason)}, got {_short(value)}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# -- requests.csv -----------------------------------------------------------------------------------------


def read_requests(path: Path) -> dict[str, RequestRow]:
    """The rows of a ``requests.csv`` by request id, in the order of the file.

    Raises:
        InputError: the file is missing, lacks a column, or a row is malformed (file and line).
    """
    rows: dict[str, RequestRow] = {}
    line = 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [c for c in (*_COLUMNS, "finish_reason") if c not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path}:1: columns missing: {', '.join(missing)}")
            for cells in reader:
                line = reader.line_num
                row = _request(cells, line)
                if row.id in rows:
                    raise _LineError(f"request id {row.id!r} was in line {rows[row.id].line} already")
                rows[row.id] = row
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path}:{line}: malformed row ({error})") from error
    return rows


def _request(cells: Mapping[str, Any], line: int) -> RequestRow:
    name, arrival, prompt, output, *times = (cells[c] for c in _COLUMNS)
    arrival_s = _finite(arrival)
    ttft, tpot, e2e = (_finite(t) if t else None for t in times)
    if name is None or arrival_s is None:
        raise _LineError("a cell is missing")
    reason = _reason(cells["finish_reason"]) if cells["finish_reason"] else None
    return RequestRow(line, name, arrival_s, int(prompt), int(output), ttft, tpot, e2e, reason)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _LineError(f"{text} is not a time")
    return value

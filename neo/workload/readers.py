"""Readers of the trace formats in use, ``read_trace``, and the writer of neo's own format."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from neo.core.errors import InputError, NeoError, raised
from neo.workload.base import TraceRequest, Workload, whole_number
from neo.workload.registry import (
    TraceFormat,
    csv_with,
    format_named,
    json_lines_with,
    sniff_format,
    trace_format,
)
from neo.workload.source import (
    MAX_TOKENS,
    FieldError,
    Source,
    Timestamps,
    TokensColumn,
    json_problem,
    number_from_json,
    open_source,
    seconds_from_text,
    shown,
    tokens_from_json,
)

_MAX_ID_CHARS = 200


def read_trace(path: str | Path, format: str | None = None, limit: int | None = None) -> Workload:
    """Read a request trace.

    Args:
        path: the file; its extension does not matter.
        format: a name from ``FORMATS``; by default it is told from the content.
        limit: read (and check) only the first so many requests.

    Raises:
        InputError: naming the file, and the line and field where there is one.
    """
    limit = None if limit is None else whole_number("limit", limit)
    with open_source(path) as source:
        known = sniff_format(source) if format is None else format_named(format)
        requests = _collect(source, known, limit)
    if not requests:
        raise InputError(f"{source.name}: the trace has no requests")
    made = {"format": known.name, "file": Path(path).name, "limit": limit}
    return Workload(Path(path).stem, tuple(requests), made, source.has_arrivals)


def _collect(source: Source, known: TraceFormat, limit: int | None) -> list[TraceRequest]:
    requests: list[TraceRequest] = []
    latest = 0.0
    try:
        rows: Any = known.read(source)
        if not isinstance(rows, Iterable):
            raise source.error(f"reader '{known.name}' returned {type(rows).__name__}, not requests")
        for request in islice(rows, limit):
            _check_request(request, known)
            arrival = request.arrival_s
            if arrival < latest:
                raise source.error(f"time goes backwards: {arrival} s comes after {latest} s")
            latest = arrival
            requests.append(request)
    except FieldError as error:
        raise source.error(str(error)) from None
    except NeoError:
        raise
    except (Exception, SystemExit) as error:  # a reader is a user's code too
        if isinstance(error, OSError) and error.filename is None:
            raise  # the trace itself cannot be read
        code = getattr(known.read, "__code__", None)
        what = raised(error, getattr(code, "co_filename", None))
        raise source.error(f"reader '{known.name}' raised {what}") from error
    return requests


def _check_request(request: Any, known: TraceFormat) -> None:
    """FieldError if what a reader yields is no request that can be run."""
    if not isinstance(request, TraceRequest):
        wanted = f"reader '{known.name}' must yield TraceRequest"
        raise FieldError("request", f"{wanted}, got {type(request).__name__}")
    identity, arrival, prompt, output, priority, timeout, abort = request
    _check_identity(identity)
    if not _is_time(arrival):
        raise FieldError("arrival_s", f"expected a time in seconds, got {shown(arrival)}")
    for field, tokens in (("prompt_tokens", prompt), ("output_tokens", output)):
        if type(tokens) is not int or not 0 < tokens <= MAX_TOKENS:
            raise FieldError(field, f"expected an integer from 1 to {MAX_TOKENS}, got {shown(tokens)}")
    if type(priority) is not int:
        raise FieldError("priority", f"expected an integer, got {shown(priority)}")
    if timeout is not None and not (_is_time(timeout) and timeout > 0):
        raise FieldError("timeout_s", f"expected a time in seconds above zero, got {shown(timeout)}")
    if abort is not None and not _is_time(abort):
        raise FieldError("abort_s", f"expected a time in seconds, got {shown(abort)}")


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and 0 <= value < math.inf


@trace_format(
    "azure",
    "CSV with TIMESTAMP,ContextTokens,GeneratedTokens",
    csv_with("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
)
def read_azure(source: Source) -> Iterator[TraceRequest]:
    """The Azure LLM inference traces (github.com/Azure/AzurePublicDataset); time 0 is the first row."""
    nanoseconds = Timestamps("TIMESTAMP").nanoseconds
    prompt_tokens, output_tokens = TokensColumn("ContextTokens"), TokensColumn("GeneratedTokens")
    first = latest = None
    latest_text = ""
    rows = source.table("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    for number, (text, context, generated) in enumerate(rows):
        instant = nanoseconds(text)
        if first is None or latest is None:
            first = instant
        elif instant < latest:
            raise FieldError(
                "TIMESTAMP", f"time goes backwards: {shown(text)} comes after {shown(latest_text)}"
            )
        latest, latest_text = instant, text
        yield TraceRequest(
            str(number),
            (instant - first) / 1e9,
            prompt_tokens[context],
            output_tokens[generated],
        )


@trace_format(
    "mooncake",
    'JSON lines with {"timestamp": ms, "input_length", "output_length"}',
    json_lines_with("input_length"),
)
def read_mooncake(source: Source) -> Iterator[TraceRequest]:
    """The Mooncake traces (github.com/kvcache-ai/Mooncake); milliseconds; ``hash_ids`` are not used."""
    for number, record in enumerate(source.objects()):
        yield TraceRequest(
            str(number),
            number_from_json(record, "timestamp", "a time in milliseconds") / 1e3,
            tokens_from_json(record, "input_length"),
            tokens_from_json(record, "output_length"),
        )


@trace_format(
    "vidur",
    "CSV with num_prefill_tokens,num_decode_tokens and perhaps arrived_at",
    csv_with("num_prefill_tokens", "num_decode_tokens"),
)
def read_vidur(source: Source) -> Iterator[TraceRequest]:
    """The traces of Vidur (github.com/microsoft/vidur): seconds and lengths, or lengths only."""
    wanted = ["num_prefill_tokens", "num_decode_tokens"]
    prompt_tokens, output_tokens = map(TokensColumn, wanted)
    if "arrived_at" in source.columns():
        wanted.append("arrived_at")
    else:
        source.has_arrivals = False
    for number, (prompt, output, *arrived) in enumerate(source.table(*wanted)):
        yield TraceRequest(
            str(number),
            seconds_from_text(arrived[0], "arrived_at") if arrived else 0.0,
            prompt_tokens[prompt],
            output_tokens[output],
        )


@trace_format(
    "neo-json",
    'JSON list of {"prompt": tokens, "max_tokens": tokens}',
    lambda source: re.match(r'\s*\[\s*(\]|\{[^{}]*"(prompt|max_tokens)"\s*:)', source.head) is not None,
)
def read_neo_json(source: Source) -> Iterator[TraceRequest]:
    """The data files of the NEO artifact (github.com/NEO-MLSys25/NEO): lengths only."""
    source.has_arrivals = False
    text = source.text()
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise source.error(json_problem(error), getattr(error, "lineno", 1)) from None
    if not isinstance(records, list):
        raise source.error(f"expected a JSON list, got {shown(records)}", 1)
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            line = _line_of_item(text, number, None)
            raise source.error(f"expected a JSON object, got {shown(record)}", line)
        field = "prompt"
        try:
            prompt = tokens_from_json(record, field)
            field = "max_tokens"
            output = tokens_from_json(record, field)
        except FieldError as error:
            raise source.error(str(error), _line_of_item(text, number, field)) from None
        yield TraceRequest(str(number), 0.0, prompt, output)


def _line_of_item(text: str, number: int, field: str | None) -> int:
    """The line of a field of an item of a JSON list; of the item itself if it has no such field."""
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    start = end = text.index("[") + 1
    for _ in range(number + 1):
        blank = skip.match(text, end)
        start = blank.end() if blank else end
        _, end = decode(text, start)
    key = re.compile(rf'"{field}"\s*:').search(text, start, end) if field else None
    return text.count("\n", 0, key.start() if key else start) + 1


@trace_format(
    "jsonl",
    'JSON lines with {"arrival_s": seconds, "prompt_tokens", "output_tokens"}',
    json_lines_with("prompt_tokens"),
)
def read_jsonl(source: Source) -> Iterator[TraceRequest]:
    """neo's own format, see docs/workloads.md; lengths only if no line has ``arrival_s``."""
    lines_of: dict[str, int] = {}
    for number, record in enumerate(source.objects()):
        if number == 0:
            source.has_arrivals = "arrival_s" in record
        elif ("arrival_s" in record) != source.has_arrivals:
            problem = "missing, though" if source.has_arrivals else "given, though not by"
            raise FieldError("arrival_s", f"{problem} the first request{' has it' * source.has_arrivals}")
        identity = _identity(record, number)
        if lines_of.setdefault(identity, source.line) != source.line:
            raise FieldError("id", f"{shown(identity)} is already used on line {lines_of[identity]}")
        yield TraceRequest(
            identity,
            number_from_json(record, "arrival_s", "a time in seconds") if source.has_arrivals else 0.0,
            tokens_from_json(record, "prompt_tokens"),
            tokens_from_json(record, "output_tokens"),
            _priority(record),
            _optional_seconds(record, "timeout_s", positive=True),
            _optional_seconds(record, "abort_s"),
        )


def _identity(record: dict[str, Any], number: int) -> str:
    identity = record.get("id")
    return str(number) if identity is None else _check_identity(identity)


def _check_identity(identity: object) -> str:
    if isinstance(identity, str) and 0 < len(identity) <= _MAX_ID_CHARS and identity.isprintable():
        return identity
    raise FieldError("id", f"expected 1 to {_MAX_ID_CHARS} printable characters, got {shown(identity)}")


def _priority(record: dict[str, Any]) -> int:
    priority = record.get("priority", 0)
    if type(priority) is not int:
        raise FieldError("priority", f"expected an integer, got {shown(priority)}")
    return priority


def _optional_seconds(record: dict[str, Any], field: str, positive: bool = False) -> float | None:
    if record.get(field) is None:
        return None
    meaning = "a time in seconds above zero" if positive else "a time in seconds"
    return number_from_json(record, field, meaning, positive)


def write_jsonl(workload: Workload, path: str | Path) -> None:
    """Write a workload in neo's own format; ``read_trace`` gives the same requests back.

    A workload without arrivals is written without ``arrival_s``. InputError if the file cannot be written.
    """
    try:
        with Path(path).open("w", encoding="utf-8", newline="\n") as file:
            for request in workload.requests:
                record = {"id": request.id} | (
                    {"arrival_s": request.arrival_s} if workload.has_arrivals else {}
                )
                record |= {"prompt_tokens": request.prompt_tokens, "output_tokens": request.output_tokens}
                if request.priority:
                    record["priority"] = request.priority
                for field, seconds in (("timeout_s", request.timeout_s), ("abort_s", request.abort_s)):
                    if seconds is not None:
                        record[field] = seconds
                file.write(json.dumps(record, allow_nan=False) + "\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None

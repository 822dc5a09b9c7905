"""The trace formats: registered by name with a decorator, in a user's file too, or found by entry point."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from neo.core.errors import InputError
from neo.core.plugins import load_object
from neo.workload.base import TraceRequest
from neo.workload.source import Source, shown

ENTRY_POINTS = "neo.trace_formats"
"""Entry point group: the name is the format's name, loading the object must run its ``@trace_format``."""

Reader = Callable[[Source], Iterator[TraceRequest]]
Sniffer = Callable[[Source], bool]


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """A trace format: how it is recognised and read.

    Attributes:
        name: as in ``read_trace(path, format=name)``.
        looks_like: what such a file looks like, for people.
        sniff: whether a file's beginning (``source.head``, ``source.columns()``) is of this format.
        read: yields the requests in order of arrival; reads lazily, raises FieldError for a wrong field.
    """

    name: str
    looks_like: str
    sniff: Sniffer
    read: Reader


FORMATS: dict[str, TraceFormat] = {}


def trace_format(name: str, looks_like: str, sniff: Sniffer) -> Callable[[Reader], Reader]:
    """Register a reader under a name; a name that is taken is an InputError.

    Example::

        @trace_format("pairs", "CSV with in,out", csv_with("in", "out"))
        def read_pairs(source: Source) -> Iterator[TraceRequest]:
            source.has_arrivals = False
            prompts, outputs = TokensColumn("in"), TokensColumn("out")
            for number, (prompt, output) in enumerate(source.table("in", "out")):
                yield TraceRequest(str(number), 0.0, prompts[prompt], outputs[output])
    """

    def register(read: Reader) -> Reader:
        if name in FORMATS:
            raise InputError(f"trace format '{name}' is already registered")
        FORMATS[name] = TraceFormat(name, looks_like, sniff, read)
        return read

    return register


def csv_with(*columns: str) -> Sniffer:
    """A sniffer for CSV files whose header has these columns, among others."""
    return lambda source: set(columns) <= set(source.columns())


def json_lines_with(field: str) -> Sniffer:
    """A sniffer for JSON lines whose first object has this field."""
    key = rf'\{{.*"{re.escape(field)}"\s*:'
    return lambda source: re.match(key, source.head_line()) is not None


def format_named(name: str) -> TraceFormat:
    """The format of that name, installed plugins included, or of ``path/to/file.py:reader``.

    Raises:
        InputError: there is none, with those that are known; or the file cannot be loaded, with its line.
    """
    if ".py:" in name:
        return _written_in_file(name)
    if name not in FORMATS:
        problems = _load_plugins(name)
        if name not in FORMATS:
            why = problems[0] if problems else f"unknown trace format {name!r}"
            raise InputError(f"{why}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def _written_in_file(spec: str) -> TraceFormat:
    """The format of ``path/to/file.py:reader``; a file is loaded once, as modules are."""
    file, _, reader = spec.rpartition(":")
    path = Path(file).expanduser().resolve()
    for known in FORMATS.values():
        code = getattr(known.read, "__code__", None)
        if code is not None and code.co_name == reader and Path(code.co_filename).resolve() == path:
            return known
    read = load_object(spec, "trace format")
    found = next((f for f in FORMATS.values() if f.read is read), None)
    if found is None:
        raise InputError(f"trace format '{spec}': {reader} is no reader, @trace_format registers those")
    return found


def sniff_format(source: Source) -> TraceFormat:
    """The format a file's content is in; InputError listing the known ones if none recognises it."""
    for known in FORMATS.values():
        if known.sniff(source):
            return known
    before = set(FORMATS)
    problems = _load_plugins()
    for name, known in FORMATS.items():
        if name not in before and known.sniff(source):
            return known
    failed = "".join(f"; {problem}" for problem in problems)
    raise InputError(
        f"{source.name}: cannot tell the trace format from its first line, {shown(source.head_line())}; "
        f"name it with --format: {', '.join(FORMATS)}{failed}"
    )


def _load_plugins(only: str | None = None) -> list[str]:
    """Load the entry points (of one name, or all) not yet registered; returns a line for each failure."""
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    problems = []
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in FORMATS or only not in (None, point.name):
            continue
        try:
            point.load()
        except Exception as error:  # a plugin may fail in any way; it must not take the built-in formats down
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            problems.append(f"trace format '{point.name}' ({point.value}) cannot be loaded: {reason}")
        else:
            if point.name not in FORMATS:
                problems.append(
                    f"trace format '{point.name}': loading {point.value} registered no such format"
                )
    return problems

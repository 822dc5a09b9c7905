"""A trace file being read, and the checked conversion of its fields. Errors name the file and the line."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from io import BufferedReader, FileIO
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from neo.core.errors import InputError

MAX_TOKENS = 10_000_000
"""Longest prompt or output believed, in tokens; a longer one is taken for a mistake in the file."""

HEAD_BYTES = 65536
"""How much of a file is looked at to tell its format."""

_SHOWN_CHARS = 40  # a wrong value is quoted up to here, so that the message stays one line
_NS = 1_000_000_000


class FieldError(ValueError):
    """A field of the current row is wrong; ``read_trace`` adds the file and the line."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field}: {problem}")


def shown(value: object) -> str:
    """A value as the file wrote it, shortened, on one line."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


class Source:
    """A trace file open for reading, one pass, line by line.

    A reader uses :meth:`table` for CSV, :meth:`objects` for JSON lines, :meth:`text` for the whole file.
    A reader whose file gives lengths only sets ``has_arrivals`` to False and yields ``arrival_s=0.0``.

    Attributes:
        name: the path as the user gave it, for messages.
        line: 1-based number of the line handed out last; 0 before the first.
        head: the beginning of the file, decoded leniently, for sniffing only.
    """

    def __init__(self, name: str, file: BinaryIO, head: bytes) -> None:
        self.name = name
        self.line = 0
        self.has_arrivals = True
        self.head = head.decode("utf-8", errors="replace").removeprefix("\ufeff")
        self._file = file
        self._columns: list[str] = []

    def error(self, problem: str, line: int | None = None) -> InputError:
        """An error at a line, by default the current one (none before the first)."""
        number = self.line if line is None else line
        return InputError(f"{self.name}:{number}: {problem}" if number else f"{self.name}: {problem}")

    def lines(self) -> Iterator[str]:
        """Every line, its end included; InputError where one is not text."""
        for raw in self._file:
            self.line += 1
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                bad = raw[error.start]
                raise self.error(f"not UTF-8 text: byte 0x{bad:02x} at column {error.start + 1}") from None
            if "\0" in text:
                raise self.error("not text: the line contains NUL bytes")
            yield text.removeprefix("\ufeff") if self.line == 1 else text

    def text(self) -> str:
        """The rest of the file."""
        return "".join(self.lines())

    def head_line(self) -> str:
        """The first line of the file that is not blank, for sniffing; empty if there is none."""
        return self.head.lstrip().partition("\n")[0].rstrip()

    def columns(self) -> tuple[str, ...]:
        """The column names, if the file is CSV; for sniffing."""
        try:
            return tuple(name.strip() for name in next(csv.reader([self.head_line()]), []))
        except csv.Error:
            return ()

    def table(self, *wanted: str) -> Iterator[tuple[str, ...]]:
        """Rows of a CSV file with a header: the wanted columns (two at least), in that order.

        Other columns are ignored, blank lines are skipped. InputError if a column is missing or a row has not
        as many fields as the header.
        """
        rows = csv.reader(self.lines(), strict=True)
        width, pick, before = -1, itemgetter(0), 0
        try:
            for row in rows:
                if self.line - before > 1:
                    raise self.error("a quoted field runs over several lines", before + 1)
                before = self.line
                if len(row) == width:
                    yield pick(row)
                elif len(row) > 1 or (row and row[0].strip()):
                    if width >= 0:
                        raise self._wrong_width(row, width, wanted)
                    width, pick = len(row), self._pick(row, wanted)
        except csv.Error as error:
            raise self.error(f"not a valid CSV row: {error}", before + 1) from None

    def _pick(self, header: list[str], wanted: tuple[str, ...]) -> itemgetter[Any]:
        names = [name.strip() for name in header]
        for name in wanted:
            if names.count(name) != 1:
                problem = "twice in" if name in names else "missing from"
                raise self.error(f"field {name}: {problem} the header {shown(','.join(names))}")
        self._columns = names
        return itemgetter(*map(names.index, wanted))

    def _wrong_width(self, row: list[str], width: int, wanted: tuple[str, ...]) -> InputError:
        lost = [name for name in wanted if self._columns.index(name) >= len(row)]
        where = f"field {lost[0]}: missing: " if lost else ""
        return self.error(f"{where}the row has {len(row)} fields, the header {width}")

    def objects(self) -> Iterator[dict[str, Any]]:
        """The JSON object of every line; blank lines are skipped."""
        loads = json.JSONDecoder().decode
        for text in self.lines():
            try:
                record = loads(text)
            except (ValueError, RecursionError) as error:
                if not text.strip():
                    continue
                raise self.error(json_problem(error)) from None
            if not isinstance(record, dict):
                raise self.error(f"expected a JSON object, got {shown(record)}")
            yield record


def json_problem(error: Exception) -> str:
    """Why a JSON text could not be parsed, in one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON (truncated?): {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "not a trace: JSON nested too deeply"
    return f"not valid JSON: {str(error).partition(';')[0]}"


@contextmanager
def open_source(path: str | Path) -> Iterator[Source]:
    """A trace file open for reading. InputError if it is missing, empty, unreadable or binary."""
    name = str(path)
    if "\0" in name:
        raise InputError(f"{name!r}: not a file name")
    try:
        with BufferedReader(FileIO(name), HEAD_BYTES) as file:
            head = file.peek(HEAD_BYTES)
            _check_head(name, head)
            yield Source(name, file, head)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{name}: is a directory, expected a trace file") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from None


def _check_head(name: str, head: bytes) -> None:
    if not head.strip():
        raise InputError(f"{name}: the file is {'blank' if head else 'empty'}, expected a trace")
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):  # gzip, zstd, zip
        raise InputError(f"{name}: the file is compressed; decompress it first")
    if b"\0" in head:
        line = head.count(b"\n", 0, head.index(b"\0")) + 1
        raise InputError(f"{name}:{line}: not text: the line contains NUL bytes")


def _bad_tokens(field: str, value: object, number: int | None) -> FieldError:
    if number is not None and number > MAX_TOKENS:
        return FieldError(field, f"expected at most {MAX_TOKENS} tokens, got {shown(value)}")
    hint = ": a request needs at least one prompt token and must produce at least one" if number == 0 else ""
    return FieldError(field, f"expected a positive integer, got {shown(value)}{hint}")


def tokens_from_text(text: str, field: str) -> int:
    """A number of tokens in a CSV field."""
    digits = text if text.isdecimal() else text.strip()
    if not (
        digits.isdecimal() and digits.isascii()
    ):  # int() alone would take '+5', '1_000' and other scripts
        raise _bad_tokens(field, text, None)
    number = int(digits) if len(digits) < 20 else MAX_TOKENS + 1
    if 0 < number <= MAX_TOKENS:
        return number
    raise _bad_tokens(field, text, number)


def tokens_from_json(record: Mapping[str, Any], field: str) -> int:
    """A number of tokens in a JSON object: an integer, not a float, a string or a boolean."""
    value = record.get(field)
    if type(value) is int:
        if 0 < value <= MAX_TOKENS:
            return value
        raise _bad_tokens(field, value, value)
    if field not in record:
        raise FieldError(field, "missing")
    raise _bad_tokens(field, value, None)


def seconds_from_text(text: str, field: str) -> float:
    """A time in seconds in a CSV field: finite, not negative."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0 <= number < math.inf and text.isascii() and "_" not in text:
        return number
    raise FieldError(field, f"expected a time in seconds, got {shown(text)}")


def number_from_json(record: Mapping[str, Any], field: str, meaning: str, positive: bool = False) -> float:
    """A finite number, not negative (or above zero), in a JSON object; ``meaning`` says of what, in words."""
    value = record.get(field)
    if type(value) in (int, float):
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        if (number > 0 if positive else number >= 0) and number < math.inf:
            return number
    elif field not in record:
        raise FieldError(field, "missing")
    raise FieldError(field, f"expected {meaning}, got {shown(value)}")


class TokensColumn(dict[str, int]):
    """A CSV column of token counts: ``column[text]`` is the number; kept, because lengths repeat."""

    def __init__(self, field: str) -> None:
        self.field = field

    def __missing__(self, text: str) -> int:
        number = self[text] = tokens_from_text(text, self.field)
        return number


class Timestamps:
    """Converts timestamps like ``2023-11-16 18:17:03.9799600`` to integer nanoseconds, exactly.

    Takes a space or ``T`` between date and time, any number of fractional digits (those after the ninth are
    dropped), and an optional ``Z`` or UTC offset; without one, UTC. The origin is arbitrary: use differences.
    """

    _FORM = (
        r"(\d{4})-(\d\d)-(\d\d)[ Tt](\d\d):(\d\d):(\d\d)(?:\.(\d+))?"
        r"(?:[Zz]|([+-])(\d\d):?(\d\d))?"
    )
    _EXAMPLE = "2023-11-16 18:17:03.9799600"

    def __init__(self, field: str) -> None:
        self._field = field
        self._form = re.compile(self._FORM, re.ASCII)
        self._minutes: dict[str, int] = {}  # 'YYYY-MM-DD HH:MM:' -> nanoseconds; rows share their minute

    def nanoseconds(self, text: str) -> int:
        """The instant in nanoseconds; FieldError if the text is not a timestamp."""
        minute = self._minutes.get(text[:17])
        if minute is not None and len(text) == 27 and text[19] == ".":  # the form of the Azure traces
            digits = text[17:19] + text[20:]
            if digits.isdecimal() and digits.isascii() and digits < "6":
                return minute + int(digits) * 100
        return self._parse(text)

    def _parse(self, text: str) -> int:
        bare = text.strip()
        match = self._form.fullmatch(bare)
        if match is None:
            raise FieldError(self._field, f"expected a timestamp like {self._EXAMPLE}, got {shown(text)}")
        *whole, fraction, sign, offset_h, offset_m = match.groups()
        year, month, day, hour, minute, second = map(int, whole)
        offset = int(offset_h) * 3600 + int(offset_m) * 60 if sign else 0
        try:
            days = date(year, month, day).toordinal()
        except ValueError as error:
            raise FieldError(self._field, f"not a date ({error}): {shown(text)}") from None
        if hour > 23 or minute > 59 or second > 59 or offset >= 86400 or (sign and int(offset_m) > 59):
            raise FieldError(self._field, f"not a time of day: {shown(text)}")
        instant = (days * 86400 + hour * 3600 + minute * 60 + second) * _NS
        if bare == text and not sign:
            self._minutes[text[:17]] = instant - second * _NS
        instant -= (-offset if sign == "-" else offset) * _NS
        return instant + int((fraction or "0")[:9].ljust(9, "0"))

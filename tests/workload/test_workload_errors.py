"""Traces that are wrong: each error names the file, the line and the field, in one line."""

import gzip
import os
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.core.errors import InputError
from neo.workload import FORMATS, Source, TraceFormat, TraceRequest, read_trace, trace_format
from neo.workload.registry import Reader

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
TIME = "2023-11-16 18:17:03.9799600"
POSITIVE = "expected a positive integer, got"
ZERO = ": a request needs at least one prompt token and must produce at least one"
LONG = "expected at most 10000000 tokens, got"


def _azure(*rows: str) -> str:
    return AZURE + f"{TIME},5,6\n" + "\n".join(rows)


def _mooncake(row: str) -> str:
    return '{"timestamp": 2000, "input_length": 5, "output_length": 6}\n' + row


def _jsonl(row: str) -> str:
    return '{"id": "a", "arrival_s": 1.0, "prompt_tokens": 5, "output_tokens": 6}\n' + row


def _osc(row: str) -> str:
    return '[\n  {\n    "prompt": 5,\n    "max_tokens": 6\n  },\n  ' + row + "\n]\n"


MALFORMED = [
    (_azure(f"{TIME},abc,6"), f"3: field ContextTokens: {POSITIVE} 'abc'"),
    (_azure(f"{TIME},,6"), f"3: field ContextTokens: {POSITIVE} ''"),
    (_azure(f"{TIME},5,-1"), f"3: field GeneratedTokens: {POSITIVE} '-1'"),
    (_azure(f"{TIME},5,0"), f"3: field GeneratedTokens: {POSITIVE} '0'{ZERO}"),
    (_azure(f"{TIME},0,5"), f"3: field ContextTokens: {POSITIVE} '0'{ZERO}"),
    (_azure(f"{TIME},5,7.5"), f"3: field GeneratedTokens: {POSITIVE} '7.5'"),
    (_azure(f"{TIME},1_0,5"), f"3: field ContextTokens: {POSITIVE} '1_0'"),
    (_azure(f"{TIME},+5,5"), f"3: field ContextTokens: {POSITIVE} '+5'"),
    (_azure(f"{TIME},٣,5"), f"3: field ContextTokens: {POSITIVE} '٣'"),
    (_azure(f"{TIME},nan,5"), f"3: field ContextTokens: {POSITIVE} 'nan'"),
    (_azure(f"{TIME},10000001,5"), f"3: field ContextTokens: {LONG} '10000001'"),
    (_azure(f"{TIME},{'9' * 6000},5"), f"3: field ContextTokens: {LONG} '{'9' * 36}..."),
    (_azure(f"{TIME},5"), "3: field GeneratedTokens: missing: the row has 2 fields, the header 3"),
    (_azure(f"{TIME},5,6,7"), "3: the row has 4 fields, the header 3"),
    (_azure("", "", f"{TIME},x,6"), f"5: field ContextTokens: {POSITIVE} 'x'"),
    (_azure("yesterday,5,6"), f"3: field TIMESTAMP: expected a timestamp like {TIME}, got 'yesterday'"),
    (_azure(f"{TIME}x,5,6"), f"3: field TIMESTAMP: expected a timestamp like {TIME}, got '{TIME}x'"),
    (
        _azure("2023-02-30 18:17:03,5,6"),
        "3: field TIMESTAMP: not a date (day is out of range for month): '2023-02-30 18:17:03'",
    ),
    (
        _azure("2023-11-16 18:17:61.0000000,5,6"),
        "3: field TIMESTAMP: not a time of day: '2023-11-16 18:17:61.0000000'",
    ),
    (
        _azure("2023-11-16 18:17:03+00:61,5,6"),
        "3: field TIMESTAMP: not a time of day: '2023-11-16 18:17:03+00:61'",
    ),
    (
        _azure(f"{TIME},5,6", "2023-11-16 18:17:03.9799599,5,6"),
        f"4: field TIMESTAMP: time goes backwards: '2023-11-16 18:17:03.9799599' comes after '{TIME}'",
    ),
    (_azure(f'{TIME},"5,6'), "3: not a valid CSV row: unexpected end of data"),
    (_azure(f'"{TIME}\n",5,6'), "3: a quoted field runs over several lines"),
    (_azure(f"{TIME},5,\0"), "3: not text: the line contains NUL bytes"),
    (_azure("") + "\n" * 70_000 + "\0", "70003: not text: the line contains NUL bytes"),
    (
        "num_prefill_tokens,num_decode_tokens,num_prefill_tokens\n5,6,5",
        "1: field num_prefill_tokens: twice in the header 'num_prefill_tokens,num_decode_tokens...",
    ),
    (
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,6\ninf,5,6",
        "3: field arrived_at: expected a time in seconds, got 'inf'",
    ),
    (
        "arrived_at,num_prefill_tokens,num_decode_tokens\n-1,5,6",
        "2: field arrived_at: expected a time in seconds, got '-1'",
    ),
    (
        "arrived_at,num_prefill_tokens,num_decode_tokens\n2.5,5,6\n1.5,5,6",
        "3: time goes backwards: 1.5 s comes after 2.5 s",
    ),
    ("num_prefill_tokens,num_decode_tokens\n5,6\n5,x", f"3: field num_decode_tokens: {POSITIVE} 'x'"),
    (
        _mooncake('{"timestamp": 1999, "input_length": 5, "output_length": 6}'),
        "2: time goes backwards: 1.999 s comes after 2.0 s",
    ),
    (_mooncake('{"input_length": 5, "output_length": 6}'), "2: field timestamp: missing"),
    (
        _mooncake('{"timestamp": NaN, "input_length": 5, "output_length": 6}'),
        "2: field timestamp: expected a time in milliseconds, got NaN",
    ),
    (
        _mooncake('{"timestamp": "3", "input_length": 5, "output_length": 6}'),
        "2: field timestamp: expected a time in milliseconds, got '3'",
    ),
    (
        _mooncake('{"timestamp": 3000, "input_length": 5, "output_length": true}'),
        f"2: field output_length: {POSITIVE} true",
    ),
    (
        _mooncake('{"timestamp": 3000, "input_length": 5.0, "output_length": 6}'),
        f"2: field input_length: {POSITIVE} 5.0",
    ),
    (_mooncake('{"timestamp": 3000, "input_length": 5}'), "2: field output_length: missing"),
    (
        _mooncake('{"timestamp": 3000, "input_length": 5, "outp'),
        "2: not valid JSON (truncated?): Unterminated string starting at at column 40",
    ),
    (_mooncake("[1, 2]"), "2: expected a JSON object, got [1, 2]"),
    (_mooncake("[" * 100_000), "2: not a trace: JSON nested too deeply"),
    (_jsonl('{"arrival_s": 0.5, "prompt_tokens": 5, "output_tokens": 6}'), "2: time goes backwards: 0.5 s"),
    (
        _jsonl('{"prompt_tokens": 5, "output_tokens": 6}'),
        "2: field arrival_s: missing, though the first request has it",
    ),
    (
        '{"prompt_tokens": 5, "output_tokens": 6}\n{"arrival_s": 1, "prompt_tokens": 5, "output_tokens": 6}',
        "2: field arrival_s: given, though not by the first request",
    ),
    (
        _jsonl('{"arrival_s": true, "prompt_tokens": 5, "output_tokens": 6}'),
        "2: field arrival_s: expected a time in seconds, got true",
    ),
    (
        _jsonl(f'{{"arrival_s": 1{"0" * 400}, "prompt_tokens": 5, "output_tokens": 6}}'),
        "2: field arrival_s: expected a time in seconds, got 1000",
    ),
    (
        _jsonl(f'{{"arrival_s": 1{"0" * 5000}, "prompt_tokens": 5, "output_tokens": 6}}'),
        "2: not valid JSON: Exceeds the limit",
    ),
    (
        _jsonl('{"arrival_s": 2, "prompt_tokens": null, "output_tokens": 6}'),
        f"2: field prompt_tokens: {POSITIVE} null",
    ),
    (
        _jsonl('{"arrival_s": 2, "prompt_tokens": 5, "output_tokens": 6, "id": "a"}'),
        "2: field id: 'a' is already used on line 1",
    ),
    (
        _jsonl('{"arrival_s": 2, "prompt_tokens": 5, "output_tokens": 6, "id": "a\\nb"}'),
        "2: field id: expected 1 to 200 printable characters, got 'a\\nb'",
    ),
    (
        _jsonl('{"arrival_s": 2, "prompt_tokens": 5, "output_tokens": 6, "priority": 0.5}'),
        "2: field priority: expected an integer, got 0.5",
    ),
    (
        _jsonl('{"arrival_s": 2, "prompt_tokens": 5, "output_tokens": 6, "timeout_s": 0}'),
        "2: field timeout_s: expected a time in seconds above zero, got 0",
    ),
    (
        _jsonl('{"arrival_s": 2, "prompt_tokens": 5, "output_tokens": 6, "abort_s": -Infinity}'),
        "2: field abort_s: expected a time in seconds, got -Infinity",
    ),
    (_osc('{"prompt": 7,\n    "max_tokens": 0}'), f"7: field max_tokens: {POSITIVE} 0{ZERO}"),
    (_osc('{"prompt": "7",\n    "max_tokens": 1}'), f"6: field prompt: {POSITIVE} '7'"),
    (_osc('{"prompt": 7}'), "6: field max_tokens: missing"),
    (_osc("7"), "6: expected a JSON object, got 7"),
    (_osc('{"prompt": 7, "max_tokens": 8'), "7: not valid JSON (truncated?): Expecting ',' delimiter at"),
]


@pytest.mark.parametrize(("content", "message"), MALFORMED)
def test_a_malformed_row_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content.encode())
    with pytest.raises(InputError) as caught:
        read_trace(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:{message}"), text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": the file is empty, expected a trace"),
        (b" \r\n\n", ": the file is blank, expected a trace"),
        (AZURE.encode(), ": the trace has no requests"),
        (b"[]", ": the trace has no requests"),
        (gzip.compress(AZURE.encode(), mtime=0), ": the file is compressed; decompress it first"),
        (b"\x7fELF\x00\x01", ":1: not text: the line contains NUL bytes"),
        (AZURE.encode("utf-16"), ":1: not text: the line contains NUL bytes"),
        (AZURE.encode() + b"\n\xff\xfe", ":3: not UTF-8 text: byte 0xff at column 1"),
        (_mooncake("").encode() + b'{"t\xc3', ":2: not UTF-8 text: byte 0xc3 at column 4"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert str(caught.value) == f"{path}{message}"


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.csv: no such file$"):
        read_trace(tmp_path / "gone.csv")
    with pytest.raises(InputError, match=r": is a directory, expected a trace file$"):
        read_trace(tmp_path)
    with pytest.raises(InputError, match=r"not a file name$"):
        read_trace("a\0b")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot be read: Not a directory$"):
        read_trace(tmp_path / "file" / "t.csv")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read any file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(AZURE)
    path.chmod(0)
    with pytest.raises(InputError, match=r"cannot be read: Permission denied$"):
        read_trace(path)


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError) as caught:
        read_trace(path)
    text = str(caught.value)
    assert "cannot tell the trace format from its first line, 'a,b'" in text
    assert text.endswith("; name it with --format: " + ", ".join(FORMATS))
    assert list(FORMATS) == ["azure", "mooncake", "vidur", "neo-json", "jsonl"]
    other = tmp_path / "other.csv"
    other.write_text("x" * 1000)
    with pytest.raises(InputError) as caught:
        read_trace(other)
    assert len(str(caught.value).removeprefix(str(other))) <= 200
    with pytest.raises(
        InputError, match=r"^unknown trace format 'azur'; known formats: azure, mooncake, vidur"
    ):
        read_trace(path, format="azur")
    with pytest.raises(InputError, match=r"t\.csv:1: field TIMESTAMP: missing from the header 'a,b'$"):
        read_trace(path, format="azure")
    with pytest.raises(InputError, match=r"t\.csv:1: not valid JSON"):
        read_trace(path, format="neo-json")
    path.write_text('{"a": 1}')
    with pytest.raises(InputError, match=r't\.csv:1: expected a JSON list, got \{"a": 1\}$'):
        read_trace(path, format="neo-json")


@given(st.binary(max_size=300), st.sampled_from([None, *FORMATS]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content: bytes, format: str | None) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("bytes") / "t"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_trace(path, format)
    assert "\n" not in str(caught.value)


_cells = st.one_of(st.integers(-2, 20).map(str), st.sampled_from([TIME, '"', "", "x", "\r", "nan", " 7 "]))


@given(st.lists(st.lists(_cells, min_size=1, max_size=4).map(",".join), max_size=6))
def test_any_rows_are_read_or_refused_with_their_line(tmp_path_factory, rows: list[str]) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("rows") / "t"
    path.write_bytes((AZURE + "\n".join(rows)).encode())
    try:
        workload = read_trace(path)
    except InputError as error:
        message = str(error).removeprefix(f"{path}:")
    else:
        assert all(request.prompt_tokens > 0 < request.output_tokens for request in workload.requests)
        return
    assert message == " the trace has no requests" or 2 <= int(message.partition(":")[0]) <= len(rows) + 1
    assert "\n" not in message


class _Point:
    """Stands for an installed entry point."""

    def __init__(self, name: str, load) -> None:  # type: ignore[no-untyped-def]
        self.name, self.value, self.load = name, f"plugin:{name}", load


def _install(monkeypatch: pytest.MonkeyPatch, *points: _Point) -> None:
    for point in points:
        monkeypatch.setitem(FORMATS, point.name, None)  # type: ignore[arg-type]
        monkeypatch.delitem(FORMATS, point.name)
    monkeypatch.setattr(
        metadata, "entry_points", lambda group: points if group == "neo.trace_formats" else ()
    )


def _register_pairs() -> None:
    @trace_format("pairs", "pairs of numbers", lambda source: source.head.startswith("pairs"))
    def read_pairs(source: Source):  # type: ignore[no-untyped-def]
        source.has_arrivals = False
        yield TraceRequest("0", 0.0, 1, 1)


def test_a_plugin_is_found_by_name_and_by_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("pairs")
    before = list(FORMATS)
    for form in ("pairs", None):
        with monkeypatch.context() as patch:
            _install(patch, _Point("pairs", _register_pairs))
            workload = read_trace(path, form)
            assert (len(workload), workload.has_arrivals) == (1, False)
            with pytest.raises(InputError, match="'pairs' is already registered"):
                _register_pairs()
    assert list(FORMATS) == before


def _raising(source: Source):  # type: ignore[no-untyped-def]
    raise RuntimeError
    yield


def _row(**change: object):  # type: ignore[no-untyped-def]
    row = {"id": "0", "arrival_s": 0.0, "prompt_tokens": 1, "output_tokens": 1} | change
    return lambda source: iter([TraceRequest(**row)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (_raising, r"reader 'odd' raised RuntimeError at test_workload_errors.py:\d+$"),
        (lambda source: None, "reader 'odd' returned NoneType, not requests"),
        (lambda source: iter([(1, 2)]), "reader 'odd' must yield TraceRequest, got tuple"),
        (_row(prompt_tokens=3.5), "field prompt_tokens: expected an integer from 1 to 10000000, got 3.5"),
        (_row(output_tokens="4"), "field output_tokens: .* got '4'"),
        (_row(output_tokens=-4), "field output_tokens: .* got -4"),
        (_row(arrival_s="0"), "field arrival_s: expected a time in seconds, got '0'"),
        (_row(arrival_s=float("nan")), "field arrival_s: .* got NaN"),
        (_row(id=7), "field id: expected 1 to 200 printable characters, got 7"),
        (_row(priority=None), "field priority: expected an integer, got null"),
        (_row(timeout_s=0), "field timeout_s: expected a time in seconds above zero, got 0"),
        (_row(abort_s=-1.0), "field abort_s: expected a time in seconds, got -1.0"),
    ],
)
def test_what_a_users_reader_does_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read: Reader, message: str
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("anything")
    monkeypatch.setitem(FORMATS, "odd", TraceFormat("odd", "", lambda source: False, read))
    with pytest.raises(InputError, match=message) as caught:
        read_trace(path, "odd")
    assert str(caught.value).startswith(f"{path}: ")


def test_the_format_shown_in_the_docs_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "workloads.md"
    example = page.read_text(encoding="utf-8").split("```python\n")[2].partition("```")[0]
    path = tmp_path / "t"
    path.write_text("in,out\n5,6\n7,x")
    _install(monkeypatch, _Point("pairs", lambda: exec(example, {})))
    assert read_trace(path, limit=1).requests == (TraceRequest("0", 0.0, 5, 6),)
    with pytest.raises(InputError, match=r"t:3: field out: expected a positive integer, got 'x'$"):
        read_trace(path)


def test_a_broken_plugin_is_reported_and_harms_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise ImportError("no module\nnamed x")

    _install(monkeypatch, _Point("broken", fail), _Point("silent", lambda: None))
    path = tmp_path / "t"
    path.write_text(AZURE + f"{TIME},5,6")
    assert len(read_trace(path)) == 1
    broken = r"trace format 'broken' \(plugin:broken\) cannot be loaded: ImportError: no module named x"
    with pytest.raises(InputError, match=f"^{broken}; known formats: azure"):
        read_trace(path, "broken")
    with pytest.raises(InputError, match=r"^trace format 'silent': loading plugin:silent registered no such"):
        read_trace(path, "silent")
    path.write_text("?")
    with pytest.raises(InputError, match=broken):
        read_trace(path)

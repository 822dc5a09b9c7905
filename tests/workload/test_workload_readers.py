"""Reading and writing traces that are well formed."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.core.errors import InputError
from neo.workload import TraceRequest, Workload, read_trace, write_jsonl
from neo.workload.registry import FORMATS
from neo.workload.source import MAX_TOKENS, Timestamps

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def _file(folder: Path, content: str | bytes, name: str = "trace.data") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


SAME = [TraceRequest("0", 0.0, 100, 20), TraceRequest("1", 1.5, 7, 3)]
SAME_LENGTHS = [request._replace(arrival_s=0.0) for request in SAME]


@pytest.mark.parametrize(
    ("format", "content", "timed"),
    [
        ("azure", AZURE + "2023-11-16 18:17:59.5,100,20\n2023-11-16 18:18:01,7,3\n", True),
        (
            "mooncake",
            '{"timestamp": 0, "input_length": 100, "output_length": 20, "hash_ids": [1]}\n'
            '{"timestamp": 1500, "input_length": 7, "output_length": 3}\n',
            True,
        ),
        (
            "vidur",
            ",arrived_at,num_decode_tokens,num_prefill_tokens,pd_ratio\n0,0.0,20,100,5\n1,1.5,3,7,2.3\n",
            True,
        ),
        ("vidur", "num_prefill_tokens,num_decode_tokens\n100,20\n7,3\n", False),
        (
            "neo-json",
            '[{"prompt": 100, "max_tokens": 20},\n {"prompt": 7, "max_tokens": 3, "x": null}]',
            False,
        ),
        (
            "jsonl",
            '{"arrival_s": 0, "prompt_tokens": 100, "output_tokens": 20, "more": NaN}\n'
            '{"arrival_s": 1.5, "prompt_tokens": 7, "output_tokens": 3}\n',
            True,
        ),
        (
            "jsonl",
            '{"prompt_tokens": 100, "output_tokens": 20}\n\n{"prompt_tokens": 7, "output_tokens": 3}',
            False,
        ),
    ],
)
@pytest.mark.parametrize("as_written", ["\n", "\r\n", "no end", "bom", "blank lines"])
def test_each_format_is_recognised_by_its_content(
    tmp_path: Path, format: str, content: str, timed: bool, as_written: str
) -> None:
    content = {
        "\r\n": content.replace("\n", "\r\n"),
        "no end": content.rstrip(),
        "bom": "\ufeff" + content,
        "blank lines": "\n" + content + "\n \n",
    }.get(as_written, content)
    workload = read_trace(_file(tmp_path, content, "my.trace.data"))
    assert list(workload.requests) == (SAME if timed else SAME_LENGTHS)
    assert workload.has_arrivals is timed
    assert workload.name == "my.trace"
    assert workload.source == {"format": format, "file": "my.trace.data", "limit": None}
    assert read_trace(tmp_path / "my.trace.data", format=format).requests == workload.requests


def test_quoted_and_padded_csv_fields(tmp_path: Path) -> None:
    path = _file(tmp_path, '"TIMESTAMP", ContextTokens ,GeneratedTokens\n"2023-11-16 18:17:03", 5 ,"6"\n')
    assert read_trace(path).requests == (TraceRequest("0", 0.0, 5, 6),)


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = _file(tmp_path, AZURE + "2023-11-16 18:17:03,5,6\n2023-11-16 18:17:04,7,8\nbroken\n")
    workload = read_trace(path, limit=2)
    assert [request.prompt_tokens for request in workload.requests] == [5, 7]
    assert workload.source["limit"] == 2
    with pytest.raises(InputError, match=r"trace\.data:4: "):
        read_trace(path, limit=3)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "3"])
def test_a_wrong_limit_is_refused(tmp_path: Path, limit: object) -> None:
    path = _file(tmp_path, AZURE + "2023-11-16 18:17:03,5,6\n")
    with pytest.raises(InputError, match=r"^limit: expected a positive integer"):
        read_trace(path, limit=limit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "after_ns"),
    [
        ("2023-11-16 18:17:03.9799600", 0),
        ("2023-11-16 18:17:03.9799601", 100),
        ("2023-11-16 18:17:03.979960001", 1),
        ("2023-11-16 18:17:03.979960000999", 0),
        ("2023-11-16 18:17:03.97996", 0),
        ("2023-11-16 18:17:04", 20_040_000),
        ("2023-11-16T18:17:03.979960Z", 0),
        ("2023-11-16T18:17:03.9799600+00:00", 0),
        ("2023-11-16t20:47:03.97996+0230", 0),
        ("2023-11-16 13:17:03.97996-05:00", 0),
        (" 2023-11-17 00:00:00 ", 20_576_020_040_000),
        ("2023-11-16 18:17:59.0000000", 55_020_040_000),
    ],
)
def test_timestamps_are_exact(text: str, after_ns: int) -> None:
    times = Timestamps("T")
    origin = times.nanoseconds("2023-11-16 18:17:03.9799600")
    assert times.nanoseconds(text) - origin == after_ns
    assert times.nanoseconds(text) - origin == after_ns  # again, with the minute known
    assert Timestamps("T").nanoseconds(text) == times.nanoseconds(text)


@given(st.datetimes(), st.booleans())
def test_timestamps_agree_with_datetime(moment, zulu: bool) -> None:  # type: ignore[no-untyped-def]
    times = Timestamps("T")
    origin = times.nanoseconds("0001-01-01 00:00:00")
    text = moment.strftime("%H:%M:%S.%f")
    text = f"{moment.date().isoformat()} {text}" + ("Z" if zulu else "0")
    passed = moment - type(moment)(1, 1, 1)
    for _ in range(2):
        micros = (passed.days * 86400 + passed.seconds) * 1_000_000 + passed.microseconds
        assert times.nanoseconds(text) - origin == micros * 1000


_seconds = st.floats(0, 1e9, allow_nan=False)
_requests = st.lists(
    st.builds(
        TraceRequest,
        st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20),
        _seconds,
        st.integers(1, MAX_TOKENS),
        st.integers(1, MAX_TOKENS),
        st.integers(-5, 5),
        st.none() | st.floats(1e-9, 1e9),
        st.none() | _seconds,
    ),
    min_size=1,
    max_size=20,
    unique_by=lambda request: request.id,
)


@given(_requests, st.booleans())
def test_what_is_written_is_read_back(tmp_path_factory, requests, timed: bool) -> None:  # type: ignore[no-untyped-def]
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    if not timed:
        ordered = [request._replace(arrival_s=0.0) for request in ordered]
    path = tmp_path_factory.mktemp("jsonl") / "trace.jsonl"
    write_jsonl(Workload("w", tuple(ordered), {}, timed), path)
    back = read_trace(path)
    assert list(back.requests) == ordered
    assert back.has_arrivals is timed
    assert back.source["format"] == "jsonl"


def test_a_value_that_looks_like_the_field_of_another_format(tmp_path: Path) -> None:
    workload = Workload(
        "w", (TraceRequest('{"input_length": 5', 0.0, 1, 1), TraceRequest("max_tokens", 0.0, 1, 1)), {}
    )
    write_jsonl(workload, tmp_path / "t")
    assert read_trace(tmp_path / "t").requests == workload.requests


@pytest.mark.parametrize("target", ["missing/trace.jsonl", "."])
def test_a_file_that_cannot_be_written(tmp_path: Path, target: str) -> None:
    with pytest.raises(InputError, match=r"cannot be written: (No such file|Is a directory)"):
        write_jsonl(Workload("w", tuple(SAME), {}), tmp_path / target)


def test_times_that_are_not_numbers_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_jsonl(Workload("w", (TraceRequest("0", float("nan"), 1, 1),), {}), tmp_path / "x.jsonl")


def test_importing_and_reading_need_neither_numpy_nor_rich(tmp_path: Path) -> None:
    path = _file(tmp_path, AZURE + "2023-11-16 18:17:03,5,6\n")
    code = (
        "import sys, neo.workload as w; w.describe(w.read_trace(sys.argv[1])); "
        "print([m for m in ('numpy', 'rich', 'pydantic', 'torch', 'simpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


TOTALS = {
    "AzureLLMInferenceTrace_conv.csv": ("azure", 19366, 22_361_870, 4_088_665, 3501.721937),
    "AzureLLMInferenceTrace_code.csv": ("azure", 8819, 18_059_974, 245_896, 3435.948056),
    "mooncake_conversation.jsonl": ("mooncake", 12031, 144_793_823, 4_122_048, 3536.999),
    "neo_osc.json": ("neo-json", 2000, None, None, 0.0),
}


@pytest.mark.traces
@pytest.mark.parametrize("name", TOTALS)
def test_the_real_traces(traces_dir: Path, tmp_path: Path, name: str) -> None:
    if not (traces_dir / name).exists():
        pytest.skip(f"{name} is not in {traces_dir}")
    form, count, prompts, outputs, last = TOTALS[name]
    workload = read_trace(traces_dir / name)
    assert (workload.source["format"], len(workload)) == (form, count)
    if prompts is not None:
        assert sum(request.prompt_tokens for request in workload.requests) == prompts
        assert sum(request.output_tokens for request in workload.requests) == outputs
    assert workload.requests[0].arrival_s == 0.0
    assert workload.requests[-1].arrival_s == pytest.approx(last, abs=1e-9)
    write_jsonl(workload, tmp_path / "copy")
    assert read_trace(tmp_path / "copy").requests == workload.requests


def test_json_lines_longer_than_the_sniffed_head(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 5, "output_length": 6, "hash_ids": list(range(30_000))}
    content = io.StringIO()
    for _ in range(2):
        content.write(json.dumps(row) + "\n")
    assert len(read_trace(_file(tmp_path, content.getvalue()))) == 2


OWN = """
from neo.workload import TraceRequest, trace_format

@trace_format("own-lines", "lines of in out", lambda source: False)
def read_own(source):
    source.has_arrivals = False
    for number, line in enumerate(source.lines()):
        prompt, output = map(int, line.split())
        yield TraceRequest(str(number), 0.0, prompt, output)

def helper():
    pass
"""


def test_a_format_in_a_file_of_one_s_own_needs_no_more_than_its_name(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "t.txt").write_text("5 6\n7 8\n")
    try:
        for _ in range(2):  # a file is loaded once
            found = read_trace(tmp_path / "t.txt", f"{tmp_path / 'own.py'}:read_own")
            assert [(r.prompt_tokens, r.output_tokens) for r in found.requests] == [(5, 6), (7, 8)]
    finally:
        FORMATS.pop("own-lines", None)
    with pytest.raises(InputError, match="helper is no reader, @trace_format registers those"):
        read_trace(tmp_path / "t.txt", f"{tmp_path / 'own.py'}:helper")
    FORMATS.pop("own-lines", None)
    with pytest.raises(InputError, match="no such file"):
        read_trace(tmp_path / "t.txt", f"{tmp_path / 'gone.py'}:read")

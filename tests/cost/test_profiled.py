import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cost_works import FIELDS, MACHINE, MODEL, grown, kinds, works
from hypothesis import given
from hypothesis import strategies as st

from neo.core.errors import InputError
from neo.core.graph import OpKind, Work
from neo.cost.factors import RooflineFactors
from neo.cost.interface import CostModel
from neo.cost.interpolation import Curve, Surface
from neo.cost.profiled import Profiled
from neo.cost.roofline import Roofline
from neo.cost.table_schema import AXES
from neo.cost.tabulate import tabulate

TWO_RANKS = replace(MODEL, tp=2)
ROOFLINE = Roofline(TWO_RANKS, MACHINE)
TABLE: dict[str, Any] = tabulate(ROOFLINE, TWO_RANKS)
TOLERANCE = 1 + 1e-12  # monotone up to rounding of interpolation


def profiled() -> Profiled:
    return Profiled.from_dict(TABLE)


def test_is_a_cost_model() -> None:
    assert isinstance(profiled(), CostModel)
    assert json.dumps(profiled().describe())
    assert profiled().describe()["warnings"] == []


def test_table_is_plain_json() -> None:
    assert json.loads(json.dumps(TABLE)) == TABLE


@given(
    kinds,
    st.integers(1, 1024),
    st.integers(0, 4_000_000),
    st.integers(1024, 2**32),
    st.tuples(st.integers(0, 100_000), st.integers(1, 16_000)),
)
def test_round_trip_within_interpolation_error(
    kind: OpKind, rows: int, kv: int, nbytes: int, chunk: tuple[int, int]
) -> None:
    work = Work(tokens=rows, sequences=rows, kv_tokens=kv, bytes=nbytes, chunks=(chunk,))
    assert profiled().seconds(kind, work) == pytest.approx(ROOFLINE.seconds(kind, work), rel=0.15)


def test_round_trip_is_exact_on_the_grid() -> None:
    table = profiled()
    for kind, work in [
        (OpKind.PRE, Work(256)),
        (OpKind.HEAD, Work(64, 64)),
        (OpKind.GPU_ATTN, Work(sequences=64, kv_tokens=65_536)),
        (OpKind.GPU_ATTN, Work(chunks=((1024, 512),))),
        (OpKind.CPU_ATTN, Work(sequences=64, kv_tokens=65_536)),
        (OpKind.SWAP_IN, Work(bytes=2**20)),
        (OpKind.ALLREDUCE, Work(bytes=2**20)),
    ]:
        assert table.seconds(kind, work) == pytest.approx(ROOFLINE.seconds(kind, work), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        (OpKind.CPU_ATTN, Work(sequences=8, kv_tokens=2**20, beside_bytes=10**6)),
        (OpKind.CPU_ATTN, Work(sequences=8, kv_tokens=2**20, beside_bytes=10**10)),
        (OpKind.SWAP_OUT, Work(bytes=2**26, beside_bytes=2**25)),
        (OpKind.STREAM, Work(bytes=2**26, beside_bytes=2**30)),
    ],
)
def test_contention_survives_the_round_trip(kind: OpKind, work: Work) -> None:
    assert profiled().seconds(kind, work) == pytest.approx(ROOFLINE.seconds(kind, work), rel=0.05)
    assert profiled().seconds(kind, work) > profiled().seconds(kind, work._replace(beside_bytes=0))


@pytest.mark.parametrize("cost", [profiled(), ROOFLINE], ids=["profiled", "roofline"])
def test_layers_in_one_run_share_its_price(cost: CostModel) -> None:
    """What a run costs beside its reading is paid once."""
    one = Work(sequences=4, kv_tokens=4000)
    all_of_them = Work(sequences=4 * 32, kv_tokens=4000 * 32)
    share = cost.seconds(OpKind.CPU_ATTN, one._replace(layers=32))
    assert 32 * share == pytest.approx(cost.seconds(OpKind.CPU_ATTN, all_of_them), rel=1e-3)
    assert share < cost.seconds(OpKind.CPU_ATTN, one)


@given(kinds, works, st.sampled_from(FIELDS), st.integers(1, 100_000))
def test_monotone_in_every_field(kind: OpKind, work: Work, field: str, by: int) -> None:
    less, more = profiled().seconds(kind, work), profiled().seconds(kind, grown(work, field, by))
    assert 0.0 <= less <= more * TOLERANCE


@given(
    st.sampled_from([OpKind.GPU_ATTN, OpKind.CPU_ATTN]), works, st.lists(st.integers(0, 2**40), min_size=1)
)
def test_arrays_equal_scalars_bitwise(kind: OpKind, work: Work, kv: list[int]) -> None:
    table = profiled()
    found = table.seconds(kind, work._replace(kv_tokens=np.array(kv)))
    assert found.dtype == np.float64
    assert found.tolist() == [table.seconds(kind, work._replace(kv_tokens=k)) for k in kv]


ticks = st.lists(st.integers(0, 1000), min_size=2, max_size=6, unique=True).map(sorted)


@given(st.data(), ticks, ticks)
def test_surfaces_of_any_data_are_monotone_and_never_below_the_edge(
    data: st.DataObject, xs: list[int], ys: list[int]
) -> None:
    row = st.lists(st.floats(0, 100), min_size=len(ys), max_size=len(ys))
    values = data.draw(st.lists(row, min_size=len(xs), max_size=len(xs)))
    surface = Surface("t", ("x", "y"), xs, ys, values)
    points = st.tuples(st.integers(0, 2000), st.integers(0, 2000))
    (x0, y0), (x1, y1) = data.draw(points), data.draw(points)
    low = surface.at(min(x0, x1), min(y0, y1))
    assert low <= surface.at(max(x0, x1), max(y0, y1)) * TOLERANCE + 1e-12
    array = np.array([y0, y1], dtype=np.float64)
    assert surface.at_array(x0, array).tolist() == [surface.at(x0, y0), surface.at(x0, y1)]
    edge = surface.at(min(x0, xs[-1]), min(y0, ys[-1]))
    assert edge <= surface.at(x0, y0) * TOLERANCE + 1e-12


@given(st.data(), ticks)
def test_curves_of_any_data_are_monotone(data: st.DataObject, xs: list[int]) -> None:
    curve = Curve("t", "x", xs, data.draw(st.lists(st.floats(0, 100), min_size=len(xs), max_size=len(xs))))
    a, b = sorted(data.draw(st.tuples(st.integers(0, 2000), st.integers(0, 2000))))
    assert curve.at(a) <= curve.at(b)


def test_curve_by_hand() -> None:
    curve = Curve("t", "x", [10, 20, 40], [1.0, 3.0, 4.0])
    assert [curve.at(x) for x in (5, 10, 15, 20, 30, 40, 60)] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 5.0]
    surface = Surface("t", ("x", "y"), [0, 10], [0, 10], [[0.0, 10.0], [10.0, 40.0]])
    assert surface.at(5, 5) == 15.0
    assert surface.at(20, 0) == 20.0
    assert surface.at(20, 20) == 20 * 20 * 0.2 + 20 + 20  # the plane with its cross term goes on


def test_extrapolation_is_counted_and_reported() -> None:
    small = tabulate(
        ROOFLINE, TWO_RANKS, {"tokens": (2, 64, 128), "sequences": (1, 8), "kv_tokens": (0, 1000)}
    )
    table = Profiled.from_dict(small)
    table.seconds(OpKind.PRE, Work(128))
    assert table.describe()["warnings"] == []
    table.seconds(OpKind.PRE, Work(500))
    table.seconds(OpKind.PRE, Work(300))
    table.seconds(OpKind.PRE, Work(1))
    table.seconds(OpKind.CPU_ATTN, Work(sequences=9, kv_tokens=np.array([10, 5000, 9000])))
    assert sorted(table.describe()["warnings"]) == [
        "table 'cpu_attn', kv_tokens: 2 look-ups extrapolated above the grid's last value 1000, up to 9000",
        "table 'cpu_attn', sequences: 1 look-ups extrapolated above the grid's last value 8, up to 9",
        "table 'pre', tokens: 3 look-ups extrapolated above the grid's last value 128, up to 500 "
        "and below the grid's first value 2, down to 1",
    ]


def test_noise_is_corrected_and_reported() -> None:
    noisy = copy.deepcopy(TABLE)
    noisy["tables"]["post"]["seconds"][5] *= 0.5
    table = Profiled.from_dict(noisy)
    seconds = table.seconds(OpKind.POST, Work(TABLE["tables"]["post"]["axes"]["tokens"][5]))
    assert seconds == TABLE["tables"]["post"]["seconds"][4]
    assert any("table 'post': 1 of" in line and "raised" in line for line in table.describe()["warnings"])


def test_missing_tables_matter_only_when_needed() -> None:
    part = {**TABLE, "tables": {"pre": TABLE["tables"]["pre"]}}
    table = Profiled.from_dict(part, "t.json")
    assert table.seconds(OpKind.PRE, Work(8)) > 0
    for kind, name in [
        (OpKind.CPU_ATTN, "cpu_attn"),
        (OpKind.SEND, "send"),
        (OpKind.GPU_ATTN, "gpu_attn_decode"),
    ]:
        with pytest.raises(InputError, match=f"cost table t.json: holds no table '{name}', which {kind}"):
            table.seconds(kind, Work(1, 1, 1, 1))


def _save(folder: Path, content: Any) -> Path:
    path = folder / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_load_checks_the_model(tmp_path: Path) -> None:
    path = _save(tmp_path, TABLE)
    assert Profiled.load(path, TWO_RANKS).describe()["file"] == str(path)
    assert Profiled.load(path).vectorized
    renamed = replace(TWO_RANKS, name="a finetune of the same shape")
    assert Profiled.load(path, renamed)
    with pytest.raises(InputError, match=r"was measured for 'toy' with kv_heads 2 \(model 'toy': 10\), tp 2"):
        Profiled.load(path, replace(MODEL, kv_heads=10))


def _set(table: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(table)
    *parents, last = path.split("/")
    at: Any = changed
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(last) if isinstance(at, list) else last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "other/9", "format: Input should be 'neo-cost-table/1'"),
        ("tables/pre/axes/tokens/3", 1, r"tables\.pre\.axes\.tokens\.3: 1 after 4, must increase"),
        (
            "tables/pre/seconds/2",
            -1.0,
            r"tables\.pre\.seconds\.2: -1.0 is not a finite number",
        ),
        ("tables/pre/seconds/2", float("nan"), r"tables\.pre\.seconds\.2"),
        ("tables/cpu_attn/seconds/1/2", float("inf"), r"tables\.cpu_attn\.seconds\.1\.2"),
        ("tables/pre/seconds", [1.0, 2.0], r"tables\.pre\.seconds: has 2 entries, its axis has"),
        ("tables/cpu_attn/seconds/1", [1.0], r"tables\.cpu_attn\.seconds\.1: has 1 entries, its axis has"),
        ("tables/cpu_attn/seconds", [1.0] * 11, r"tables\.cpu_attn\.seconds\.0: must be a list"),
        ("tables/pre/axes", {"rows": [1, 2]}, r"tables\.pre\.axes: must be tokens, found rows"),
        ("tables/pre/axes/tokens", [1], r"tables\.pre\.axes\.tokens: needs at least 2 values, has 1"),
        ("tables/pree", {"axes": {"tokens": [1, 2]}, "seconds": [1.0, 2.0]}, r"tables\.pree: unknown"),
        ("provenance/repeats", 0, r"provenance\.repeats"),
        ("contention/copy_share_duplex", 1.5, r"contention\.copy_share_duplex"),
        ("extra", 1, "extra: is not a known field"),
    ],
)
def test_errors_name_file_and_field(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = _save(tmp_path, _set(TABLE, path, value))
    with pytest.raises(InputError, match=message) as caught:
        Profiled.load(file)
    assert str(caught.value).startswith(f"cost table {file}: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not valid JSON: line 1"):
        Profiled.load(_save(tmp_path, "{"))
    with pytest.raises(InputError, match="cannot be read"):
        Profiled.load(tmp_path / "none.json")


def test_the_documentation_is_true() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cost-models.md").read_text()
    example = text.split("```json\n")[1].split("```")[0]
    assert Profiled.from_dict(json.loads(example)).seconds(OpKind.PRE, Work(64)) == 1.1e-4
    for row in RooflineFactors().rows():
        assert (
            f"| `{row['name']}` | {row['value']:g} | {row['unit']} | {row['doc']} | {row['source']} |" in text
        )
    for name in AXES:
        assert f"`{name}`" in text

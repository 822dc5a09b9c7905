"""What both backends compute, held against float64 and against each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="KV memory is torch's")

import torch
from backend_cases import make_case, queries
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.core.errors import InputError
from neo.runtime import cpu_library
from neo.runtime.backend import Backend, Kind, KVMemory, backend
from neo.runtime.kv_memory import available_bytes

needs_library = pytest.mark.skipif(
    not cpu_library.available(), reason="the CPU kernels are not built here (make kernels)"
)
KINDS = [pytest.param("native", marks=needs_library), "torch"]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", params=KINDS)
def back(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = backend(request.param, threads=2)
    yield made
    made.close()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("io", TYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 32), ((3, 3), 64), ((8, 1), 16), ((6, 2), 80)])
@pytest.mark.parametrize("block_size", [8, 32])
def test_append_then_attend(
    back: Backend,
    dtype: torch.dtype,
    io: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
) -> None:
    """Slots in any order, some twice, at lengths up to theirs; k, v, q of any type."""
    case = make_case([1, 33, 8, 100, 64], heads, head_dim, block_size, dtype, io)
    case.fill(back)
    slots = np.array([3, 0, 4, 3, 1, 2], np.int32)
    lengths = np.array([100, 1, 64, 37, 0, 7], np.int32)
    q = queries(case, 6, io)
    out = torch.full_like(q, float("nan"))
    back.decode(case.memory, q, out, case.tables, slots, lengths)
    case.check(out, q, slots, lengths)


def test_gathered_rows_are_those_appended(back: Backend) -> None:
    case = make_case([70, 16, 5], dtype=torch.bfloat16, io=torch.float32)
    case.fill(back)
    for slot, tokens in ((0, 70), (0, 33), (1, 16), (2, 1), (2, 0)):
        for table in (case.tables[slot], torch.from_numpy(case.tables[slot])):
            k, v = back.gather(case.memory, table, tokens)
            assert torch.equal(k, case.k[slot][:tokens].bfloat16())
            assert torch.equal(v, case.v[slot][:tokens].bfloat16())
    with pytest.raises(ValueError, match="block -1, the memory has"):
        back.gather(case.memory, case.tables[2], 17)
    with pytest.raises(ValueError, match="160 tokens take 10 blocks, the table has 6"):
        back.gather(case.memory, case.tables[0], 160)


def test_rows_of_a_fused_projection_and_of_wider_outputs(back: Backend) -> None:
    case = make_case([20, 40, 3])
    _, _, slots, positions = case.rows()
    fused = torch.randn(len(slots), (4 + 2 * 2) * 32).half()
    k, v = fused[:, 128:192].view(-1, 2, 32), fused[:, 192:].view(-1, 2, 32)
    case.k, case.v = list(k.split(case.lengths)), list(v.split(case.lengths))
    back.append(case.memory, k, v, case.tables, slots, positions)
    wide = torch.zeros(3, 6, 48).half()
    q, out = fused[:3, :128].view(3, 4, 32), wide[:, 1:5, :32]
    which, lengths = np.arange(3, dtype=np.int32), np.array(case.lengths, np.int32)
    back.decode(case.memory, q, out, case.tables, which, lengths)
    case.check(out, q, which, lengths)
    out.zero_()
    assert not wide.any()


def test_inputs_in_any_arrangement(back: Backend) -> None:
    """Heads apart, axes swapped, k and v of different types: copied where need be, never misread."""
    case = make_case([20])
    k, v, slots, positions = case.rows()
    swapped = k.transpose(0, 1).contiguous().transpose(0, 1)
    by_column = v.transpose(1, 2).contiguous().transpose(1, 2)
    back.append(case.memory, swapped, by_column.float(), case.tables, slots, positions)
    q = queries(case, 1).transpose(1, 2).contiguous().transpose(1, 2)
    out = torch.empty(1, 4, 32).half()
    back.decode(case.memory, q, out, case.tables, slots[:1], np.array([20], np.int32))
    case.check(out, q, slots[:1], np.array([20], np.int32))


def test_a_layer_of_tables_as_array_and_as_tensor(back: Backend) -> None:
    """The tables of all layers are one array; arrays that may not be written are read too."""
    case = make_case([20, 33])
    layers = np.stack([np.full_like(case.tables, -1), case.tables])
    k, v, slots, positions = case.rows()
    fixed = slots.copy()
    fixed.flags.writeable = False
    back.append(
        case.memory, k, v, torch.from_numpy(layers)[1], torch.from_numpy(slots), torch.from_numpy(positions)
    )
    which, lengths, q = np.array([1, 0], np.int32), np.array([33, 20], np.int32), queries(case, 2)
    out = torch.empty_like(q)
    back.decode(case.memory, q, out, layers[1][:, :3], which, lengths)
    case.check(out, q, which, lengths)


def test_nothing_to_do(back: Backend) -> None:
    empty = KVMemory.allocate(0, 2, 32, 16, torch.float32)
    none, rows = np.empty(0, np.int32), torch.empty(0, 2, 32)
    tables = np.empty((0, 0), np.int32)
    back.append(empty, rows, rows, tables, none, none)
    back.decode(empty, rows, rows.clone(), tables, none, none)
    k, v = back.gather(empty, none, 0)
    assert k.shape == v.shape == (0, 2, 32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slots", [0, 3]),
        ("slots", [0, -1]),
        ("slots", [0]),
        ("positions", [5, 48]),
        ("positions", [5, -1]),
        ("tables", [[0, 1, 99]] * 3),
        ("tables", [0, 1, 2]),
        ("k", torch.zeros(2, 2, 16)),
        ("k", torch.zeros(2, 3, 32)),
        ("k", torch.zeros(3, 2, 32)),
        ("v", torch.zeros(2, 32)),
        ("v", torch.zeros(2, 2, 32, device="meta")),
    ],
)
def test_refused_appends_write_nothing(back: Backend, field: str, value: object) -> None:
    memory = KVMemory.allocate(4, 2, 32, 16, torch.float32)
    arguments: dict[str, object] = {
        "k": torch.ones(2, 2, 32),
        "v": torch.ones(2, 2, 32),
        "tables": np.array([[0, 1, 2]] * 3, np.int32),
        "slots": np.array([0, 1], np.int32),
        "positions": np.array([5, 40], np.int32),
    }
    arguments[field] = value if isinstance(value, torch.Tensor) else np.array(value, np.int32)
    with pytest.raises(ValueError, match=r"\d"):
        back.append(memory, **arguments)  # type: ignore[arg-type]
    assert not memory.tensor.any()


def test_indices_of_another_type_are_refused(back: Backend) -> None:
    memory, rows, good = (
        KVMemory.allocate(4, 2, 32, 16, torch.float32),
        torch.ones(2, 2, 32),
        np.arange(2, dtype=np.int32),
    )
    tables = np.array([[0], [1]], np.int32)
    for wrong in (np.arange(2), torch.arange(2)):
        for arguments in ((tables, wrong, good), (tables, good, wrong), (wrong[:, None], good, good)):
            with pytest.raises(ValueError, match="int32"):
                back.append(memory, rows, rows, *arguments)
            with pytest.raises(ValueError, match="int32"):
                back.decode(memory, rows, rows.clone(), *arguments)
    assert not memory.tensor.any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slots", [2, 0]),
        ("lengths", [20, -1]),
        ("lengths", [20, 1000]),
        ("tables", [[0, 99], [1, 2]]),
        ("q", torch.zeros(2, 3, 32)),
        ("q", torch.zeros(2, 4, 16)),
        ("out", torch.zeros(1, 4, 32)),
        ("out", torch.zeros(2, 4, 32).half()),
    ],
)
def test_refused_decodes_write_nothing(back: Backend, field: str, value: object) -> None:
    memory = KVMemory.allocate(4, 2, 32, 16, torch.float32)
    out = torch.full((2, 4, 32), 7.0)
    arguments: dict[str, object] = {
        "q": torch.ones(2, 4, 32),
        "out": out,
        "tables": np.array([[0, 3], [1, 2]], np.int32),
        "slots": np.array([0, 1], np.int32),
        "lengths": np.array([20, 17], np.int32),
    }
    arguments[field] = value if isinstance(value, torch.Tensor) else np.array(value, np.int32)
    with pytest.raises(ValueError, match=r"\d"):
        back.decode(memory, **arguments)  # type: ignore[arg-type]
    assert (out == 7.0).all()


@needs_library
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    shape=st.sampled_from([(1, 1, 16), (4, 1, 64), (2, 2, 96), (8, 2, 128)]),
    block_size=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 2**31),
)
def test_both_backends_agree(
    lengths: list[int], shape: tuple[int, int, int], block_size: int, dtype: torch.dtype, seed: int
) -> None:
    """Memories equal to the bit; outputs within a few units in the last place of sums of size 1."""
    heads, kv_heads, dim = shape
    outputs, memories = [], []
    for kind in ("native", "torch"):
        case = make_case(lengths, (heads, kv_heads), dim, block_size, dtype, torch.float32, seed)
        back = backend(kind)  # type: ignore[arg-type]
        case.fill(back)
        q = queries(case, len(lengths), torch.float32, seed)
        out = torch.empty_like(q)
        slots = np.arange(len(lengths), dtype=np.int32)
        back.decode(case.memory, q, out, case.tables, slots, np.array(lengths, np.int32))
        outputs.append(out)
        memories.append(case.memory.tensor)
        back.close()
    assert torch.equal(memories[0].nan_to_num(7.0), memories[1].nan_to_num(7.0))
    assert (outputs[0] - outputs[1]).abs().max() <= 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("touch", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_memory_has_the_layout_of_the_kernels(dtype: torch.dtype, touch: bool) -> None:
    memory = KVMemory.allocate(5, 2, 32, 16, dtype, touch=touch)
    assert memory.tensor.shape == (5, 2, 2, 512)
    assert memory.nbytes == memory.tensor.numel() * dtype.itemsize == 5 * memory.block_bytes
    assert not memory.tensor.any()
    k, v = memory.planes()
    assert k.shape == (5, 2, 32, 16)
    assert v.shape == (5, 2, 16, 32)
    k[3, 1, 4, 5], v[3, 1, 6, 7] = 1.0, 2.0
    flat = memory.tensor.flatten()
    head = (3 * 2 + 1) * 2 * 512
    assert flat.nonzero().flatten().tolist() == [head + 4 * 16 + 5, head + 512 + 6 * 32 + 7]


def test_memory_that_is_not_there_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        InputError, match=r"1000000000 layer-blocks takes [\d.]+ GiB \(131072000000000 bytes\), but"
    ):
        KVMemory.allocate(1_000_000_000, 8, 256, 16, torch.float16)
    with pytest.raises(ValueError, match="-1 blocks"):
        KVMemory.allocate(-1, 8, 128, 16, torch.float16)
    with pytest.raises(ValueError, match="float64"):
        KVMemory.allocate(1, 8, 128, 16, torch.float64)


def test_available_memory_is_the_lesser_of_system_and_control_group(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert available_bytes(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 2000000\ninactive_file 500000\n")
    assert available_bytes(tmp_path) == 5000 * 1024
    (group / "memory.max").write_text("4000000\n")
    assert available_bytes(tmp_path) == 1_500_000


def test_the_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kind, message in (("cuda", "'cuda' is unknown"), ("auto", "0 given, at least 1")):
        with pytest.raises(InputError, match=message):
            backend(kind, threads=0 if kind == "auto" else 1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 given for 2 threads"):
        backend("auto", threads=2, cores=[0])
    monkeypatch.setenv(cpu_library.LIBRARY_VARIABLE, str(tmp_path / "nothing.so"))
    with pytest.raises(InputError, match=r"nothing\.so"):
        backend("native")
    fallen = backend("auto")
    assert fallen.kind == "torch"
    assert "slowly" in fallen.note
    assert "make kernels" in fallen.note


@needs_library
def test_the_library_is_chosen_where_it_is_built() -> None:
    chosen = backend("auto", threads=2)
    assert (chosen.kind, chosen.note) == ("native", "")
    assert chosen.describe()["threads"] == 2
    chosen.close()


@pytest.mark.parametrize("kind", KINDS)
def test_descriptions_are_plain_data(kind: Kind) -> None:
    made = backend(kind)
    assert json.loads(json.dumps(made.describe()))["kind"] == kind
    made.close()


@needs_library
def test_the_documented_code_runs() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "cpu-attention.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, object] = {}
        exec(block, names)
        assert np.abs(np.asarray(names["out"])).max() > 0

"""The CUDA library without a GPU: loading it, what it refuses, what it says where there is no device."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_cases import emulated_path, why_no_gpu

from neo.runtime import cuda_kernels as ck
from neo.runtime import cuda_library as c
from neo.runtime import cuda_transfers as ct
from neo.runtime.cpu_library import Sized


@pytest.fixture(params=["real", "emulated"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Arguments are refused before a device is looked for, so either library can be asked anywhere."""
    if request.param == "emulated":
        if not emulated_path().is_file():
            pytest.skip("the emulated CUDA kernels are not built here (make kernels)")
        monkeypatch.setenv(c.LIBRARY_VARIABLE, str(emulated_path()))
    try:
        return c.load()
    except c.CudaKernelsMissingError as error:
        pytest.skip(str(error))


def test_it_loads_without_a_gpu(library: ctypes.CDLL) -> None:
    assert library.neo_cuda_abi() == c.ABI
    assert library.neo_cuda_version().decode().count(".") == 2


def test_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(c.LIBRARY_VARIABLE, str(tmp_path / "gone.so"))
    with pytest.raises(c.CudaKernelsMissingError, match=r"gone\.so.*make kernels.*nvcc"):
        c.load()
    assert "make kernels" in c.why_not()


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "libneo_cuda.so"
    path.write_text("nothing")
    with pytest.raises(c.CudaKernelsMissingError, match=str(path)):
        c.load_from(path)


def test_no_device_is_an_error_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    if not why_no_gpu():
        pytest.skip("there is a GPU")
    try:
        c.load()
    except c.CudaKernelsMissingError as error:
        pytest.skip(str(error))
    with pytest.raises(c.CudaKernelError, match="cuda"):
        c.describe()


def test_the_emulated_device_describes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    if not emulated_path().is_file():
        pytest.skip("the emulated CUDA kernels are not built here (make kernels)")
    monkeypatch.setenv(c.LIBRARY_VARIABLE, str(emulated_path()))
    assert c.describe().capability == 90
    assert not c.why_not()


HERE = 1 << 20  # an address that is aligned, and never used


def cache(**fields: Any) -> c.Cache:
    good = {"data": HERE, "num_blocks": 4, "kv_heads": 2, "head_dim": 64, "block_size": 16, "dtype": 0}
    return c.Cache(**good | fields)


def decode(of: c.Cache | None = None, **fields: Any) -> c.Decode:
    good: dict[str, Any] = {
        "cache": ctypes.pointer(of or cache()), "q": HERE, "out": HERE, "q_stride": 256, "q_head_stride": 64,
        "out_stride": 256, "out_head_stride": 64, "block_tables": HERE, "table_stride": 4, "lengths": HERE,
        "rows": 2, "q_heads": 4, "scale": 0.1,
    }  # fmt: skip
    return c.Decode(**good | fields)


def norm(**fields: Any) -> c.Norm:
    good = {"hidden": HERE, "weight": HERE, "out": HERE, "rows": 2, "width": 64, "dtype": 1, "eps": 1e-5}
    return c.Norm(**good | fields)


def silu(**fields: Any) -> c.Silu:
    return c.Silu(**{"gate_up": HERE, "out": HERE, "rows": 2, "width": 64, "dtype": 1} | fields)


def angles(**fields: Any) -> c.Angles:
    good = {
        "positions": HERE,
        "frequencies": HERE,
        "cos": HERE,
        "sin": HERE,
        "rows": 2,
        "head_dim": 64,
        "scale": 1.0,
    }
    return c.Angles(**good | fields)


def qkv(of: c.Cache | None = None, **fields: Any) -> c.Qkv:
    good: dict[str, Any] = {
        "cache": ctypes.pointer(of or cache()), "qkv": HERE, "qkv_stride": 512, "cos": HERE, "sin": HERE,
        "q_out": HERE, "k_out": HERE, "v_out": HERE, "q_stride": 256, "kv_stride": 128, "block_tables": HERE,
        "table_stride": 4, "slots": HERE, "positions": HERE, "rows": 2, "q_heads": 4,
    }  # fmt: skip
    return c.Qkv(**good | fields)


def copy(**fields: Any) -> c.Copy:
    good = {"src": HERE, "dst": HERE, "block_bytes": 64, "src_blocks": HERE, "dst_blocks": HERE, "count": 1}
    return c.Copy(**good | fields)


def channel(**fields: Any) -> Any:
    good = {"state": HERE, "request": HERE, "answer": HERE, "error": HERE}
    return ctypes.pointer(c.Channel(**good | fields))


def post(**fields: Any) -> c.Post:
    good: dict[str, Any] = {
        "channel": channel(), "q": HERE, "k": HERE, "v": HERE, "q_stride": 64, "k_stride": 32, "v_stride": 32,
        "packed": HERE, "packed_stride": 128, "rows": 2, "q_bytes": 64, "kv_bytes": 32,
    }  # fmt: skip
    return c.Post(**good | fields)


def wait(**fields: Any) -> c.Await:
    good: dict[str, Any] = {
        "channel": channel(), "packed": HERE, "packed_stride": 64, "out": HERE, "out_stride": 64, "rows": 2,
        "row_bytes": 64, "timeout_us": 10,
    }  # fmt: skip
    return c.Await(**good | fields)


REFUSED: list[tuple[str, Sized, str]] = [
    ("decode_attention", decode(size=1), "args has size 1"),
    ("decode_attention", decode(cache(size=1)), "cache has size 1"),
    ("decode_attention", decode(cache(dtype=3)), "dtype is 3"),
    ("decode_attention", decode(cache(head_dim=65)), "head_dim is 65, must be a multiple of 16"),
    ("decode_attention", decode(cache(head_dim=48, dtype=1)), "head_dim is 48, must be 64, 80"),
    ("decode_attention", decode(cache(block_size=64)), "block_size is 64"),
    ("decode_attention", decode(cache(kv_heads=0)), "kv_heads is 0"),
    ("decode_attention", decode(cache(data=0)), "data must not be NULL"),
    ("decode_attention", decode(cache(data=HERE + 8)), "data must be aligned"),
    ("decode_attention", decode(cache(kv_heads=3)), "q_heads is 4"),
    ("decode_attention", decode(rows=-1), "rows is -1"),
    ("decode_attention", decode(q=0), "q and out must not be NULL"),
    ("decode_attention", decode(lengths=0), "lengths must not be NULL"),
    ("decode_attention", decode(block_tables=0), "block_tables must not be NULL"),
    ("decode_attention", decode(table_stride=0), "table_stride is 0"),
    ("decode_attention", decode(q_stride=3), "one is 3"),
    ("decode_attention", decode(out_head_stride=2), "out_head_stride is 2"),
    ("decode_attention", decode(scale=float("nan")), "scale"),
    ("decode_attention", decode(stages=9), "stages is 9"),
    ("decode_attention", decode(ctas=-1), "ctas is -1"),
    ("decode_plan", decode(lengths=0), "lengths must not be NULL"),
    ("add_rms_norm", norm(size=0), "args has size 0"),
    ("add_rms_norm", norm(dtype=-1), "dtype is -1"),
    ("add_rms_norm", norm(width=12), "width is 12"),
    ("add_rms_norm", norm(width=40000), "at most 32768"),
    ("add_rms_norm", norm(hidden=0), "must not be NULL"),
    ("add_rms_norm", norm(delta=HERE + 4), "aligned to 16"),
    ("silu_mul", silu(rows=-2), "rows is -2"),
    ("silu_mul", silu(out=0), "must not be NULL"),
    ("silu_mul", silu(out=HERE + 8), "aligned to 16"),
    ("rope_angles", angles(head_dim=65), "head_dim is 65"),
    ("rope_angles", angles(rows=1 << 30), "too many"),
    ("rope_angles", angles(positions=0), "positions and frequencies"),
    ("rope_angles", angles(sin=0), "cos and sin"),
    ("qkv_rope_append", qkv(cache(kv_heads=3)), "q_heads is 4"),
    ("qkv_rope_append", qkv(qkv_stride=511), "at least 512"),
    ("qkv_rope_append", qkv(q_stride=255), "at least 256"),
    ("qkv_rope_append", qkv(kv_stride=127), "at least 128"),
    ("qkv_rope_append", qkv(q_norm=HERE), "q_norm and k_norm"),
    ("qkv_rope_append", qkv(slots=0), "slots and positions"),
    ("qkv_rope_append", qkv(cos=0), "cos and sin"),
    ("copy_blocks", copy(block_bytes=24), "block_bytes is 24"),
    ("copy_blocks", copy(count=-1), "count is -1"),
    ("copy_blocks", copy(src=HERE + 8), "aligned to 16"),
    ("copy_blocks", copy(src_blocks=0), "src_blocks and dst_blocks"),
    ("copy_runs", copy(count_at=HERE), "count_at must be NULL"),
    ("post_rows", post(channel=channel(state=0)), "state, request"),
    ("post_rows", post(channel=channel(state=HERE + 4)), "state must be aligned"),
    ("post_rows", post(q_bytes=24), "q_bytes is 24"),
    ("post_rows", post(packed_stride=112), "packed_stride is 112, must be a multiple of 16, at least 128"),
    ("post_rows", post(k=HERE + 8), "aligned to 16"),
    ("post_rows", post(ctas=17), "ctas is 17"),
    ("await_rows", wait(timeout_us=0), "timeout_us is 0"),
    ("await_rows", wait(out_stride=48), "out_stride is 48"),
    ("await_rows", wait(out=0), "packed and out"),
    ("await_rows", wait(channel=channel(size=2)), "channel has size 2"),
]


@pytest.mark.parametrize(("function", "args", "said"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments_are_refused(library: ctypes.CDLL, function: str, args: Sized, said: str) -> None:
    name = f"neo_cuda_{function}"
    assert isinstance(args, c.LAUNCHES[name])
    with pytest.raises(ValueError, match=said):
        c.check(getattr(library, name)(args, None))


def test_null_is_refused_everywhere(library: ctypes.CDLL) -> None:
    for name in c.LAUNCHES:
        with pytest.raises(ValueError, match="must not be NULL"):
            c.check(getattr(library, name)(None, None))


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("add_rms_norm", norm(rows=0, hidden=0)),
        ("decode_attention", decode(rows=0, q=0)),
        ("copy_runs", copy(count=0)),
    ],
)
def test_nothing_to_do_needs_no_device(library: ctypes.CDLL, function: str, args: Sized) -> None:
    c.check(getattr(library, f"neo_cuda_{function}")(args, None))
    assert library.neo_cuda_last_error() == b""


def test_overlap_is_turned_off_and_on(library: ctypes.CDLL) -> None:
    was = c.overlap()
    try:
        assert c.overlap(False) is was
        assert c.overlap() is False
        assert c.overlap(True) is False
        assert c.overlap() is True
    finally:
        c.overlap(was)


def test_tensors_that_do_not_fit_are_refused() -> None:
    blocks = torch.zeros(4, 2, 2, 64 * 16)
    with pytest.raises(ValueError, match="blocks are"):
        ck.cache_of(blocks[:, :, :1], 16)
    of = ck.cache_of(blocks, 16)
    q, tables, ints = (
        torch.zeros(3, 4, 64),
        torch.zeros(3, 2, dtype=torch.int32),
        torch.zeros(3, dtype=torch.int32),
    )
    space = torch.empty(0, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must agree, and with the cache"):
        ck.decode(of, q.half(), q, tables, ints, space)
    with pytest.raises(ValueError, match="tables must be int32"):
        ck.decode(of, q, q, tables.long(), ints, space)
    with pytest.raises(ValueError, match="lengths must be 3"):
        ck.decode(of, q, q, tables, ints[:2], space)
    with pytest.raises(ValueError, match="weight is"):
        ck.add_rms_norm(q[0], None, q[0, 0, :8], q[1], 1e-5)
    with pytest.raises(ValueError, match="gate_up is"):
        ck.silu_mul(q[0], q[1])
    with pytest.raises(ValueError, match="must agree"):
        ct.copy_blocks(blocks, blocks.half(), ints, ints)

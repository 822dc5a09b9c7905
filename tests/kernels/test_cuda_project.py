"""Products of few rows by the kernel of our own, against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import EPSILON, Device, device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from neo.runtime import cuda_kernels as ck

__all__ = ["device"]

TYPES = [torch.float16, torch.bfloat16]


def apart(device: Device, tensor: Tensor, spare: int) -> Tensor:
    """The same rows on the device, so many elements further apart; NaN between them.

    Rows that share a sector of 64 bytes are brought in with bank conflicts, at which the emulator stops.
    """
    pitch = tensor.shape[1] + spare
    if device.name == "cpu":
        pitch = -(-pitch // 32) * 32
    wide = torch.full((len(tensor), pitch), float("nan"), dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return device(wide)[:, : tensor.shape[1]]


def check(
    device: Device,
    rows: int,
    columns: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    spare: int = 0,
    parts: int = 0,
    stages: int = 0,
) -> Tensor:
    """One product; NaN stand where nothing may be read and must still stand where nothing may be written."""
    generator = torch.Generator().manual_seed(rows * 7919 + columns + width)
    x, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, columns))
    add = torch.randn(columns, generator=generator).to(dtype) if bias else None
    out = device(torch.full((rows + 2, columns + 8 + spare), float("nan"), dtype=dtype))
    on_x, on_weight = (apart(device, t, spare) for t in (x, weight))
    launch = ck.project(
        on_x,
        on_weight,
        None if add is None else device(add),
        out[1 : rows + 1, :columns],
        parts=parts,
        stages=stages,
    )
    launch(device.stream)
    device.wait()
    got = out.cpu()
    expected = x.double() @ weight.double().T
    bound = (x.double().abs() @ weight.double().abs().T) * width**0.5 * 4 * EPSILON[torch.float32]
    if add is not None:
        expected = expected + add.double()
    inside = got[1 : rows + 1, :columns].clone()
    error = (inside.double() - expected).abs()
    least = 2.0**-24 if dtype is torch.float16 else 0.0
    assert (error <= expected.abs() * EPSILON[dtype] * 1.01 + bound + least).all(), float(error.max())
    got[1 : rows + 1, :columns] = float("nan")
    assert got.isnan().all()
    return inside


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 31, 33, 64])
def test_rows(device: Device, rows: int, dtype: torch.dtype) -> None:
    check(device, rows, 80, 256, dtype, bias=rows % 2 == 1)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [16, 208, 560])
def test_parts_of_the_width(device: Device, parts: int, columns: int) -> None:
    check(device, 20, columns, 600, parts=parts, bias=True)


@pytest.mark.parametrize("stages", [2, 3, 8])
def test_depths_of_the_ring(device: Device, stages: int) -> None:
    check(device, 3, 592, 456, stages=stages, parts=1)


def test_tiles_in_several_rounds(device: Device) -> None:
    """More tiles than a block takes at once: 33 tiles and more for each of the emulated multiprocessors."""
    check(device, 40, 1072, 136, bias=True, parts=1)


@pytest.mark.parametrize("spare", [0, 8, 24])
@pytest.mark.parametrize("width", [8, 16, 64, 72, 192])
def test_odd_widths_and_rows_that_lie_apart(device: Device, width: int, spare: int) -> None:
    check(device, 5, 48, width, torch.float16, bias=True, spare=spare)


def test_the_same_bits_again(device: Device) -> None:
    first, again = (check(device, 13, 64, 1024, parts=4) for _ in range(2))
    assert torch.equal(first, again)


def test_a_row_does_not_depend_on_others(device: Device) -> None:
    """Rows of one kernel, of whatever batch, have the same bits: nothing of other rows comes in."""
    generator = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(n, 320, generator=generator).bfloat16() for n in (16, 96))
    outs = []
    for rows in (16, 11):
        out = device(torch.zeros(rows, 96, dtype=torch.bfloat16))
        ck.project(device(x[:rows].contiguous()), device(weight), None, out)(device.stream)
        device.wait()
        outs.append(out.cpu())
    assert torch.equal(outs[0][:11], outs[1])


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    rows=st.integers(1, 64),
    tiles=st.integers(1, 40),
    eighths=st.integers(1, 60),
    dtype=st.sampled_from(TYPES),
    bias=st.booleans(),
    spare=st.sampled_from([0, 8, 40]),
)
def test_any_shape(
    device: Device, rows: int, tiles: int, eighths: int, dtype: torch.dtype, bias: bool, spare: int
) -> None:
    check(device, rows, tiles * 16, eighths * 8, dtype, bias, spare)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 65}, "rows is 65, must be 0 to 64"),
        ({"columns": 24}, "columns is 24, must be a positive multiple of 16"),
        ({"width": 20}, "width is 20, must be a positive multiple of 8"),
        ({"dtype": 0}, "dtype is 0, must be 1"),
        ({"parts": 3}, "parts is 3, must be 0, 1, 2, 4 or 8"),
        ({"stages": 1}, "stages is 1, must be 0 or 2 to 8"),
        ({"x": None}, "must not be NULL"),
        ({"weight": 8}, "aligned to 16 bytes"),
        ({"x_stride": 68}, "x_stride is 68, must be a multiple of 8"),
        ({"weight_stride": 32}, "weight_stride is 32, must be a multiple of 8, at least width"),
        ({"out_stride": 30}, "out_stride is 30, must be a multiple of 4, at least columns"),
    ],
)
def test_refusals(device: Device, change: dict[str, int | None], words: str) -> None:
    x, weight, out = (device(torch.zeros(n, m).half()) for n, m in ((4, 64), (32, 64), (4, 32)))
    launch = ck.project(x, weight, None, out)
    for name, value in change.items():
        setattr(launch.args, name, value)
    with pytest.raises(ValueError, match=words):
        launch(device.stream)


def test_shapes_that_do_not_agree(device: Device) -> None:
    x, weight, out = (torch.zeros(n, m).half() for n, m in ((4, 64), (32, 64), (4, 32)))
    with pytest.raises(ValueError, match="must agree"):
        ck.project(x, weight[:, :48], None, out)
    with pytest.raises(ValueError, match="bias is"):
        ck.project(x, weight, torch.zeros(31).half(), out)

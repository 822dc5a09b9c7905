"""Norm, SiLU, rotary embedding with append, and block copies of the CUDA kernels against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import EPSILON, Device, Paged, device, paged

from neo.runtime import cuda_kernels as ck
from neo.runtime import cuda_transfers as ct
from neo.runtime.model_config import RopeConfig
from neo.runtime.rope import RotaryEmbedding

__all__ = ["device"]

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def near(got: torch.Tensor, expected: torch.Tensor, roundings: float = 1.0) -> None:
    """So many roundings to the type, and of fp32 sums as many as a warp's tree has."""
    eps = EPSILON[got.dtype] * roundings + 16 * EPSILON[torch.float32]
    scale = expected.abs() + expected.abs().mean() * 1e-3
    error = (got.double() - expected).abs()
    assert (error <= eps * scale).all(), float((error / scale).max() / eps)


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [8, 64, 1000, 8192, 16384])
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_rms_norm(device: Device, dtype: torch.dtype, width: int, with_delta: bool) -> None:
    x, y, w = (normal(3, width, dtype=dtype, seed=i) for i in range(3))
    weight = w[0].contiguous()
    hidden, out = device(x.clone()), device(torch.full_like(x, float("nan")))
    ck.add_rms_norm(hidden, device(y) if with_delta else None, device(weight), out, 1e-5)(device.stream)
    device.wait()
    summed = (x.float() + y.float()).to(dtype) if with_delta else x
    assert torch.equal(hidden.cpu(), summed)
    wide = summed.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    near(out.cpu(), expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("dim", "block_size"), [(64, 16), (80, 8), (96, 16), (128, 32), (256, 16)])
def test_gather(device: Device, dtype: torch.dtype, dim: int, block_size: int) -> None:
    """Whole sequences in another order, and nothing of what lies behind them."""
    lengths, order = (1, 50, 16, 33), (2, 0, 3, 1)
    case = paged(lengths, dtype, 3, dim, block_size, seed=dim)
    entries: list[tuple[int, int, int, int]] = []
    first = 4  # rows that are nobody's stay as they are
    for slot in order:
        starts = range(0, lengths[slot], block_size)
        entries += [(slot, i, first + at, min(block_size, lengths[slot] - at)) for i, at in enumerate(starts)]
        first += lengths[slot]
    k, v = (device(torch.full((first + 3, 3, dim), 7.0, dtype=dtype)) for _ in range(2))
    cache = ck.cache_of(device(case.blocks), block_size)
    listed = torch.tensor(entries, dtype=torch.int32)
    ct.gather(cache, device(case.tables), device(listed), k, v)(device.stream)
    device.wait()
    rest = torch.full((4, 3, dim), 7.0, dtype=dtype)
    for got, of in ((k, case.k), (v, case.v)):
        assert torch.equal(got.cpu(), torch.cat([rest, *(of[slot] for slot in order), rest[:3]]))


def test_what_gather_refuses() -> None:
    cache = ck.cache_of(torch.zeros(4, 2, 2, 64 * 16), 16)
    table, entries = (torch.zeros(1, n, dtype=torch.int32) for n in (1, 4))
    rows = torch.zeros(5, 2, 64)
    ct.gather(cache, table, entries, rows, rows)
    for wrong in (rows.half(), rows[:, :1], rows.view(5, 64, 2)):
        with pytest.raises(ValueError, match="must be contiguous"):
            ct.gather(cache, table, entries, rows, wrong)
    with pytest.raises(ValueError, match="entries are"):
        ct.gather(cache, table, entries[:, :3], rows, rows)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [8, 264, 14336])
def test_silu_mul(device: Device, dtype: torch.dtype, width: int) -> None:
    x = normal(3, 2 * width, dtype=dtype, seed=1) * 4
    x[0, :8] = torch.tensor([0.0, 100.0, -100.0, 1e-4, -1e-4, 20.0, -20.0, 1.0]).to(dtype)
    out = device(torch.full((3, width), float("nan"), dtype=dtype))
    ck.silu_mul(device(x), out)(device.stream)
    device.wait()
    gate, up = x.double().chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * up
    eps = EPSILON[dtype] + 2.0**-20 * (1 if dtype is torch.float32 else 8)
    least = 1e-30 if dtype is not torch.float16 else 2.0**-24
    assert ((out.cpu().double() - expected).abs() <= eps * expected.abs() + least).all()


def scales(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """Of a norm, in float64: [rows, 1]."""
    return (hidden.double().square().mean(-1, keepdim=True) + eps).rsqrt()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [8, 1000, 5120])
@pytest.mark.parametrize("width", [8, 264, 4096])
def test_silu_mul_of_rows_that_are_not_normalised(
    device: Device, dtype: torch.dtype, width: int, size: int
) -> None:
    x, hidden = (normal(3, n, dtype=dtype, seed=n) for n in (2 * width, size))
    hidden *= torch.tensor([[0.02], [1.0], [30.0]]).to(dtype)
    out, there = device(torch.full((3, width), float("nan"), dtype=dtype)), device(hidden)
    launch = ck.silu_mul(device(x), out)
    launch.args.scale = ck.scale_of(there, 1e-5)
    launch(device.stream)
    device.wait()
    gate, up = (x.double() * scales(hidden, 1e-5)).chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * up
    eps = EPSILON[dtype] + 2.0**-20 * (1 if dtype is torch.float32 else 8) * (1 + gate.abs())
    assert ((out.cpu().double() - expected).abs() <= eps * expected.abs() + 2.0**-24).all()


def reference(x: torch.Tensor, weights: ck.QkvWeights, heads: int, kv_heads: int, dim: int, cos, sin):
    """q, k, v in float64."""
    wide = x.double()
    if weights.bias is not None:
        wide = wide + weights.bias.double()
    all_heads = wide.view(len(x), heads + 2 * kv_heads, dim)
    q, k, v = all_heads.split([heads, kv_heads, kv_heads], 1)
    turned = []
    for part, norm in ((q, weights.q_norm), (k, weights.k_norm)):
        if norm is not None:
            part = part / (part.square().mean(-1, keepdim=True) + weights.eps).sqrt() * norm.double()
        turned.append(part * cos.double()[:, None] + part.roll(dim // 2, -1) * sin.double()[:, None])
    return turned[0], turned[1], v


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("kind", "dim"), [("default", 128), ("yarn", 80)])
def test_rope_angles(device: Device, dtype: torch.dtype, kind: str, dim: int) -> None:
    """As the model computes them; positions far from 0, too."""
    rotary = RotaryEmbedding(
        RopeConfig(
            kind=kind,
            factor=4.0,
            original_max_positions=4096,
            attention_factor=1.1386 if kind == "yarn" else 1.0,
        ),
        dim,
        dtype,
        torch.device("cpu"),
    )
    positions = torch.tensor([0, 1, 17, 4095, 131071, 10**6], dtype=torch.int32)
    cos, sin = (device(torch.full((len(positions), dim), float("nan"), dtype=dtype)) for _ in range(2))
    ck.rope_angles(device(positions), device(rotary.signed), rotary.scale, cos, sin)(device.stream)
    device.wait()
    for got, of in ((cos, torch.cos), (sin, torch.sin)):
        angle = positions.float()[:, None] * rotary.signed  # rounded to fp32, as in training
        expected = of(angle.double()) * rotary.scale
        assert ((got.cpu().double() - expected).abs() <= EPSILON[dtype] * expected.abs() + 2.0**-22).all()


HEADS = (4, 2)


def append_and_check(
    device: Device,
    case: Paged,
    slots: torch.Tensor,
    positions: torch.Tensor,
    full: bool,
    odd: int = 0,
    heads: int = HEADS[0],
    in_place: bool = False,
    scaled: bool = False,
) -> None:
    """Rows into a copy of the cache, `full`: with bias and norms; rows begin at element `odd`."""
    kv_heads, rows = case.blocks.shape[1], len(slots)
    dtype, dim, block_size = case.blocks.dtype, case.blocks.shape[3] // case.block_size, case.block_size
    x = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype, seed=2)
    cos, sin = (normal(rows, dim, dtype=dtype, seed=i) for i in (3, 4))
    weights = ck.QkvWeights(
        bias=normal(x.shape[1], dtype=dtype, seed=5) if full else None,
        q_norm=normal(dim, dtype=dtype, seed=6) if full else None,
        k_norm=normal(dim, dtype=dtype, seed=7) if full else None,
        eps=1e-6,
    )
    on = ck.QkvWeights(
        *(None if t is None else device(t) for t in (weights.bias, weights.q_norm, weights.k_norm)), 1e-6
    )
    blocks = device(case.blocks.clone())
    fused = device(torch.cat([x[:, :odd], x], 1))[:, odd:]
    to = torch.empty_like(fused).fill_(float("nan")) if not in_place else fused
    q, k, v = to.unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    launch = ck.qkv_rope_append(
        ck.cache_of(blocks, block_size), fused, on, device(cos), device(sin), q, k, v,
        device(case.tables), device(slots), device(positions),
    )  # fmt: skip
    wide, hidden = x.double(), normal(rows, 1000, dtype=dtype, seed=8) * 5
    there = device(hidden)
    if scaled:
        launch.args.scale = ck.scale_of(there, 1e-5)
        wide = wide * scales(hidden, 1e-5)
    launch(device.stream)
    device.wait()
    expected = reference(wide, weights, heads, kv_heads, dim, cos, sin)
    for got, want in zip((q, k, v), expected, strict=True):  # a sum of two products: error of the larger
        error = (got.cpu().double() - want).abs()
        assert (error <= (EPSILON[dtype] + 2.0**-20) * want.abs() + 2.0**-19 * want.abs().max()).all()
    grown = case.blocks.clone()
    planes_k = grown[:, :, 0].view(len(grown), kv_heads, dim, block_size)
    planes_v = grown[:, :, 1].view(len(grown), kv_heads, block_size, dim)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if slot >= 0:
            block, offset = int(case.tables[slot, position // block_size]), position % block_size
            planes_k[block, :, :, offset] = k.cpu()[row]
            planes_v[block, :, offset] = v.cpu()[row]
    assert torch.equal(blocks.cpu().view(torch.uint8), grown.view(torch.uint8))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("odd", [0, 1])
def test_qkv_rope_append(device: Device, dtype: torch.dtype, dim: int, block_size: int, odd: int) -> None:
    """Rows for the cache, a row for nobody; what is in the cache otherwise stays as it is."""
    case = paged((0, 21, 0, 40), dtype, HEADS[1], dim, block_size, room=45)
    slots = torch.tensor([3, -1, 1, 0, 3], dtype=torch.int32)
    positions = torch.tensor([41, 7, 21, 0, 40], dtype=torch.int32)
    append_and_check(device, case, slots, positions, dim != 80, odd)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("dim", "heads"), [(64, 4), (128, 18), (256, 2)])
@pytest.mark.parametrize("full", [True, False])
def test_append_of_rows_that_are_not_normalised(
    device: Device, dtype: torch.dtype, dim: int, heads: int, full: bool
) -> None:
    """In place, as the engine has it: v, which is otherwise left as it lies, is scaled too."""
    case = paged((0, 21, 0, 40), dtype, HEADS[1], dim, 16, room=45)
    slots = torch.tensor([3, -1, 1, 0, 3], dtype=torch.int32)
    positions = torch.tensor([41, 7, 21, 0, 40], dtype=torch.int32)
    append_and_check(device, case, slots, positions, full, heads=heads, in_place=True, scaled=True)


def prefills() -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and positions of 540 rows: chunks that begin anywhere in a block, decodes, rows of nobody."""
    parts = [(2, 40, 200), (-1, 0, 3), (1, 3, 150), (-1, 0, 5), (0, 0, 1), (3, 9, 1), (3, 16, 180)]
    slots = torch.cat([torch.full((count,), slot) for slot, _, count in parts]).to(torch.int32)
    return slots, torch.cat([torch.arange(at, at + count) for _, at, count in parts]).to(torch.int32)


@pytest.mark.parametrize(
    ("dtype", "dim", "block_size", "heads", "odd"),
    [
        (torch.bfloat16, 64, 8, (4, 2), 0),
        (torch.bfloat16, 64, 16, (18, 6), 0),  # keys of heads in two thread blocks, the last one not full
        (torch.float16, 80, 32, (4, 2), 0),
        (torch.float16, 96, 16, (5, 1), 0),
        (torch.bfloat16, 128, 8, (4, 2), 0),
        (torch.bfloat16, 128, 16, (10, 5), 0),
        (torch.float16, 128, 32, (4, 2), 0),
        (torch.bfloat16, 256, 16, (2, 1), 0),
        (torch.float16, 256, 32, (6, 3), 0),
        (torch.bfloat16, 128, 16, (4, 2), 1),  # not aligned: a warp a head
        (torch.float16, 64, 16, (4, 2), 2),
        (torch.float32, 80, 16, (4, 2), 0),
    ],
)
@pytest.mark.parametrize("full", [True, False], ids=["norms", "plain"])
def test_qkv_of_prefills(
    device: Device,
    dtype: torch.dtype,
    dim: int,
    block_size: int,
    heads: tuple[int, int],
    odd: int,
    full: bool,
) -> None:
    """Many rows at once, with everything and where they are."""
    case = paged((0, 3, 40, 0), dtype, heads[1], dim, block_size, room=300)
    append_and_check(device, case, *prefills(), full, odd, heads[0], in_place=not full)


def test_qkv_in_place_without_cache(device: Device) -> None:
    """Rows of the projection become rotated where they are."""
    heads, kv_heads, dim = 4, 2, 64
    case = paged((0,), torch.float32, kv_heads, dim, 16)
    x = normal(3, (heads + 2 * kv_heads) * dim, dtype=torch.float32, seed=2)
    cos, sin = (normal(3, dim, dtype=torch.float32, seed=i) for i in (3, 4))
    fused = device(x.clone())
    parts = fused.view(3, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 1)
    cache = ck.cache_of(device(case.blocks), 16)
    ck.qkv_rope_append(cache, fused, ck.QkvWeights(), device(cos), device(sin), *parts, None, None, None)(
        device.stream
    )
    device.wait()
    expected = torch.cat(reference(x, ck.QkvWeights(), heads, kv_heads, dim, cos, sin), 1)
    assert (fused.cpu().double() - expected.reshape(3, -1)).abs().max() < 1e-5


@pytest.mark.parametrize("engines", [False, True])
@pytest.mark.parametrize("elements", [8, 1000, 40000])
@pytest.mark.parametrize("to_host", [True, False])
def test_copy_blocks(device: Device, engines: bool, elements: int, to_host: bool) -> None:
    src, dst = normal(7, elements, dtype=torch.float16, seed=1), torch.zeros(9, elements, dtype=torch.float16)
    pairs = torch.tensor([[6, 0], [2, 5], [3, 6], [4, 7], [0, 8]], dtype=torch.int32)
    lists = [device.pinned(pairs[:, i].contiguous()) for i in range(2)]
    there, back = (device(src), device.pinned(dst)) if to_host else (device.pinned(src), device(dst))
    ct.copy_blocks(there, back, *lists, ctas=3, engines=engines)(device.stream)
    device.wait()
    dst[pairs[:, 1].long()] = src[pairs[:, 0].long()]
    assert torch.equal(back.cpu(), dst)


def test_copy_count_is_read_when_it_runs(device: Device) -> None:
    src, dst = normal(4, 64, dtype=torch.float16, seed=1), torch.zeros(4, 64, dtype=torch.float16)
    lists = [device.pinned(torch.arange(4, dtype=torch.int32)) for _ in range(2)]
    count = device.pinned(torch.tensor([4], dtype=torch.int32))
    there, back = device(src), device(dst)
    copy = ct.copy_blocks(there, back, *lists, count_at=count)
    for n in (0, 3, -1):
        count[0] = n
        back.zero_()
        copy(device.stream)
        device.wait()
        kept = max(0, n)
        assert torch.equal(back.cpu()[:kept], src[:kept])
        assert not back.cpu()[kept:].any()

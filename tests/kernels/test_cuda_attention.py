"""Decode attention of the CUDA kernels against float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cuda_cases import EPSILON, Device, Paged, attention, device, paged

from neo.runtime import cuda_kernels as ck
from neo.runtime import cuda_library as c

__all__ = ["device"]

ODD = (1, 15, 16, 17, 33, 100, 0, 260, 7)


def run(
    where: Device,
    case: Paged,
    q: torch.Tensor,
    slots: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    ctas: int = 0,
    stages: int = 0,
    times: int = 1,
) -> torch.Tensor:
    cache = ck.cache_of(blocks := where(case.blocks), case.block_size)
    space = ck.decode_workspace(cache, *q.shape[:2], ctas=ctas, stages=stages)
    workspace = torch.full((space,), 0x7F, dtype=torch.uint8, device=where.name)
    out = torch.full_like(q, float("nan"), device=where.name)
    launch = ck.decode(
        cache,
        where(q),
        out,
        where(case.tables),
        where(case.lengths if lengths is None else lengths),
        workspace,
        None if slots is None else where(slots),
        ctas=ctas,
        stages=stages,
    )
    launch.plan(where.stream)
    for _ in range(times):  # the layers of a step: one plan serves them all
        out.fill_(float("nan"))
        launch.attend(where.stream)
    where.wait()
    assert blocks.shape == case.blocks.shape
    return out.cpu()


def check(
    out: torch.Tensor, case: Paged, q: torch.Tensor, slots: Sequence[int], lengths: Sequence[int]
) -> None:
    """Weights and output are rounded to the cache's type, sums to fp32; a score's error is a weight's."""
    dim = q.shape[2]
    eps = EPSILON[q.dtype]
    for i, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        k, v = case.k[slot][:length], case.v[slot][:length]
        expected = attention(q[i], k, v, dim**-0.5)
        score = float(q[i].double().abs().max() * k.double().abs().max() * dim**0.5) if length else 0.0
        reach = float(v.double().abs().max()) if length else 0.0
        bound = (
            eps * expected.abs()
            + (eps if eps > 1e-6 else 0.0) * reach
            + 16 * EPSILON[torch.float32] * (1 + score) * reach
        )
        error = (out[i].double() - expected).abs()
        assert (error <= bound + 1e-30).all(), (i, slot, length, float(error.max()), float(bound.min()))


def queries(rows: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 9) -> torch.Tensor:
    return torch.randn(rows, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_block_sizes_and_types(device: Device, dtype: torch.dtype, block_size: int) -> None:
    case = paged(ODD, dtype, 2, 64, block_size)
    q = queries(len(ODD), 8, 64, dtype)
    check(run(device, case, q), case, q, range(len(ODD)), ODD)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (14, 2), (16, 1), (20, 1)], ids=lambda h: f"{h[0]}over{h[1]}")
def test_head_dims_and_groups(device: Device, dim: int, heads: tuple[int, int]) -> None:
    lengths = (40, 1, 95)
    dtype = torch.bfloat16 if dim in (80, 128) else torch.float16
    case = paged(lengths, dtype, heads[1], dim, 16)
    q = queries(len(lengths), heads[0], dim, dtype)
    check(run(device, case, q), case, q, range(len(lengths)), lengths)


def test_small_head_dims_in_fp32(device: Device) -> None:
    case = paged((5, 70), torch.float32, 2, 16, 16)
    q = queries(2, 4, 16, torch.float32)
    check(run(device, case, q), case, q, range(2), (5, 70))


@pytest.mark.parametrize("ctas", [1, 3, 40])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_however_the_work_is_cut(device: Device, ctas: int, stages: int) -> None:
    """From 4 workers, who have rows after rows, to 160, who share one unit among many."""
    lengths = (700, 3, 0, 0, 64, 1030)
    case = paged(lengths, torch.float16, 2, 64, 16)
    q = queries(len(lengths), 4, 64, torch.float16)
    out = run(device, case, q, ctas=ctas, stages=stages, times=2)
    check(out, case, q, range(len(lengths)), lengths)


@pytest.mark.parametrize(("dim", "blocks"), [(64, 2), (80, 2), (96, 2), (128, 2), (256, 1)])
def test_own_choice_of_blocks(device: Device, dim: int, blocks: int) -> None:
    """64 KiB of rings in each of two blocks of a multiprocessor; where that is not two tiles, one block."""
    if c.describe().shared_bytes < 227 << 10:
        pytest.skip("a device with less shared memory")
    case = paged((70, 3), torch.float16, 2, dim, 16)
    cache, multiprocessors = ck.cache_of(device(case.blocks), 16), c.describe().multiprocessors
    own = ck.decode_workspace(cache, 2, 4)
    sizes = [ck.decode_workspace(cache, 2, 4, ctas=n * multiprocessors) for n in range(1, 4)]
    assert sizes.index(own) + 1 == blocks
    q = queries(2, 4, dim, torch.float16)
    check(run(device, case, q), case, q, range(2), (70, 3))


@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("length", [2100, 4999])
def test_many_parts_of_one_sequence(device: Device, length: int, heads: int) -> None:
    """Up to 79 warps share it: they merge in groups first. A second run finds all counters as they were."""
    case = paged((7, length, 9), torch.bfloat16, 1, 64, 32)
    q = queries(3, heads, 64, torch.bfloat16)
    out = run(device, case, q, ctas=80, times=2)
    check(out, case, q, range(3), (7, length, 9))


def test_slots_and_lengths_are_read_when_it_runs(device: Device) -> None:
    """Two rows of one slot, a prefix of another, rows in any order; others are not touched."""
    case = paged((50, 90, 20), torch.float16, 2, 64, 16)
    slots, lengths = [2, 0, 0, 1], [20, 50, 31, 64]
    q = queries(4, 4, 64, torch.float16)
    out = run(
        device, case, q, torch.tensor(slots, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    )
    check(out, case, q, slots, lengths)


def test_rows_may_lie_apart(device: Device) -> None:
    """q is a part of the fused projection."""
    case = paged((33, 18), torch.bfloat16, 2, 64, 16)
    fused = queries(2, 8, 64, torch.bfloat16)
    q = fused[:, 2:6]
    check(run(device, case, q), case, q, range(2), (33, 18))


def test_large_scores(device: Device) -> None:
    """Scores of hundreds: nothing overflows, and one token takes it all."""
    case = paged((200, 17), torch.float16, 1, 128, 16)
    q = queries(2, 4, 128, torch.float16) * 30
    out = run(device, case, q)
    for i in range(2):
        expected = attention(q[i], case.k[i], case.v[i], 128**-0.5)
        assert (out[i].double() - expected).abs().max() <= 0.02


def test_nothing_to_do(device: Device) -> None:
    case = paged((0, 0), torch.float16, 1, 64, 16)
    assert not run(device, case, queries(2, 1, 64, torch.float16)).any()

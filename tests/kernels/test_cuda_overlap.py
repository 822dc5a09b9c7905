"""Kernels that begin before the one ahead has ended.

On a GPU these run as CUDA graphs and many times over, so that what is read too early has a chance to show.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_cases import EPSILON, Device, attention, device, paged

from neo.runtime import cuda_kernels as ck

__all__ = ["device"]

HEADS, KV_HEADS = 8, 2
LAYERS = 6


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def replayed(device: Device, work: Callable[[int | None], None]) -> Callable[[], None]:
    """`work` on a stream: as a graph where there is a GPU."""
    if device.name == "cpu":
        return lambda: work(device.stream)
    work(None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work(None)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lengths", [(1, 16, 17, 40, 300, 0, 1025), (5,), (15, 16, 33, 1000)])
def test_attention_that_begins_while_tokens_are_appended(
    device: Device, lengths: tuple[int, ...], dim: int
) -> None:
    """Layers of append and attention over the same buffers: what is found has each layer's newest token."""
    rows = len(lengths)
    before = [max(0, n - 1) for n in lengths]
    cases = [paged(before, torch.bfloat16, KV_HEADS, dim, 16, seed=i, room=1) for i in range(LAYERS)]
    blocks = [device(case.blocks.clone()) for case in cases]
    fused = [device(randn(rows, (HEADS + 2 * KV_HEADS) * dim, seed=i)) for i in range(LAYERS)]
    qkv = torch.zeros_like(fused[0])
    heads = qkv.view(rows, -1, dim).split([HEADS, KV_HEADS, KV_HEADS], 1)
    cos, sin = device(torch.ones(rows, dim).bfloat16()), device(torch.zeros(rows, dim).bfloat16())
    appended = [i if n else -1 for i, n in enumerate(lengths)]
    slots = device(torch.tensor(appended, dtype=torch.int32))
    positions = device(torch.tensor(before, dtype=torch.int32))
    counts = device(torch.tensor(lengths, dtype=torch.int32))
    caches = [ck.cache_of(b, 16) for b in blocks]
    space = ck.decode_workspace(caches[0], rows, HEADS)
    workspace = torch.zeros(space, dtype=torch.uint8, device=device.name)
    out = torch.zeros(rows, HEADS, dim, dtype=torch.bfloat16, device=device.name)
    results = torch.zeros(LAYERS, *out.shape, dtype=out.dtype, device=device.name)
    steps = []
    for case, cache in zip(cases, caches, strict=True):
        tables = device(case.tables)
        append = ck.qkv_rope_append(
            cache, qkv, ck.QkvWeights(), cos, sin, *heads, tables, slots, positions
        )  # fmt: skip
        append.args.early = 1
        steps.append((append, ck.decode(cache, heads[0], out, tables, counts, workspace, early=True)))

    def work(stream: int | None) -> None:
        steps[0][1].plan(stream)
        for layer, (append, attend) in enumerate(steps):
            qkv.copy_(fused[layer])
            append(stream)
            attend.attend(stream)
            results[layer] = out

    run = replayed(device, work)
    for _ in range(1 if device.name == "cpu" else 50):
        for case, b in zip(cases, blocks, strict=True):
            b.copy_(case.blocks)  # without the newest tokens
        results.fill_(float("nan"))
        run()
        for layer, case in enumerate(cases):
            for row, length in enumerate(lengths):
                new = fused[layer][row].cpu().view(-1, dim).split([HEADS, KV_HEADS, KV_HEADS])
                k, v = (
                    torch.cat((old[row], one[None]))
                    for old, one in zip((case.k, case.v), new[1:], strict=True)
                )
                want = attention(new[0], k[:length], v[:length], dim**-0.5)
                error = (results[layer, row].cpu().double() - want).abs()
                assert (error <= 2 * EPSILON[torch.bfloat16] * max(1.0, float(v.abs().max()))).all(), (
                    layer,
                    row,
                )

"""The CUDA kernels' libraries and random inputs for their tests.

Each test of arithmetic runs twice: on the emulated library (the same kernels compiled for the CPU, tensors in
host memory), which any machine can build, and on a GPU where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neo.runtime import cuda_library as c

_BUILT = Path(__file__).resolve().parents[2] / "build" / "kernels"
EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # rounding to nearest


def emulated_path() -> Path:
    """Where the emulated library is."""

    return Path(os.environ.get("NEO_CUDA_EMULATED_LIBRARY", _BUILT / "libneo_cuda_emulated.so"))


def why_no_gpu() -> str:
    """Why the real kernels cannot be tested here."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    return c.why_not()


@dataclass(frozen=True)
class Device:
    """Where a test runs: torch's device, and the stream to launch on (None: torch's current one)."""

    name: str
    stream: int | None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor there."""
        return tensor.to(self.name)

    def pinned(self, tensor: Tensor) -> Tensor:
        """A copy in host memory that both sides see."""
        return tensor.clone() if self.name == "cpu" else tensor.pin_memory()

    def wait(self) -> None:
        """Until all that was launched has run."""
        if self.name != "cpu":
            torch.cuda.synchronize()


@dataclass
class Paged:
    """A cache whose unused memory is NaN: [blocks, kv_heads, 2, head_dim * block_size], and its contents."""

    blocks: Tensor
    tables: Tensor
    lengths: Tensor
    k: list[Tensor]  # of each slot [tokens, kv_heads, head_dim]
    v: list[Tensor]
    block_size: int


def paged(
    lengths: Sequence[int],
    dtype: torch.dtype,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    seed: int = 0,
    room: int = 0,
) -> Paged:
    """Random K and V in scattered blocks, with `room` for more tokens; table entries past them are wild."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(n + room) // block_size) for n in lengths]
    blocks = torch.full((sum(counts) + 2, kv_heads, 2, head_dim * block_size), float("nan"), dtype=dtype)
    order = torch.randperm(len(blocks), generator=generator).to(torch.int32)
    tables = torch.full((len(lengths), max([*counts, 1]) + 1), 2**30, dtype=torch.int32)
    shape = (len(blocks), kv_heads)
    k_planes = blocks[:, :, 0].view(*shape, head_dim, block_size)
    v_planes = blocks[:, :, 1].view(*shape, block_size, head_dim)
    ks, vs = [], []
    used = 0
    for slot, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[slot, :count] = order[used : used + count]
        used += count
        k, v = (torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        for t in range(length):
            block, offset = int(tables[slot, t // block_size]), t % block_size
            k_planes[block, :, :, offset] = k[t]
            v_planes[block, :, offset] = v[t]
        ks.append(k)
        vs.append(v)
    return Paged(blocks, tables, torch.tensor(lengths, dtype=torch.int32), ks, vs, block_size)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """In float64: q [heads, dim] over k, v [tokens, kv_heads, dim]."""
    if not len(k):
        return torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[0] // k.shape[1]
    wide_k, wide_v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    weights = torch.softmax(torch.einsum("hd,thd->ht", q.double(), wide_k) * scale, -1)
    return torch.einsum("ht,thd->hd", weights, wide_v)


DEVICES = ["emulated", "gpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Both, where they are."""
    if request.param == "gpu":
        if reason := why_no_gpu():
            pytest.skip(reason)
        return Device("cuda", None)
    if not emulated_path().is_file():
        pytest.skip("the emulated CUDA kernels are not built here (make kernels)")
    monkeypatch.setenv(c.LIBRARY_VARIABLE, str(emulated_path()))
    return Device("cpu", 0)

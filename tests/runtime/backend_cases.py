"""KV memories with known contents, and what decode attention over them gives in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neo.runtime.backend import Backend, KVMemory

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass
class Case:
    """Slots of one layer, in scattered blocks, with all their tokens as given to `append`."""

    memory: KVMemory
    tables: np.ndarray  # int32 [slots, width]
    lengths: list[int]  # of each slot
    k: list[Tensor]  # of each slot [tokens, kv_heads, head_dim]
    v: list[Tensor]
    heads: int

    def rows(self) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """k, v, slots and positions of every token there is."""
        slots = np.repeat(np.arange(len(self.lengths)), self.lengths).astype(np.int32)
        positions = np.concatenate([np.arange(n) for n in self.lengths]).astype(np.int32)
        return torch.cat(self.k), torch.cat(self.v), slots, positions

    def fill(self, backend: Backend) -> None:
        backend.append(self.memory, *self.rows()[:2], self.tables, *self.rows()[2:])

    def expected(self, q: Tensor, slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Attention in float64 over K and V rounded to the memory's type."""
        out = np.zeros(q.shape)
        kv_heads, dim = self.memory.kv_heads, self.memory.head_dim
        for i, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            if not length:
                continue
            keys, values = (x[slot][:length].to(self.memory.dtype).double().numpy() for x in (self.k, self.v))
            grouped = q[i].double().numpy().reshape(kv_heads, -1, dim)
            scores = np.einsum("hgd,thd->hgt", grouped, keys) / np.sqrt(dim)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[i] = np.einsum("hgt,thd->hgd", weights, values).reshape(-1, dim)
        return out

    def check(self, out: Tensor, q: Tensor, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Half an ulp of the output's type, and what float32 loses: scores and sums of size about 4."""
        expected = self.expected(q, slots, lengths)
        bound = 1.01 * ROUNDING[out.dtype] * np.abs(expected) + 128 * ROUNDING[torch.float32]
        assert (np.abs(out.double().numpy() - expected) <= bound).all()


def make_case(
    lengths: list[int],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float16,
    io: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    """Room for each slot's tokens; entries past it name no block. `io` is the type of k and v."""
    generator = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    counts = [-(-n // block_size) for n in lengths]
    blocks = sum(counts) + 3
    memory = KVMemory.allocate(blocks, kv_heads, head_dim, block_size, dtype)
    memory.tensor.fill_(float("nan"))
    order = torch.randperm(blocks, generator=generator).numpy().astype(np.int32)
    tables = np.full((len(lengths), max(counts) + 1), -1, np.int32)
    ends = np.cumsum(counts)
    for table, count, end in zip(tables, counts, ends, strict=True):
        table[:count] = order[end - count : end]
    k, v = (
        [torch.randn(n, kv_heads, head_dim, generator=generator).to(io or dtype) for n in lengths]
        for _ in range(2)
    )
    return Case(memory, tables, lengths, k, v, q_heads)


def queries(case: Case, rows: int, dtype: torch.dtype | None = None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, case.heads, case.memory.head_dim, generator=generator)
    return q.to(dtype or case.memory.dtype)

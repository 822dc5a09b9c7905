"""Attention of prefill chunks on the GPU, by torch's kernels over what PRE computed and the cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from neo.core.blocks import blocks_for
from neo.runtime.block_tables import BlockTables
from neo.runtime.cuda_rows import Rows
from neo.runtime.cuda_step import Special, to_device
from neo.runtime.kv_memory import KVMemory
from neo.runtime.model import Model
from neo.runtime.step_inputs import BatchInputs, ChunkRows

_CAUSAL = (-1, 0)  # window: all before, nothing behind; aligned to the last query


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring chunks without a prefix, attended together."""

    first: int
    rows: int
    longest: int
    bounds: Tensor  # int32 [chunks + 1]


class Prefill:
    """Chunks of one step after the other; ``begin`` once, ``run`` per layer."""

    def __init__(self, model: Model, memory: KVMemory) -> None:
        self.model, self.memory = model, memory
        self.flash = model.dtype in (torch.float16, torch.bfloat16)
        self._gqa = model.config.heads != model.config.kv_heads

    def begin(self, batch: BatchInputs, special: Special | None) -> None:
        """Sort a sub-batch's chunks: those from token 0 on in runs, the others with their prefix."""
        self._runs: list[_Run] = []
        self._prefixed: list[tuple[ChunkRows, int, tuple[Tensor, Tensor]]] = []
        self._special = special
        self._blocks: dict[tuple[int, int], Tensor] = {}
        run: list[ChunkRows] = []
        spilled = 0 if special is None else special.tables.shape[1] - special.streams
        first_special = len(batch.chunks) - spilled
        for i, chunk in enumerate(batch.chunks):
            if run and (chunk.start or run[-1].row + run[-1].length != chunk.row or not self.flash):
                self._runs.append(self._run(run))
                run = []
            if chunk.start:
                row = (
                    special.streams + i - first_special if special is not None and i >= first_special else -1
                )
                ends = [0, chunk.length], [0, chunk.start + chunk.length]
                device = self.model.device
                of_q, of_k = (to_device(np.array(e, dtype=np.int32), device) for e in ends)
                self._prefixed.append((chunk, row, (of_q, of_k)))
            else:
                run.append(chunk)
        if run:
            self._runs.append(self._run(run))

    def _run(self, chunks: Sequence[ChunkRows]) -> _Run:
        lengths = [c.length for c in chunks]
        bounds = to_device(np.cumsum([0, *lengths]).astype(np.int32), self.model.device)
        return _Run(chunks[0].row, sum(lengths), max(lengths), bounds)

    def run(self, rows: Rows, layer: int, tables: BlockTables) -> None:
        """Attention of all chunks in one layer; their new KV is in the cache already."""
        for run in self._runs:
            at = slice(run.first, run.first + run.rows)
            self._attend(rows, at, rows.k[at], rows.v[at], (run.bounds, run.bounds), run.longest, run.longest)
        for chunk, row, bounds in self._prefixed:
            at = slice(chunk.row, chunk.row + chunk.length)
            count = blocks_for(chunk.start, self.memory.block_size)
            if row < 0:
                table = tables.gpu.tables[layer, chunk.slot, :count]
            else:
                assert self._special is not None
                table = self._special.tables[layer, row, :count]
            k, v = self.memory.gather(to_device(table, self.model.device), chunk.start)
            k, v = torch.cat((k, rows.k[at])), torch.cat((v, rows.v[at]))
            self._attend(rows, at, k, v, bounds, chunk.length, chunk.start + chunk.length)

    def _attend(
        self,
        rows: Rows,
        at: slice,
        k: Tensor,
        v: Tensor,
        bounds: tuple[Tensor, Tensor],
        most_q: int,
        most_k: int,
    ) -> None:
        q = rows.q[at]
        if self.flash:
            from torch.nn.attention.varlen import varlen_attn

            out = varlen_attn(q, k, v, *bounds, most_q, most_k, window_size=_CAUSAL, **self._options())
            assert isinstance(out, Tensor)
            rows.out[at] = out
            return
        mask = torch.ones(most_q, most_k, dtype=torch.bool, device=q.device).tril_(most_k - most_q)
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self._gqa)
        rows.out[at] = found[0].transpose(0, 1)

    def _options(self) -> dict[str, Any]:
        """Older versions of torch take grouped queries without being told."""
        return {"enable_gqa": True} if self._gqa and _TELLS_GQA else {}


def _takes_gqa() -> bool:
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


_TELLS_GQA = _takes_gqa()

"""The KV memory of one tier: one flat array of layer-blocks in host memory."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neo.core.errors import InputError

TYPES = (torch.float32, torch.float16, torch.bfloat16)
_GIB = 1 << 30


class KVMemory:
    """Layer-blocks in the layout of ``kernels/cpu/neo_cpu.h``: [block][KV head][K plane, V plane].

    Attributes:
        tensor: [blocks, kv_heads, 2, head_dim * block_size].
        blocks, kv_heads, head_dim, block_size, dtype: its shape.
        nbytes: bytes of all blocks; block_bytes: of one.
        view: what a backend has prepared for this memory; backends only.
    """

    __slots__ = (
        "__weakref__",
        "block_bytes",
        "block_size",
        "blocks",
        "dtype",
        "head_dim",
        "kv_heads",
        "nbytes",
        "tensor",
        "view",
    )

    def __init__(self, tensor: Tensor, block_size: int) -> None:
        """Use a contiguous tensor in host memory."""
        blocks, kv_heads, planes, plane = tensor.shape
        if planes != 2 or plane % block_size or not tensor.is_contiguous() or tensor.dtype not in TYPES:
            raise ValueError(
                f"KV memory of {tuple(tensor.shape)} {tensor.dtype} with blocks of {block_size} tokens: "
                "must be contiguous [blocks, kv_heads, 2, head_dim * block_size] of a 16 or 32 bit float"
            )
        self.tensor = tensor
        self.blocks, self.kv_heads = blocks, kv_heads
        self.head_dim, self.block_size = plane // block_size, block_size
        self.dtype = tensor.dtype
        self.block_bytes = kv_heads * 2 * plane * tensor.element_size()
        self.nbytes = blocks * self.block_bytes
        self.view: Any = None

    @classmethod
    def allocate(
        cls,
        blocks: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        touch: bool = True,
    ) -> KVMemory:
        """Reserve memory, on huge pages where there are any; with `touch`, make sure that it is really there.

        Raises InputError, with the numbers and before any of it is touched, if there is not as much.
        """
        if blocks < 0 or min(kv_heads, head_dim, block_size) < 1 or dtype not in TYPES:
            raise ValueError(
                f"KV memory of {blocks} blocks of {block_size} tokens, {kv_heads} heads of {head_dim} {dtype}"
            )
        asked = blocks * kv_heads * 2 * head_dim * block_size * dtype.itemsize
        free = available_bytes()
        if free is not None and asked > free:
            raise InputError(
                f"KV memory of {blocks} layer-blocks takes {asked / _GIB:.2f} GiB ({asked} bytes), but "
                f"{free / _GIB:.2f} GiB ({free} bytes) of host memory are available: give it fewer blocks"
            )
        try:
            space = mmap.mmap(-1, max(1, asked))
        except (OSError, OverflowError) as error:
            raise InputError(f"KV memory of {asked} bytes cannot be reserved: {error}") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                space.madvise(mmap.MADV_HUGEPAGE)
        shape = (blocks, kv_heads, 2, head_dim * block_size)
        if blocks == 0:
            return cls(torch.empty(shape, dtype=dtype), block_size)
        tensor = torch.frombuffer(space, dtype=dtype).view(shape)
        if touch:
            tensor.zero_()  # shared out among torch's threads, unlike a write to every page from here
        return cls(tensor, block_size)

    def planes(self) -> tuple[Tensor, Tensor]:
        """Views: K [blocks, kv_heads, head_dim, block_size], V [blocks, kv_heads, block_size, head_dim]."""
        shape = (self.blocks, self.kv_heads)
        k = self.tensor[:, :, 0].view(*shape, self.head_dim, self.block_size)
        return k, self.tensor[:, :, 1].view(*shape, self.block_size, self.head_dim)

    def gather(self, table: npt.NDArray[np.int32] | Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V [tokens, kv_heads, head_dim], copied, of the first tokens in the layer-blocks of `table`.

        Raises ValueError for a table that is too short or names a block that is not there.
        """
        count = -(-tokens // self.block_size)
        blocks = (torch.from_numpy(table) if isinstance(table, np.ndarray) else table)[:count]
        if tokens < 0 or blocks.shape != (count,):
            raise ValueError(f"{tokens} tokens take {count} blocks, the table has {len(table)}")
        if count:
            low, high = int(blocks.min()), int(blocks.max())
            if low < 0 or high >= self.blocks:
                wrong = low if low < 0 else high
                raise ValueError(f"the table names block {wrong}, the memory has {self.blocks} blocks")
        picked = self.tensor.index_select(0, blocks)
        rows = (count * self.block_size, self.kv_heads, self.head_dim)
        k = picked[:, :, 0].view(count, self.kv_heads, self.head_dim, self.block_size)
        v = picked[:, :, 1].view(count, self.kv_heads, self.block_size, self.head_dim)
        k, v = k.permute(0, 3, 1, 2).reshape(rows), v.permute(0, 2, 1, 3).reshape(rows)
        return k[:tokens], v[:tokens]


def available_bytes(root: Path = Path("/")) -> int | None:
    """Host memory that can still be had, in bytes: the system's and the control group's, whichever is less.

    None where neither says. Memory that caches of files hold counts as available, as the kernel counts it.
    """
    found = [
        n for n in (_of_system(root / "proc/meminfo"), _of_group(root / "sys/fs/cgroup")) if n is not None
    ]
    return min(found, default=None)


def _of_system(meminfo: Path) -> int | None:
    with suppress(OSError, ValueError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _of_group(group: Path) -> int | None:
    with suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat.get("inactive_file", 0)))
    return None

"""KV memory of a GPU and of the pinned host beside it, and the block tables as the device sees them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neo.core.errors import InputError
from neo.runtime.block_tables import Ints, TierBlocks
from neo.runtime.cuda_sender import Sender
from neo.runtime.kv_memory import KVMemory

_GIB = 1 << 30
_MAPPED = 2  # cudaHostRegisterMapped: kernels may read and write it


def device_memory(
    blocks: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KVMemory:
    """Layer-blocks in a GPU's memory. InputError, with the numbers, if there is not as much."""
    shape = (blocks, kv_heads, 2, head_dim * block_size)
    asked = blocks * kv_heads * 2 * head_dim * block_size * dtype.itemsize
    free, total = torch.cuda.mem_get_info(device)
    if asked > free:
        raise InputError(
            f"KV memory of {blocks} layer-blocks takes {asked / _GIB:.2f} GiB ({asked} bytes), but "
            f"{free / _GIB:.2f} of {total / _GIB:.2f} GiB ({free} bytes) of {device} are free: "
            "give the GPU fewer blocks"
        )
    # Zeros: what is left over in a block is multiplied by weights of 0, and a NaN there would stay one.
    return KVMemory(torch.zeros(shape, dtype=dtype, device=device), block_size)


def pinned_memory(
    blocks: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> tuple[KVMemory, Callable[[], object]]:
    """Layer-blocks in host memory that the GPU can address, on huge pages where there are any.

    Also returns what unpins them; that happens at the latest when the memory is given up.
    """
    memory = KVMemory.allocate(blocks, kv_heads, head_dim, block_size, dtype)
    if not memory.nbytes:
        return memory, lambda: None
    address = memory.tensor.data_ptr()
    status = _runtime().cudaHostRegister(address, memory.nbytes, _MAPPED)
    if int(status):
        raise InputError(
            f"KV memory of {memory.nbytes / _GIB:.2f} GiB cannot be pinned (cudaHostRegister: error "
            f"{int(status)}): give the host fewer blocks, or raise 'ulimit -l'"
        )
    return memory, weakref.finalize(memory, _unpin, address)


def _unpin(address: int) -> None:
    torch.cuda.synchronize()
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class TableMirror:
    """The GPU tier's block tables in device memory, int32 [layers, slots, width], brought up to date by step.

    Attributes:
        tables: the device's copy; a new tensor when the host's tables have grown.
        latest: int32 [slots], the token that was sampled last for a slot, where that happened on the device.
        generation: how often they have grown.
    """

    def __init__(self, tier: TierBlocks, sender: Sender) -> None:
        self._tier = tier
        self._sender, self._device = sender, sender.device
        device = sender.device
        self.generation = 0
        tier.watch()
        self.tables: Tensor = torch.from_numpy(tier.tables).to(device)
        self.latest = torch.zeros(tier.tables.shape[1], dtype=torch.int32, device=device)
        self._rooms = [self._buffers(1 << 12) for _ in range(2)]

    def update(self) -> None:
        """Bring over what has changed, on the current stream. The step before the last must have ended."""
        changes = self._tier.changes()
        host = self._tier.tables
        if tuple(self.tables.shape) != host.shape:
            torch.cuda.current_stream().synchronize()  # a step that runs reads those that go
            self.tables = torch.from_numpy(host).to(self._device)
            latest = torch.zeros(host.shape[1], dtype=torch.int32, device=self._device)
            latest[: len(self.latest)] = self.latest
            self.latest = latest
            self.generation += 1
        elif changes:
            where, what = _entries(host, changes)
            self._send(where, what)

    def _send(self, where: npt.NDArray[np.int64], what: Ints) -> None:
        count = len(where)
        self._rooms.reverse()
        if self._rooms[0][0].shape[1] < count:
            self._rooms[0] = self._buffers(2 * count)
        host, device = self._rooms[0]
        host.numpy()[0, :count], host.numpy()[1, :count] = where, what
        for source, target in zip(host, device, strict=True):  # each row is one run of memory
            target[:count].copy_(source[:count], non_blocking=True)
        self.tables.view(-1).index_copy_(0, device[0, :count], device[1, :count].to(torch.int32))

    def note(self, slots: Sequence[int], tokens: Tensor) -> None:
        """The tokens, int64 on the device, that a step has sampled for slots; on the current stream."""
        where = self._sender.send(np.array(slots, dtype=np.int64))
        self.latest.index_copy_(0, where, tokens.to(torch.int32))

    def _buffers(self, count: int) -> tuple[Tensor, Tensor]:
        """Positions and values, pinned and on the device; taken in turn, as the step before may still run."""
        host = torch.empty((2, count), dtype=torch.int64).pin_memory()
        return host, torch.empty_like(host, device=self._device)


def _entries(tables: Ints, changes: Sequence[tuple[int, int, int]]) -> tuple[npt.NDArray[np.int64], Ints]:
    """Flat positions and values of the entries [start, stop) of the rows that changed, in all layers."""
    layers, slots, width = tables.shape
    rows = np.array([c[0] for c in changes], dtype=np.int64)
    counts = np.array([c[2] - c[1] for c in changes], dtype=np.int64)
    firsts = np.array([c[1] for c in changes], dtype=np.int64)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    flat = np.repeat(rows * width + firsts, counts) + within
    where = (np.arange(layers, dtype=np.int64)[:, None] * (slots * width) + flat).ravel()
    return where, tables.reshape(-1)[where]

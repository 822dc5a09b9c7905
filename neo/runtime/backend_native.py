"""The library as a backend. Its calls come per layer and step, so they do as little Python as they can."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from neo.runtime import cpu_library as c
from neo.runtime.backend import Ints, Job
from neo.runtime.cpu_kernels import Pool, target, version
from neo.runtime.kv_memory import KVMemory
from neo.runtime.native_args import Slot, fill_append, fill_copy, fill_decode
from neo.runtime.native_worker import NativeJob, NativeWorker


class NativeBackend:
    """See `neo.runtime.backend.Backend`."""

    kind = "native"
    note = ""

    def __init__(self, threads: int = 1, cores: Sequence[int] | None = None, spin_us: int = 50) -> None:
        library = c.load()
        self._pool = Pool(threads, cores, spin_us)
        self._append, self._decode = library.neo_cpu_append_kv, library.neo_cpu_decode_attention
        self._free: deque[Slot] = deque()

    def describe(self) -> dict[str, Any]:
        """Kind, instruction set, version and threads."""
        return {
            "kind": self.kind,
            "target": target(),
            "version": version(),
            "threads": self._pool.threads,
        }

    def close(self) -> None:
        """Stop the threads of the calls that run at once."""
        self._pool.close()

    def worker(
        self, name: str, threads: int = 1, cores: Sequence[int] | None = None, spin_us: int = 50
    ) -> NativeWorker:
        """Start a worker."""
        return NativeWorker(name, threads, cores, spin_us, self._free)

    def _slot(self) -> Slot:
        try:
            return self._free.popleft()
        except IndexError:
            return Slot()

    def append(
        self, memory: KVMemory, k: Tensor, v: Tensor, tables: Ints, slots: Ints, positions: Ints
    ) -> None:
        """Write rows of k and v; see `neo.runtime.backend.Backend.append`."""
        if not len(k):
            return
        slot = self._slot()
        keep = fill_append(slot.append, memory, k, v, tables, slots, positions)
        status = self._append(self._pool.handle, slot.append)
        del keep
        self._free.append(slot)
        self._pool.check(status)

    def decode(
        self, memory: KVMemory, q: Tensor, out: Tensor, tables: Ints, slots: Ints, lengths: Ints
    ) -> None:
        """Decode attention; see `neo.runtime.backend.Backend.decode`."""
        if not len(q):
            return
        slot = self._slot()
        keep = fill_decode(slot.decode, memory, q, out, tables, slots, lengths)
        status = self._decode(self._pool.handle, slot.decode)
        del keep
        self._free.append(slot)
        self._pool.check(status)

    def gather(self, memory: KVMemory, table: Ints, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V of the first tokens; see `neo.runtime.backend.Backend.gather`."""
        return memory.gather(table, tokens)

    def attention_job(
        self,
        memory: KVMemory,
        k: Tensor,
        v: Tensor,
        q: Tensor,
        out: Tensor,
        tables: Ints,
        slots: Ints,
        positions: Ints,
        lengths: Ints,
    ) -> NativeJob:
        """Append, then decode."""
        slot = self._slot()
        job, keep = slot.job, ()  # type: tuple[c.Job, tuple[object, ...]]
        job.append = job.decode = job.copy = None
        if len(k):
            keep = fill_append(slot.append, memory, k, v, tables, slots, positions)
            job.append = slot.append_at
        if len(q):
            keep += fill_decode(slot.decode, memory, q, out, tables, slots, lengths)
            job.decode = slot.decode_at
        return NativeJob("attention", (slot,), keep)

    def append_job(
        self, memory: KVMemory, k: Tensor, v: Tensor, tables: Ints, slots: Ints, positions: Ints
    ) -> NativeJob:
        """Append as a job."""
        slot = self._slot()
        job, keep = slot.job, ()  # type: tuple[c.Job, tuple[object, ...]]
        job.append = job.decode = job.copy = None
        if len(k):
            keep = fill_append(slot.append, memory, k, v, tables, slots, positions)
            job.append = slot.append_at
        return NativeJob("append", (slot,), keep)

    def copy_job(self, src: KVMemory, dst: KVMemory, src_blocks: Ints, dst_blocks: Ints) -> NativeJob:
        """Copy layer-blocks."""
        slot = self._slot()
        keep = fill_copy(slot.copy, src, dst, src_blocks, dst_blocks)
        slot.job.append = slot.job.decode = None
        slot.job.copy = slot.copy_at
        return NativeJob("copy", (slot,), keep)

    def together(self, jobs: Sequence[Job]) -> NativeJob | None:
        """Several jobs as one. Those given must not be used any more."""
        parts: tuple[Slot, ...] = ()
        keep: tuple[object, ...] = ()
        for job in jobs:
            assert isinstance(job, NativeJob)
            parts, keep = parts + job.parts, keep + job.keep
            job.parts = job.keep = ()
        return NativeJob("+".join(job.kind for job in jobs), parts, keep) if parts else None

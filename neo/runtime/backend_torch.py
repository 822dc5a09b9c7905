"""The backend without the library: plain torch, for machines where it is not built, and to hold it against.

Its workers are Python threads with the same rules; torch shares its own threads among them, so the thread
counts and cores that a worker is given mean nothing here.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neo.runtime.backend import ANSWER_S, Ints, Job, Ticket, check_threads
from neo.runtime.cpu_library import CpuKernelError
from neo.runtime.kv_memory import KVMemory

_CAPACITY = 4096  # jobs in a queue, as in the library


def _longs(values: Ints, name: str, count: int | None = None) -> Tensor:
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if tensor.dtype != torch.int32 or (count is not None and tensor.shape != (count,)):
        raise ValueError(
            f"{name} must be {'' if count is None else count} int32, is {tuple(tensor.shape)} {tensor.dtype}"
        )
    return tensor.long()


def _check(rows: Tensor, name: str, memory: KVMemory) -> None:
    if rows.ndim != 3 or rows.shape[2] != memory.head_dim or not rows.is_cpu:
        raise ValueError(
            f"{name} must be [rows, heads, {memory.head_dim}] in host memory, "
            f"is {tuple(rows.shape)} on {rows.device}"
        )


def _inside(values: Tensor, below: int, name: str) -> None:
    wrong = (values < 0) | (values >= below)
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        raise ValueError(f"{name}[{first}] is {int(values[first])}, there are {below}")


class TorchJob:
    """See `neo.runtime.backend.Job`."""

    __slots__ = ("kind", "parts")

    def __init__(self, kind: str, parts: tuple[Callable[[], None], ...]) -> None:
        self.kind, self.parts = kind, parts


class TorchTicket:
    """See `neo.runtime.backend.Ticket`."""

    __slots__ = ("_end", "_start", "after", "ended", "job", "kind", "message", "worker")

    def __init__(self, worker: TorchWorker, job: TorchJob, after: tuple[TorchTicket, ...]) -> None:
        self.worker, self.kind, self.after = worker, job.kind, after
        self.job: TorchJob | None = job
        self.ended = threading.Event()
        self.message = ""
        self._start = self._end = 0.0

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.ended.is_set()

    @property
    def start_s(self) -> float:
        """When it began, in seconds of ``time.perf_counter``."""
        self._require_done()
        return self._start

    @property
    def end_s(self) -> float:
        """When it ended, likewise."""
        self._require_done()
        return self._end

    def _require_done(self) -> None:
        if not self.done:
            raise ValueError(f"the {self.kind} job of worker {self.worker.name} has not ended")

    def run(self, closing: threading.Event) -> None:
        """Wait for what it comes after, then run it, and end either way."""
        try:
            failed = ""
            for ticket in self.after:
                while not ticket.ended.wait(0.05) and not closing.is_set():
                    pass
                failed = failed or ticket.message
            self._start = time.perf_counter()
            if closing.is_set():
                raise CpuKernelError("the worker was closed before the job's turn came")
            if failed:
                raise CpuKernelError(f"dependency failed: {failed.removeprefix('dependency failed: ')}")
            assert self.job is not None
            with torch.inference_mode():
                for part in self.job.parts:
                    part()
        except Exception as error:
            self.message = str(error) or type(error).__name__
        finally:
            self._end = time.perf_counter()
            self.job, self.after = None, ()
            self.ended.set()


class TorchWorker:
    """See `neo.runtime.backend.Worker`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._queue: deque[TorchTicket] = deque()  # the first may be running
        self._change = threading.Condition()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"neo-{name}", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether every job has ended."""
        with self._change:
            return not self._queue or self._queue[-1].done

    def submit(self, job: Job, after: Sequence[Ticket] = ()) -> TorchTicket:
        """Queue a job; see `neo.runtime.backend.Worker.submit`."""
        if not isinstance(job, TorchJob) or not job.parts:
            raise ValueError(f"worker {self.name}: not a job of this backend, or submitted before: {job!r}")
        before = tuple(ticket for ticket in after if isinstance(ticket, TorchTicket))
        if len(before) != len(after):
            raise ValueError(f"worker {self.name}: not all tickets are of this backend: {after!r}")
        with self._change:
            if self._closing.is_set():
                raise ValueError("the worker is closed")
            self._change.wait_for(lambda: len(self._queue) < _CAPACITY)
            ticket = TorchTicket(self, TorchJob(job.kind, job.parts), before)
            job.parts = ()
            self._queue.append(ticket)
            self._change.notify_all()
        return ticket

    def wait(self, ticket: Ticket, timeout_s: float = ANSWER_S) -> None:
        """Return when the job has ended; see `neo.runtime.backend.Worker.wait`."""
        if not isinstance(ticket, TorchTicket) or ticket.worker is not self:
            raise ValueError(f"worker {self.name}: not a ticket of this worker: {ticket!r}")
        if not ticket.ended.wait(timeout_s):
            raise CpuKernelError(
                f"worker {self.name} does not answer: its {ticket.kind} job has not ended after "
                f"{timeout_s:g} s"
            )
        if ticket.message:
            raise CpuKernelError(f"worker {self.name}, {ticket.kind} job: {ticket.message}")

    def close(self) -> None:
        """End the thread; see `neo.runtime.backend.Worker.close`."""
        with self._change:
            self._closing.set()
            self._change.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._queue) or self._closing.is_set())
                if not self._queue:
                    return
                ticket = self._queue[0]
            ticket.run(self._closing)
            with self._change:
                self._queue.popleft()
                self._change.notify_all()


class TorchBackend:
    """See `neo.runtime.backend.Backend`."""

    kind = "torch"

    def __init__(self, note: str = "") -> None:
        self.note = note

    def describe(self) -> dict[str, Any]:
        """Kind, version and threads."""
        return {"kind": self.kind, "version": torch.__version__, "threads": torch.get_num_threads()}

    def close(self) -> None:
        """Nothing to stop: torch keeps its threads."""

    def worker(
        self, name: str, threads: int = 1, cores: Sequence[int] | None = None, spin_us: int = 50
    ) -> TorchWorker:
        """Start a worker; its threads are torch's, whatever is asked for."""
        check_threads(threads, cores)
        return TorchWorker(name)

    def append(
        self, memory: KVMemory, k: Tensor, v: Tensor, tables: Ints, slots: Ints, positions: Ints
    ) -> None:
        """Write rows of k and v; see `neo.runtime.backend.Backend.append`."""
        if not len(k):
            return
        _check(k, "k", memory)
        _check(v, "v", memory)
        rows, heads, _ = k.shape
        if k.shape != v.shape or heads != memory.kv_heads:
            raise ValueError(
                f"k is {tuple(k.shape)} and v {tuple(v.shape)}: must agree, with {memory.kv_heads} heads"
            )
        table = _longs(tables, "tables")
        if table.ndim != 2:
            raise ValueError(f"tables must be int32 [slots, width], are {tuple(table.shape)}")
        sequences, at = _longs(slots, "slots", rows), _longs(positions, "positions", rows)
        _inside(sequences, table.shape[0], "slots")
        _inside(at, table.shape[1] * memory.block_size, "positions")
        blocks, offset = table[sequences, at // memory.block_size], at % memory.block_size
        _inside(blocks, memory.blocks, "blocks of the rows")
        with torch.inference_mode():
            k_plane, v_plane = memory.planes()
            k_plane[blocks, :, :, offset] = k.to(memory.dtype)
            v_plane[blocks, :, offset] = v.to(memory.dtype)

    def decode(
        self, memory: KVMemory, q: Tensor, out: Tensor, tables: Ints, slots: Ints, lengths: Ints
    ) -> None:
        """Decode attention; see `neo.runtime.backend.Backend.decode`."""
        if not len(q):
            return
        _check(q, "q", memory)
        if q.shape != out.shape or q.dtype != out.dtype:
            raise ValueError(
                f"q is {tuple(q.shape)} {q.dtype}, out {tuple(out.shape)} {out.dtype}: must agree"
            )
        rows, heads, dim = q.shape
        if heads % memory.kv_heads:
            raise ValueError(f"{heads} heads of q are no multiple of the memory's {memory.kv_heads}")
        table = _longs(tables, "tables")
        if table.ndim != 2:
            raise ValueError(f"tables must be int32 [slots, width], are {tuple(table.shape)}")
        sequences, tokens = _longs(slots, "slots", rows), _longs(lengths, "lengths", rows)
        _inside(sequences, table.shape[0], "slots")
        _inside(tokens, table.shape[1] * memory.block_size + 1, "lengths")
        scale = 1.0 / math.sqrt(dim)
        with torch.inference_mode():
            both = [
                memory.gather(table[sequence], length)
                for sequence, length in zip(sequences.tolist(), tokens.tolist(), strict=True)
            ]
            for i, (keys, values) in enumerate(both):
                grouped = q[i].float().reshape(memory.kv_heads, -1, dim)
                scores = torch.einsum("hgd,thd->hgt", grouped * scale, keys.float())
                weights = scores.softmax(dim=-1)
                result = torch.einsum("hgt,thd->hgd", weights, values.float())
                out[i] = result.view(heads, dim).to(out.dtype)

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
    ) -> TorchJob:
        """Append, then decode."""

        def run() -> None:
            self.append(memory, k, v, tables, slots, positions)
            self.decode(memory, q, out, tables, slots, lengths)

        return TorchJob("attention", (run,))

    def append_job(
        self, memory: KVMemory, k: Tensor, v: Tensor, tables: Ints, slots: Ints, positions: Ints
    ) -> TorchJob:
        """Append as a job."""
        return TorchJob("append", (lambda: self.append(memory, k, v, tables, slots, positions),))

    def copy_job(self, src: KVMemory, dst: KVMemory, src_blocks: Ints, dst_blocks: Ints) -> TorchJob:
        """Copy layer-blocks."""
        same_shape = src.tensor.shape[1:] == dst.tensor.shape[1:] and src.block_size == dst.block_size
        if not same_shape or src.dtype != dst.dtype:
            raise ValueError(
                f"blocks of {tuple(src.tensor.shape[1:])} {src.dtype} cannot be copied to "
                f"{tuple(dst.tensor.shape[1:])} {dst.dtype}"
            )
        sources = _longs(src_blocks, "src_blocks", len(src_blocks))
        targets = _longs(dst_blocks, "dst_blocks", len(src_blocks))

        def run() -> None:
            _inside(sources, src.blocks, "src_blocks")
            _inside(targets, dst.blocks, "dst_blocks")
            dst.tensor[targets] = src.tensor[sources]

        return TorchJob("copy", (run,))

    def together(self, jobs: Sequence[Job]) -> TorchJob | None:
        """Several jobs as one. Those given must not be used any more."""
        parts: tuple[Callable[[], None], ...] = ()
        for job in jobs:
            assert isinstance(job, TorchJob)
            parts, job.parts = parts + job.parts, ()
        return TorchJob("+".join(job.kind for job in jobs), parts) if parts else None

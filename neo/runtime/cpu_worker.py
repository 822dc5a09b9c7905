"""Threads of the CPU library that run jobs in order, and copying of blocks. Calls release the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from neo.runtime import cpu_library as c
from neo.runtime.cpu_kernels import Ints, Pool, _ints

FLAG_TIMEOUT_S = 10.0
"""How long a job waits for its flag before it fails: far longer than any step, far shorter than patience."""


class Worker:
    """A thread that runs `cpu_library.Job` structs in the order of submission. Close it.

    `pool` serves jobs that name none and must outlive the worker; the thread runs on `core` (-1: anywhere);
    it, and who waits for it, spins for `spin_us` before it sleeps (-1: it never sleeps); a job waits for its
    flag for `flag_timeout_s`. Safe to use from several threads.
    """

    def __init__(
        self,
        pool: Pool | None = None,
        core: int = -1,
        spin_us: int = 50,
        flag_timeout_s: float = FLAG_TIMEOUT_S,
    ) -> None:
        self._library = c.load()
        self._handle: ctypes.c_void_p | None = None
        self._pool = pool  # kept alive
        options = c.WorkerOptions(
            pool=None if pool is None else pool.handle,
            flag_timeout_us=round(flag_timeout_s * 1e6),
            core=core,
            spin_us=spin_us,
        )
        handle = ctypes.c_void_p()
        self.check(self._library.neo_cpu_worker_create(options, handle))
        self._handle = handle

    @property
    def handle(self) -> ctypes.c_void_p:
        """The C handle."""
        if self._handle is None:
            raise ValueError("the worker is closed")
        return self._handle

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._handle is None

    def check(self, status: int) -> None:
        """Raise for a status that is not success, with the library's message."""
        if status:
            c.raise_for(status, self._library.neo_cpu_last_error().decode())

    def submit(self, job: c.Job, after: Sequence[tuple[Worker, int]] = ()) -> int:
        """Queue a job, to run when the tickets in `after` have ended; returns its ticket.

        The caller keeps the job, and all it points to, alive and unchanged until it has ended. Raises
        `cpu_library.CpuKernelError` when 4096 jobs are waiting already.
        """
        pairs = (c.After * len(after))(*[c.After(worker.handle, ticket) for worker, ticket in after])
        ticket = ctypes.c_int64()
        self.check(self._library.neo_cpu_worker_submit(self.handle, job, pairs, len(after), ticket))
        return ticket.value

    def wait(self, ticket: int, timeout_s: float | None = None) -> None:
        """Return when the job has ended; raise what it failed with, or TimeoutError after `timeout_s`."""
        status = self.await_end(ticket, timeout_s)
        if status == c.TIMEOUT:
            raise TimeoutError(self._library.neo_cpu_last_error().decode())
        self.check(status)

    def await_end(self, ticket: int, timeout_s: float | None = None) -> int:
        """Like `wait`, but returns the status: that of the job, or `cpu_library.TIMEOUT`."""
        timeout_us = -1 if timeout_s is None else round(timeout_s * 1e6)
        return int(self._library.neo_cpu_worker_wait(self.handle, ticket, timeout_us))

    @property
    def finished(self) -> int:
        """The last ticket that has ended, as all before it have; 0 if none."""
        return int(self._library.neo_cpu_worker_finished(self.handle))

    def close(self) -> None:
        """End the thread after the job that runs; later jobs fail. No call may be going on."""
        if self._handle is not None:
            self._library.neo_cpu_worker_destroy(self._handle)
            self._handle = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


def copy_blocks(
    pool: Pool | None,
    src: memoryview | bytearray,
    dst: memoryview | bytearray,
    block_bytes: int,
    src_blocks: Ints,
    dst_blocks: Ints,
) -> None:
    """Block dst_blocks[i] of `dst` becomes block src_blocks[i] of `src`; without a pool on the caller alone.

    src, dst: writable contiguous memory, cut into blocks of `block_bytes`; src_blocks, dst_blocks: int32
    [count]. Raises ValueError, with nothing copied, for bad arguments.
    """
    if _ints(src_blocks, "src_blocks", 1).shape != _ints(dst_blocks, "dst_blocks", 1).shape:
        raise ValueError(f"{len(src_blocks)} src_blocks and {len(dst_blocks)} dst_blocks: must agree")
    if block_bytes < 1:
        raise ValueError(f"block_bytes is {block_bytes}, must be positive")
    views = [memoryview(memory).cast("B") for memory in (src, dst)]
    spaces = [(ctypes.c_char * view.nbytes).from_buffer(view) for view in views]
    args = c.Copy(
        src=ctypes.addressof(spaces[0]),
        dst=ctypes.addressof(spaces[1]),
        block_bytes=block_bytes,
        src_blocks=src_blocks.ctypes.data,
        dst_blocks=dst_blocks.ctypes.data,
        src_count=views[0].nbytes // block_bytes,
        dst_count=views[1].nbytes // block_bytes,
        count=len(src_blocks),
    )
    library = c.load()
    status = library.neo_cpu_copy_blocks(None if pool is None else pool.handle, args)
    if status:
        c.raise_for(status, library.neo_cpu_last_error().decode())

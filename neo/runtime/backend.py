"""KV memory in host memory, and who computes on it: the native library, or torch where it is not built.

Names used below: a layer-block is room for `block_size` tokens of K and V in one layer; `tables` is the block
table of ONE layer, int32 [slots, width], whose row s lists the layer-blocks of slot s in order. Tables,
slots, positions, lengths and lists of blocks are numpy arrays or torch tensors of int32, contiguous in their
last axis.
q, k, v and outputs are torch tensors [rows, heads, head_dim] of float32, float16 or bfloat16 in host memory;
rows may lie apart from each other, as in a fused projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from neo.core.errors import InputError
from neo.runtime import cpu_library
from neo.runtime.kv_memory import KVMemory

Ints: TypeAlias = npt.NDArray[np.int32] | Tensor
Kind: TypeAlias = Literal["auto", "native", "torch"]

ANSWER_S = 60.0
"""Seconds a thread that waits gives a worker before it says that the worker does not answer. No job takes as
long: a whole terabyte is read in less."""

__all__ = ["ANSWER_S", "Backend", "Ints", "Job", "KVMemory", "Kind", "Ticket", "Worker", "backend"]


class Job(Protocol):
    """Work for a worker, submitted once. What it computes on must not change until it has ended."""

    @property
    def kind(self) -> str:
        """What it does: ``append``, ``attention``, ``copy``; joined by ``+`` where it does several things."""
        ...


class Ticket(Protocol):
    """A submitted job."""

    @property
    def worker(self) -> Worker:
        """Who runs it."""
        ...

    @property
    def done(self) -> bool:
        """Whether it has ended, with or without success."""
        ...

    @property
    def start_s(self) -> float:
        """When it began, in seconds of ``time.perf_counter``. ValueError before it has ended."""
        ...

    @property
    def end_s(self) -> float:
        """When it ended, likewise."""
        ...


class Worker(Protocol):
    """A thread that runs jobs in the order of submission, each after what it must come after."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def idle(self) -> bool:
        """Whether every job has ended."""
        ...

    def submit(self, job: Job, after: Sequence[Ticket] = ()) -> Ticket:
        """Queue a job, to run when all in `after`, of any worker of this backend, have ended.

        If one of those failed, the job is not run and fails too. Waits while 4096 jobs are queued.
        """
        ...

    def wait(self, ticket: Ticket, timeout_s: float = ANSWER_S) -> None:
        """Return when the job has ended.

        Raises `cpu_library.CpuKernelError`, naming worker and job, if it failed or has not ended in time.
        """
        ...

    def close(self) -> None:
        """End the thread after the job that runs; jobs that have not begun fail. No call may be going on."""
        ...


class Backend(Protocol):
    """Appends to, attends over and copies KV memory: at once on the calling thread, or as jobs for workers.

    Bad arguments raise ValueError (of a job: at `Worker.wait`), with nothing written by that call.
    """

    kind: str
    note: str
    """What the user should know about this choice, or ``""``."""

    def describe(self) -> dict[str, Any]:
        """Which it is, with versions and threads (JSON-serialisable)."""
        ...

    def append(
        self, memory: KVMemory, k: Tensor, v: Tensor, tables: Ints, slots: Ints, positions: Ints
    ) -> None:
        """Write row i of k and v [rows, kv_heads, head_dim] as token positions[i] of slots[i]."""
        ...

    def decode(
        self, memory: KVMemory, q: Tensor, out: Tensor, tables: Ints, slots: Ints, lengths: Ints
    ) -> None:
        """Attention of query i over the first lengths[i] tokens of slots[i]; 0 tokens give zeros.

        q, out: [rows, heads, head_dim] of one type, heads a multiple of kv_heads. Scores are divided by
        sqrt(head_dim); sums are in float32.
        """
        ...

    def gather(self, memory: KVMemory, table: Ints, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V [tokens, kv_heads, head_dim] of the first tokens in the blocks of `table` [blocks]."""
        ...

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
    ) -> Job:
        """`append`, then `decode`, of the same slots."""
        ...

    def append_job(
        self, memory: KVMemory, k: Tensor, v: Tensor, tables: Ints, slots: Ints, positions: Ints
    ) -> Job:
        """`append` as a job."""
        ...

    def copy_job(self, src: KVMemory, dst: KVMemory, src_blocks: Ints, dst_blocks: Ints) -> Job:
        """Layer-block src_blocks[i] of `src` to dst_blocks[i] of `dst`, memories of one shape and type.

        None is written twice, nor both read and written.
        """
        ...

    def together(self, jobs: Sequence[Job]) -> Job | None:
        """These jobs as one, in this order; it fails where one does. None if there are none."""
        ...

    def worker(
        self, name: str, threads: int = 1, cores: Sequence[int] | None = None, spin_us: int = 50
    ) -> Worker:
        """Start a worker.

        Its work is shared by `threads` threads, its own included, on `cores`, one each (None: anywhere); idle
        ones spin for `spin_us` before they sleep (-1: they never sleep).
        """
        ...

    def close(self) -> None:
        """Stop the threads of the calls that run at once. Close workers first."""
        ...


def check_threads(threads: int, cores: Sequence[int] | None) -> None:
    """Raise InputError unless there is at least one thread and, where cores are given, one for each."""
    if threads < 1:
        raise InputError(f"CPU threads: {threads} given, at least 1 is needed")
    if cores is not None and len(cores) != threads:
        raise InputError(f"CPU cores: {len(cores)} given for {threads} threads; give one for each, or none")


def backend(
    kind: Kind = "auto", threads: int = 1, cores: Sequence[int] | None = None, spin_us: int = 50
) -> Backend:
    """Choose who computes: ``native``, the library; ``torch``, slow; ``auto``, the library where it runs.

    `threads`, `cores` and `spin_us` are those of calls that run at once, the calling thread included; see
    `Backend.worker`. Raises InputError for an unknown kind and where ``native`` cannot be had, saying why.
    """
    if kind not in ("auto", "native", "torch"):
        raise InputError(f"backend {kind!r} is unknown: auto, native or torch")
    check_threads(threads, cores)
    if kind != "torch":
        reason = _why_not_native()
        if not reason:
            from neo.runtime.backend_native import NativeBackend

            return NativeBackend(threads, cores, spin_us)
        if kind == "native":
            raise InputError(reason)
    from neo.runtime.backend_torch import TorchBackend

    why = "" if kind == "torch" else f": {reason}"
    return TorchBackend(note=f"attention on the CPU is done by torch, slowly{why}")


def _why_not_native() -> str:
    try:
        if cpu_library.load().neo_cpu_target() != b"unsupported":
            return ""
    except cpu_library.CpuKernelsMissingError as error:
        return str(error)
    return "this processor has none of the instruction sets that the CPU kernels are built for (AVX2, NEON)"

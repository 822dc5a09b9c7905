"""The host's side of a step on the GPU: CPU attention that the device asks for through flags.

For each sub-batch a channel (``kernels/cuda/neo_cuda.h``): the GPU writes q, k and v of its CPU decodes to
pinned memory and a number behind them; a thread of the CPU library, told once per step what to do in all
layers, appends, attends and answers. No Python runs in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from neo.runtime import cpu_library as c
from neo.runtime import cuda_transfers as transfers
from neo.runtime.block_tables import TierBlocks
from neo.runtime.cpu_kernels import Pool
from neo.runtime.cpu_worker import Worker
from neo.runtime.cuda_kernels import Launch
from neo.runtime.cuda_transfers import Channel
from neo.runtime.errors import EngineError
from neo.runtime.kv_memory import KVMemory
from neo.runtime.native_args import fill_append, fill_decode
from neo.runtime.step_inputs import DecodeRows, RelayRows

TIMEOUT_S = 10.0
"""How long each side waits for the other before it gives the step up: far longer than any layer takes."""
_SPIN_US = 2000
"""How long idle threads look for work before they sleep: longer than what a layer does between two of theirs,
as waking them takes as long as reading a megabyte."""


class HandOver:
    """One sub-batch's channel and rows in pinned memory.

    Attributes:
        packed: [rows, (heads + 2 kv_heads) head_dim], what the device writes.
        answer: [rows, heads head_dim], what it reads.
    """

    def __init__(
        self, rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.channel = transfers.Channel(device)
        self.packed = transfers.shared_zeros((rows, (heads + 2 * kv_heads) * dim), dtype, device)
        self.answer = transfers.shared_zeros((rows, heads * dim), dtype, device)
        self.q = self.packed[:, : heads * dim].view(rows, heads, dim)
        self.k = self.packed[:, heads * dim : (heads + kv_heads) * dim].view(rows, kv_heads, dim)
        self.v = self.packed[:, (heads + kv_heads) * dim :].view(rows, kv_heads, dim)
        self.out = self.answer.view(rows, heads, dim)
        self.post: Launch | None = None
        self.wait: Launch | None = None
        self.asked = 0  # numbers that the steps submitted so far ask for

    def describe(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        """The device's kernels, for rows of these buffers; ``place`` says which rows."""
        n = len(self.packed)
        self.post = transfers.post_rows(self.channel, q[:n], k[:n], v[:n], self.packed)
        self.wait = transfers.await_rows(self.channel, self.answer, out[:n], TIMEOUT_S)
        by, args = q.element_size(), self.post.args
        self._base = (args.q, args.k, args.v, self.wait.args.out)
        self._strides = (args.q_stride, args.k_stride, args.v_stride, out.stride(0) * by)

    def place(self, row: int, rows: int, rows_at: int | None = None) -> None:
        """The CPU decodes stand in rows ``row`` on; ``rows_at``: where the device reads how many count."""
        assert self.post is not None
        assert self.wait is not None
        q, k, v, out = (b + row * s for b, s in zip(self._base, self._strides, strict=True))
        post, wait = self.post.args, self.wait.args
        post.q, post.k, post.v, wait.out = q, k, v, out
        post.rows = wait.rows = rows
        post.rows_at = wait.rows_at = rows_at


class Submitted:
    """A step's job: what it was told, and when the host did it.

    Attributes:
        channels: by which it hands over.
        keep: what the job points to.
    """

    def __init__(self, channels: Sequence[Channel], job: c.Job) -> None:
        self.channels = channels
        self.job = job
        self.ticket = 0
        self.keep: list[object] = []
        self.times: Callable[[], npt.NDArray[np.int64]] = lambda: np.zeros((0, 0, 2), dtype=np.int64)
        self.place: Callable[[str], str] = lambda said: said  # layer and sub-batch in the library's words

    def seconds(self) -> npt.NDArray[np.int64]:
        """[layers, sub-batches, (begin, end)] in nanoseconds, once it has ended."""
        return self.times()


class HostRelay(Protocol):
    """Tells what relayed decodes need of a step (``neo.runtime.cuda_relay``)."""

    def job(self, rows: RelayRows) -> Submitted:
        """CPU attention of all layers, to be submitted."""
        ...


class HostAttention:
    """A worker with its threads, and the hand-over of a step.

    Args:
        memory: the host tier's KV memory, pinned.
        tier: its block tables.
        threads: of CPU attention, the worker's own included, on ``cores`` if given.
    """

    def __init__(
        self, memory: KVMemory, tier: TierBlocks, threads: int, cores: Sequence[int] | None, layers: int
    ) -> None:
        self.memory, self.tier, self.layers = memory, tier, layers
        self._pool = Pool(threads, cores, spin_us=_SPIN_US)
        self._worker = Worker(
            self._pool, cores[0] if cores is not None else -1, spin_us=_SPIN_US, flag_timeout_s=TIMEOUT_S
        )

    def submit(self, parts: Sequence[tuple[HandOver, DecodeRows]]) -> Submitted:
        """Before the device begins a step: what it will ask for, sub-batch by sub-batch.

        The step before may still run.
        """
        stages = (c.Stage * len(parts))()
        told = Submitted([over.channel for over, _ in parts], c.Job())
        times = np.zeros((self.layers, len(parts), 2), dtype=np.int64)
        told.times = lambda: times
        keep = told.keep
        keep += [stages, times]
        for stage, (over, rows) in zip(stages, parts, strict=True):
            n, tables = len(rows), self.tier.tables
            positions = rows.positions
            table = tables[0]
            append, decode = c.Append(), c.Decode()
            keep += fill_append(append, self.memory, over.k[:n], over.v[:n], table, rows.slots, positions)
            keep += fill_decode(
                decode, self.memory, over.q[:n], over.out[:n], table, rows.slots, rows.lengths
            )
            stage.size = ctypes.sizeof(c.Stage)
            stage.append, stage.decode = ctypes.pointer(append), ctypes.pointer(decode)
            stage.request, stage.answer = over.channel.request, over.channel.answer
            stage.first = (over.asked + 1) & 0xFFFFFFFF
            stage.layer_stride = tables.strides[0] // tables.itemsize
            over.asked += self.layers
        handover = c.Handover(stages=stages, n_stages=len(parts), layers=self.layers, times=times.ctypes.data)
        keep.append(handover)
        told.job.handover = ctypes.pointer(handover)
        told.ticket = self._worker.submit(told.job)
        return told

    def submit_relay(self, relay: HostRelay, rows: RelayRows) -> Submitted:
        """The same for a step with relayed decodes: attention that waits for nothing of this step."""
        told = relay.job(rows)
        told.ticket = self._worker.submit(told.job)
        return told

    def finish(self, told: Submitted) -> None:
        """After the device has ended the step. EngineError if either side gave it up."""
        failed = any(channel.failed for channel in told.channels)
        ended = self._worker.await_end(told.ticket, TIMEOUT_S) != c.TIMEOUT
        if told.job.status or failed or not ended:
            said = told.place(told.job.message.decode(errors="replace"))
            raise EngineError(f"CPU_ATTN failed: {said or f'no answer within {TIMEOUT_S:g} s'}")

    def close(self) -> None:
        """Stop the threads."""
        self._worker.close()
        self._pool.close()

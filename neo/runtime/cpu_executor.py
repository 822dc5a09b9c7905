"""The ``cpu`` executor: a StepGraph on a machine without a GPU.

torch on the calling thread stands for the GPU; a worker thread with the ISPC kernel does CPU attention, two
more do copies to and from the host tier, each beside the others. Both tiers are in host memory, so SEND and
RECV move nothing: CPU attention reads q, k and v where PRE left them and writes where POST reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from neo.core.graph import RELAY, OpKind, Resource, StepGraph
from neo.core.plan import StepPlan
from neo.core.record import Slice
from neo.runtime.backend import Backend, KVMemory, Ticket, Worker
from neo.runtime.block_tables import BlockTables, Copies, Ints
from neo.runtime.cpu_relay import Relay
from neo.runtime.executor import FAULTS, Sample, StepTimes
from neo.runtime.model import Model
from neo.runtime.program import Issued, fault, program, wait_for
from neo.runtime.rope import Rope
from neo.runtime.step_inputs import Append, BatchInputs, ChunkRows, StepInputs

_COPY_SPIN_US = 50


@dataclass(frozen=True, slots=True)
class CpuExecutorOptions:
    """Threads of the executor.

    Attributes:
        cpu_threads: of CPU attention.
        cpu_cores: where they run, one core each; None leaves it to the system.
        spin_us: how long idle workers spin before they sleep; those that copy at most 50.
    """

    cpu_threads: int = 1
    cpu_cores: tuple[int, ...] | None = None
    spin_us: int = 1000


class CpuExecutor:
    """See the module's description.

    Args:
        model: on the CPU.
        backend: kernels of the "GPU's" thread; closed with the executor.
        tables: of both tiers.
        staging: (buffers, layer-blocks of each) that streamed KV passes through, as accounted.
        slices_of: how many first steps leave slices.

    Raises:
        InputError: KV memory of this size cannot be had; the message has the numbers.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        tables: BlockTables,
        staging: tuple[int, int] = (0, 0),
        options: CpuExecutorOptions | None = None,
        slices_of: int = 0,
    ) -> None:
        self.model = model
        self.backend = backend
        self.tables = tables
        self.options = options or CpuExecutorOptions()
        self.slices_of = slices_of
        config = model.config
        shape = (config.kv_heads, config.head_dim, tables.block_size, model.dtype)
        first = tables.gpu.total  # the staging buffers stand behind the blocks that the tables give out
        self._standing = np.arange(first, first + staging[0] * staging[1], dtype=np.int32).reshape(staging)
        self.gpu = KVMemory.allocate(tables.gpu.total + staging[0] * staging[1], *shape)
        self.cpu = KVMemory.allocate(tables.cpu.total, *shape)
        self._about = {
            "executor": "cpu",
            "backend": backend.describe(),
            "torch": torch.__version__,
            "gpu_threads": torch.get_num_threads(),
            "cpu_threads": self.options.cpu_threads,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_bytes": {"gpu": self.gpu.nbytes, "cpu": self.cpu.nbytes},
        }
        self._workers: dict[Resource, Worker] = {}
        self._relay = Relay(model)
        self._ran = 0
        self._handlers: dict[OpKind, Callable[[int, int], None]] = {
            OpKind.EMBED: self._embed,
            OpKind.PRE: self._pre,
            OpKind.GPU_ATTN: self._gpu_attention,
            OpKind.POST: self._post,
            OpKind.HEAD: self._head,
        }
        self._jobs: dict[OpKind, Callable[[int, int], Any]] = {
            OpKind.CPU_ATTN: self._cpu_attention,
            OpKind.SWAP_OUT: self._swap_out,
            OpKind.SWAP_IN: self._swap_in,
            OpKind.STREAM: self._stream,
        }

    def describe(self) -> dict[str, Any]:
        """Device, threads, library and versions (JSON-serialisable); also of a closed executor."""
        return dict(self._about)

    def close(self) -> None:
        """Stop the threads and give KV memory back; may be called again."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self.backend.close()
        config = self.model.config
        shape = (config.kv_heads, config.head_dim, self.tables.block_size, self.model.dtype)
        self.gpu = self.cpu = KVMemory.allocate(0, *shape)

    # -- a step -------------------------------------------------------------------------------------------

    def run(
        self, plan: StepPlan, graph: StepGraph, inputs: StepInputs, copies: Copies, sample: Sample
    ) -> StepTimes:
        """Run a step to its end; see ``neo.runtime.executor.Executor``."""
        self._inputs, self._copies, self._sample = inputs, copies, sample
        self._stage(plan, inputs)
        seconds = [0.0] * len(graph.works)
        issued: list[Issued] = []
        slices: list[Slice] | None = [] if self._ran < self.slices_of else None
        with torch.inference_mode():
            begin = self._walk(graph, seconds, issued, slices)
        for step, layer, ticket in issued:
            try:
                ticket.worker.wait(ticket)
            except FAULTS as error:
                raise fault(step, layer, error) from error
            seconds[step.work] += ticket.end_s - ticket.start_s
            if slices is not None:
                slices.append(
                    Slice(
                        self._ran, step.resource, step.kind, layer, step.batch, ticket.start_s, ticket.end_s
                    )
                )
        self._ran += 1
        return StepTimes(begin, time.perf_counter(), seconds, slices or [])

    def _walk(
        self,
        graph: StepGraph,
        seconds: list[float],
        issued: list[Issued],
        slices: list[Slice] | None,
    ) -> float:
        """Every operation in program order: the GPU's here and now, the others as jobs of their workers."""
        clock = time.perf_counter
        latest: dict[tuple[OpKind, int], list[Ticket]] = {}
        begin = clock()
        relayed = self._relayed_attention()
        for repeat, first_layer, steps in program(graph.template):
            for layer_of_section in range(first_layer, first_layer + repeat):
                for step in steps:
                    kind, batch, offset, work, resource, waits = step
                    layer = -1 if offset is None else layer_of_section + offset
                    after = []
                    for key_kind, key_batch, lag in waits:
                        tickets = latest.get((key_kind, key_batch))
                        if tickets is not None and len(tickets) > lag:
                            after.append(tickets[-1 - lag])
                    shown = None if offset is None else layer
                    try:
                        if resource is Resource.GPU:
                            wait_for(after, issued)
                            start = clock()
                            self._handlers[kind](batch, layer)
                            end = clock()
                            seconds[work] += end - start
                            if slices is not None:
                                slices.append(Slice(self._ran, resource, kind, shown, batch, start, end))
                        else:
                            if batch == RELAY:
                                ticket = relayed.get(layer)
                            else:
                                job = self._jobs[kind](batch, layer)
                                ticket = None if job is None else self._worker(resource).submit(job, after)
                            if ticket is None:
                                continue
                            latest.setdefault((kind, batch), []).append(ticket)
                            issued.append((step, shown, ticket))
                    except FAULTS as error:
                        raise fault(step, shown, error) from error
        return begin

    def _relayed_attention(self) -> dict[int, Ticket]:
        """CPU attention of relayed decodes, by layer: it waits for nothing of this step."""
        found: dict[int, Ticket] = {}
        rows = self._inputs.batches[0].relay
        if rows is None:
            return found
        self._relay.begin(rows)
        for layer in range(self.model.config.layers):
            if (what := self._relay.attention(layer)) is not None:
                k, v, q, out, slots, lengths = what
                table = self.tables.cpu.tables[layer]
                where = (table, slots, lengths - np.int32(1), lengths)
                job = self.backend.attention_job(self.cpu, k, v, q, out, *where)
                found[layer] = self._worker(Resource.CPU).submit(job)
        return found

    def _worker(self, resource: Resource) -> Worker:
        worker = self._workers.get(resource)
        if worker is None:
            o = self.options
            threads = o.cpu_threads if resource is Resource.CPU else 1
            cores = o.cpu_cores if resource is Resource.CPU else None
            # Copies are few: who waits for them all the time takes a core from those who compute.
            spin_us = o.spin_us if resource is Resource.CPU else min(o.spin_us, _COPY_SPIN_US)
            worker = self.backend.worker(str(resource), threads, cores, spin_us)
            self._workers[resource] = worker
        return worker

    def _stage(self, plan: StepPlan, inputs: StepInputs) -> None:
        """Give what is streamed its rows of the staging buffers: the plan's own ring, or the standing one."""
        rooms = inputs.staged.room
        self._ring = plan.ring or self._standing.shape[0]
        if not rooms:
            return
        total = sum(rooms)
        buffers = (
            self.tables.stage(plan.ring * total).reshape(plan.ring, total) if plan.ring else self._standing
        )
        if total > buffers.shape[1]:
            raise AssertionError(f"{total} blocks to stage, the buffer has {buffers.shape[1]}")
        self._staging = np.zeros((self._ring, len(rooms), max(rooms)), dtype=np.int32)
        masks = inputs.staged.host_layers
        streamed = [n for n in range(self.model.config.layers) if any(mask >> n & 1 for mask in masks)]
        self._buffer = {layer: i % self._ring for i, layer in enumerate(streamed)}
        offset = 0
        for i, room in enumerate(rooms):
            self._staging[:, i, :room] = buffers[:, offset : offset + room]
            offset += room

    # -- the GPU's operations -----------------------------------------------------------------------------

    def _embed(self, _batch: int, _layer: int) -> None:
        model, batches = self.model, self._inputs.batches
        tokens = np.concatenate([b.tokens for b in batches]) if len(batches) > 1 else batches[0].tokens
        hidden = model.embed(torch.from_numpy(tokens))
        self._hidden = [hidden[: len(batches[0].tokens)], hidden[len(batches[0].tokens) :]][: len(batches)]
        self._ropes: list[Rope] = [model.rope(torch.from_numpy(b.positions)) for b in batches]
        self._qkv: list[tuple[Tensor, Tensor, Tensor]] = [()] * len(batches)  # type: ignore[list-item]
        heads = (model.config.heads, model.config.head_dim)
        self._out = [torch.empty((len(b.tokens), *heads), dtype=model.dtype) for b in batches]

    def _pre(self, batch: int, layer: int) -> None:
        if self._inputs.batches[batch].relay is not None:
            self._relay.turn(layer, self._ropes[batch])
        q, k, v = self.model.pre(layer, self._hidden[batch], self._ropes[batch])
        self._qkv[batch] = (q, k, v)
        inputs = self._inputs.batches[batch]
        self._append(inputs.append, layer, k, v)
        self._append_resident(inputs, layer, k, v, late=False)

    def _append(self, a: Append, layer: int, k: Tensor, v: Tensor) -> None:
        """New KV into the GPU's cache."""
        if len(a):
            table = self.tables.gpu.tables[layer]
            self.backend.append(self.gpu, k[a.rows], v[a.rows], table, a.slots, a.positions)

    def _append_resident(self, inputs: BatchInputs, layer: int, k: Tensor, v: Tensor, late: bool) -> None:
        """The same of streamed decodes whose KV of this layer is on the GPU."""
        s = inputs.stream
        for i in self._resident(inputs, layer):
            if (i in inputs.late_streams) is late:
                one = slice(i, i + 1)
                self._append(Append(s.row + i, s.slots[one], s.positions[one]), layer, k, v)

    def _post(self, batch: int, layer: int) -> None:
        if self._inputs.batches[batch].relay is not None:
            self._relay.exchange(layer, self._hidden[batch], self._qkv[batch], self._out[batch])
        self._hidden[batch] = self.model.post(layer, self._hidden[batch], self._out[batch])

    def _head(self, _batch: int, _layer: int) -> None:
        rows = [
            h[list(b.sampled)] for h, b in zip(self._hidden, self._inputs.batches, strict=True) if b.sampled
        ]
        self._sample(self.model.head(torch.cat(rows) if len(rows) > 1 else rows[0]), self._inputs.sampled)

    def _gpu_attention(self, batch: int, layer: int) -> None:
        inputs = self._inputs.batches[batch]
        q, k, v = self._qkv[batch]
        out = self._out[batch]
        self._append(inputs.late, layer, k, v)
        self._append_resident(inputs, layer, k, v, late=True)
        for chunk in inputs.chunks:
            self._chunk(chunk, layer, q, k, v, out)
        d = inputs.gpu
        if len(d):
            table = self.tables.gpu.tables[layer]
            self.backend.decode(self.gpu, q[d.rows], out[d.rows], table, d.slots, d.lengths)
        if len(inputs.stream):
            self._streamed(inputs, layer, q, k, v, out)

    def _chunk(self, chunk: ChunkRows, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Causal attention of a chunk over its prefix in the cache (or the staging buffer) and itself."""
        rows = slice(chunk.row, chunk.row + chunk.length)
        keys, values, mask = k[rows], v[rows], None
        if chunk.start:
            table = (
                self.tables.gpu.tables[layer, chunk.slot]
                if chunk.staged < 0
                else self._staging[self._buffer[layer], chunk.staged]
            )
            before_k, before_v = self.backend.gather(self.gpu, table, chunk.start)
            keys, values = torch.cat((before_k, keys)), torch.cat((before_v, values))
            mask = torch.ones(chunk.length, len(keys), dtype=torch.bool).tril_(chunk.start)
        result = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.model.config.heads != self.model.config.kv_heads,
        )
        out[rows] = result[0].transpose(0, 1)

    # -- streamed KV --------------------------------------------------------------------------------------

    def _resident(self, inputs: BatchInputs, layer: int) -> list[int]:
        """Streamed decodes whose KV of this layer is on the GPU; theirs are the first staging rows."""
        masks = self._inputs.staged.host_layers[: len(inputs.stream)]
        return [i for i, mask in enumerate(masks) if not mask >> layer & 1]

    def _streamed(
        self, inputs: BatchInputs, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor
    ) -> None:
        """Decodes over streamed KV: the new token joins it in the staging buffer first."""
        s = inputs.stream
        resident = self._resident(inputs, layer)
        staged = [i for i in range(len(s)) if i not in set(resident)]
        for members, tables in ((resident, self.tables.gpu.tables[layer]), (staged, None)):
            if not members:
                continue
            index = np.array(members)
            rows = torch.from_numpy(index + s.row)
            slots = s.slots[index]
            if tables is None:
                tables = self._staging[self._buffer[layer]]
                slots = index.astype(np.int32)
                self.backend.append(self.gpu, k[rows], v[rows], tables, slots, s.positions[index])
            answer = torch.empty_like(q[rows])
            self.backend.decode(self.gpu, q[rows], answer, tables, slots, s.lengths[index])
            out[rows] = answer

    # -- the workers' operations --------------------------------------------------------------------------

    def _cpu_attention(self, batch: int, layer: int) -> Any:
        d = self._inputs.batches[batch].cpu
        q, k, v = self._qkv[batch]
        rows, table = d.rows, self.tables.cpu.tables[layer]
        return self.backend.attention_job(
            self.cpu,
            k[rows],
            v[rows],
            q[rows],
            self._out[batch][rows],
            table,
            d.slots,
            d.positions,
            d.lengths,
        )

    def _swap_out(self, batch: int, layer: int) -> Any:
        if batch != 0:
            return self._copy(self.gpu, self.cpu, [self._copies.swap_out.at(layer)])
        return self._spill(layer)

    def _spill(self, layer: int) -> Any:
        """New KV, and blocks that leave behind this layer, to the host."""
        inputs = self._inputs.batches[0]
        _, k, v = self._qkv[0]
        jobs = []
        if len(inputs.spill):
            a = inputs.spill
            table = self.tables.cpu.tables[layer]
            jobs.append(self.backend.append_job(self.cpu, k[a.rows], v[a.rows], table, a.slots, a.positions))
        resident = set(self._resident(inputs, layer))
        if staged := [i for i in range(len(inputs.stream)) if i not in resident]:
            index = np.array(staged)
            rows = torch.from_numpy(index + inputs.stream.row)
            slots, positions = inputs.stream.slots[index], inputs.stream.positions[index]
            table = self.tables.cpu.tables[layer]
            jobs.append(self.backend.append_job(self.cpu, k[rows], v[rows], table, slots, positions))
        if copy := self._copy(self.gpu, self.cpu, [self._copies.behind.at(layer)]):
            jobs.append(copy)
        return self.backend.together(jobs)

    def _swap_in(self, _batch: int, layer: int) -> Any:
        return self._copy(self.cpu, self.gpu, [self._copies.swap_in.at(layer)])

    def _stream(self, _batch: int, layer: int) -> Any:
        staged, buffer = self._inputs.staged, self._buffer[layer]
        pairs = [
            (self.tables.cpu.tables[layer, slot, :blocks], self._staging[buffer, i, :blocks])
            for i, (slot, blocks) in enumerate(zip(staged.slots, staged.blocks, strict=True))
            if staged.host_layers[i] >> layer & 1
        ]
        return self._copy(self.cpu, self.gpu, pairs)

    def _copy(self, source: KVMemory, target: KVMemory, pairs: Sequence[tuple[Ints, Ints]]) -> Any:
        sources = np.concatenate([p[0] for p in pairs]) if pairs else np.empty(0, dtype=np.int32)
        if not len(sources):
            return None
        targets = np.concatenate([p[1] for p in pairs])
        return self.backend.copy_job(source, target, sources, targets)

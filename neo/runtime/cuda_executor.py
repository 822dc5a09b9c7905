"""The ``cuda`` executor: a StepGraph on an NVIDIA GPU and the processor beside it.

The GPU's operations are launched on one stream in the graph's order, copies on a stream per direction,
ordered by events where the graph says so. CPU attention is handed over through flags in pinned memory
(``neo.runtime.cuda_host``): SEND is a kernel that writes rows, RECV one that waits for the answer, launched
right ahead of the POST that needs it. Steps that only decode, and move nothing, are replayed as CUDA graphs
(``neo.runtime.cuda_graphs``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neo.core.graph import RESOURCE_OF, OpKind, Resource, StepGraph, Template
from neo.core.plan import StepPlan
from neo.core.request import Tier
from neo.runtime import cuda_kernels as kernels
from neo.runtime import cuda_library
from neo.runtime.block_tables import BlockTables, Copies
from neo.runtime.cuda_attention import Prefill
from neo.runtime.cuda_graphs import Graphs, padded, valid_rows
from neo.runtime.cuda_host import HandOver, HostAttention, Submitted
from neo.runtime.cuda_linear import Tuned
from neo.runtime.cuda_memory import TableMirror, device_memory, pinned_memory
from neo.runtime.cuda_program import COPIES, ORDERED, Step, program, work_of
from neo.runtime.cuda_rows import Layout, Rows
from neo.runtime.cuda_step import LayerCopies, Special, Way, special_rows, to_device
from neo.runtime.cuda_timeline import Timeline, host_slices
from neo.runtime.errors import EngineError
from neo.runtime.executor import FAULTS, Pending, Sample, StepTimes
from neo.runtime.kv_memory import KVMemory
from neo.runtime.model import Model
from neo.runtime.step_inputs import BatchInputs, StepInputs

_WAY = {(OpKind.SWAP_OUT, -1): Way.OUT, (OpKind.SWAP_OUT, 0): Way.SPILL}
_WAY |= {(OpKind.SWAP_IN, -1): Way.IN, (OpKind.STREAM, 0): Way.STREAM}


@dataclass(frozen=True, slots=True)
class CudaExecutorOptions:
    """How the executor runs.

    Attributes:
        max_rows: tokens of a step at most.
        max_decodes: requests of a step at most.
        cpu_threads, cpu_cores: of CPU attention.
        graphs: replay steps that only decode as CUDA graphs.
    """

    max_rows: int
    max_decodes: int
    cpu_threads: int = 1
    cpu_cores: tuple[int, ...] | None = None
    graphs: bool = True


class CudaExecutor:
    """See the module's description.

    Args:
        model: on the GPU.
        tables: of both tiers.
        staging: (buffers, layer-blocks of each) that streamed KV passes through, as accounted.
        slices_of: how many first steps leave slices; they are not replayed as graphs.
        timed: measure every operation of every step, at the price of longer steps.
        tuned: matrix products of this model whose kernels another executor has timed already.

    Raises:
        InputError: KV memory of this size cannot be had; the message has the numbers.
    """

    def __init__(
        self,
        model: Model,
        tables: BlockTables,
        options: CudaExecutorOptions,
        staging: tuple[int, int] = (0, 0),
        slices_of: int = 0,
        timed: bool = False,
        tuned: Tuned | None = None,
    ) -> None:
        self.model, self.tables, self.options = model, tables, options
        self.slices_of = slices_of
        self.timed = timed
        config, device = model.config, model.device
        shape = (config.kv_heads, config.head_dim, tables.block_size, model.dtype)
        first = tables.gpu.total  # staging blocks stand behind those that the tables give out
        self._standing = np.arange(first, first + staging[0] * staging[1], dtype=np.int32).reshape(staging)
        self._main = _stream(device)
        self._streams = {Resource.H2D: _stream(device), Resource.D2H: _stream(device)}
        with torch.inference_mode(), torch.cuda.stream(self._main):
            self.gpu = device_memory(tables.gpu.total + staging[0] * staging[1], *shape, device)
            self.cpu, self._unpin = pinned_memory(tables.cpu.total, *shape)
            most = min(options.max_decodes, options.max_rows)
            self._tuned = tuned or Tuned(model.weights)
            self._rows = [Rows(model, self.gpu, options.max_rows, most, self._tuned.layers)]
            self._host: HostAttention | None = None
            self._over: list[HandOver] = []
            if tables.cpu.total:
                self._rows.append(Rows(model, self.gpu, most, 0, self._tuned.layers))
                self._host = HostAttention(
                    self.cpu, tables.cpu, options.cpu_threads, options.cpu_cores, config.layers
                )
                for rows in self._rows:
                    over = HandOver(most, config.heads, config.kv_heads, config.head_dim, model.dtype, device)
                    over.describe(rows.q, rows.k, rows.v, rows.attended)
                    self._over.append(over)
            self._mirror = TableMirror(tables.gpu, device)
            self._copying = LayerCopies(self.gpu, self.cpu, device)
            self._prefill = Prefill(model, self.gpu)
            self._graphs = Graphs()
        self._main.synchronize()
        self._ran = 0
        self._ended_s = 0.0  # when the step before ended
        self._capturing = False
        self._special: Special | None = None
        self._timeline: Timeline | None = None
        self._about = self._describe()
        self._handlers: dict[OpKind, Callable[[int, int], None]] = {
            OpKind.EMBED: self._embed,
            OpKind.PRE: self.pre,
            OpKind.GPU_ATTN: self._gpu_attention,
            OpKind.SEND: self.send,
            OpKind.POST: self.post,
            OpKind.HEAD: self._head,
        }

    def _describe(self) -> dict[str, Any]:
        info = cuda_library.describe()
        return {
            "executor": "cuda",
            "device": torch.cuda.get_device_name(self.model.device),
            "driver": f"CUDA {info.driver // 1000}.{info.driver % 1000 // 10}",
            "backend": {
                "kind": "cuda",
                "target": f"sm_{info.capability}",
                "version": cuda_library.load().neo_cuda_version().decode(),
            },
            "torch": torch.__version__,
            "cpu_threads": self.options.cpu_threads,
            "graphs": self.options.graphs,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "kv_bytes": {"gpu": self.gpu.nbytes, "cpu": self.cpu.nbytes},
        }

    def describe(self) -> dict[str, Any]:
        """Device, threads, library and versions (JSON-serialisable); also of a closed executor."""
        return dict(self._about)

    def close(self) -> None:
        """Stop the threads and give KV memory back; may be called again."""
        if self._host is not None:
            self._host.close()
            self._host = None
        self._unpin()
        config = self.model.config
        self._graphs.clear()
        self._rows, self._over = [], []
        self.gpu = self.cpu = KVMemory.allocate(
            0, config.kv_heads, config.head_dim, self.tables.block_size, self.model.dtype
        )

    # -- a step -------------------------------------------------------------------------------------------

    def run(
        self, plan: StepPlan, graph: StepGraph, inputs: StepInputs, copies: Copies, sample: Sample
    ) -> StepTimes:
        """Run a step to its end; see ``neo.runtime.executor.Executor``."""
        return self.start(plan, graph, inputs, copies, sample)()

    def may_be_followed(self, plan: StepPlan) -> bool:
        """Whether a step can be queued behind this one; see ``neo.runtime.executor.Queueing``."""
        return not self.timed and self._ran > self.slices_of and _stays(plan)

    def start(
        self, plan: StepPlan, graph: StepGraph, inputs: StepInputs, copies: Copies, sample: Sample
    ) -> Pending:
        """Launch a step; see ``neo.runtime.executor.Queueing``."""
        timed = self.timed or self._ran < self.slices_of
        with _faults(), torch.inference_mode(), torch.cuda.stream(self._main):
            begin = time.perf_counter()
            self._mirror.update()
            self._sample, self._inputs = sample, inputs
            if self.options.graphs and not timed and _only_decodes(plan, inputs):
                self._replay(graph, inputs)
            else:
                self._walk(plan, graph, inputs, copies, timed)
            told, timeline, number = self._told, self._timeline, self._ran
            copying = self._streams.values() if program(graph.template)[0] else ()
            ended = [s.record_event() for s in (self._main, *copying)]
        self._ran += 1

        def wait() -> StepTimes:
            with _faults():
                for event in ended:
                    event.synchronize()
                if told is not None and self._host is not None:
                    self._host.finish(told)
                end = time.perf_counter()
                times = StepTimes(max(begin, self._ended_s), end, [0.0] * len(graph.works), measured=timed)
                self._ended_s = end
                self._note(times, graph, inputs, told, timeline, number)
            return times

        return wait

    def _note(
        self,
        times: StepTimes,
        graph: StepGraph,
        inputs: StepInputs,
        told: Submitted | None,
        timeline: Timeline | None,
        number: int,
    ) -> None:
        """What operations of a step that has ended took, as far as it was measured."""
        answers: dict[int, npt.NDArray[np.int64]] = {}
        if told is not None:
            answers = {b: told.times[:, i] for i, b in enumerate(_with_cpu(inputs))}
        if timeline is not None:
            for work, found in timeline.slices(number, answers):
                times.seconds[work] += found.end_s - found.start_s
                if number < self.slices_of:
                    times.slices.append(found)
            if number < self.slices_of:
                for batch, seconds in answers.items():
                    times.slices += host_slices(number, batch, seconds)
        for batch, seconds in answers.items():
            taken = float((seconds[:, 1] - seconds[:, 0]).sum()) * 1e-9
            times.seconds[work_of(graph.template, OpKind.CPU_ATTN, batch)] = taken

    def table(self, layer: int) -> tuple[int, int]:
        """Address of a layer's block table on the device, and entries between its rows."""
        tables = self._mirror.tables
        return tables.data_ptr() + 4 * layer * tables.stride(0), tables.stride(1)

    def _submit(self, inputs: StepInputs, layouts: Sequence[Layout], counted: bool) -> None:
        """Tell the host what the device will ask for.

        ``counted``: rows are padded, and the device reads how many of them count.
        """
        parts = []
        for i, (batch, at) in enumerate(zip(inputs.batches, layouts, strict=True)):
            if len(batch.cpu):
                counts = self._rows[i].inputs.device_counts.data_ptr() if counted else None
                self._over[i].place(at.cpu, at.cpu_rows, counts)
                parts.append((self._over[i], batch.cpu))
        self._told = self._host.submit(parts) if parts and self._host is not None else None

    def _replay(self, graph: StepGraph, inputs: StepInputs) -> None:
        """Run a step of decodes alone as a CUDA graph, captured the first time."""
        layouts = padded(inputs.batches, [r.capacity for r in self._rows[: len(inputs.batches)]])
        rows = [at.rows for at in layouts]
        self._tune(rows, sum(rows))
        self._fill(inputs, layouts)
        self._special, self._timeline, self._layouts = None, None, layouts
        self._prefill.begin(inputs.batches[0], None)
        self._submit(inputs, layouts, counted=True)
        key = (graph.template, *((at.gpu_rows, at.cpu_rows) for at in layouts))
        run = self._graphs.replay(key, self._mirror.generation, lambda: self._captured(graph.template))
        self._choose(valid_rows(run(), inputs, layouts))

    def _tune(self, rows: Sequence[int], sampled: int) -> None:
        """Find kernels for products of so many rows, the first time there are."""
        for count in rows:
            self._tuned.layers.prepare(count)
        self._tuned.head.prepare(sampled)

    def _captured(self, template: Template) -> Tensor:
        """Launch a whole step while its stream is being captured; logits of all rows, nobody's too."""
        self._logits: Tensor | None = None
        self._capturing = True
        try:
            self._launch(template)
        finally:
            self._capturing = False
        assert self._logits is not None
        return self._logits

    def _walk(
        self, plan: StepPlan, graph: StepGraph, inputs: StepInputs, copies: Copies, timed: bool
    ) -> None:
        """Launch every operation in program order."""
        self._tune([len(b.tokens) for b in inputs.batches], len(inputs.sampled))
        self._timeline = Timeline(self._main, self.timed) if timed else None
        self._prepare(plan, inputs, copies, program(graph.template)[0])
        self._launch(graph.template)

    def _measure(self, step: Step, layer: int, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
        if self._timeline is None:
            return nullcontext()
        return self._timeline.measure(step, None if step.offset is None else layer, stream)

    def _launch(self, template: Template) -> None:
        """Every operation, in program order."""
        copied, sections = program(template)
        self._copied = copied
        self._waiting: dict[int, tuple[Step, int]] = {}  # RECVs that are launched ahead of their POST
        self._latest: dict[tuple[OpKind, int], list[torch.cuda.Event]] = {}
        for repeat, first_layer, steps in sections:
            for layer_of_section in range(first_layer, first_layer + repeat):
                for step in steps:
                    layer = -1 if step.offset is None else layer_of_section + step.offset
                    self._issue(step, layer, copied)

    def _fill(self, inputs: StepInputs, layouts: Sequence[Layout]) -> None:
        for rows, batch, at in zip(self._rows, inputs.batches, layouts, strict=False):
            rows.inputs.fill(batch, at)
            rows.inputs.send()

    def _prepare(self, plan: StepPlan, inputs: StepInputs, copies: Copies, copied: bool) -> None:
        """Inputs, lists and the host's part of the step, on their way before its first operation."""
        layouts = [_layout(b) for b in inputs.batches]
        first = inputs.batches[0]
        self._special = None
        self._late = (
            to_device(first.late.slots, self.model.device),
            to_device(first.late.positions, self.model.device),
        )
        if copied:
            self._special, into, back = special_rows(first, plan, self.tables, self._standing)
            self._copying.begin(copies, self.model.config.layers, into, back)
            self._special_inputs(first)
        self._fill(inputs, layouts)
        self._submit(inputs, layouts, counted=False)
        self._prefill.begin(first, self._special)
        self._layouts = layouts
        if copied:  # copies read lists, and write blocks, that the main stream is about to have ready
            ready = self._main.record_event()
            for stream in self._streams.values():
                stream.wait_event(ready)

    def _special_inputs(self, batch: BatchInputs) -> None:
        """Tables, rows and lengths of special rows on the device, and attention of streamed decodes."""
        special, device = self._special, self.model.device
        self._streamed: kernels.Attention | None = None
        if special is None:
            return
        self._special_tables = to_device(special.tables, device)
        chunks = batch.chunks[len(batch.chunks) - (special.tables.shape[1] - special.streams) :]
        rows = np.concatenate(
            [
                np.arange(special.streams, dtype=np.int32),
                *(np.full(c.length, special.streams + i, dtype=np.int32) for i, c in enumerate(chunks)),
            ]
        )
        positions = [batch.stream.positions, batch.spill.positions]
        self._special_slots = to_device(rows.astype(np.int32), device)
        self._special_positions = to_device(np.concatenate(positions).astype(np.int32), device)
        if n := special.streams:
            own = self._rows[0]
            at = slice(batch.stream.row, batch.stream.row + n)
            lengths = to_device(batch.stream.lengths, device)
            size = kernels.decode_workspace(own.cache, n, own.heads)
            workspace = torch.zeros(max(16, size), dtype=torch.uint8, device=device)
            self._streamed = kernels.decode(
                own.cache, own.q[at], own.out[at], self._special_tables[0], lengths, workspace
            )
            self._streamed.plan()

    def _issue(self, step: Step, layer: int, copied: bool) -> None:
        kind, batch = step.kind, step.batch
        if kind in COPIES:
            if not (kind is OpKind.SWAP_OUT and batch == 0 and self._deferred):
                self._copy(step, layer)
            return
        if copied:
            for event in self._events(step.waits):
                self._main.wait_event(event)
        if kind is OpKind.RECV:
            self._waiting[batch] = (step, layer)
            return
        with self._measure(step, layer, self._main):
            self._handlers[kind](batch, layer)
        if copied and kind in ORDERED:
            self._latest.setdefault((kind, batch), []).append(self._main.record_event())
        if kind is OpKind.GPU_ATTN and self._deferred:
            self._spill(layer)

    def _events(self, waits: Sequence[tuple[OpKind, int, int]]) -> list[torch.cuda.Event]:
        found = []
        for kind, batch, lag in waits:
            events = self._latest.get((kind, batch))
            if events is not None and len(events) > lag:
                found.append(events[-1 - lag])
        return found

    def _copy(self, step: Step, layer: int) -> None:
        """One way's copies of a layer, on the stream of their direction."""
        stream = self._streams[RESOURCE_OF[step.kind]]
        for event in self._events(step.waits):
            stream.wait_event(event)
        if step.kind is OpKind.STREAM:  # what was written to these staging blocks must have left them
            for event in self._latest.get((OpKind.SWAP_OUT, 0), ())[-1:]:
                stream.wait_event(event)
        with torch.cuda.stream(stream), self._measure(step, layer, stream):
            self._copying.run(_WAY[step.kind, step.batch], layer)
        self._latest.setdefault((step.kind, step.batch), []).append(stream.record_event())

    def _spill(self, layer: int) -> None:
        """What was appended with attention goes to the host behind it."""
        stream = self._streams[Resource.D2H]
        stream.wait_event(self._main.record_event())
        with torch.cuda.stream(stream):
            self._copying.run(Way.SPILL, layer)
        self._latest.setdefault((OpKind.SWAP_OUT, 0), []).append(stream.record_event())

    @property
    def _deferred(self) -> bool:
        """Whether new KV of special rows waits for what is copied in, and so for GPU_ATTN."""
        return self._special is not None and self._special.prefixed

    # -- the GPU's operations -----------------------------------------------------------------------------

    def _embed(self, _batch: int, _layer: int) -> None:
        for rows, at in zip(self._rows, self._layouts, strict=False):
            rows.begin(at, self._mirror.latest)

    def pre(self, batch: int, layer: int) -> None:
        """PRE of a sub-batch."""
        weights = self.model.weights.layers[layer]
        self._rows[batch].pre(layer, weights, self.table(layer), layer == 0)
        if batch == 0 and self._special is not None and not self._special.prefixed:
            self._append_special(layer)

    def _append_special(self, layer: int) -> None:
        special, batch = self._special, self._inputs.batches[0]
        assert special is not None
        tables = self._special_tables
        table = (tables.data_ptr() + 4 * layer * tables.stride(0), tables.stride(1))
        n = special.streams
        own = self._rows[0]
        slots, positions = self._special_slots, self._special_positions
        if n:
            own.append(batch.stream.row, n, slots[:n], positions[:n], table)
        if rest := len(slots) - n:
            own.append(batch.spill.row, rest, slots[n:], positions[n:], table)

    def _gpu_attention(self, batch: int, layer: int) -> None:
        rows, late = self._rows[batch], self._inputs.batches[batch].late
        if len(late):
            rows.append(late.row, len(late), *self._late, self.table(layer))
        if self._deferred:
            self._append_special(layer)
        self._prefill.run(rows, layer, self.tables)
        rows.attend(layer, self.table(layer), early=not self._copied)
        if self._special is not None and self._streamed is not None:
            tables = self._special_tables
            self._streamed.attend.args.block_tables = tables.data_ptr() + 4 * layer * tables.stride(0)
            self._streamed.attend()

    def send(self, batch: int, _layer: int) -> None:
        """q, k and v of CPU decodes to the host."""
        post = self._over[batch].post
        assert post is not None
        post()

    def _receive(self, batch: int, _layer: int) -> None:
        wait = self._over[batch].wait
        assert wait is not None
        wait()

    def post(self, batch: int, layer: int) -> None:
        """POST of a sub-batch, behind the answer of its CPU attention."""
        if (awaited := self._waiting.pop(batch, None)) is not None:
            with self._measure(*awaited, self._main):
                self._receive(batch, layer)
        self._rows[batch].post(layer, self.model.weights.layers[layer])

    def _head(self, _batch: int, _layer: int) -> None:
        if self._capturing:
            self._logits = self._all_logits()
            return
        hidden, delta = [], []
        for rows, batch in zip(self._rows, self._inputs.batches, strict=False):
            if batch.sampled:
                index = to_device(np.array(batch.sampled, dtype=np.int32), self.model.device)
                hidden.append(rows.hidden.index_select(0, index))
                delta.append(rows.delta.index_select(0, index))
        both = [torch.cat(h) if len(h) > 1 else h[0] for h in (hidden, delta)]
        self._choose(self.model.logits(both[0].add_(both[1]), self._tuned.head.linear))

    def _choose(self, logits: Tensor) -> None:
        """Tokens of the step's sampled rows; those chosen on the device are noted for the step behind it."""
        tokens = self._sample(logits, self._inputs.sampled)
        if tokens is not None:
            self._mirror.note([self.tables.slot(r) for r in self._inputs.sampled], tokens)

    def _all_logits(self) -> Tensor:
        """Of every row, nobody's too."""
        ends = [
            rows.hidden[: at.rows] + rows.delta[: at.rows]
            for rows, at in zip(self._rows, self._layouts, strict=False)
        ]
        return self.model.logits(torch.cat(ends) if len(ends) > 1 else ends[0], self._tuned.head.linear)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _layout(batch: BatchInputs) -> Layout:
    return Layout(len(batch.tokens), batch.gpu.row, len(batch.gpu), batch.cpu.row, len(batch.cpu))


def _stays(plan: StepPlan) -> bool:
    """Whether a step moves no KV and streams none, so that no block becomes free behind it."""
    if plan.moves or plan.evict:
        return False
    chunks = [c for b in plan.batches for c in b.prefill]
    return not any(c.dst is Tier.CPU for c in chunks) and not any(b.stream_decode for b in plan.batches)


@contextmanager
def _faults() -> Iterator[None]:
    """What the device raises becomes an EngineError."""
    try:
        yield
    except EngineError:
        raise
    except FAULTS as error:
        raise EngineError(f"the step on the GPU failed: {error}") from error


def _only_decodes(plan: StepPlan, inputs: StepInputs) -> bool:
    """Whether a step is decodes alone, each where its KV is, with nothing copied."""
    if plan.moves or plan.evict:
        return False
    return not any(b.chunks or len(b.stream) or len(b.late) for b in inputs.batches)


def _with_cpu(inputs: StepInputs) -> list[int]:
    return [i for i, b in enumerate(inputs.batches) if len(b.cpu)]

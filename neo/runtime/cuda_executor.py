"""The ``cuda`` executor: a StepGraph on an NVIDIA GPU and the processor beside it.

The GPU's operations are launched in the graph's order (``neo.runtime.cuda_operations``). CPU attention is
handed over through flags in pinned memory (``neo.runtime.cuda_host``): SEND is a kernel that writes rows,
RECV one that waits for the answer. Steps that only decode are replayed as CUDA graphs
(``neo.runtime.cuda_graphs``), also where KV moves ahead of them (``neo.runtime.cuda_copies``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from neo.core.graph import RELAY, OpKind, StepGraph, Template
from neo.core.plan import StepPlan
from neo.runtime import cuda_library
from neo.runtime.block_tables import BlockTables, Copies
from neo.runtime.cuda_graphs import Graphs, padded, valid_rows
from neo.runtime.cuda_host import HostAttention, Submitted
from neo.runtime.cuda_linear import ROW_SIZES, Tuned, padded_rows
from neo.runtime.cuda_memory import device_memory, pinned_memory
from neo.runtime.cuda_operations import Operations, new_stream
from neo.runtime.cuda_program import program, work_of
from neo.runtime.cuda_timeline import Timeline, host_slices, seconds_each
from neo.runtime.errors import EngineError
from neo.runtime.executor import FAULTS, Pending, Sample, StepTimes
from neo.runtime.kv_memory import KVMemory
from neo.runtime.model import Model
from neo.runtime.step_inputs import StepInputs

_EXERCISED = 8192  # rows: a step of many runs ahead of its time until so many are computed
_WITHOUT_HEAD = frozenset({OpKind.HEAD})  # which would send its inputs anew, and note tokens
_MOST_PADDED = 512  # rows of a sub-batch in a graph: with more, launching one by one takes less than the step


@dataclass(frozen=True, slots=True)
class CudaExecutorOptions:
    """How the executor runs.

    Attributes:
        max_rows: tokens of a step at most.
        max_decodes: requests of a step at most.
        cpu_threads, cpu_cores: of CPU attention.
        graphs: replay steps that only decode as CUDA graphs.
        relay_rows: rows of relayed decodes at most.
    """

    max_rows: int
    max_decodes: int
    cpu_threads: int = 1
    cpu_cores: tuple[int, ...] | None = None
    graphs: bool = True
    relay_rows: int = 0


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
        standing = np.arange(first, first + staging[0] * staging[1], dtype=np.int32).reshape(staging)
        self._main = new_stream(device)
        with torch.inference_mode(), torch.cuda.stream(self._main):
            self.gpu = device_memory(tables.gpu.total + standing.size, *shape, device)
            self.cpu, self._unpin = pinned_memory(tables.cpu.total, *shape)
            # Decodes of a captured step are padded: there must be room for those of nobody, too.
            decodes = min(padded_rows(options.max_decodes), options.max_rows)
            most = options.max_rows, decodes
            self._tuned = tuned or Tuned(model.weights)
            memory = self.gpu, self.cpu
            lanes = 1 << (options.relay_rows - 1).bit_length() if options.relay_rows else 0
            self._decodes = decodes
            self._ops = Operations(model, tables, memory, self._main, most, self._tuned, lanes, standing)
            if tables.cpu.total:
                self._ops.host = HostAttention(
                    self.cpu, tables.cpu, options.cpu_threads, options.cpu_cores, config.layers
                )
            self._graphs = Graphs()
        self._main.synchronize()
        self._ran = 0
        self._ended_s = 0.0  # when the step before ended
        self._about = self._describe()

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

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of decodes that steps are captured for, at start where somebody asks for it."""
        most = min(_MOST_PADDED, self.options.max_decodes, self.options.max_rows)
        return tuple([n for n in ROW_SIZES[1:] if n <= most]) if self.options.graphs else ()

    def describe(self) -> dict[str, Any]:
        """Device, threads, library and versions (JSON-serialisable); also of a closed executor."""
        return dict(self._about)

    def close(self) -> None:
        """Stop the threads and give KV memory back; may be called again."""
        self._ops.close()
        self._unpin()
        config = self.model.config
        self._graphs.clear()
        self._main.synchronize()
        if self.gpu.tensor.is_cuda:  # now, not when the last reference has gone: the next engine needs it
            self.gpu.tensor.untyped_storage().resize_(0)
            torch.cuda.empty_cache()
        self.gpu = self.cpu = KVMemory.allocate(
            0, config.kv_heads, config.head_dim, self.tables.block_size, self.model.dtype
        )

    # -- a step -------------------------------------------------------------------------------------------

    def run(
        self, plan: StepPlan, graph: StepGraph, inputs: StepInputs, copies: Copies, sample: Sample
    ) -> StepTimes:
        """Run a step to its end; see ``neo.runtime.executor.Executor``."""
        return self.start(plan, graph, inputs, copies, sample)()

    @property
    def may_be_followed(self) -> bool:
        """Whether a step can be queued behind the last one; see ``neo.runtime.executor.Queueing``.

        Blocks that it gives up may be taken at once. All that uses them on the GPU, copies too, has ended
        when the main stream has; the host appends in the order of the steps, to what the GPU has handed over,
        or ahead of it to relayed rows, which had their blocks a step before.
        """
        return not self.timed and self._ran > self.slices_of

    def start(
        self, plan: StepPlan, graph: StepGraph, inputs: StepInputs, copies: Copies, sample: Sample
    ) -> Pending:
        """Launch a step; see ``neo.runtime.executor.Queueing``."""
        timed = self.timed or self._ran < self.slices_of
        with _faults(), torch.inference_mode(), torch.cuda.stream(self._main):
            begin = time.perf_counter()
            self._ops.begin(inputs, sample)
            if self.options.graphs and not timed and _only_decodes(inputs) and self._ops.fixed.fits(copies):
                copied = program(graph.template)[0]
                self._replay(graph, inputs, copies=copies if copied else None)
            else:
                self._walk(plan, graph, inputs, copies, timed)
            told, timeline, number = self._ops.told, self._ops.timeline, self._ran
            ended = self._main.record_event()
        self._ran += 1

        def wait() -> StepTimes:
            with _faults():
                ended.synchronize()
                if told is not None and self._ops.host is not None:
                    self._ops.host.finish(told)
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
            seconds = told.seconds()
            if OpKind.CPU_ATTN in graph.template.kinds:  # of relayed decodes somebody may have come back yet
                answers = {b: seconds[:, i] for i, b in enumerate(_with_cpu(inputs))}
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

    def replays(self, plan: StepPlan, inputs: StepInputs) -> bool:
        """Whether a step can be timed as it is replayed; see ``neo.runtime.executor.Replaying``."""
        still = not (plan.moves or plan.evict)
        return self.options.graphs and still and _only_decodes(inputs) and not _with_cpu(inputs)

    def replay(
        self, graph: StepGraph, inputs: StepInputs, sample: Sample, without: frozenset[OpKind] = frozenset()
    ) -> float:
        """Time a step as it is replayed; see ``neo.runtime.executor.Replaying``.

        A step's share of copying its inputs and of choosing its tokens, outside the graph, is part of it.
        """
        with _faults(), torch.inference_mode(), torch.cuda.stream(self._main):
            self._ops.begin(inputs, sample)
            return seconds_each(self._main, lambda: self._replay(graph, inputs, without))

    def _replay(
        self,
        graph: StepGraph,
        inputs: StepInputs,
        without: frozenset[OpKind] = frozenset(),
        copies: Copies | None = None,
    ) -> None:
        """Run a step of decodes alone as a CUDA graph, captured the first time."""
        most = [r.capacity for r in self._ops.rows[: len(inputs.batches)]]
        layouts = padded(inputs.batches, most, self._decodes)
        rows = [at.rows for at in layouts]
        self._tune(rows, sum(rows))
        self._ops.prepare_decodes(layouts, copies)
        key = (graph.template, without, *((at.gpu_rows, at.cpu_rows, at.relay_rows) for at in layouts))
        generation = self._ops.mirror.generation
        run = self._graphs.replay(key, generation, lambda: self._ops.captured(graph.template, without))
        if (logits := run()) is not None:
            self._ops.choose(valid_rows(logits, inputs, layouts, self._ops.sender))

    def _tune(self, rows: Sequence[int], sampled: int) -> None:
        """Find kernels for products of so many rows, the first time there are."""
        for count in rows:
            self._tuned.layers.prepare(count)
        self._tuned.head.prepare(sampled)

    def _walk(
        self, plan: StepPlan, graph: StepGraph, inputs: StepInputs, copies: Copies, timed: bool
    ) -> None:
        """Launch every operation in program order."""
        self._tune([len(b.tokens) for b in inputs.batches], len(inputs.sampled))
        timeline = Timeline(self._main, self.timed) if timed else None
        copied = program(graph.template)[0]
        self._ops.prepare(plan, copies, copied, timeline)
        if self.timed and not (copied or _with_cpu(inputs)):
            self._exercise(graph.template, _rows(inputs))
        self._ops.launch(graph.template)

    def _exercise(self, template: Template, rows: int) -> None:
        """Run a step of many rows several times ahead of its time; every run writes the same rows and KV.

        Such steps draw more power than a GPU may for long, so that it lowers its clocks: behind a rest they
        are faster than behind their like, as they come in an engine that has prompts to compute.
        """
        if rows <= _MOST_PADDED:
            return
        timeline, self._ops.timeline = self._ops.timeline, None
        for _ in range(-(-_EXERCISED // rows)):
            self._ops.launch(template, _WITHOUT_HEAD)
        self._ops.timeline = timeline


@contextmanager
def _faults() -> Iterator[None]:
    """What the device raises becomes an EngineError."""
    try:
        yield
    except EngineError:
        raise
    except FAULTS as error:
        raise EngineError(f"the step on the GPU failed: {error}") from error


def _only_decodes(inputs: StepInputs) -> bool:
    """Whether a step is a few decodes alone, each where its KV is, or moves to ahead of it."""
    return _rows(inputs) <= _MOST_PADDED and not any(b.chunks or len(b.stream) for b in inputs.batches)


def _rows(inputs: StepInputs) -> int:
    """Rows of the larger sub-batch."""
    return max([len(b.tokens) for b in inputs.batches])


def _with_cpu(inputs: StepInputs) -> list[int]:
    if inputs.batches[0].relay is not None:
        return [RELAY]
    return [i for i, b in enumerate(inputs.batches) if len(b.cpu)]

"""Engines over tiny models, with any policy object, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from support import MACHINE, ToyCost

from neo.core.graph import StepGraph
from neo.core.plan import StepPlan
from neo.core.request import FinishReason, Tier
from neo.core.scheduler import Scheduler
from neo.core.view import Limits
from neo.runtime.backend import backend
from neo.runtime.block_tables import BlockTables
from neo.runtime.cpu_executor import CpuExecutor, CpuExecutorOptions
from neo.runtime.engine import Engine, EngineOptions, Output
from neo.runtime.executor import StepTimes
from neo.runtime.model import Model
from neo.runtime.model_config import ModelConfig
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.weights import RandomWeights, load_weights

GREEDY = {"temperature": 0.0, "ignore_eos": True}
VOCAB = 96
SPIN_US = 0  # tests share few cores with others: who waits sleeps


def tiny_model(layers: int = 3, max_positions: int = 256, seed: int = 0) -> Model:
    """A float32 Llama of random weights: nothing to read, everything to compute."""
    config = ModelConfig(
        "tiny", "llama", 64, layers, 4, 2, 16, 96, VOCAB, max_positions, eos_token_ids=(2,), dtype="float32"
    )
    return Model(
        config, load_weights(config, RandomWeights(seed, layers), torch.float32, torch.device("cpu"))
    )


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Token ids, none of them the end token of ``tiny_model``."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def make_engine(
    model: Model,
    policy: Any,
    *,
    gpu: int = 12,
    cpu: int = 40,
    limits: Mapping[str, int] | None = None,
    cost: Any = None,
    kind: Any = "auto",
    threads: int = 1,
    slices_of: int = 0,
    graphs: bool = True,
    log: Any = None,
    record: Any = None,
    wrap: Callable[[Any], Any] = lambda executor: executor,
    **options: Any,
) -> Engine:
    """An engine of ``gpu`` and ``cpu`` blocks; ``kind`` names the backend, or is ``cuda``.

    torch gets one thread: a test's matrices are too small to be shared out.
    """
    torch.set_num_threads(1)
    budget = Limits(**{"block_size": 8, "max_seqs": 8, "max_batch_tokens": 48, **(limits or {})})
    spec = model.config.spec()
    scheduler = Scheduler(policy, cost or ToyCost(), spec, MACHINE, budget, gpu, cpu)
    pools = scheduler.view.pools
    tables = BlockTables(
        spec.layers, budget.block_size, pools[Tier.GPU].total, pools[Tier.CPU].total, slots=2
    )
    staging = pools[Tier.GPU].staging_layers, pools[Tier.GPU].staging_blocks
    executor: Any
    if kind == "cuda":
        executor = cuda_executor(model, tables, budget, staging, threads, slices_of, graphs)
    else:
        executor = CpuExecutor(
            model, backend(kind, 1), tables, staging, CpuExecutorOptions(threads, spin_us=SPIN_US), slices_of
        )
    most = {"max_model_len": model.config.max_positions, **options}
    return Engine(scheduler, wrap(executor), spec.vocab, EngineOptions(**most), log=log, record=record)


def cuda_executor(
    model: Model,
    tables: BlockTables,
    limits: Limits,
    staging: tuple[int, int],
    threads: int,
    slices_of: int,
    graphs: bool,
) -> Any:
    """An executor on a GPU, for a model that is there."""
    from neo.runtime.cuda_executor import CudaExecutor, CudaExecutorOptions

    options = CudaExecutorOptions(
        limits.max_batch_tokens, limits.max_seqs, threads, graphs=graphs, relay_rows=limits.relay_rows
    )
    return CudaExecutor(model, tables, options, staging, slices_of)


@dataclass
class Collected:
    """What came out of an engine, by request."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    def take(self, outputs: Sequence[Output]) -> None:
        for o in outputs:
            assert o.request_id not in self.reasons, "nothing comes after the end"
            if o.token is not None:
                self.tokens.setdefault(o.request_id, []).append(o.token)
                self.logprobs.setdefault(o.request_id, []).append(o.logprobs)
            if o.finish_reason is not None:
                self.reasons[o.request_id] = o.finish_reason
                self.details[o.request_id] = o.detail


def run(engine: Engine, most: int = 3000, found: Collected | None = None) -> Collected:
    """Step an engine until nobody is left, its memory held against the accounts at every step."""
    found = found or Collected()
    for _ in range(most):
        if not engine.has_work:
            return found
        found.take(engine.step())
        if not engine.options.ahead:
            engine.check_integrity()
    raise AssertionError(f"still working after {most} steps")


def add(engine: Engine, name: str, prompt: Sequence[int], max_tokens: int = 8, **params: Any) -> None:
    """Queue a request; greedy to its full length unless said otherwise."""
    engine.add(name, prompt, SamplingParams(max_tokens=max_tokens, **{**GREEDY, **params}))


@dataclass
class Ran:
    """A step that an executor has run."""

    plan: StepPlan
    graph: StepGraph
    times: StepTimes


class Watched:
    """An executor that keeps what it ran; ``before`` is called with each plan."""

    def __init__(self, inner: CpuExecutor, before: Callable[[StepPlan], None] | None = None) -> None:
        self.inner = inner
        self.before = before
        self.ran: list[Ran] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, plan: StepPlan, graph: StepGraph, *rest: Any) -> StepTimes:
        if self.before is not None:
            self.before(plan)
        times = self.inner.run(plan, graph, *rest)
        self.ran.append(Ran(plan, graph, times))
        return times


def watch(engine: Engine, before: Callable[[StepPlan], None] | None = None) -> Watched:
    """Put a Watched around an engine's executor."""
    assert isinstance(engine.executor, CpuExecutor)
    engine.executor = Watched(engine.executor, before)
    return engine.executor

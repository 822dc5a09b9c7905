"""Engines over tiny models, with any policy object, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from support import MACHINE, ToyCost

from neo.core.request import FinishReason, Tier
from neo.core.scheduler import Scheduler
from neo.core.view import Limits
from neo.runtime.backend import backend
from neo.runtime.block_tables import BlockTables
from neo.runtime.cpu_executor import CpuExecutor, CpuExecutorOptions
from neo.runtime.engine import Engine, EngineOptions, Output
from neo.runtime.model import Model
from neo.runtime.sampling_params import SamplingParams

GREEDY = {"temperature": 0.0, "ignore_eos": True}


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
    log: Any = None,
    record: Any = None,
    **options: Any,
) -> Engine:
    """An engine of ``gpu`` and ``cpu`` blocks; ``kind`` names the backend.

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
    executor = CpuExecutor(
        model,
        backend(kind, 1),
        tables,
        (pools[Tier.GPU].staging_layers, pools[Tier.GPU].staging_blocks),
        CpuExecutorOptions(threads),
        slices_of,
    )
    most = {"max_model_len": model.config.max_positions, **options}
    return Engine(scheduler, executor, spec.vocab, EngineOptions(**most), log=log, record=record)


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

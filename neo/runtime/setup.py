"""From names to an Engine: model, KV budgets, executor, policy and cost model put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from neo.core.errors import InputError
from neo.core.record import RunRecord
from neo.core.request import Tier
from neo.core.runlog import RunLog
from neo.core.specs import HardwareSpec, ModelSpec
from neo.core.view import Limits, SystemView
from neo.cost.loading import load_cost_model
from neo.cost.memory import kv_budget
from neo.cost.presets import load_hardware
from neo.runtime.backend import Kind, backend
from neo.runtime.block_tables import BlockTables
from neo.runtime.cpu_executor import CpuExecutor, CpuExecutorOptions
from neo.runtime.engine import Engine, EngineOptions
from neo.runtime.kv_memory import available_bytes
from neo.runtime.machine import local_hardware, split_cores
from neo.runtime.model import Model
from neo.system.config import System, SystemConfig, kv_blocks

THIS_MACHINE = "this"
_GIB = 1 << 30
_GPU_KV, _CPU_KV = _GIB, 2 * _GIB  # bytes that KV takes of this machine's memory unless told otherwise


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine: what runs, under which budgets and which policy.

    Attributes:
        model: a Hugging Face folder; with ``load_format="dummy"`` also a preset's name.
        hardware: what the policy is told: ``this`` machine, or a preset.
        cost_model: as ``--cost``; the policy's estimates.
        limits: step budgets.
        max_model_len: longest prompt and output together; None for what model and KV budgets allow.
        gpu_threads: of torch, which stands for the GPU; None shares the cores out.
        cpu_threads: of CPU attention.
        backend: ``native`` kernels, ``torch``, or what there is (``auto``).
        ahead: plan the next step while one runs.
    """

    model: str
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    dtype: str | None = None
    policy: str = "neo"
    policy_options: Mapping[str, str] = field(default_factory=dict)
    hardware: str = THIS_MACHINE
    cost_model: str = "roofline"
    cost_options: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    kv_gpu_blocks: int | None = None
    kv_cpu_blocks: int | None = None
    kv_gpu_bytes: int | None = None
    kv_cpu_bytes: int | None = None
    max_model_len: int | None = None
    gpu_threads: int | None = None
    cpu_threads: int | None = None
    cpu_cores: tuple[int, ...] | None = None
    backend: Kind = "auto"
    seed: int = 0
    ahead: bool = False


class EngineParts:
    """A loaded model and the System around it: what several engines, one after the other, may share.

    Raises InputError, in one line, for names, files and budgets that are wrong or do not fit.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.gpu_threads, self.cpu_threads = split_cores(config.gpu_threads, config.cpu_threads)
        torch.set_num_threads(self.gpu_threads)
        self.model = Model.load(
            config.model, load_format=config.load_format, dtype=config.dtype, seed=config.seed
        )
        if config.hardware == THIS_MACHINE:
            self.hardware = local_hardware(self.gpu_threads, self.cpu_threads)
        else:
            self.hardware = load_hardware(config.hardware)
        self.spec = self.model.config.spec()

    def system(self, **changes: Any) -> System:
        """The System, with fields of the config (policy, cost model, ...) changed."""
        config = replace(self.config, **changes)
        cost = load_cost_model(config.cost_model, self.spec, self.hardware, dict(config.cost_options))
        gpu, cpu = _budgets(config, self.spec, self.hardware)
        described = SystemConfig(
            policy=config.policy,
            hardware=self.hardware.name,
            model=self.spec.name,
            policy_options=config.policy_options,
            cost_model=config.cost_model,
            cost_options=config.cost_options,
            limits=config.limits,
            tp=1,
        )
        return System(described, self.hardware, self.spec, cost, gpu, cpu)

    def engine(
        self,
        system: System,
        *,
        log: RunLog | None = None,
        record: RunRecord | None = None,
        slices_of: int = 0,
        zero_s: float | None = None,
    ) -> Engine:
        """A fresh engine; its KV memory is reserved now, or refused with the numbers."""
        scheduler = system.scheduler()
        pools = scheduler.view.pools
        _check_memory(scheduler.view)
        tables = BlockTables(
            self.spec.layers, system.config.limits.block_size, pools[Tier.GPU].total, pools[Tier.CPU].total
        )
        executor = CpuExecutor(
            self.model,
            backend(self.config.backend, self.gpu_threads),
            tables,
            (pools[Tier.GPU].staging_layers, pools[Tier.GPU].staging_blocks),
            CpuExecutorOptions(self.cpu_threads, self.config.cpu_cores),
            slices_of,
        )
        options = EngineOptions(
            self.max_model_len, self.model.config.eos_token_ids, self.config.seed, self.config.ahead
        )
        return Engine(scheduler, executor, self.spec.vocab, options, zero_s, log, record)

    @property
    def max_model_len(self) -> int:
        """Longest prompt and output together that the model was made for, or that was asked for."""
        most, asked = self.model.config.max_positions, self.config.max_model_len
        if asked is not None and asked > most and self.config.load_format != "dummy":
            raise InputError(f"--max-model-len {asked}: {self.spec.name} was made for {most} tokens")
        return most if asked is None else asked


def _check_memory(view: SystemView) -> None:
    """Raise InputError, with the numbers, if the KV of both tiers is more than this machine's free memory."""
    gpu, cpu = view.pools[Tier.GPU], view.pools[Tier.CPU]
    block_bytes = view.limits.block_size * view.model.kv_bytes_per_token_layer
    asked = (gpu.total + gpu.staging_layers * gpu.staging_blocks) * block_bytes, cpu.total * block_bytes
    free = available_bytes()
    if free is not None and sum(asked) > free:
        raise InputError(
            f"KV memory of {asked[0] / _GIB:.2f} GiB for the GPU ({gpu.blocks} blocks) and "
            f"{asked[1] / _GIB:.2f} GiB for the host ({cpu.blocks} blocks) is {sum(asked)} bytes, but {free} "
            f"bytes ({free / _GIB:.2f} GiB) of memory are available: give fewer blocks"
        )


def _budgets(config: EngineConfig, model: ModelSpec, hardware: HardwareSpec) -> tuple[int, int]:
    """KV blocks of both tiers: as asked for, else what memory leaves, up to a friendly size."""
    block_bytes = config.limits.block_size * model.kv_bytes_per_token
    gpu = kv_blocks("gpu", config.kv_gpu_blocks, config.kv_gpu_bytes, block_bytes)
    cpu = kv_blocks("cpu", config.kv_cpu_blocks, config.kv_cpu_bytes, block_bytes)
    if gpu is None or cpu is None:
        budget = kv_budget(model, hardware, config.limits)
        gpu = max(1, min(budget[0], _GPU_KV // block_bytes)) if gpu is None else gpu
        cpu = min(budget[1], _CPU_KV // block_bytes) if cpu is None else cpu
    return gpu, cpu

"""From names to an Engine: model, KV budgets, executor, policy and cost model put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from neo.core.errors import InputError
from neo.core.record import RunRecord
from neo.core.request import Tier
from neo.core.runlog import RunLog
from neo.core.specs import HardwareSpec, ModelSpec
from neo.core.view import Limits
from neo.cost.loading import load_cost_model
from neo.cost.presets import load_hardware
from neo.runtime.backend import Kind
from neo.runtime.block_tables import BlockTables
from neo.runtime.device import Device, DeviceKind, device_of
from neo.runtime.engine import Engine, EngineOptions
from neo.runtime.model import Model
from neo.system.config import System, SystemConfig, kv_blocks

THIS_MACHINE = "this"


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
        device: what the model runs on; ``auto`` takes a GPU where there is one.
        gpu_memory_bytes: of a GPU's memory to be used at most.
        graphs: replay steps that only decode as CUDA graphs.
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
    device: DeviceKind = "auto"
    gpu_memory_bytes: int | None = None
    graphs: bool = True


class EngineParts:
    """A loaded model and the System around it: what several engines, one after the other, may share.

    Raises InputError, in one line, for names, files and budgets that are wrong or do not fit.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = device_of(config)
        self.model = Model.load(
            config.model,
            load_format=config.load_format,
            dtype=config.dtype,
            device=self.device.torch,
            seed=config.seed,
        )
        if config.hardware == THIS_MACHINE:
            self.hardware = self.device.hardware()
        else:
            self.hardware = load_hardware(config.hardware)
        self.spec = self.model.config.spec()

    def system(self, **changes: Any) -> System:
        """The System, with fields of the config (policy, cost model, ...) changed."""
        config = replace(self.config, **changes)
        cost = load_cost_model(config.cost_model, self.spec, self.hardware, dict(config.cost_options))
        gpu, cpu = _budgets(config, self.device, self.spec, self.hardware)
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
        timed: bool = False,
        zero_s: float | None = None,
    ) -> Engine:
        """A fresh engine; its KV memory is reserved now, or refused with the numbers.

        ``timed``: every operation's time is wanted, even if a step takes longer for it.
        """
        scheduler = system.scheduler()
        pools = scheduler.view.pools
        self.device.check(scheduler.view)
        tables = BlockTables(
            self.spec.layers, system.config.limits.block_size, pools[Tier.GPU].total, pools[Tier.CPU].total
        )
        staging = pools[Tier.GPU].staging_layers, pools[Tier.GPU].staging_blocks
        executor = self.device.executor(self.model, tables, staging, system.config.limits, slices_of, timed)
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


def _budgets(
    config: EngineConfig, device: Device, model: ModelSpec, hardware: HardwareSpec
) -> tuple[int, int]:
    """KV blocks of both tiers: as asked for, else what memory leaves, up to a friendly size."""
    block_bytes = config.limits.block_size * model.kv_bytes_per_token
    gpu = kv_blocks("gpu", config.kv_gpu_blocks, config.kv_gpu_bytes, block_bytes)
    cpu = kv_blocks("cpu", config.kv_cpu_blocks, config.kv_cpu_bytes, block_bytes)
    if gpu is None or cpu is None:
        default = device.default_blocks(model, hardware, config.limits)
        gpu, cpu = (d if asked is None else asked for asked, d in zip((gpu, cpu), default, strict=True))
    return gpu, cpu

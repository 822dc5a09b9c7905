"""From names to an Engine: model, KV budgets, executor, policy and cost model put together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from neo.core.errors import InputError
from neo.core.record import RunRecord
from neo.core.request import Tier
from neo.core.runlog import RunLog
from neo.core.specs import HardwareSpec, ModelSpec
from neo.cost.loading import load_cost_model, resolve_cost
from neo.cost.presets import load_hardware
from neo.runtime.block_tables import BlockTables
from neo.runtime.device import Device, device_of
from neo.runtime.engine import Engine, EngineOptions
from neo.runtime.engine_config import THIS_MACHINE, EngineConfig
from neo.runtime.model import Model
from neo.system.config import System, SystemConfig, kv_blocks


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
        spec = resolve_cost(config.cost_model, self.spec, self.hardware.name, config.cost_options)
        config = replace(config, cost_model=spec)
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

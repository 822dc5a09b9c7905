"""From names to a System: presets, budgets, policy and cost model put together, for simulator and engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from neo.core.errors import InputError
from neo.core.learning import learning
from neo.core.scheduler import Scheduler
from neo.core.specs import HardwareSpec, ModelSpec
from neo.core.view import Limits
from neo.cost.interface import CostModel
from neo.cost.loading import is_calibrated, load_cost_model, resolve_cost, table_of, with_table
from neo.cost.memory import kv_budget
from neo.cost.presets import load_hardware, load_model
from neo.policy.registry import load_policy


@dataclass(frozen=True, slots=True)
class SystemConfig:
    """A system: what runs, where, under which budgets and which policy.

    Budgets left at None come from the machine's memory (``neo.cost.memory.kv_budget``). ``kv_*_blocks``
    count blocks of ``limits.block_size`` tokens, before a policy's staging layers are taken off.
    """

    policy: str = "neo"
    hardware: str = "g5.16xlarge"
    model: str = "llama-3.1-8b"
    policy_options: Mapping[str, str] = field(default_factory=dict)
    cost_model: str = "auto"
    cost_options: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    tp: int | None = None  # None: all GPUs of the machine
    dtype: str | None = None
    gpu_memory_utilization: float | None = None
    kv_gpu_blocks: int | None = None
    kv_cpu_blocks: int | None = None
    kv_gpu_bytes: int | None = None
    kv_cpu_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class System:
    """A SystemConfig with its names resolved."""

    config: SystemConfig
    hardware: HardwareSpec
    model: ModelSpec
    cost: CostModel
    gpu_blocks: int
    cpu_blocks: int

    def describe(self) -> dict[str, Any]:
        """The header of a run log: everything needed to run the same again (JSON-serialisable)."""
        limits = self.config.limits
        return {
            "policy": _portable(self.config.policy),
            "policy_options": dict(self.config.policy_options),
            "model": self.model.name,
            "tp": self.model.tp,
            "hardware": self.hardware.name,
            "cost_model": _portable_cost(self.config.cost_model),
            "cost_options": dict(self.config.cost_options),
            "limits": {name: getattr(limits, name) for name in Limits.__dataclass_fields__},
            "gpu_blocks": self.gpu_blocks,
            "cpu_blocks": self.cpu_blocks,
            "model_spec": asdict(self.model),
            "hardware_spec": asdict(self.hardware),
        }

    def scheduler(self) -> Scheduler:
        """A fresh Scheduler with a fresh policy; a cost model that learns begins anew."""
        policy = load_policy(self.config.policy, self.config.policy_options)
        if (learns := learning(self.cost)) is not None:
            learns.begin()
        return Scheduler(
            policy, self.cost, self.model, self.hardware, self.config.limits, self.gpu_blocks, self.cpu_blocks
        )


def _portable(spec: str) -> str:
    """A policy as it was named, without the folders of an absolute path."""
    return spec.rpartition("/")[2] if spec.startswith("/") else spec


def _portable_cost(spec: str) -> str:
    """The same of a cost model; its table may have folders too, and what it corrects."""
    if (table := table_of(spec)) is not None:
        return with_table(spec, _portable(table))
    kind, colon, base = spec.partition(":")
    return kind + colon + _portable(base) if is_calibrated(spec) else _portable(spec)


def build_system(config: SystemConfig) -> System:
    """A system to be simulated: resolves names and budgets; InputError in one line if any of it is wrong."""
    hardware = load_hardware(config.hardware)
    model = load_model(config.model, tp=config.tp or hardware.gpu_count, dtype=config.dtype)
    if model.tp > hardware.gpu_count:
        raise InputError(f"--tp {model.tp}: {hardware.name} has {hardware.gpu_count} GPU(s)")
    if is_calibrated(config.cost_model):
        base = config.cost_model.partition(":")[2] or "roofline"
        raise InputError(
            f"--cost {config.cost_model}: it learns from measured steps, which a simulation has not; "
            f"use --cost {base}"
        )
    named = resolve_cost(config.cost_model, model, hardware.name, config.cost_options)
    config = replace(config, cost_model=named)
    cost = load_cost_model(config.cost_model, model, hardware, dict(config.cost_options))
    try:
        described = isinstance(cost.describe(), dict)
    except Exception as error:
        raise InputError(f"cost model '{config.cost_model}': describe() raised {error!r}") from error
    if not described:
        raise InputError(f"cost model '{config.cost_model}': describe() must return a dict")
    block_bytes = config.limits.block_size * model.kv_bytes_per_token
    gpu = kv_blocks("gpu", config.kv_gpu_blocks, config.kv_gpu_bytes, block_bytes)
    cpu = kv_blocks("cpu", config.kv_cpu_blocks, config.kv_cpu_bytes, block_bytes)
    if gpu is None or cpu is None:
        more = {}
        if config.gpu_memory_utilization is not None:
            more["gpu_memory_utilization"] = config.gpu_memory_utilization
        budget = kv_budget(model, hardware, config.limits, **more)
        gpu = budget[0] if gpu is None else gpu
        cpu = budget[1] if cpu is None else cpu
    return System(config, hardware, model, cost, gpu, cpu)


def kv_blocks(tier: str, blocks: int | None, size: int | None, block_bytes: int) -> int | None:
    """Blocks of a tier from its two flags, of which one may be given; None without either."""
    if blocks is not None and size is not None:
        raise InputError(f"--kv-{tier}-blocks and --kv-{tier}-bytes say the same thing twice: give one")
    if blocks is None and size is None:
        return None
    count = blocks if blocks is not None else (size or 0) // block_bytes
    if count < (1 if tier == "gpu" else 0):
        raise InputError(f"the {tier} KV budget holds {count} blocks (a block is {block_bytes} bytes)")
    return count

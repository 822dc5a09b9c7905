"""What an engine is to be: names and budgets, without torch, for those who only pass them on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from neo.core.view import Limits

Kernels: TypeAlias = Literal["auto", "native", "torch"]
DeviceKind: TypeAlias = Literal["auto", "cpu", "cuda"]
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
    cost_model: str = "auto"
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
    backend: Kernels = "auto"
    seed: int = 0
    ahead: bool = False
    device: DeviceKind = "auto"
    gpu_memory_bytes: int | None = None
    graphs: bool = True

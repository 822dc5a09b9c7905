"""What the GPU's side of an engine runs on: this machine's processor, or an NVIDIA GPU."""

from __future__ import annotations

from typing import Protocol

import torch

from neo.core.errors import InputError
from neo.core.request import Tier
from neo.core.specs import HardwareSpec, ModelSpec
from neo.core.view import Limits, SystemView
from neo.cost.memory import kv_budget
from neo.runtime.backend import Kind, backend
from neo.runtime.block_tables import BlockTables
from neo.runtime.cpu_executor import CpuExecutor, CpuExecutorOptions
from neo.runtime.engine_config import EngineConfig
from neo.runtime.executor import Executor
from neo.runtime.kv_memory import available_bytes
from neo.runtime.machine import local_hardware, split_cores
from neo.runtime.model import Model

_GIB = 1 << 30
_GPU_KV, _CPU_KV = _GIB, 2 * _GIB  # bytes that KV takes of this machine's memory unless told otherwise


class Device(Protocol):
    """Where the model runs, and what follows from it."""

    kind: str
    gpu_threads: int
    cpu_threads: int

    @property
    def torch(self) -> torch.device:
        """Where weights go."""
        ...

    def hardware(self) -> HardwareSpec:
        """This machine, its rates measured in a moment: rough, for roofline and reports."""
        ...

    def default_blocks(self, model: ModelSpec, hardware: HardwareSpec, limits: Limits) -> tuple[int, int]:
        """KV blocks of both tiers where none are asked for."""
        ...

    def check(self, view: SystemView) -> None:
        """Raise InputError, with the numbers, if the KV of both tiers is more than there is memory for."""
        ...

    def executor(
        self,
        model: Model,
        tables: BlockTables,
        staging: tuple[int, int],
        limits: Limits,
        slices_of: int,
        timed: bool,
    ) -> Executor:
        """A fresh executor; reserves the KV memory of both tiers."""
        ...


class CpuDevice:
    """Torch on this machine's processor stands for the GPU."""

    kind = "cpu"

    def __init__(
        self,
        kernels: Kind,
        gpu_threads: int | None,
        cpu_threads: int | None,
        cpu_cores: tuple[int, ...] | None,
    ) -> None:
        self.kernels = kernels
        self.gpu_threads, self.cpu_threads = split_cores(gpu_threads, cpu_threads)
        self.cpu_cores = cpu_cores
        torch.set_num_threads(self.gpu_threads)

    @property
    def torch(self) -> torch.device:
        """Where weights go."""
        return torch.device("cpu")

    def hardware(self) -> HardwareSpec:
        """See ``Device.hardware``."""
        return local_hardware(self.gpu_threads, self.cpu_threads)

    def default_blocks(self, model: ModelSpec, hardware: HardwareSpec, limits: Limits) -> tuple[int, int]:
        """What memory leaves, up to a friendly size."""
        block_bytes = limits.block_size * model.kv_bytes_per_token
        gpu, cpu, _ = kv_budget(model, hardware, limits)
        return max(1, min(gpu, _GPU_KV // block_bytes)), min(cpu, _CPU_KV // block_bytes)

    def check(self, view: SystemView) -> None:
        """See ``Device.check``."""
        gpu, cpu = view.pools[Tier.GPU], view.pools[Tier.CPU]
        gpu_bytes, cpu_bytes = kv_bytes(view)
        asked, free = gpu_bytes + cpu_bytes, available_bytes()
        if free is not None and asked > free:
            raise InputError(
                f"KV memory of {gpu_bytes / _GIB:.2f} GiB for the GPU ({gpu.blocks} blocks) and "
                f"{cpu_bytes / _GIB:.2f} GiB for the host ({cpu.blocks} blocks) is {asked} bytes, but {free} "
                f"bytes ({free / _GIB:.2f} GiB) of memory are available: give fewer blocks"
            )

    def executor(
        self,
        model: Model,
        tables: BlockTables,
        staging: tuple[int, int],
        limits: Limits,
        slices_of: int,
        timed: bool,
    ) -> Executor:
        """See ``Device.executor``."""
        options = CpuExecutorOptions(self.cpu_threads, self.cpu_cores)
        return CpuExecutor(
            model, backend(self.kernels, self.gpu_threads), tables, staging, options, slices_of
        )


def kv_bytes(view: SystemView) -> tuple[int, int]:
    """Bytes of KV memory of both tiers, staging buffers included."""
    gpu, cpu = view.pools[Tier.GPU], view.pools[Tier.CPU]
    block_bytes = view.limits.block_size * view.model.kv_bytes_per_token_layer
    return (gpu.total + gpu.staging_layers * gpu.staging_blocks) * block_bytes, cpu.total * block_bytes


def device_of(config: EngineConfig) -> Device:
    """The device an engine's config asks for: a GPU where ``auto`` finds one that the kernels run on.

    Raises InputError where ``cuda`` is asked for and cannot be had.
    """
    if config.device != "cpu":
        from neo.runtime.cuda_device import CudaDevice, why_no_gpu

        why = why_no_gpu()
        if not why:
            return CudaDevice(config.cpu_threads, config.cpu_cores, config.gpu_memory_bytes, config.graphs)
        if config.device == "cuda":
            raise InputError(f"--device cuda: {why}")
    if config.gpu_memory_bytes is not None:
        raise InputError("--gpu-memory: there is no GPU to be used; --kv-gpu-bytes limits the KV cache")
    return CpuDevice(config.backend, config.gpu_threads, config.cpu_threads, config.cpu_cores)

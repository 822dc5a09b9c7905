"""An NVIDIA GPU as the engine's device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from neo.core.errors import InputError
from neo.core.specs import HardwareSpec, ModelSpec
from neo.core.view import Limits, SystemView
from neo.cost.memory import kv_budget
from neo.runtime import cpu_library, cuda_library
from neo.runtime.block_tables import BlockTables
from neo.runtime.cuda_linear import Tuned
from neo.runtime.device import kv_bytes
from neo.runtime.executor import Executor
from neo.runtime.kv_memory import available_bytes
from neo.runtime.machine import local_hardware, read_bandwidth, usable_cores
from neo.runtime.model import Model

_GIB = 1 << 30
_CPU_KV = 16 * _GIB  # host KV unless told otherwise: pinning more makes a start slow
_LAUNCHING = 2  # cores left to the thread that launches and to the system
_SIDE = 4096  # of the square matrices whose product is timed
_BYTES = 1 << 28
_REPEATS = 5


def why_no_gpu() -> str:
    """Why no GPU can be used here; ``""`` if one can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU that it can use ('neo doctor' says more)"
    if why := cuda_library.why_not():
        return why
    try:
        cpu_library.load()
    except cpu_library.CpuKernelsMissingError as error:
        return str(error)
    return ""


class CudaDevice:
    """See ``neo.runtime.device.Device``.

    Args:
        memory_bytes: of the GPU's memory to be used at most; None for all.
        graphs: replay steps that only decode as CUDA graphs.
    """

    kind = "cuda"
    gpu_threads = 1

    def __init__(
        self,
        cpu_threads: int | None,
        cpu_cores: tuple[int, ...] | None,
        memory_bytes: int | None,
        graphs: bool = True,
    ) -> None:
        free = max(1, usable_cores() - _LAUNCHING)
        self.cpu_threads = cpu_threads or (len(cpu_cores) if cpu_cores else free)
        self.cpu_cores = cpu_cores
        self.graphs = graphs
        self._total = torch.cuda.mem_get_info()[1]
        if memory_bytes is not None and memory_bytes > self._total:
            raise InputError(
                f"--gpu-memory: {memory_bytes} bytes, {torch.cuda.get_device_name()} has {self._total}"
            )
        self._memory = memory_bytes or self._total
        torch.set_num_threads(1)  # the others are for attention
        self._tuned: tuple[Model, Tuned] | None = None

    @property
    def torch(self) -> torch.device:
        """Where weights go."""
        return torch.device("cuda", torch.cuda.current_device())

    def hardware(self) -> HardwareSpec:
        """See ``neo.runtime.device.Device.hardware``."""
        host = local_hardware(1, self.cpu_threads)
        name = torch.cuda.get_device_name()
        device = self.torch
        big = torch.empty(_BYTES, dtype=torch.uint8, device=device)
        pinned = torch.empty(_BYTES, dtype=torch.uint8).pin_memory()
        a = torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device=device)
        twin = torch.empty_like(big)
        h2d = _BYTES / _best(lambda: big.copy_(pinned, non_blocking=True))
        d2h = _BYTES / _best(lambda: pinned.copy_(big, non_blocking=True))
        read = read_bandwidth(self.cpu_threads, self.cpu_cores) or host.cpu_bandwidth
        return replace(
            host,
            name=f"{name.removeprefix('NVIDIA ').lower().replace(' ', '-')}+{self.cpu_threads}",
            gpu=name,
            gpu_memory_bytes=float(self._memory),
            gpu_bandwidth=2 * _BYTES / _best(lambda: twin.copy_(big)),
            gpu_flops=2.0 * _SIDE**3 / _best(lambda: a @ a),
            h2d_bandwidth=h2d,
            d2h_bandwidth=d2h,
            duplex_bandwidth=max(h2d, d2h),
            cpu_bandwidth=read,
            cpu_bandwidth_beside_copy=read,
            cpu_memory_bytes=float(available_bytes() or host.cpu_memory_bytes),
        )

    def default_blocks(self, model: ModelSpec, hardware: HardwareSpec, limits: Limits) -> tuple[int, int]:
        """GPU: what ``neo.cost.memory.kv_budget`` leaves; host: likewise, up to a friendly size."""
        limited = replace(hardware, gpu_memory_bytes=float(min(hardware.gpu_memory_bytes, self._memory)))
        gpu, cpu, _ = kv_budget(model, limited, limits)
        return gpu, min(cpu, _CPU_KV // (limits.block_size * model.kv_bytes_per_token))

    def check(self, view: SystemView) -> None:
        """See ``neo.runtime.device.Device.check``. Weights are in the GPU's memory already."""
        gpu_bytes, cpu_bytes = kv_bytes(view)
        free, _ = torch.cuda.mem_get_info()
        used = self._total - free
        usable = min(free, self._memory - used)
        for side, asked, there in (
            ("GPU", gpu_bytes, usable),
            ("host", cpu_bytes, available_bytes()),
        ):
            if there is not None and asked > there:
                raise InputError(
                    f"KV memory of {asked / _GIB:.2f} GiB ({asked} bytes) for the {side}, but "
                    f"{max(0, there) / _GIB:.2f} GiB of its memory are left: give fewer blocks"
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
        """See ``neo.runtime.device.Device.executor``."""
        from neo.runtime.cuda_executor import CudaExecutor, CudaExecutorOptions

        if self._tuned is None or self._tuned[0] is not model:
            tuned = Tuned(model.weights)
            with torch.inference_mode():
                tuned.prepare_all(limits.max_batch_tokens)
            self._tuned = model, tuned
        options = CudaExecutorOptions(
            limits.max_batch_tokens,
            limits.max_seqs,
            self.cpu_threads,
            self.cpu_cores,
            self.graphs,
            limits.relay_rows,
        )
        return CudaExecutor(model, tables, options, staging, slices_of, timed, self._tuned[1])


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs on the GPU."""
    seconds = []
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)

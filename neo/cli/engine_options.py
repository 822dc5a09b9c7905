"""The options of commands that run an engine (see ``options`` for those shared with ``neo simulate``)."""

from __future__ import annotations

import os
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from neo.cli.flags import key_values, size_of
from neo.cli.options import BUDGET, SYSTEM
from neo.core.errors import InputError
from neo.core.view import Limits
from neo.runtime.engine_config import EngineConfig

ENGINE = "Engine"
DEFAULT_MODEL = "stories42m"
MOST_THREADS = 1024  # as kernels/cpu/pool.cpp has it
BLOCK_SIZES = (8, 16, 32)  # as kernels/cpu/check.cpp has it


class LoadFormat(StrEnum):
    """Where weights come from."""

    auto = "auto"
    safetensors = "safetensors"
    dummy = "dummy"


class Kernels(StrEnum):
    """Who computes attention and copies."""

    auto = "auto"
    native = "native"
    torch = "torch"


class Devices(StrEnum):
    """What the model runs on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Model = Annotated[
    str,
    _option(
        ENGINE,
        "--model",
        help="Hugging Face folder; or a preset (see 'neo models'), run with random weights.",
    ),
]
LoadWeights = Annotated[
    LoadFormat | None,
    _option(ENGINE, "--load-format", help="dummy: random weights (default for what is no folder)."),
]
Dtype = Annotated[
    str | None,
    _option(
        ENGINE, "--dtype", help="float32, float16 or bfloat16 of weights and KV, instead of the model's."
    ),
]
MaxModelLen = Annotated[
    int | None,
    _option(
        ENGINE, "--max-model-len", help="Longest prompt and output together (default: the model's).", min=2
    ),
]
Device = Annotated[
    Devices,
    _option(
        ENGINE, "--device", help="What the model runs on; auto: a GPU where there is one, else torch here."
    ),
]
GpuMemory = Annotated[
    str | None,
    _option(BUDGET, "--gpu-memory", help="Of the GPU's memory to be used, as 24GiB (default: all)."),
]
GpuThreads = Annotated[
    int | None,
    _option(
        ENGINE,
        "--gpu-threads",
        help="Threads of torch, which stands for the GPU (default: half).",
        min=1,
        max=MOST_THREADS,
    ),
]
CpuThreads = Annotated[
    int | None,
    _option(
        ENGINE, "--cpu-threads", help="Threads of CPU attention (default: half).", min=1, max=MOST_THREADS
    ),
]
CpuCores = Annotated[
    str | None, _option(ENGINE, "--cpu-cores", help="Cores of CPU attention, one a thread, as 4-7 or 1,3.")
]
Backend = Annotated[
    Kernels, _option(ENGINE, "--backend", help="Kernels: native (ISPC), torch (slow), or what there is.")
]
Ahead = Annotated[bool, _option(ENGINE, "--ahead/--no-ahead", help="Plan the next step while one runs.")]
Hardware = Annotated[
    str,
    _option(
        SYSTEM,
        "--hardware",
        help="What policies are told: 'this' machine, measured, or a preset or TOML file.",
    ),
]
KvGpuBlocks = Annotated[
    int | None,
    _option(BUDGET, "--kv-gpu-blocks", help="GPU KV blocks (default: 1 GiB, or what fits).", min=1),
]
KvCpuBlocks = Annotated[
    int | None,
    _option(BUDGET, "--kv-cpu-blocks", help="Host KV blocks (default: 2 GiB, or what fits).", min=0),
]


def engine_config(
    *,
    model: str,
    load_format: LoadFormat | None,
    dtype: str | None,
    max_model_len: int | None,
    gpu_threads: int | None,
    cpu_threads: int | None,
    cpu_cores: str | None,
    backend: Kernels,
    ahead: bool,
    hardware: str,
    cost: str,
    cost_opt: list[str] | None,
    kv_gpu_blocks: int | None,
    kv_cpu_blocks: int | None,
    kv_gpu_bytes: str | None,
    kv_cpu_bytes: str | None,
    limits: Limits,
    seed: int,
    device: Devices = Devices.auto,
    gpu_memory: str | None = None,
) -> EngineConfig:
    """An EngineConfig of the values of these options; InputError for wrong ones, or if there is no torch."""
    for name in ("torch", "safetensors"):
        if find_spec(name) is None:
            raise InputError(f"the engine needs {name}, see 'neo doctor'; neo simulate runs without")
    if backend is not Kernels.torch and limits.block_size not in BLOCK_SIZES:
        raise InputError(
            f"--block-size {limits.block_size}: the kernels take {', '.join(map(str, BLOCK_SIZES))}; "
            "--backend torch takes any"
        )
    cores = None if cpu_cores is None else cores_of(cpu_cores)
    if load_format is None:
        load_format = LoadFormat.auto if Path(model).is_dir() else LoadFormat.dummy
    return EngineConfig(
        model=model,
        load_format=load_format.value,
        dtype=dtype,
        hardware=hardware,
        cost_model=cost,
        cost_options=key_values(cost_opt, "--cost-opt"),
        limits=limits,
        kv_gpu_blocks=kv_gpu_blocks,
        kv_cpu_blocks=kv_cpu_blocks,
        kv_gpu_bytes=size_of(kv_gpu_bytes, "--kv-gpu-bytes"),
        kv_cpu_bytes=size_of(kv_cpu_bytes, "--kv-cpu-bytes"),
        max_model_len=max_model_len,
        gpu_threads=gpu_threads,
        cpu_threads=len(cores) if cores is not None and cpu_threads is None else cpu_threads,
        cpu_cores=cores,
        backend=backend.value,
        seed=seed,
        ahead=ahead,
        device=device.value,
        gpu_memory_bytes=size_of(gpu_memory, "--gpu-memory"),
    )


def cores_of(text: str) -> tuple[int, ...]:
    """Core numbers of '0,2,4-7'; InputError for anything else, and for cores that are not to be had."""
    cores: list[int] = []
    for part in text.split(","):
        first, dash, last = (p.strip() for p in part.partition("-"))
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)):
            raise InputError(f"--cpu-cores {text}: expected core numbers, as 4-7 or 1,3")
        span = range(int(first), int(last if dash else first) + 1)
        if not 0 < len(span) <= (os.cpu_count() or 1):
            raise InputError(f"--cpu-cores {text}: '{part.strip()}' names {len(span)} cores")
        cores += span
    if len(set(cores)) < len(cores):
        raise InputError(f"--cpu-cores {text}: a core is named twice")
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if wrong := sorted(set(cores) - usable):
        raise InputError(
            f"--cpu-cores {text}: core {wrong[0]} is not one of those to be had, {sorted(usable)}"
        )
    return tuple(cores)

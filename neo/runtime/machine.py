"""This machine as a HardwareSpec, where torch on its processor stands for the GPU."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import torch

from neo.core.specs import HardwareSpec
from neo.runtime.host_facts import Roots, memory, processor

_SIDE = 1024  # of the square matrices whose product is timed
_BYTES = 1 << 26  # read and copied: several times the caches of a core
_KV_BYTES = 1 << 29  # read as KV: larger than the caches of a processor
_REPEATS = 3
_SHARE = 0.4  # of the memory that is free: what each side, "GPU" and host, counts as its own


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_cores(gpu_threads: int | None, cpu_threads: int | None) -> tuple[int, int]:
    """Threads for torch and for CPU attention: as given, else the cores shared out, at least one each."""
    cores = usable_cores()
    cpu = cpu_threads if cpu_threads is not None else max(1, cores // 2)
    gpu = gpu_threads if gpu_threads is not None else max(1, cores - cpu)
    return gpu, cpu


def local_hardware(gpu_threads: int, cpu_threads: int) -> HardwareSpec:
    """What is here, rates measured in a quarter of a second: rough, for roofline and reports."""
    roots = Roots()
    found = memory(roots)
    free = found.available if found is not None else 1 << 32
    flops = 2.0 * _SIDE**3 / _best(_product())
    read = _BYTES / _best(_sum())
    copy = _BYTES / _best(_copy())
    name = processor(roots) or platform.machine()
    return HardwareSpec(
        name=f"cpu-{gpu_threads}+{cpu_threads}",
        gpu=f"{gpu_threads} thread(s) of torch on {name}",
        cpu=name,
        gpu_memory_bytes=_SHARE * free,
        gpu_bandwidth=read,
        gpu_flops=flops,
        cpu_cores=cpu_threads,
        cpu_memory_bytes=_SHARE * free,
        cpu_bandwidth=read * cpu_threads / gpu_threads,
        cpu_bandwidth_beside_copy=read * cpu_threads / gpu_threads,
        cpu_flops=flops * cpu_threads / gpu_threads,
        h2d_bandwidth=copy,
        d2h_bandwidth=copy,
        duplex_bandwidth=copy,
        link_latency=0.0,
    )


def read_bandwidth(threads: int, cores: Sequence[int] | None = None) -> float | None:
    """Bytes per second that threads of the CPU library read KV at, blocks in any order; None without it."""
    from neo.runtime import cpu_kernels as kernels
    from neo.runtime import cpu_library

    if not cpu_library.available():
        return None
    heads, dim, size = 8, 128, 16
    count = _KV_BYTES // (2 * heads * dim * size * 2)
    cache = kernels.PagedCache.allocate(count, heads, dim, size, kernels.KVType.FP16)
    assert cache.memory is not None
    cache.memory.fill(1)  # its pages must be there
    sequences = 2 * threads
    blocks = np.random.default_rng(0).permutation(count - count % sequences).astype(np.int32)
    table = blocks.reshape(sequences, -1)
    lengths = np.full(sequences, table.shape[1] * size, dtype=np.int32)
    q = np.zeros((sequences, heads, dim), dtype=np.float16)
    with kernels.Pool(threads, cores) as pool:
        seconds = _best(lambda: kernels.read_cache(pool, cache, q, table, lengths))
    return table.size * (_KV_BYTES // count) / seconds


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _product() -> Callable[[], object]:
    a = torch.ones(_SIDE, _SIDE)
    return lambda: a @ a


def _sum() -> Callable[[], object]:
    a = torch.ones(_BYTES // 4)
    return a.sum


def _copy() -> Callable[[], object]:
    a = torch.ones(_BYTES // 4)
    b = torch.empty_like(a)
    return lambda: b.copy_(a)


def hardware_toml(hardware: HardwareSpec) -> str:
    """The machine as a hardware file, for ``--hardware`` (docs/cost-models.md)."""
    source = "measured here by neo profile, for a rough roofline"
    lines = [f"{name} = {json.dumps(getattr(hardware, name))}" for name in ("name", "gpu", "cpu")]
    for figure in fields(HardwareSpec):
        value = getattr(hardware, figure.name)
        if isinstance(value, int | float) and not figure.name.startswith("gpu_link"):
            lines += ["", f"[{figure.name}]", f"value = {value!r}", f'source = "{source}"']
    return "\n".join(lines) + "\n"

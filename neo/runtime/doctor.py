"""``neo doctor``: what of this machine neo can use, what is missing, and how to get it."""

from __future__ import annotations

import importlib
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import metadata
from typing import Any

import numpy as np

from neo import __version__
from neo.runtime import cpu_kernels, cpu_library, cuda_library
from neo.runtime import host_facts as host
from neo.runtime.host_facts import Roots

SERVE = 'pip install "neo-serve[serve]"'
PLOTS = 'pip install "neo-serve[plots]"'
PACKAGES = {
    "transformers": SERVE,
    "tokenizers": SERVE,
    "safetensors": SERVE,
    "fastapi": SERVE,
    "uvicorn": SERVE,
    "matplotlib": PLOTS,
}
"""Packages of the extras besides torch, with the command that brings them."""

_BANDWIDTH_BYTES = 512 << 20  # more than the last-level caches of all but a few servers
_BANDWIDTH_SECONDS = 0.3


class Status(StrEnum):
    """How a fact is to be taken."""

    OK = "ok"
    NOTE = "note"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the report.

    Attributes:
        group: the part of the report it stands in.
        name: what it is about.
        status: fine, worth knowing, or missing.
        value: what was found, for people.
        advice: what to do about it; empty if nothing.
        data: the same for programs; sizes in bytes, speeds in bytes/s.
    """

    group: str
    name: str
    status: Status
    value: str
    advice: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Probes:
    """How the facts are found out that are not files; tests put their own here.

    Attributes:
        roots: where /proc and /sys are.
        version: version of an installed distribution, None if it is not installed.
        load: imports a module by name.
        cores: ids of the processors this process may run on.
    """

    roots: Roots = field(default_factory=Roots)
    version: Callable[[str], str | None] = lambda name: _version(name)
    load: Callable[[str], Any] = importlib.import_module
    cores: Callable[[], set[int]] = lambda: _affinity()


@dataclass(frozen=True, slots=True)
class Report:
    """All facts, in the order in which they are shown."""

    facts: tuple[Fact, ...]

    @property
    def can_run(self) -> bool:
        """Whether the engine can run at all: torch is here. The rest makes it faster or adds to it."""
        return any(f.name == "torch" and f.status is Status.OK for f in self.facts)

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "neo": __version__,
            "can_run": self.can_run,
            "facts": [
                {
                    "group": f.group,
                    "name": f.name,
                    "status": f.status.value,
                    "value": f.value,
                    "advice": f.advice,
                    "data": dict(f.data),
                }
                for f in self.facts
            ],
        }


def examine(probes: Probes | None = None, *, bandwidth: bool = False) -> Report:
    """Look at everything. `bandwidth` also measures how fast memory is read, in about a second."""
    probes = probes or Probes()
    facts = [
        Fact("neo", "neo", Status.OK, __version__, data={"version": __version__}),
        Fact("neo", "python", Status.OK, f"{platform.python_version()} on {platform.system()}"),
        _library(),
        _cuda_library(),
        *_torch(probes),
        *(_package(name, probes) for name in PACKAGES),
        *_processor(probes),
        *_memory(probes.roots),
    ]
    if bandwidth:
        facts.append(_bandwidth(probes))
    return Report(tuple(facts))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _library() -> Fact:
    """The CPU kernels. Without them attention on the CPU has no fast path."""
    try:
        path = cpu_library.library_path()
        version, target = cpu_kernels.version(), cpu_kernels.target()
    except cpu_library.CpuKernelsMissingError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]  # what follows is the advice
        return Fact("neo", "CPU kernels", Status.MISSING, reason, "make kernels", {"error": str(error)})
    data = {"path": str(path), "version": version, "target": target}
    value = f"{version}, {target}, {path}"
    if target == "unsupported":
        advice = "this processor has none of AVX2, AVX-512, NEON: run on one that has"
        return Fact("neo", "CPU kernels", Status.MISSING, value, advice, data)
    return Fact("neo", "CPU kernels", Status.OK, value, data=data)


def _cuda_library() -> Fact:
    """The CUDA kernels, which only a GPU needs."""
    try:
        path, version = cuda_library.library_path(), cuda_library.load().neo_cuda_version().decode()
    except cuda_library.CudaKernelsMissingError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        advice = "needed for a GPU only: make kernels, where nvcc is on the PATH"
        return Fact("neo", "CUDA kernels", Status.NOTE, reason, advice, {"error": str(error)})
    data = {"path": str(path), "version": version}
    return Fact("neo", "CUDA kernels", Status.OK, f"{version}, {path}", data=data)


def _torch(probes: Probes) -> Iterator[Fact]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # a driver too old for this torch is told as a warning only
        try:
            torch = probes.load("torch")
        except Exception as error:  # of any type: a shared library or a package that does not fit
            installed = probes.version("torch")
            value = f"{installed}, cannot be imported: {error}" if installed else "not installed"
            yield Fact("torch", "torch", Status.MISSING, " ".join(value.split()), SERVE)
            return
        threads = torch.get_num_threads()
        data = {"version": str(torch.__version__), "threads": threads}
        yield Fact("torch", "torch", Status.OK, f"{torch.__version__}, {threads} threads", data=data)
        try:
            yield from list(_cuda(torch, host.nvidia_driver(probes.roots)))
        except RuntimeError as error:  # a GPU that is there and does not answer
            value = f"cannot be used: {' '.join(str(error).split())}"
            yield Fact("torch", "CUDA", Status.NOTE, value, "see nvidia-smi")
    for said in {" ".join(str(w.message).split()) for w in caught}:
        yield Fact("torch", "warning", Status.NOTE, said)


def _cuda(torch: Any, driver: str) -> Iterator[Fact]:
    built, data = torch.version.cuda, {"driver": driver or None, "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        if not driver:
            value, advice = "no NVIDIA driver", "the engine runs on the CPU; a GPU needs NVIDIA's driver"
        elif not built:
            value = f"driver {driver}, but this torch is built without CUDA"
            advice = "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        else:
            value = f"driver {driver}, torch for CUDA {built}, but no GPU can be used"
            advice = "see nvidia-smi and $CUDA_VISIBLE_DEVICES; the driver may be too old for this torch"
        yield Fact("torch", "CUDA", Status.NOTE, value, advice, data)
        return
    value = f"{built}, driver {driver or 'of unknown version'}"
    yield Fact("torch", "CUDA", Status.OK, value, data=data)
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        capability = f"{gpu.major}.{gpu.minor}"
        yield Fact(
            "torch",
            f"GPU {i}",
            Status.OK,
            f"{gpu.name}, {_gib(gpu.total_memory)}, capability {capability}",
            data={"name": gpu.name, "memory": gpu.total_memory, "capability": capability},
        )


def _package(name: str, probes: Probes) -> Fact:
    found = probes.version(name)
    if found is None:
        return Fact("packages", name, Status.MISSING, "not installed", PACKAGES[name])
    return Fact("packages", name, Status.OK, found, data={"version": found})


def _processor(probes: Probes) -> Iterator[Fact]:
    roots = probes.roots
    name, flags = host.processor(roots) or platform.machine(), host.simd(roots)
    usable = any(flag in flags for flag in ("avx2", "neon"))
    yield Fact("processor", "processor", Status.OK, name, data={"name": name})
    yield Fact(
        "processor",
        "SIMD",
        Status.OK if usable else Status.MISSING,
        ", ".join(flags) or "none that neo uses",
        "" if usable else "the CPU kernels need AVX2, AVX-512 or NEON",
        {"flags": list(flags)},
    )
    cores, quota = len(probes.cores()), host.cpu_quota(roots)
    limited = quota is not None and quota < cores
    yield Fact(
        "processor",
        "cores",
        Status.NOTE if limited else Status.OK,
        f"{cores} usable" + (f", but time of {quota:.4g} (control group)" if limited else ""),
        "raise the container's CPU limit, or use no more threads than that" if limited else "",
        {"usable": cores, "quota": quota},
    )
    nodes = host.numa_nodes(roots)
    advice = "numactl --cpunodebind=0 --membind=0 keeps threads beside their memory" if nodes > 1 else ""
    status = Status.NOTE if nodes > 1 else Status.OK
    yield Fact("processor", "NUMA nodes", status, str(nodes), advice, {"nodes": nodes})


def _memory(roots: Roots) -> Iterator[Fact]:
    found = host.memory(roots)
    if found is None:
        yield Fact("memory", "memory", Status.NOTE, "unknown: /proc/meminfo cannot be read")
    else:
        value = f"{_gib(found.total)}, {_gib(found.available)} available"
        advice = ""
        if found.limit is not None:
            value += f", limited to {_gib(found.limit)} (control group)"
            advice = "raise the container's memory limit to use more"
        data = {"total": found.total, "available": found.available, "limit": found.limit}
        yield Fact("memory", "memory", Status.NOTE if advice else Status.OK, value, advice, data)
    yield _huge_pages(roots)
    known, limit = host.locked_memory(roots)
    if not known:
        yield Fact("memory", "locked memory", Status.NOTE, "unknown")
        return
    # Copies to and from a GPU are asynchronous and fast only from memory that is locked (pinned).
    short = limit is not None and (found is None or limit < found.total)
    yield Fact(
        "memory",
        "locked memory",
        Status.NOTE if short else Status.OK,
        "unlimited" if limit is None else f"{_gib(limit)} (ulimit -l)",
        "if pinned memory is refused: ulimit -l unlimited, docker run --ulimit memlock=-1" if short else "",
        {"limit": limit},
    )


def _huge_pages(roots: Roots) -> Fact:
    mode = host.transparent_huge_pages(roots)
    total, free, size = host.huge_pages(roots)
    usable = mode in ("always", "madvise")
    value = f"transparent: {mode or 'not in this kernel'}"
    if total:
        value += f"; reserved: {total} of {_gib(size)}, {free} free"
    return Fact(
        "memory",
        "huge pages",
        Status.OK if usable else Status.NOTE,
        value,
        "" if usable else "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        {"transparent": mode or None, "total": total, "free": free, "size": size},
    )


def _bandwidth(probes: Probes) -> Fact:
    """How fast memory is read: by the CPU kernels with all cores, or by numpy with one."""
    known = host.memory(probes.roots)
    # At most an eighth of what is free, so that looking never hurts what runs beside.
    size = min(_BANDWIDTH_BYTES, known.available // 8 if known else _BANDWIDTH_BYTES)
    if size < 1 << 20:
        return Fact("memory", "read bandwidth", Status.NOTE, "not measured: too little memory is free")
    if cpu_library.available():
        threads = len(probes.cores())
        speed, how = _read_with_kernels(size, threads), f"CPU kernels, {threads} threads"
    else:
        memory = np.ones(size // 8)
        speed, how = _best_speed(lambda: memory.max(), memory.nbytes), "numpy, 1 thread"
    data = {"bytes_per_s": speed, "bytes": size, "how": how}
    return Fact("memory", "read bandwidth", Status.OK, f"{speed / 1e9:.1f} GB/s ({how})", data=data)


def _read_with_kernels(size: int, threads: int) -> float:
    heads, dim, block = 8, 128, 16  # the shape of Llama 3.1 8B's KV
    kind = cpu_kernels.KVType.FP16
    block_bytes = 2 * heads * dim * block * kind.bytes
    sequences = 8
    per_sequence = max(1, size // block_bytes // sequences)
    blocks = per_sequence * sequences
    cache = cpu_kernels.PagedCache.allocate(blocks, heads, dim, block, kind)
    if cache.memory is not None:
        cache.memory[:] = 1  # memory never written to is one page of zeros, and would be read from the cache
    tables = np.arange(blocks, dtype=np.int32).reshape(sequences, per_sequence)
    lengths = np.full(sequences, per_sequence * block, np.int32)
    queries = np.zeros((sequences, heads, dim), np.float32)
    with cpu_kernels.Pool(threads) as pool, pool.step():
        return _best_speed(
            lambda: cpu_kernels.read_cache(pool, cache, queries, tables, lengths), blocks * block_bytes
        )


def _best_speed(read: Callable[[], object], size: int) -> float:
    """Bytes/s of the fastest of several reads: whatever else runs only ever slows one."""
    read()
    best, end = float("inf"), time.perf_counter() + _BANDWIDTH_SECONDS
    while True:
        start = time.perf_counter()
        read()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return size / best


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**28 else f"{size / 2**20:.4g} MiB"

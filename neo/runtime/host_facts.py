"""What Linux says of this machine: processor, memory, limits of the container. Reads /proc and /sys only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SIMD_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon")
"""Instruction sets that the CPU kernels or torch's matrix products make use of."""

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as the largest multiple of a page below 2**63


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the kernel's file systems are mounted; tests put their own here."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `limit` is the lowest limit of the control groups this process is in, None if there is none.

    `available` is what can be taken without swapping, that limit considered.
    """

    total: int
    available: int
    limit: int | None


def text(path: Path) -> str:
    """A file's text; empty where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def processor(roots: Roots) -> str:
    """The processor's name; empty where the kernel gives none (most ARM)."""
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text(roots.proc / "cpuinfo"), re.M)
    return found[1].strip() if found else ""


def simd(roots: Roots) -> tuple[str, ...]:
    """Those of `SIMD_FLAGS` that the processor has."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text(roots.proc / "cpuinfo"), re.M)
    flags = set(found[1].split()) if found else set()
    if "asimd" in flags:  # what 64-bit ARM calls NEON
        flags.add("neon")
    return tuple(flag for flag in SIMD_FLAGS if flag in flags)


def numa_nodes(roots: Roots) -> int:
    """NUMA nodes; 1 where the kernel knows of none."""
    nodes = (roots.sys / "devices/system/node").glob("node[0-9]*")
    return max(1, sum(1 for _ in nodes))


def memory(roots: Roots) -> Memory | None:
    """Memory of this machine or, if lower, what its control groups leave; None where /proc does not say."""
    fields = _meminfo(roots)
    if "MemTotal" not in fields:
        return None
    total = fields["MemTotal"]
    available = fields.get("MemAvailable", fields.get("MemFree", 0))
    limit = None
    for group in _groups(roots, "memory"):
        v2 = (group / "memory.max").exists()
        most = _number(text(group / ("memory.max" if v2 else "memory.limit_in_bytes")))
        if most is None or most >= min(total, _UNLIMITED):
            continue
        used = _number(text(group / ("memory.current" if v2 else "memory.usage_in_bytes"))) or 0
        cached = _file_pages(text(group / "memory.stat"), v2)
        available = min(available, max(0, most - max(0, used - cached)))
        limit = most if limit is None else min(limit, most)
    return Memory(total, available, limit)


def cpu_quota(roots: Roots) -> float | None:
    """How many processors' time the control groups allow; None without a limit."""
    found: list[float] = []
    for group in _groups(roots, "cpu"):
        quota, _, period = text(group / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = text(group / "cpu.cfs_quota_us"), text(group / "cpu.cfs_period_us")
        time, per = _number(quota), _number(period)
        if time is not None and time > 0 and per:
            found.append(time / per)
    return min(found, default=None)


def transparent_huge_pages(roots: Roots) -> str:
    """The mode: ``always``, ``madvise`` or ``never``; empty where the kernel has none."""
    found = re.search(r"\[(\w+)\]", text(roots.sys / "kernel/mm/transparent_hugepage/enabled"))
    return found[1] if found else ""


def huge_pages(roots: Roots) -> tuple[int, int, int]:
    """Reserved huge pages: in all, free, and the bytes of one."""
    fields = _meminfo(roots)
    return (
        fields.get("HugePages_Total", 0),
        fields.get("HugePages_Free", 0),
        fields.get("Hugepagesize", 0),
    )


def locked_memory(roots: Roots) -> tuple[bool, int | None]:
    """Whether /proc tells how many bytes this process may lock, and how many; None is no limit."""
    found = re.search(r"^Max locked memory\s+(\S+)", text(roots.proc / "self/limits"), re.M)
    return bool(found), _number(found[1]) if found else None


def nvidia_driver(roots: Roots) -> str:
    """Version of the NVIDIA kernel driver; empty where it is not loaded."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text(roots.proc / "driver/nvidia/version"))
    return found[1] if found else ""


def _meminfo(roots: Roots) -> dict[str, int]:
    """Fields of /proc/meminfo, in bytes where it gives kB, else as they are."""
    rows = re.findall(r"^(\w+):\s+(\d+)( kB)?$", text(roots.proc / "meminfo"), re.M)
    return {name: int(value) * (1024 if unit else 1) for name, value, unit in rows}


def _groups(roots: Roots, controller: str) -> Iterator[Path]:
    """Folders of the control groups this process is in, innermost first, version 2 and 1.

    Inside a container the path may be that of the host, which is not there; the mount's root is then the
    container's own group.
    """
    for line in text(roots.proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if not controllers:
            bases = [roots.sys / "fs/cgroup", roots.sys / "fs/cgroup/unified"]
        elif controller in controllers.split(","):
            bases = [roots.sys / "fs/cgroup" / name for name in {controllers, controller}]
        else:
            continue
        for base in bases:
            folder = base.joinpath(*(part for part in inside.split("/") if part not in ("", "..")))
            for group in (folder, *folder.parents):
                if group.is_dir():
                    yield group
                if group == base:
                    break


def _file_pages(stat: str, v2: bool) -> int:
    """Bytes of page cache in a group that the kernel gives back first."""
    found = re.search(rf"^{'' if v2 else 'total_'}inactive_file (\d+)$", stat, re.M)
    return int(found[1]) if found else 0


def _number(value: str) -> int | None:
    """An integer, or None for ``max``, ``unlimited`` and nothing."""
    try:
        return int(value.strip())
    except ValueError:
        return None

"""``neo doctor``: what it finds on machines made up of files, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from neo.cli.doctor import doctor
from neo.runtime import doctor as module
from neo.runtime import host_facts as host
from neo.runtime.cpu_library import LIBRARY_VARIABLE
from neo.runtime.doctor import Fact, Probes, Report, Status, examine
from neo.runtime.host_facts import Roots

GIB = 1 << 30
X86 = """processor\t: 0
model name\t: Example CPU 9000
flags\t\t: fpu sse2 avx avx2 avx512f avx512_bf16 amx_tile amx_bf16
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd40\n"
MEMINFO = """MemTotal:       67108864 kB
MemFree:         1048576 kB
MemAvailable:   33554432 kB
HugePages_Total:      16
HugePages_Free:        4
Hugepagesize:       2048 kB
"""
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max locked memory         8388608              unlimited            bytes
"""
FILES = {
    "proc/cpuinfo": X86,
    "proc/meminfo": MEMINFO,
    "proc/self/limits": LIMITS,
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/devices/system/node/node0/cpulist": "0-3\n",
}
DRIVER = {
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n"
    "GCC version: gcc version 12.2.0\n"
}

Machine = Callable[..., Roots]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    def made(*more: dict[str, str]) -> Roots:
        for files in (FILES, *more):
            for name, content in files.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(content)
        return Roots(tmp_path / "proc", tmp_path / "sys")

    return made


def fake_torch(available: bool = False, cuda: str | None = None, gpus: int = 2) -> Any:
    gpu = SimpleNamespace(name="Example GPU", total_memory=24 * GIB, major=8, minor=6)
    return SimpleNamespace(
        __version__="2.13.0",
        get_num_threads=lambda: 4,
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: gpus,
            get_device_properties=lambda i: gpu,
        ),
    )


def probes(roots: Roots, torch: Any = None, versions: dict[str, str] | None = None, cores: int = 4) -> Probes:
    def load(name: str) -> Any:
        assert name == "torch"
        if isinstance(torch, Exception):
            raise torch
        if torch is None:
            raise ModuleNotFoundError("No module named 'torch'")
        return torch

    return Probes(roots, (versions or {}).get, load, lambda: set(range(cores)))


def fact(report: Report, name: str) -> Fact:
    (found,) = [f for f in report.facts if f.name == name]
    return found


# -- the machine --------------------------------------------------------------------------------------------


def test_a_machine_without_limits(machine: Machine) -> None:
    report = examine(probes(machine(), fake_torch()))
    assert fact(report, "processor").value == "Example CPU 9000"
    assert fact(report, "SIMD").data["flags"] == ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
    assert fact(report, "cores") == Fact(
        "processor", "cores", Status.OK, "4 usable", data={"usable": 4, "quota": None}
    )
    assert fact(report, "NUMA nodes").status is Status.OK
    assert fact(report, "memory").value == "64.0 GiB, 32.0 GiB available"
    assert fact(report, "memory").data == {"total": 64 * GIB, "available": 32 * GIB, "limit": None}
    assert fact(report, "huge pages").value == "transparent: madvise; reserved: 16 of 2 MiB, 4 free"
    locked = fact(report, "locked memory")
    assert (locked.status, locked.data["limit"]) == (Status.NOTE, 8 << 20)
    assert "ulimit -l unlimited" in locked.advice


def test_version_2_control_groups_limit_it(machine: Machine) -> None:
    group = "sys/fs/cgroup/outer/inner"
    roots = machine(
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            f"{group}/memory.max": "max\n",
            f"{group}/cpu.max": "max 100000\n",
            "sys/fs/cgroup/outer/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{5 * GIB}\n",
            "sys/fs/cgroup/outer/memory.stat": f"anon 7\ninactive_file {2 * GIB}\n",
            "sys/fs/cgroup/outer/cpu.max": "150000 100000\n",
        }
    )
    report = examine(probes(roots, fake_torch()))
    memory, cores = fact(report, "memory"), fact(report, "cores")
    assert memory.data == {"total": 64 * GIB, "available": 5 * GIB, "limit": 8 * GIB}
    assert memory.status is Status.NOTE
    assert "limited to 8.0 GiB" in memory.value
    assert (cores.status, cores.value) == (Status.NOTE, "4 usable, but time of 1.5 (control group)")


def test_version_1_control_groups_whose_path_is_the_hosts(machine: Machine) -> None:
    memory = "sys/fs/cgroup/memory"
    roots = machine(
        {
            "proc/self/cgroup": "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n",
            f"{memory}/memory.limit_in_bytes": f"{4 * GIB}\n",
            f"{memory}/memory.usage_in_bytes": f"{GIB}\n",
            f"{memory}/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB // 2}\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        }
    )
    assert host.memory(roots) == host.Memory(64 * GIB, 7 * GIB // 2, 4 * GIB)
    assert host.cpu_quota(roots) == 2.0


def test_limits_that_are_none(machine: Machine) -> None:
    roots = machine(
        {
            "proc/self/cgroup": "9:memory:/\n4:cpu:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "proc/self/limits": LIMITS.replace("8388608", "unlimited"),
        }
    )
    assert host.memory(roots) == host.Memory(64 * GIB, 32 * GIB, None)
    assert host.cpu_quota(roots) is None
    assert host.locked_memory(roots) == (True, None)
    locked = fact(examine(probes(roots, fake_torch())), "locked memory")
    assert (locked.status, locked.value, locked.advice) == (Status.OK, "unlimited", "")


def test_an_arm_server_with_two_nodes_and_no_huge_pages(machine: Machine) -> None:
    roots = machine(
        {
            "proc/cpuinfo": ARM,
            "sys/devices/system/node/node1/cpulist": "4-7\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
        }
    )
    report = examine(probes(roots, fake_torch()))
    assert fact(report, "SIMD").data["flags"] == ["neon"]
    assert fact(report, "NUMA nodes").data == {"nodes": 2}
    assert "numactl" in fact(report, "NUMA nodes").advice
    pages = fact(report, "huge pages")
    assert (pages.status, "echo madvise" in pages.advice) == (Status.NOTE, True)


def test_a_processor_without_vectors(machine: Machine) -> None:
    roots = machine({"proc/cpuinfo": "model name: Old\nflags: sse2\n"})
    assert fact(examine(probes(roots, fake_torch())), "SIMD").status is Status.MISSING


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    report = examine(probes(Roots(tmp_path, tmp_path), fake_torch()))
    assert report.can_run
    assert fact(report, "memory").status is Status.NOTE
    assert fact(report, "locked memory").value == "unknown"
    assert fact(report, "NUMA nodes").data == {"nodes": 1}


# -- torch and packages -------------------------------------------------------------------------------------


def test_gpus_are_listed(machine: Machine) -> None:
    report = examine(probes(machine(DRIVER), fake_torch(True, "12.8")))
    assert fact(report, "CUDA").value == "12.8, driver 550.54.15"
    assert fact(report, "GPU 1").value == "Example GPU, 24.0 GiB, capability 8.6"
    assert fact(report, "GPU 1").data["memory"] == 24 * GIB


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (a@b)\n",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n",
    ],
)
def test_the_driver_s_version(machine: Machine, line: str) -> None:
    assert host.nvidia_driver(machine({"proc/driver/nvidia/version": line})) == "580.95.05"


@pytest.mark.parametrize(
    ("files", "built", "value", "advice"),
    [
        ({}, None, "no NVIDIA driver", "runs on the CPU"),
        (DRIVER, None, "driver 550.54.15, but this torch is built without CUDA", "a CUDA build of torch"),
        (DRIVER, "12.8", "driver 550.54.15, torch for CUDA 12.8, but no GPU can be used", "nvidia-smi"),
    ],
)
def test_why_no_gpu_can_be_used(
    machine: Machine, files: dict[str, str], built: str | None, value: str, advice: str
) -> None:
    report = examine(probes(machine(files), fake_torch(False, built)))
    cuda = fact(report, "CUDA")
    assert (cuda.status, cuda.value) == (Status.NOTE, value)
    assert advice in cuda.advice
    assert report.can_run


def test_a_gpu_that_fails_is_told(machine: Machine) -> None:
    torch = fake_torch(True, "12.8")

    def fails() -> int:
        raise RuntimeError("CUDA error:\nout of memory")

    torch.cuda.device_count = fails
    report = examine(probes(machine(DRIVER), torch))
    assert report.can_run
    assert any(f.value == "cannot be used: CUDA error: out of memory" for f in report.facts)


def test_a_warning_of_torch_is_a_line(machine: Machine) -> None:
    torch = fake_torch(False, "12.8")

    def warns() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your\nsystem is too old", stacklevel=1)
        return False

    torch.cuda.is_available = warns
    assert fact(examine(probes(machine(), torch)), "warning").value.endswith("your system is too old")


@pytest.mark.parametrize(
    ("torch", "versions", "value"),
    [
        (None, {}, "not installed"),
        (OSError("libgomp.so:\nno such file"), {"torch": "2.13"}, "2.13, cannot be imported: libgomp.so: no"),
    ],
)
def test_without_torch_the_engine_cannot_run(
    machine: Machine, torch: Any, versions: dict[str, str], value: str
) -> None:
    report = examine(probes(machine(), torch, versions))
    assert not report.can_run
    missing = fact(report, "torch")
    assert missing.status is Status.MISSING
    assert missing.value.startswith(value)
    assert missing.advice == 'pip install "neo-serve[serve]"'


def test_each_package_says_which_extra_brings_it(machine: Machine) -> None:
    report = examine(probes(machine(), fake_torch(), {"tokenizers": "0.23"}))
    assert fact(report, "tokenizers").value == "0.23"
    assert fact(report, "uvicorn").advice == 'pip install "neo-serve[serve]"'
    assert fact(report, "matplotlib").advice == 'pip install "neo-serve[plots]"'
    assert fact(report, "matplotlib").status is Status.MISSING


# -- the library --------------------------------------------------------------------------------------------


def test_missing_and_broken_kernels(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    found = fact(examine(probes(machine(), fake_torch())), "CPU kernels")
    assert (found.status, found.advice) == (Status.MISSING, "make kernels")
    assert "none.so" in found.value
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(broken))
    found = fact(examine(probes(machine(), fake_torch())), "CPU kernels")
    assert (found.status, "cannot be used" in found.value) == (Status.MISSING, True)
    assert "\n" not in found.value


def test_cuda_kernels_are_missed_by_nobody_without_a_gpu(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEO_CUDA_LIBRARY", str(tmp_path / "none.so"))
    found = fact(examine(probes(machine(), fake_torch())), "CUDA kernels")
    assert (found.status, "make kernels" in found.advice) == (Status.NOTE, True)
    assert "none.so" in found.value


def test_bandwidth_is_measured_only_if_asked(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"proc/meminfo": "MemTotal: 65536 kB\nMemAvailable: 65536 kB\n"}
    monkeypatch.setattr(module, "_BANDWIDTH_SECONDS", 0.0)
    plain = probes(machine(small), fake_torch(), cores=1)
    assert not [f for f in examine(plain).facts if f.name == "read bandwidth"]
    if fact(examine(plain), "CPU kernels").status is Status.OK:
        found = fact(examine(plain, bandwidth=True), "read bandwidth")
        assert found.data["how"] == "CPU kernels, 1 threads"
        assert (found.data["bytes_per_s"] > 1e8, found.data["bytes"]) == (True, 8 << 20)
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    found = fact(examine(plain, bandwidth=True), "read bandwidth")
    assert found.data["how"] == "numpy, 1 thread"
    assert found.data["bytes_per_s"] > 1e8
    machine(small, {"proc/meminfo": "MemTotal: 4096 kB\nMemAvailable: 4096 kB\n"})
    assert fact(examine(plain, bandwidth=True), "read bandwidth").status is Status.NOTE


# -- the command --------------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> Any:
    app = typer.Typer()
    app.command()(doctor)
    return CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False)


@pytest.fixture
def report(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    def use(torch: Any) -> None:
        made = examine(probes(machine(), torch))
        monkeypatch.setattr(module, "examine", lambda *, bandwidth: made)

    return use


def test_in_a_pipe_every_fact_is_one_line(report: Callable[[Any], None]) -> None:
    report(fake_torch())
    done = run(COLUMNS="")
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    (line,) = [row for row in done.stdout.splitlines() if row.strip().startswith("locked memory")]
    assert "note" in line
    assert line.rstrip().endswith("--ulimit memlock=-1")
    assert done.stdout.rstrip().endswith("The engine can run here.")


def test_a_narrow_table_keeps_its_words(report: Callable[[Any], None]) -> None:
    report(fake_torch())
    done = run(COLUMNS="60")
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert "missing" in done.stdout


def test_without_torch_it_says_so_and_exits_with_1(report: Callable[[Any], None]) -> None:
    report(None)
    done = run(COLUMNS="")
    assert done.exit_code == 1
    assert 'pip install "neo-serve[serve]"' in done.stdout
    assert "The engine cannot run here" in done.stdout


def test_json_holds_the_same_facts(report: Callable[[Any], None]) -> None:
    report(None)
    done = run("--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert said["can_run"] is False
    names = [f["name"] for f in said["facts"]]
    assert {"neo", "python", "CPU kernels", "torch", "cores", "memory", "huge pages"} <= set(names)
    assert len(names) == len(set(names))
    assert {f["status"] for f in said["facts"]} <= {"ok", "note", "missing"}
    assert all(f["advice"] for f in said["facts"] if f["status"] == "missing")


def test_this_machine_can_be_examined() -> None:
    done = run("--json")
    said = json.loads(done.stdout)
    assert done.exit_code == (0 if said["can_run"] else 1)
    (memory,) = [f["data"] for f in said["facts"] if f["name"] == "memory"]
    if memory:
        assert 0 < memory["available"] <= memory["total"]

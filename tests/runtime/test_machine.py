"""This machine as a hardware spec: what is found, how it is shared out, and that it survives a file."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="its rates are measured with torch")

from neo.core.specs import HardwareSpec
from neo.cost.presets import load_hardware
from neo.runtime import machine
from neo.runtime.machine import hardware_toml, local_hardware, split_cores, usable_cores


@pytest.fixture(scope="module")
def here() -> HardwareSpec:
    return local_hardware(1, 1)


def test_what_is_measured_is_plausible(here: HardwareSpec) -> None:
    """Between a toy and a supercomputer: a wrong unit is off by a thousand at least."""
    assert 1e8 < here.gpu_bandwidth < 1e13  # bytes/s that one thread reads
    assert 1e8 < here.gpu_flops < 1e14
    assert 1e8 < here.h2d_bandwidth < 1e13
    assert here.h2d_bandwidth == here.d2h_bandwidth == here.duplex_bandwidth
    assert 1e8 < here.gpu_memory_bytes < 1e14
    assert here.link_latency == 0.0
    assert here.name == "cpu-1+1"
    assert here.gpu.startswith("1 thread(s) of torch on ")
    assert all(math.isfinite(v) for f in fields(here) if isinstance(v := getattr(here, f.name), float))


def test_the_cpus_side_has_the_share_of_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_best", lambda _run: 0.5)  # measured once above; here only the shares
    spec = local_hardware(2, 6)
    assert spec.cpu_bandwidth == spec.cpu_bandwidth_beside_copy == 3 * spec.gpu_bandwidth
    assert spec.cpu_flops == 3 * spec.gpu_flops
    assert (spec.cpu_cores, spec.name) == (6, "cpu-2+6")


def test_both_sides_together_count_less_than_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, here: HardwareSpec
) -> None:
    assert here.gpu_memory_bytes == here.cpu_memory_bytes
    monkeypatch.setattr(machine, "memory", lambda _roots: None)
    monkeypatch.setattr(machine, "_best", lambda _run: 0.5)
    unknown = local_hardware(1, 1)
    assert 0 < unknown.gpu_memory_bytes + unknown.cpu_memory_bytes < 1 << 32, "where nobody says, 4 GiB"


@pytest.mark.parametrize(
    ("cores", "gpu", "cpu", "expected"),
    [
        (1, None, None, (1, 1)),
        (2, None, None, (1, 1)),
        (5, None, None, (3, 2)),
        (16, None, None, (8, 8)),
        (16, None, 12, (4, 12)),
        (16, 3, None, (3, 8)),
        (4, None, 9, (1, 9)),
        (4, 7, 2, (7, 2)),
    ],
)
def test_cores_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpu: int | None, cpu: int | None, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    assert split_cores(gpu, cpu) == expected


def test_usable_cores_are_those_of_this_process() -> None:
    assert usable_cores() >= 1


def test_the_file_gives_the_machine_back(here: HardwareSpec, tmp_path: Path) -> None:
    """Every figure to its last digit, and names that need quoting."""
    odd = replace(here, cpu='a "fast" one\\two, 3 µm', gpu_memory_bytes=1e22, gpu_flops=1 / 3)
    for spec in (here, odd):
        path = tmp_path / "machine.toml"
        path.write_text(hardware_toml(spec), encoding="utf-8")
        assert load_hardware(str(path)) == spec


def test_every_figure_of_the_file_has_its_source(here: HardwareSpec) -> None:
    text = hardware_toml(here)
    tables = [block for block in text.split("\n\n") if block.startswith("[")]
    assert len(tables) >= 12
    assert all("measured here by neo profile" in block for block in tables)

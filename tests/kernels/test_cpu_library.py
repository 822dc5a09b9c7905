"""Finding the library, and what is said where there is none. These run without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from neo.runtime import cpu_library
from neo.runtime.cpu_library import CpuKernelsMissingError


def test_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cpu_library.LIBRARY_VARIABLE, str(tmp_path / "nothing.so"))
    assert not cpu_library.available()
    with pytest.raises(CpuKernelsMissingError, match=r"nothing\.so.*make kernels"):
        cpu_library.load()


def test_something_else_is_not_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "libneo_cpu.so"
    other.write_text("not a library")
    monkeypatch.setenv(cpu_library.LIBRARY_VARIABLE, str(other))
    with pytest.raises(CpuKernelsMissingError, match="cannot be used"):
        cpu_library.load()


def test_importing_needs_neither_library_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import neo.runtime.cpu_kernels, neo.runtime.cpu_reference, neo.runtime.cpu_worker; "
        "assert not any(m.startswith(('neo.sim', 'pydantic', 'simpy')) for m in sys.modules)"
    )
    environment = {cpu_library.LIBRARY_VARIABLE: str(tmp_path / "nothing.so")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("status", "error"),
    [(1, ValueError), (2, MemoryError), (3, cpu_library.CpuKernelError), (9, cpu_library.CpuKernelError)],
)
def test_statuses_become_exceptions(status: int, error: type[Exception]) -> None:
    cpu_library.raise_for(0, "")
    with pytest.raises(error, match="why"):
        cpu_library.raise_for(status, "why")

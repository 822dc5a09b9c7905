"""Finds and loads ``libneo_cpu``, and mirrors its C structs (``kernels/cpu/neo_cpu.h``)."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path

ABI = 3
LIBRARY_VARIABLE = "NEO_CPU_LIBRARY"
_NAME = "libneo_cpu.so"
_ROOT = Path(__file__).resolve().parents[2]

_REFUSED, _NO_MEMORY = 1, 2
TIMEOUT = 4
"""Status of a wait that ended before the job did."""


class CpuKernelsMissingError(RuntimeError):
    """The library is not built, or cannot be loaded here; the message says what to do."""


class CpuKernelError(RuntimeError):
    """The library could not do it: no usable instruction set, a job that failed, was not run or hangs."""


class Sized(ctypes.Structure):
    """A struct whose first field is its own size, as the library expects."""

    def __init__(self, **fields: object) -> None:
        super().__init__(**{"size": ctypes.sizeof(type(self)), **fields})


class PoolOptions(Sized):
    """``neo_cpu_pool_options``."""

    _fields_ = (
        ("size", c_size_t),
        ("threads", c_int32),
        ("n_cores", c_int32),
        ("cores", POINTER(c_int32)),
        ("spin_us", c_int32),
        ("prefetch", c_int32),
        ("segment", c_int32),
    )


class Cache(Sized):
    """``neo_cpu_cache``."""

    _fields_ = (
        ("size", c_size_t),
        ("k", c_void_p),
        ("v", c_void_p),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("num_blocks", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("dtype", c_int32),
    )


class Decode(Sized):
    """``neo_cpu_decode``."""

    _fields_ = (
        ("size", c_size_t),
        ("cache", POINTER(Cache)),
        ("q", c_void_p),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("q_stride", c_int64),
        ("q_head_stride", c_int64),
        ("out_stride", c_int64),
        ("out_head_stride", c_int64),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("sequences", c_void_p),
        ("lengths", c_void_p),
        ("batch", c_int32),
        ("n_sequences", c_int32),
        ("q_heads", c_int32),
        ("io_dtype", c_int32),
        ("scale", c_float),
    )


class Append(Sized):
    """``neo_cpu_append``."""

    _fields_ = (
        ("size", c_size_t),
        ("cache", POINTER(Cache)),
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("sequences", c_void_p),
        ("positions", c_void_p),
        ("rows", c_int32),
        ("n_sequences", c_int32),
        ("io_dtype", c_int32),
    )


class Copy(Sized):
    """``neo_cpu_copy``."""

    _fields_ = (
        ("size", c_size_t),
        ("src", c_void_p),
        ("dst", c_void_p),
        ("block_bytes", c_int64),
        ("src_blocks", c_void_p),
        ("dst_blocks", c_void_p),
        ("src_count", c_int32),
        ("dst_count", c_int32),
        ("count", c_int32),
    )


class Stage(Sized):
    """``neo_cpu_stage``."""

    _fields_ = (
        ("size", c_size_t),
        ("append", POINTER(Append)),
        ("decode", POINTER(Decode)),
        ("request", c_void_p),
        ("answer", c_void_p),
        ("first", c_uint32),
        ("layer_stride", c_int64),
    )


class Handover(Sized):
    """``neo_cpu_handover``."""

    _fields_ = (
        ("size", c_size_t),
        ("stages", POINTER(Stage)),
        ("n_stages", c_int32),
        ("layers", c_int32),
        ("times", c_void_p),
    )


class Job(Sized):
    """``neo_cpu_job``."""

    _fields_ = (
        ("size", c_size_t),
        ("pool", c_void_p),
        ("append", POINTER(Append)),
        ("decode", POINTER(Decode)),
        ("copy", POINTER(Copy)),
        ("handover", POINTER(Handover)),
        ("wait_flag", c_void_p),
        ("done_flag", c_void_p),
        ("wait_value", c_uint32),
        ("done_value", c_uint32),
        ("start_ns", c_int64),
        ("end_ns", c_int64),
        ("status", c_int32),
        ("message", c_char * 252),
    )


class WorkerOptions(Sized):
    """``neo_cpu_worker_options``."""

    _fields_ = (
        ("size", c_size_t),
        ("pool", c_void_p),
        ("flag_timeout_us", c_int64),
        ("core", c_int32),
        ("spin_us", c_int32),
    )


class After(ctypes.Structure):
    """``neo_cpu_after``."""

    _fields_ = (("worker", c_void_p), ("ticket", c_int64))


def library_path() -> Path:
    """Where the library is: ``$NEO_CPU_LIBRARY``, else ``build/kernels`` of the source tree.

    Raises `CpuKernelsMissingError` if there is no file there.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    path = Path(named) if named else _ROOT / "build" / "kernels" / _NAME
    if not path.is_file():
        where = f"${LIBRARY_VARIABLE} names {path}" if named else f"expected at {path}"
        raise CpuKernelsMissingError(
            f"the CPU kernels are not built: no such file, {where}. "
            "Run `make kernels` (or kernels/build.sh) in the source tree; "
            f"or set {LIBRARY_VARIABLE} to a {_NAME} that is built already."
        )
    return path


def _declare(library: ctypes.CDLL) -> None:
    status, pool, worker = c_int32, c_void_p, c_void_p
    signatures: dict[str, tuple[object, list[object]]] = {
        "neo_cpu_abi": (c_int32, []),
        "neo_cpu_version": (c_char_p, []),
        "neo_cpu_target": (c_char_p, []),
        "neo_cpu_last_error": (c_char_p, []),
        "neo_cpu_pool_create": (status, [POINTER(PoolOptions), POINTER(c_void_p)]),
        "neo_cpu_pool_destroy": (None, [pool]),
        "neo_cpu_pool_threads": (c_int32, [pool]),
        "neo_cpu_pool_begin_step": (status, [pool]),
        "neo_cpu_pool_end_step": (status, [pool]),
        "neo_cpu_decode_attention": (status, [pool, POINTER(Decode)]),
        "neo_cpu_read_cache": (status, [pool, POINTER(Decode), POINTER(c_int32)]),
        "neo_cpu_append_kv": (status, [pool, POINTER(Append)]),
        "neo_cpu_copy_blocks": (status, [pool, POINTER(Copy)]),
        "neo_cpu_run": (None, [c_void_p]),
        "neo_cpu_worker_create": (status, [POINTER(WorkerOptions), POINTER(c_void_p)]),
        "neo_cpu_worker_destroy": (None, [worker]),
        "neo_cpu_worker_submit": (status, [worker, POINTER(Job), POINTER(After), c_int32, POINTER(c_int64)]),
        "neo_cpu_worker_wait": (status, [worker, c_int64, c_int64]),
        "neo_cpu_worker_finished": (c_int64, [worker]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


@cache
def load_from(path: Path) -> ctypes.CDLL:
    """Load the library at `path`, once, and check that it is the one this code was written for."""
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise CpuKernelsMissingError(
            f"{path} cannot be used: {error}. Build it here with `make kernels`."
        ) from error
    found = library.neo_cpu_abi()
    if found != ABI:
        raise CpuKernelsMissingError(
            f"{path} has ABI {found}, this version of neo needs {ABI}. Build it again with `make kernels`."
        )
    return library


def load() -> ctypes.CDLL:
    """Return the library; raises `CpuKernelsMissingError`, saying how to get it, where there is none."""
    return load_from(library_path())


def available() -> bool:
    """Whether the library can be loaded and this processor can run it."""
    try:
        return bool(load().neo_cpu_target() != b"unsupported")
    except CpuKernelsMissingError:
        return False


def raise_for(status: int, message: str) -> None:
    """Turn a status of the library into an exception: ValueError for a refused argument."""
    if status == _REFUSED:
        raise ValueError(message)
    if status == _NO_MEMORY:
        raise MemoryError(message)
    if status != 0:
        raise CpuKernelError(message)

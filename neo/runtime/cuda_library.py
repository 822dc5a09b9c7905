"""Finds and loads ``libneo_cuda``, and mirrors its C structs (``kernels/cuda/neo_cuda.h``).

Loading needs neither a GPU nor torch: the CUDA runtime is part of the library and looks for the driver when
it is first used.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

from neo.runtime.cpu_library import Sized

ABI = 6
LIBRARY_VARIABLE = "NEO_CUDA_LIBRARY"
_NAME = "libneo_cuda.so"
_ROOT = Path(__file__).resolve().parents[2]

_REFUSED, _DEVICE, _UNSUPPORTED = 1, 2, 3


class CudaKernelsMissingError(RuntimeError):
    """The library is not built, or cannot be loaded here; the message says what to do."""


class CudaKernelError(RuntimeError):
    """The CUDA runtime refused, or this device cannot do it."""


class DeviceInfo(Sized):
    """``neo_cuda_device_info``."""

    _fields_ = (
        ("size", c_size_t),
        ("capability", c_int32),
        ("multiprocessors", c_int32),
        ("shared_bytes", c_int32),
        ("l2_bytes", c_int32),
        ("runtime", c_int32),
        ("driver", c_int32),
    )


class Cache(Sized):
    """``neo_cuda_cache``."""

    _fields_ = (
        ("size", c_size_t),
        ("data", c_void_p),
        ("num_blocks", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("dtype", c_int32),
    )


class Decode(Sized):
    """``neo_cuda_decode``."""

    _fields_ = (
        ("size", c_size_t),
        ("cache", POINTER(Cache)),
        ("q", c_void_p),
        ("out", c_void_p),
        ("q_stride", c_int64),
        ("q_head_stride", c_int64),
        ("out_stride", c_int64),
        ("out_head_stride", c_int64),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("slots", c_void_p),
        ("lengths", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("rows", c_int32),
        ("q_heads", c_int32),
        ("ctas", c_int32),
        ("stages", c_int32),
        ("scale", c_float),
        ("early", c_int32),
    )


class Norm(Sized):
    """``neo_cuda_norm``."""

    _fields_ = (
        ("size", c_size_t),
        ("hidden", c_void_p),
        ("delta", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("rows", c_int32),
        ("width", c_int32),
        ("dtype", c_int32),
        ("eps", c_float),
    )


class Scale(ctypes.Structure):
    """``neo_cuda_scale``; part of others."""

    _fields_ = (
        ("hidden", c_void_p),
        ("width", c_int32),
        ("eps", c_float),
    )


class Silu(Sized):
    """``neo_cuda_silu``."""

    _fields_ = (
        ("size", c_size_t),
        ("gate_up", c_void_p),
        ("out", c_void_p),
        ("rows", c_int32),
        ("width", c_int32),
        ("dtype", c_int32),
        ("scale", Scale),
    )


class Angles(Sized):
    """``neo_cuda_angles``."""

    _fields_ = (
        ("size", c_size_t),
        ("positions", c_void_p),
        ("frequencies", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rows", c_int32),
        ("head_dim", c_int32),
        ("dtype", c_int32),
        ("scale", c_float),
    )


class Qkv(Sized):
    """``neo_cuda_qkv``."""

    _fields_ = (
        ("size", c_size_t),
        ("cache", POINTER(Cache)),
        ("qkv", c_void_p),
        ("qkv_stride", c_int64),
        ("bias", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_out", c_void_p),
        ("k_out", c_void_p),
        ("v_out", c_void_p),
        ("q_stride", c_int64),
        ("kv_stride", c_int64),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("slots", c_void_p),
        ("positions", c_void_p),
        ("rows", c_int32),
        ("q_heads", c_int32),
        ("eps", c_float),
        ("early", c_int32),
        ("scale", Scale),
    )


class Gather(Sized):
    """``neo_cuda_gather_args``."""

    _fields_ = (
        ("size", c_size_t),
        ("cache", POINTER(Cache)),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("entries", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("count", c_int32),
    )


class Copy(Sized):
    """``neo_cuda_copy``."""

    _fields_ = (
        ("size", c_size_t),
        ("src", c_void_p),
        ("dst", c_void_p),
        ("block_bytes", c_int64),
        ("src_blocks", c_void_p),
        ("dst_blocks", c_void_p),
        ("count_at", c_void_p),
        ("count", c_int32),
        ("ctas", c_int32),
    )


class Channel(Sized):
    """``neo_cuda_channel``."""

    _fields_ = (
        ("size", c_size_t),
        ("state", c_void_p),
        ("request", c_void_p),
        ("answer", c_void_p),
        ("error", c_void_p),
    )


class Post(Sized):
    """``neo_cuda_post``."""

    _fields_ = (
        ("size", c_size_t),
        ("channel", POINTER(Channel)),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_stride", c_int64),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
        ("packed", c_void_p),
        ("packed_stride", c_int64),
        ("rows_at", c_void_p),
        ("rows", c_int32),
        ("q_bytes", c_int32),
        ("kv_bytes", c_int32),
        ("ctas", c_int32),
    )


class Await(Sized):
    """``neo_cuda_await``."""

    _fields_ = (
        ("size", c_size_t),
        ("channel", POINTER(Channel)),
        ("packed", c_void_p),
        ("packed_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("rows_at", c_void_p),
        ("rows", c_int32),
        ("row_bytes", c_int32),
        ("ctas", c_int32),
        ("timeout_us", c_int64),
    )


class Relay(Sized):
    """``neo_cuda_relay``."""

    _fields_ = (
        ("size", c_size_t),
        ("channel", POINTER(Channel)),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_stride", c_int64),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
        ("packed", c_void_p),
        ("packed_stride", c_int64),
        ("came", c_void_p),
        ("came_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("hidden", c_void_p),
        ("kept", c_void_p),
        ("hidden_stride", c_int64),
        ("kept_stride", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("angle_stride", c_int64),
        ("next_cos", c_void_p),
        ("next_sin", c_void_p),
        ("next_stride", c_int64),
        ("timeout_us", c_int64),
        ("rows", c_int32),
        ("q_bytes", c_int32),
        ("kv_bytes", c_int32),
        ("hidden_bytes", c_int32),
        ("angle_bytes", c_int32),
        ("ctas", c_int32),
    )


class LinearShape(Sized):
    """``neo_cuda_linear_shape``."""

    _fields_ = (
        ("size", c_size_t),
        ("like", c_void_p),
        ("x_stride", c_int64),
        ("weight_stride", c_int64),
        ("out_stride", c_int64),
        ("workspace_bytes", c_size_t),
        ("rows", c_int32),
        ("in_", c_int32),
        ("out", c_int32),
        ("dtype", c_int32),
        ("bias", c_int32),
        ("add", c_int32),
        ("search", c_int32),
    )


class LinearTrial(Sized):
    """``neo_cuda_linear_trial``."""

    _fields_ = (
        ("size", c_size_t),
        ("plan", c_void_p),
        ("x", c_void_p),
        ("weights", POINTER(c_void_p)),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("workspace", c_void_p),
        ("weight_count", c_int32),
        ("launches", c_int32),
    )


class LinearChoice(Sized):
    """``neo_cuda_linear_choice``."""

    _fields_ = (
        ("size", c_size_t),
        ("workspace_bytes", c_size_t),
        ("candidates", c_int32),
        ("chosen", c_int32),
        ("algorithm", c_int32),
        ("tile", c_int32),
        ("stages", c_int32),
        ("splits", c_int32),
        ("cluster", c_int32),
        ("us", c_float),
        ("first_us", c_float),
    )


class Linear(Sized):
    """``neo_cuda_linear_args``."""

    _fields_ = (
        ("size", c_size_t),
        ("plan", c_void_p),
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    )


LAUNCHES: dict[str, type[Sized]] = {
    "neo_cuda_decode_plan": Decode,
    "neo_cuda_decode_attention": Decode,
    "neo_cuda_add_rms_norm": Norm,
    "neo_cuda_silu_mul": Silu,
    "neo_cuda_rope_angles": Angles,
    "neo_cuda_qkv_rope_append": Qkv,
    "neo_cuda_linear": Linear,
    "neo_cuda_gather": Gather,
    "neo_cuda_copy_blocks": Copy,
    "neo_cuda_copy_runs": Copy,
    "neo_cuda_post_rows": Post,
    "neo_cuda_relay_rows": Relay,
    "neo_cuda_await_rows": Await,
}
"""Functions that take their arguments and a stream."""


def library_path() -> Path:
    """Where the library is: ``$NEO_CUDA_LIBRARY``, else ``build/kernels`` of the source tree.

    Raises `CudaKernelsMissingError` if there is no file there.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    path = Path(named) if named else _ROOT / "build" / "kernels" / _NAME
    if not path.is_file():
        where = f"${LIBRARY_VARIABLE} names {path}" if named else f"expected at {path}"
        raise CudaKernelsMissingError(
            f"the CUDA kernels are not built: no such file, {where}. Run `make kernels` in the source tree "
            f"where nvcc is on the PATH; or set {LIBRARY_VARIABLE} to a {_NAME} that is built already."
        )
    return path


def _declare(library: ctypes.CDLL) -> None:
    signatures: dict[str, tuple[object, list[object]]] = {
        "neo_cuda_abi": (c_int32, []),
        "neo_cuda_version": (c_char_p, []),
        "neo_cuda_last_error": (c_char_p, []),
        "neo_cuda_describe": (c_int32, [POINTER(DeviceInfo)]),
        "neo_cuda_overlap": (c_int32, [c_int32]),
        "neo_cuda_decode_workspace": (c_int32, [POINTER(Decode), POINTER(c_size_t)]),
        "neo_cuda_linear_create": (c_int32, [POINTER(LinearShape), POINTER(c_void_p)]),
        "neo_cuda_linear_destroy": (None, [c_void_p]),
        "neo_cuda_linear_tune": (c_int32, [POINTER(LinearTrial)]),
        "neo_cuda_linear_describe": (c_int32, [c_void_p, POINTER(LinearChoice)]),
    }
    signatures |= {name: (c_int32, [POINTER(struct), c_void_p]) for name, struct in LAUNCHES.items()}
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
        raise CudaKernelsMissingError(
            f"{path} cannot be used: {error}. Build it here with `make kernels`."
        ) from error
    found = library.neo_cuda_abi()
    if found != ABI:
        raise CudaKernelsMissingError(
            f"{path} has ABI {found}, this version of neo needs {ABI}. Build it again with `make kernels`."
        )
    return library


def load() -> ctypes.CDLL:
    """Return the library; raises `CudaKernelsMissingError`, saying how to get it, where there is none."""
    return load_from(library_path())


def check(status: int) -> None:
    """Turn a status of the library into an exception: ValueError for a refused argument."""
    if status == 0:
        return
    message = load().neo_cuda_last_error().decode(errors="replace")
    if status == _REFUSED:
        raise ValueError(message)
    raise CudaKernelError(message)


def describe() -> DeviceInfo:
    """The current device. Raises `CudaKernelError` where there is none that the kernels run on."""
    info = DeviceInfo()
    check(load().neo_cuda_describe(info))
    return info


def overlap(on: bool | None = None) -> bool:
    """Whether kernels may begin before the one ahead has ended, as it was until now; None leaves it so.

    Of launches that a CUDA graph has captured nothing changes.
    """
    return bool(load().neo_cuda_overlap(-1 if on is None else int(on)))


def why_not() -> str:
    """Why the kernels cannot be used here; ``""`` if they can."""
    try:
        describe()
    except (CudaKernelsMissingError, CudaKernelError) as error:
        return str(error)
    return ""

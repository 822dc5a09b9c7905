"""Sampling any cost model into the cost-table format: for tests, examples, and for freezing a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neo.core.graph import OpKind, Work
from neo.core.specs import ModelSpec
from neo.cost.interface import CostModel

_POWERS = tuple(2**i for i in range(16))
DEFAULT_GRIDS: dict[str, Sequence[int]] = {
    "tokens": (
        *_POWERS[:6],
        *(48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768),
    ),
    "sequences": _POWERS[:11],
    "kv_tokens": (0, *(2**i for i in range(4, 23))),
    "length": (*_POWERS[:6], 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "start": (0, *(2**i for i in range(6, 18))),
    "bytes": (1, *(2**i for i in range(10, 33))),
}
_SATURATING = 10**15  # bytes of company that outlast every operation
_DTYPES = {1: "int8", 2: "float16 or bfloat16", 4: "float32"}

_BY_BYTES = {
    "send": OpKind.SEND,
    "recv": OpKind.RECV,
    "swap_out": OpKind.SWAP_OUT,
    "swap_in": OpKind.SWAP_IN,
    "stream": OpKind.STREAM,
    "allreduce": OpKind.ALLREDUCE,
}


def tabulate(
    cost_model: CostModel,
    model: ModelSpec,
    grids: Mapping[str, Sequence[int]] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Sample ``cost_model`` on a grid into a ``neo-cost-table/1`` document (JSON-serialisable).

    Args:
        cost_model: what to sample.
        model: the model whose operations it prices.
        grids: values of some axes (tokens, sequences, kv_tokens, length, start, bytes) instead of
            ``DEFAULT_GRIDS``.
        provenance: fields to set instead of those that say the table was sampled, not measured.
    """
    grid = {k: [int(v) for v in values] for k, values in {**DEFAULT_GRIDS, **(grids or {})}.items()}
    seconds = cost_model.seconds

    def one(axis: str, kind: OpKind) -> dict[str, Any]:
        make: dict[str, Callable[[int], Work]] = {
            "tokens": lambda v: Work(tokens=v),
            "sequences": lambda v: Work(sequences=v),
            "bytes": lambda v: Work(bytes=v),
        }
        values = list(grid[axis])
        return {"axes": {axis: values}, "seconds": [float(seconds(kind, make[axis](v))) for v in values]}

    def two(outer: str, inner: str, kind: OpKind) -> dict[str, Any]:
        rows = []
        for x in grid[outer]:
            works = [
                Work(chunks=((y, x),)) if outer == "length" else Work(sequences=x, kv_tokens=y)
                for y in grid[inner]
            ]
            rows.append([float(seconds(kind, w)) for w in works])
        return {"axes": {outer: list(grid[outer]), inner: list(grid[inner])}, "seconds": rows}

    tables = {
        "schedule": one("sequences", OpKind.SCHEDULE),
        "embed": one("tokens", OpKind.EMBED),
        "pre": one("tokens", OpKind.PRE),
        "post": one("tokens", OpKind.POST),
        "head": one("sequences", OpKind.HEAD),
        "gpu_attn_decode": two("sequences", "kv_tokens", OpKind.GPU_ATTN),
        "gpu_attn_prefill": two("length", "start", OpKind.GPU_ATTN),
        "cpu_attn": two("sequences", "kv_tokens", OpKind.CPU_ATTN),
        **{name: one("bytes", kind) for name, kind in _BY_BYTES.items()},
    }
    return {
        "format": "neo-cost-table/1",
        "provenance": {**_provenance(cost_model), **(provenance or {})},
        "model": _shape(model),
        "tp": model.tp,
        "dtype": _DTYPES.get(model.dtype_bytes, f"{model.dtype_bytes} bytes"),
        "tables": tables,
        "contention": _contention(cost_model, grid),
    }


def _contention(cost_model: CostModel, grid: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Rate shares seen from outside: a large operation alone, over the same with lasting company."""
    cpu = Work(sequences=1, kv_tokens=grid["kv_tokens"][-1])
    copy = Work(bytes=grid["bytes"][-1])

    def share(kind: OpKind, work: Work) -> float:
        beside = work._replace(beside_bytes=_SATURATING)
        return min(1.0, float(cost_model.seconds(kind, work)) / float(cost_model.seconds(kind, beside)))

    return {
        "cpu_share_beside_copy": share(OpKind.CPU_ATTN, cpu),
        "copy_share_duplex": share(OpKind.SWAP_OUT, copy),
        "copy_bandwidth": copy.bytes / float(cost_model.seconds(OpKind.SWAP_OUT, copy)),
        "source": "sampled with company that outlasts the operation",
    }


def _provenance(cost_model: CostModel) -> dict[str, Any]:
    about = cost_model.describe()
    hardware = about.get("hardware", {})
    known = hardware if isinstance(hardware, dict) else {}
    return {
        "hardware": str(known.get("name", "none")),
        "gpu": str(known.get("gpu", "none")),
        "cpu": str(known.get("cpu", "none")),
        "driver": "none",
        "versions": {},
        "date": "",
        "command": f"neo.cost.tabulate of cost model '{about.get('cost_model', type(cost_model).__name__)}'",
        "repeats": 1,
        "spread": 0.0,
    }


def _shape(model: ModelSpec) -> dict[str, Any]:
    fields = (
        "name",
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "intermediate",
        "vocab",
        "mlp_matrices",
        "dtype_bytes",
    )
    return {field: getattr(model, field) for field in fields}

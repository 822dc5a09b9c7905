"""The cost-table format ``neo-cost-table/1``: what a file must hold, checked where it enters.

Imported only when a table is read, because of pydantic's import time; see ``docs/cost-models.md`` for the
format in words and an example.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neo.core.errors import InputError
from neo.core.specs import ModelSpec
from neo.cost.schemas import first_error, read_json

FORMAT = "neo-cost-table/1"

# Table name -> its axes, in the order of the nesting of ``seconds``.
AXES: dict[str, tuple[str, ...]] = {
    "schedule": ("sequences",),
    "embed": ("tokens",),
    "pre": ("tokens",),
    "post": ("tokens",),
    "head": ("sequences",),
    "gpu_attn_decode": ("sequences", "kv_tokens"),
    "gpu_attn_prefill": ("length", "start"),
    "cpu_attn": ("sequences", "kv_tokens"),
    "send": ("bytes",),
    "recv": ("bytes",),
    "swap_out": ("bytes",),
    "swap_in": ("bytes",),
    "stream": ("bytes",),
    "allreduce": ("bytes",),
}
SHAPE_FIELDS = (
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

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(gt=0, strict=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StepCheck(_Strict):
    """What a table's operations add up to, beside whole steps of decodes, measured as engines run them.

    Attributes:
        shapes: of steps that were measured.
        median: of the absolute errors, (sum of the operations) / (the step) - 1.
        worst: the error farthest from 0.
        sequences, kv_tokens: of the step that has it.
    """

    shapes: Count
    median: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    worst: Annotated[float, Field(allow_inf_nan=False)]
    sequences: Count
    kv_tokens: Count


class Provenance(_Strict):
    """Where, when and how the seconds were measured.

    ``spread`` is that of repeats, as a share of the median; ``raised`` the largest share by which an entry
    was raised since less work took longer; ``steps`` is there where steps were measured as a whole.
    """

    hardware: str
    gpu: str
    cpu: str
    driver: str
    versions: dict[str, str]
    date: str
    command: str
    repeats: Annotated[int, Field(ge=1)]
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    raised: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    steps: StepCheck | None = None


class Shape(_Strict):
    """The model that was measured: the fields of ``ModelSpec`` that decide what an operation costs."""

    name: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    intermediate: Count
    vocab: Count
    mlp_matrices: Literal[2, 3]
    dtype_bytes: Count


class Table(_Strict):
    """Seconds over one or two axes; ``_check_table`` looks into both."""

    axes: dict[str, list[Annotated[int, Field(ge=0)]]]
    seconds: list[Any]


class Contention(_Strict):
    """How flows slow each other down; shares are rates beside company over rates alone."""

    cpu_share_beside_copy: Share
    copy_share_duplex: Share
    copy_bandwidth: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    source: str


class CostTable(_Strict):
    """A whole file."""

    format: Literal["neo-cost-table/1"]
    provenance: Provenance
    model: Shape
    tp: Count
    dtype: str
    tables: dict[str, Table]
    contention: Contention


def read_table(path: Path) -> CostTable:
    """The validated content of a table file; an InputError names file and field path."""
    return check_table(read_json(path, "cost table"), str(path))


def check_table(data: Any, where: str) -> CostTable:
    """``data`` as a cost table; an InputError starts with ``where`` and names the field path."""
    try:
        table = CostTable.model_validate(data)
    except ValidationError as error:
        raise InputError(f"cost table {where}: {first_error(error)}") from error
    for name, entry in table.tables.items():
        if name not in AXES:
            raise InputError(f"cost table {where}: tables.{name}: unknown (known: {', '.join(AXES)})")
        _check_table(name, entry, f"cost table {where}: tables.{name}")
    return table


def check_model_matches(table: CostTable, model: ModelSpec, where: str) -> None:
    """Refuse a table of another shape, number of ranks or element size than ``model``."""
    pairs = [(f, getattr(table.model, f), getattr(model, f)) for f in SHAPE_FIELDS]
    pairs.append(("tp", table.tp, model.tp))
    wrong = [
        f"{field} {theirs} (model '{model.name}': {ours})" for field, theirs, ours in pairs if theirs != ours
    ]
    if wrong:
        raise InputError(f"cost table {where}: was measured for '{table.model.name}' with {', '.join(wrong)}")


def _check_table(name: str, entry: Table, place: str) -> None:
    if tuple(entry.axes) != AXES[name]:
        found = ", ".join(entry.axes) or "none"
        raise InputError(f"{place}.axes: must be {', '.join(AXES[name])}, found {found}")
    for axis, values in entry.axes.items():
        if len(values) < 2:
            raise InputError(f"{place}.axes.{axis}: needs at least 2 values, has {len(values)}")
        if values[-1] > _MOST:
            raise InputError(f"{place}.axes.{axis}: its last value is more than {_MOST}")
        for i in range(1, len(values)):
            if values[i] <= values[i - 1]:
                raise InputError(f"{place}.axes.{axis}.{i}: {values[i]} after {values[i - 1]}, must increase")
    _check_seconds(entry.seconds, [len(values) for values in entry.axes.values()], f"{place}.seconds")


_MOST = 10**18  # of a size or of seconds: any more is a slip, and may not fit a float


def _check_seconds(found: Any, sizes: list[int], place: str) -> None:
    """Lists nested as deep as there are axes, of their sizes; at the bottom finite numbers >= 0."""
    if not sizes:
        number = isinstance(found, int | float) and not isinstance(found, bool)
        if not number or not 0 <= found <= _MOST:
            raise InputError(f"{place}: {found!r} is not a finite number of seconds, at least 0")
        return
    if not isinstance(found, list):
        raise InputError(f"{place}: must be a list")
    if len(found) != sizes[0]:
        raise InputError(f"{place}: has {len(found)} entries, its axis has {sizes[0]}")
    for i, entry in enumerate(found):
        _check_seconds(entry, sizes[1:], f"{place}.{i}")

"""The profiled cost model: measured tables, interpolated; it says when it extrapolates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neo.core.errors import InputError
from neo.core.graph import OpKind, Work
from neo.core.specs import ModelSpec
from neo.cost.interpolation import Curve, Surface, warnings_of

if TYPE_CHECKING:
    from neo.cost.table_schema import CostTable


class Profiled:
    """Prices operations from a measured table (format ``neo-cost-table/1``, see ``docs/cost-models.md``).

    Look-ups are monotone: data are made isotonic (running maximum along each axis), interpolated linearly,
    and continued beyond the grid with the last slope; ``describe`` warns of corrections and extrapolations.
    A table that a file does not hold is an InputError only when an operation needs it.

    Contention: company slows an operation of ``T`` seconds to the rate share ``s`` while it lasts
    (``neo.cost.contention``): ``T + min(T / s, other) * (1 - s)``.
    """

    vectorized = True

    def __init__(self, table: CostTable, where: str = "in memory") -> None:
        self._table = table
        self._where = where
        self._curves: dict[str, Curve] = {}
        self._surfaces: dict[str, Surface] = {}
        for name, entry in table.tables.items():
            axes = list(entry.axes)
            seconds: Any = entry.seconds
            if len(axes) == 1:
                self._curves[name] = Curve(name, axes[0], entry.axes[axes[0]], seconds)
            else:
                x, y = axes
                self._surfaces[name] = Surface(name, (x, y), entry.axes[x], entry.axes[y], seconds)
        contention = table.contention
        self._cpu_share = contention.cpu_share_beside_copy
        self._duplex_share = contention.copy_share_duplex
        self._copy_s = 1.0 / contention.copy_bandwidth
        self._price: dict[OpKind, Callable[[Work], Any]] = {
            OpKind.SCHEDULE: lambda w: self._curve("schedule", OpKind.SCHEDULE).at(w[1]),
            OpKind.EMBED: lambda w: self._by(w[0], "embed", OpKind.EMBED),
            OpKind.PRE: lambda w: self._by(w[0], "pre", OpKind.PRE),
            OpKind.POST: lambda w: self._by(w[0], "post", OpKind.POST),
            OpKind.HEAD: lambda w: self._by(w[1], "head", OpKind.HEAD),
            OpKind.GPU_ATTN: self._gpu_attention,
            OpKind.CPU_ATTN: self._cpu_attention,
            OpKind.SEND: lambda w: self._copy(w, "send", "swap_in", OpKind.SEND),
            OpKind.RECV: lambda w: self._copy(w, "recv", "swap_out", OpKind.RECV),
            OpKind.SWAP_OUT: lambda w: self._copy(w, "swap_out", "swap_in", OpKind.SWAP_OUT),
            OpKind.SWAP_IN: lambda w: self._copy(w, "swap_in", "swap_out", OpKind.SWAP_IN),
            OpKind.STREAM: lambda w: self._copy(w, "stream", "swap_out", OpKind.STREAM),
            OpKind.ALLREDUCE: lambda w: (
                0.0 if table.tp == 1 else self._by(w[3], "allreduce", OpKind.ALLREDUCE)
            ),
        }

    @classmethod
    def load(cls, path: str | Path, model: ModelSpec | None = None) -> Profiled:
        """Read a table file.

        Args:
            path: the JSON file.
            model: what is to be run; None skips the comparison with the model that was measured.

        Raises:
            InputError: file and field path: unreadable, not the format, an axis that does not increase,
                negative or NaN seconds, a table of the wrong size, or another model shape, ``tp`` or
                element size.
        """
        from neo.cost.table_schema import check_model_matches, read_table

        file = Path(path).expanduser()
        table = read_table(file)
        if model is not None:
            check_model_matches(table, model, str(file))
        return cls(table, str(file))

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "in memory") -> Profiled:
        """The same from the content of such a file, e.g. what ``tabulate`` returns."""
        from neo.cost.table_schema import check_table

        return cls(check_table(data, where), where)

    def seconds(self, kind: OpKind, work: Work) -> Any:
        """Seconds of one operation in one layer; see ``neo.cost.interface.CostModel``."""
        return self._price[kind](work)

    def describe(self) -> dict[str, Any]:
        """File, provenance, tables, contention, and warnings about corrected and extrapolated data."""
        table = self._table
        return {
            "cost_model": "profiled",
            "file": self._where,
            "provenance": table.provenance.model_dump(),
            "model": table.model.name,
            "tp": table.tp,
            "dtype": table.dtype,
            "tables": sorted(table.tables),
            "contention": table.contention.model_dump(),
            "warnings": warnings_of([*self._curves.values(), *self._surfaces.values()]),
        }

    # -- prices: positions of Work are (tokens, sequences, kv_tokens, bytes, chunks, beside_bytes, layers) --

    def _curve(self, name: str, kind: OpKind) -> Curve:
        found = self._curves.get(name)
        if found is None:
            raise self._missing(name, kind)
        return found

    def _surface(self, name: str, kind: OpKind) -> Surface:
        found = self._surfaces.get(name)
        if found is None:
            raise self._missing(name, kind)
        return found

    def _missing(self, name: str, kind: OpKind) -> InputError:
        return InputError(f"cost table {self._where}: holds no table '{name}', which {kind} operations need")

    def _by(self, amount: int, name: str, kind: OpKind) -> float:
        return self._curve(name, kind).at(amount) if amount else 0.0

    def _gpu_attention(self, work: Work) -> Any:
        """Prefill chunks by (length, start), added up, and decode by (sequences, KV tokens)."""
        _, sequences, kv, _, chunks, _, _ = work
        prefill = 0.0
        if chunks:
            surface = self._surface("gpu_attn_prefill", OpKind.GPU_ATTN)
            for start, length in chunks:
                prefill += surface.at(length, start)
        if not sequences:
            return np.full(kv.shape, prefill) if isinstance(kv, np.ndarray) else prefill
        surface = self._surface("gpu_attn_decode", OpKind.GPU_ATTN)
        if isinstance(kv, np.ndarray):
            return prefill + surface.at_array(sequences, kv.astype(np.float64))
        return prefill + surface.at(sequences, kv)

    def _cpu_attention(self, work: Work) -> Any:
        _, sequences, kv, _, _, beside, layers = work
        if layers > 1:  # one run of all of them, of which this is a share
            every = Work(0, sequences * layers, kv * layers, beside_bytes=beside * layers)
            return self._cpu_attention(every) / layers
        if not sequences:
            return np.zeros(kv.shape) if isinstance(kv, np.ndarray) else 0.0
        surface = self._surface("cpu_attn", OpKind.CPU_ATTN)
        share, copies_s = self._cpu_share, beside * self._copy_s
        if isinstance(kv, np.ndarray):
            alone = surface.at_array(sequences, kv.astype(np.float64))
            return alone + np.minimum(alone / share, copies_s) * (1.0 - share)
        seconds = surface.at(sequences, kv)
        return seconds + min(seconds / share, copies_s) * (1.0 - share)

    def _copy(self, work: Work, name: str, opposite: str, kind: OpKind) -> float:
        """A copy and the bytes that travel against it; what those need comes from the opposite swap table."""
        nbytes, beside = work[3], work[5]
        if not nbytes:
            return 0.0
        alone = self._curve(name, kind).at(nbytes)
        share = self._duplex_share
        if not beside or share == 1.0:
            return alone
        against = self._curves.get(opposite)
        other = against.at(beside) if against is not None else beside * self._copy_s
        return alone + min(alone, other) / share * (1.0 - share)

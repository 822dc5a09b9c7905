"""What relayed decodes leave in each layer until the next step takes it up there, in the ``cpu`` executor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neo.runtime.block_tables import Ints
from neo.runtime.model import Model
from neo.runtime.rope import Rope
from neo.runtime.step_inputs import RelayRows


class Relay:
    """By layer and lane: the residual stream, and q, k, v on their way to CPU attention.

    Args:
        model: on the CPU.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        config = model.config
        kv = (config.kv_heads, config.head_dim)
        self._shapes = {"hidden": (config.hidden,), "q": (config.heads, config.head_dim), "k": kv, "v": kv}
        self._kept = {name: self._room(0, name) for name in self._shapes}
        self._out: dict[int, tuple[Ints, Tensor]] = {}

    def _room(self, lanes: int, name: str) -> Tensor:
        return torch.zeros((self._model.config.layers, lanes, *self._shapes[name]), dtype=self._model.dtype)

    def begin(self, rows: RelayRows) -> None:
        """The relayed decodes of the next step."""
        self.rows = rows
        self._out.clear()
        have = self._kept["q"].shape[1]
        if rows.lanes > have:
            for name, before in self._kept.items():
                self._kept[name] = self._room(rows.lanes, name)
                self._kept[name][:, :have] = before
        layers = self._model.config.layers
        positions = torch.from_numpy(rows.lengths[:layers].astype(np.int64) - 1)
        self._rope = self._model.rope(positions.flatten())

    def attention(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Ints, Ints] | None:
        """k, v, q, where the output goes, slots and lengths of a layer's CPU attention; None without any."""
        lanes = self.rows.coming(layer)
        if not len(lanes):
            return None
        index = torch.from_numpy(lanes.astype(np.int64))
        q, k, v = (self._kept[name][layer].index_select(0, index) for name in "qkv")
        out = torch.empty_like(q)
        self._out[layer] = (lanes, out)
        at = layer + 1
        return k, v, q, out, self.rows.slots[at, lanes], self.rows.lengths[at, lanes]

    def turn(self, layer: int, rope: Rope) -> None:
        """Rows of ``rope`` are of those who do this layer's PRE."""
        lanes, rows = self.rows.lanes, self.rows.rows
        mine = slice(layer * lanes, (layer + 1) * lanes)
        rope.cos[rows], rope.sin[rows] = self._rope.cos[mine], self._rope.sin[mine]

    def exchange(
        self, layer: int, hidden: Tensor, qkv: tuple[Tensor, Tensor, Tensor], attended: Tensor
    ) -> None:
        """Between a layer's PRE and POST: those who did PRE leave, those whose attention is there come."""
        rows, lanes = self.rows.rows, self.rows.lanes
        kept = self._kept["hidden"][layer, :lanes]
        leaving = hidden[rows].clone()
        hidden[rows] = kept
        kept.copy_(leaving)
        for name, mine in zip("qkv", qkv, strict=True):
            self._kept[name][layer, :lanes] = mine[rows]
        if (found := self._out.get(layer)) is not None:
            attended[torch.from_numpy(found[0].astype(np.int64)) + self.rows.row] = found[1]

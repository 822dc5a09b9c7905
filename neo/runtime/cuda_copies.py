"""Block copies of captured steps: a graph is captured once, and what is copied differs from step to step.

Each direction has a list for every layer at an address that stays, and its length beside it, which the
kernel reads (``count_at`` of ``neo.runtime.cuda_transfers.copy_blocks``). A step's lists are sent ahead of
its graph, on the stream that replays it: whatever read those of the step before has ended by then.
"""

from __future__ import annotations

import numpy as np
import torch

from neo.runtime import cuda_transfers as transfers
from neo.runtime.block_tables import Copies
from neo.runtime.cuda_sender import Sender
from neo.runtime.cuda_step import Way
from neo.runtime.kv_memory import KVMemory

MOST_PAIRS = 1024
"""Blocks of a layer that a captured step copies in one direction at most. With 16 tokens a block these are
16k tokens: to copy more takes longer than to launch a step's operations one by one, which is then done."""
_WAYS = (Way.OUT, Way.IN)


class FixedCopies:
    """Copies ahead of the layers of a captured step, out of the GPU and into it.

    Args:
        gpu, cpu: KV memory of the two tiers.
        layers: of the model.
        sender: to the GPU.
        most: blocks of a layer and direction at most.
    """

    def __init__(
        self, gpu: KVMemory, cpu: KVMemory, layers: int, sender: Sender, most: int = MOST_PAIRS
    ) -> None:
        self._layers, self._most, self._sender = layers, most, sender
        device = sender.device
        self._lists = torch.zeros((len(_WAYS), layers, 2, most), dtype=torch.int32, device=device)
        self._counts = torch.zeros((len(_WAYS), layers), dtype=torch.int32, device=device)
        out, into = self._lists[:, 0]
        self._launch = {
            Way.OUT: transfers.copy_blocks(gpu.tensor, cpu.tensor, out[0], out[1], self._counts[0, :1]),
            Way.IN: transfers.copy_blocks(cpu.tensor, gpu.tensor, into[0], into[1], self._counts[1, :1]),
        }

    def fits(self, copies: Copies) -> bool:
        """Whether a step's copies are such, and no more than there is room for."""
        ways = [way for way in (copies.swap_out, copies.swap_in) if way]
        return not copies.behind and all(way.counts(self._layers).max() <= self._most for way in ways)

    def begin(self, copies: Copies) -> None:
        """The next step's lists, sent on the current stream."""
        found = [way.stacked(self._layers) for way in (copies.swap_out, copies.swap_in)]
        parts = [counts for _, counts in found] + [pairs.ravel() for pairs, _ in found]
        sent = self._sender.send(np.concatenate(parts))
        numbers = self._counts.numel()
        self._counts.view(-1).copy_(sent[:numbers])
        at = numbers
        for way, (pairs, _) in zip(self._lists, found, strict=True):
            if pairs.size:
                way[:, :, : pairs.shape[2]].copy_(sent[at : at + pairs.size].view(pairs.shape))
            at += pairs.size

    def run(self, way: Way, layer: int, stream: int | None = None) -> None:
        """Copy what a layer's list says when this runs, now or whenever it is replayed.

        ``stream``: its handle, None for torch's current one.
        """
        launch, index = self._launch[way], _WAYS.index(way)
        pairs = self._lists[index, layer]
        launch.args.src_blocks, launch.args.dst_blocks = pairs[0].data_ptr(), pairs[1].data_ptr()
        launch.args.count_at = self._counts[index, layer:].data_ptr()
        launch(stream)

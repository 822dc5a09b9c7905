"""Copies of captured steps: lists and their lengths are read where they lie, whenever a graph is replayed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import Device, device

from neo.runtime.block_tables import Copies, CopyList
from neo.runtime.cuda_copies import FixedCopies
from neo.runtime.cuda_sender import Sender
from neo.runtime.cuda_step import Way
from neo.runtime.kv_memory import KVMemory

__all__ = ["device"]

LAYERS, BLOCKS, MOST = 3, 12, 4


def memory(where: Device, seed: int, pinned: bool) -> KVMemory:
    values = torch.randn(BLOCKS, 2, 2, 32, generator=torch.Generator().manual_seed(seed)).half()
    return KVMemory(where.pinned(values) if pinned else where(values), 8)


def ints(*numbers: object) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def lists(*parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> CopyList:
    found = CopyList()
    for part in parts:
        found.add(*part)
    return found


FIRST = Copies(lists((ints(0, 1, 2), ints([0, 1], [2, 3], [4, 5]), ints([5, 4], [3, 2], [1, 0]))))
SECOND = Copies(
    lists((ints(1), ints([7]), ints([8])), (ints(0, 1), ints([1], [2]), ints([9], [10]))),
    lists((ints(0, 2), ints([3, 4, 5], [6, 7, 8]), ints([9, 8, 7], [6, 10, 11]))),
)


@pytest.mark.parametrize("steps", [(FIRST, SECOND), (SECOND, FIRST), (SECOND, Copies(), SECOND)])
def test_every_layer_copies_what_the_latest_lists_say(device: Device, steps: tuple[Copies, ...]) -> None:
    """The launches are those of the first step, as a graph has them."""
    gpu, cpu = memory(device, 1, pinned=False), memory(device, 2, pinned=True)
    fixed = FixedCopies(gpu, cpu, LAYERS, Sender(gpu.tensor.device), MOST)
    for copies in steps:
        assert fixed.fits(copies)
        fixed.begin(copies)
        for layer in range(LAYERS):
            for way, given in ((Way.OUT, copies.swap_out), (Way.IN, copies.swap_in)):
                device.wait()
                source, target = (gpu, cpu) if way is Way.OUT else (cpu, gpu)
                sources, targets = (torch.from_numpy(a).long() for a in given.at(layer))
                expected = target.tensor.cpu().clone()
                expected[targets] = source.tensor.cpu()[sources]
                fixed.run(way, layer, device.stream)
                device.wait()
                assert torch.equal(target.tensor.cpu(), expected)


def test_what_is_more_or_comes_behind_does_not_fit(device: Device) -> None:
    gpu, cpu = memory(device, 1, pinned=False), memory(device, 2, pinned=True)
    fixed = FixedCopies(gpu, cpu, LAYERS, Sender(gpu.tensor.device), MOST)
    most = (ints(2), ints(range(MOST)), ints(range(MOST)))
    more = (ints(0, 2), ints([4], [5]), ints([4], [5]))
    assert fixed.fits(Copies())
    assert fixed.fits(Copies(lists(most), lists(most)))
    assert not fixed.fits(Copies(lists(most, more)))
    assert not fixed.fits(Copies(swap_in=lists(more, most)))
    assert not fixed.fits(Copies(behind=lists(more)))


@pytest.mark.parametrize("copies", [FIRST, SECOND])
def test_lists_of_all_layers_are_those_of_each(copies: Copies) -> None:
    for way in (copies.swap_out, copies.swap_in):
        stacked, counts = way.stacked(LAYERS)
        assert np.array_equal(counts, way.counts(LAYERS))
        for layer in range(LAYERS):
            sources, targets = way.at(layer)
            assert stacked[layer, 0, : counts[layer]].tolist() == sources.tolist()
            assert stacked[layer, 1, : counts[layer]].tolist() == targets.tolist()

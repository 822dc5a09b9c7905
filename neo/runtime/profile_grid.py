"""What ``neo profile`` measures: sizes of operations within a system's budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from neo.core.view import Limits


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes to measure; each axis ascends, and has two values even where budgets allow one.

    Attributes:
        tokens: lengths of prefill chunks, all of them rows of dense work.
        beyond: more rows of dense work than the GPU's memory has tokens: what is bound for the host, and
            decodes there, beside a chunk.
        starts: prefixes of prefill chunks.
        rows: that HEAD samples, of decodes on both tiers.
        gpu_sequences: of decode attention on the GPU.
        gpu_kv: KV tokens that it reads, over all sequences.
        cpu_sequences: of decode attention on the CPU.
        cpu_kv: likewise.
        moved, spilled, streamed: tokens whose KV is swapped, whose new KV goes to the host, and of a prefix
            that is streamed to a chunk; as many values as budgets allow.
    """

    tokens: tuple[int, ...]
    beyond: tuple[int, ...]
    starts: tuple[int, ...]
    rows: tuple[int, ...]
    gpu_sequences: tuple[int, ...]
    gpu_kv: tuple[int, ...]
    cpu_sequences: tuple[int, ...]
    cpu_kv: tuple[int, ...]
    moved: tuple[int, ...]
    spilled: tuple[int, ...]
    streamed: tuple[int, ...]

    @classmethod
    def for_budget(
        cls, limits: Limits, gpu: int, cpu: int, quick: bool = False, longest: int = 1 << 31
    ) -> Grid:
        """Powers of 2 (dense work, which is not linear), 4 and 8 up to what a step of these budgets can have.

        ``gpu`` and ``cpu`` are the tokens that each tier holds, in whole blocks, at least two on the GPU. KV
        on its way to the host has as much room as the GPU's tier. ``quick`` takes powers of 4 for dense
        work too. ``longest``: prompt and output of a request at most, so nothing has a longer prefix.
        """
        size = limits.block_size
        fine = 4 if quick else 2
        both = min(gpu, cpu)
        prefix = max(1, min(gpu, longest) - 1)
        tokens = powers(1, min(limits.max_batch_tokens, gpu), fine)
        most = min(limits.max_batch_tokens, gpu + both + host_decodes(limits, both, cpu))
        return cls(
            tokens,
            powers(tokens[-1], most, fine)[1:] if most > tokens[-1] else (),
            (0, *within(min(4 * size, prefix), prefix, 8)),
            powers(1, min(limits.max_seqs, gpu // size + cpu // size), fine),
            powers(1, min(limits.max_seqs, gpu // size), 4),
            powers(1, gpu, 4),
            powers(1, max(1, min(limits.max_seqs, cpu // size)), 4),
            powers(1, cpu, 4),
            within(size, max(min(gpu - size, cpu), min(gpu, cpu - size)), 8),  # beside a decode with a block
            within(1, min(both, limits.max_batch_tokens), 8),
            within(1, min(both - 1, prefix), 8),
        )


def host_decodes(limits: Limits, spilled: int, cpu: int) -> int:
    """Most decodes on the host beside a chunk on the GPU and one of ``spilled`` tokens bound for the host."""
    blocks = cpu // limits.block_size - -(-spilled // limits.block_size)
    return max(0, min(limits.max_seqs - 2, blocks))


def powers(first: int, last: int, ratio: int) -> tuple[int, ...]:
    """``first``, times ``ratio`` again and again, and ``last``; at least two values."""
    found = [first]
    while found[-1] * ratio < last:
        found.append(found[-1] * ratio)
    if last > found[-1]:
        found.append(last)
    return tuple(found) if len(found) > 1 else (first, first + 1)


def within(first: int, last: int, ratio: int) -> tuple[int, ...]:
    """The same, but nothing beyond ``last``, so perhaps one value or none."""
    return tuple([n for n in powers(first, last, ratio) if n <= last]) if 0 < first <= last else ()


def corner(last: int) -> int:
    """The power of 2 above ``last``."""
    return 1 << last.bit_length()


def to_corners(entry: dict[str, Any]) -> dict[str, Any]:
    """A two-axis table out to the corners at which ``neo`` asks for it: no KV tokens, and powers of 2.

    The policy interpolates between powers of 2 (as the paper's does), so that it looks beyond the largest
    step that there can be. There the table goes on with its last slope, as every look-up would, but silently.
    """
    first, second = entry["axes"]
    seconds = np.array(entry["seconds"])
    axes = {}
    for axis, name in enumerate((first, second)):
        sizes = list(entry["axes"][name])
        seconds = np.moveaxis(seconds, axis, 0)
        slope = np.maximum(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        far = corner(sizes[-1])
        seconds = np.moveaxis(np.concatenate([seconds, [seconds[-1] + slope * (far - sizes[-1])]]), 0, axis)
        axes[name] = [*sizes, far]
    for axis in (0, 1):  # slopes differ: what ascended must do so still
        seconds = np.maximum.accumulate(seconds, axis)
    seconds = np.concatenate([seconds[:, :1], seconds], axis=1)
    return {"axes": axes | {second: [0, *axes[second]]}, "seconds": seconds.tolist()}


def from_nothing(entry: dict[str, Any]) -> dict[str, Any]:
    """A one-axis table down to size 0, at what its first size takes: a step's share of a copy may be less."""
    ((name, sizes),) = entry["axes"].items()
    if sizes[0] == 0:
        return entry
    return {"axes": {name: [0, *sizes]}, "seconds": [entry["seconds"][0], *entry["seconds"]]}


def to_corner(entry: dict[str, Any]) -> dict[str, Any]:
    """The same of a one-axis table."""
    ((name, sizes),) = entry["axes"].items()
    seconds = entry["seconds"]
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
    far = corner(sizes[-1])
    return {"axes": {name: [*sizes, far]}, "seconds": [*seconds, seconds[-1] + slope * (far - sizes[-1])]}

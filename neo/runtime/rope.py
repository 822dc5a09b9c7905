"""Rotary position embedding (Su et al., arXiv 2104.09864) and the ways to stretch it.

Dimension ``i`` and ``i + head_dim / 2`` of a head turn together by ``position * frequency[i]`` radians.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neo.runtime.model_config import RopeConfig


class Rope(NamedTuple):
    """Cosines and signed sines of some rows' positions, each ``[rows, 1, head_dim]`` in the model's dtype."""

    cos: Tensor
    sin: Tensor  # negated in the first half of head_dim


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: float32 ``[head_dim / 2]``, on the CPU.

    In float32 as models were trained: at long positions a better rounding would give other angles.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / torch.pow(torch.tensor(rope.theta, dtype=torch.float32), exponents)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":  # position interpolation, arXiv 2306.15595
        return plain / rope.factor
    kept = _llama3_kept(rope, plain) if rope.kind == "llama3" else _yarn_kept(rope, head_dim)
    return plain * kept + plain / rope.factor * (1.0 - kept)


def _llama3_kept(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Share of the unscaled frequency: 1 for short waves, 0 for long ones (Llama 3.1's reference code)."""
    turns = rope.original_max_positions * plain / (2 * math.pi)  # within the original context
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return ramp.clamp(0.0, 1.0)


def _yarn_kept(rope: RopeConfig, head_dim: int) -> Tensor:
    """The same for YaRN (arXiv 2309.00071, section 3.2): the ramp runs over dimensions, not over turns."""

    def dimension(turns: float) -> float:
        """Where a pair makes so many turns within the original context."""
        wave = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    return 1.0 - ramp.clamp(0.0, 1.0)


class RotaryEmbedding:
    """Computes the angles of a step's rows: a few small operations, where a table would take memory.

    Attributes:
        signed: radians per position, float32 ``[head_dim]``, negated in the first half: the cosine is even
            and the sine odd, so these give the signs of the rotation.
        scale: of cosines and sines.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        half = frequencies(rope, head_dim)
        self.signed = torch.cat((-half, half)).to(device)
        self.scale = rope.attention_factor
        self._dtype = dtype

    def __call__(self, positions: Tensor) -> Rope:
        """Of ``positions`` int64 ``[rows]``, on the model's device."""
        angles = positions.to(torch.float32)[:, None, None] * self.signed
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return Rope(cos.to(self._dtype), sin.to(self._dtype))


def rotate(heads: Tensor, rope: Rope) -> Tensor:
    """``heads [rows, n, head_dim]`` turned to their positions, as a new contiguous tensor."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return (heads * rope.cos).addcmul_(swapped, rope.sin)

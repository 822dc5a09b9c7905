"""Norms without kernels of their own: weights go into the matrices behind them, scales to the readers.

``norm(h) @ W.T`` is ``s * (h @ (W * g).T)`` with the norm's weight ``g`` in the columns of ``W`` and the
row's scale ``s = 1 / sqrt(mean(h^2) + eps)``. Once ``g`` is in ``W``, the product takes the hidden states
as they are, and who reads it next (rotation and append, SiLU) multiplies by ``s``; products that end a
block are added to the hidden states by cuBLAS. A layer of few rows is then seven kernels one behind the
other rather than nine.

A weight is rounded once more, to the type, where otherwise the normalised row is: what is rounded differs,
not how often. That is for bf16 alone: fp32 is compared exactly, and products of rows that are not
normalised may leave the range of fp16.
"""

from __future__ import annotations

import os

import torch

from neo.runtime.weights import LayerWeights, Weights

MOST_ROWS = 480
"""Of a step without kernels for norms; a size that rows are padded to. From 512 on rotation and append takes
16 rows a block, which does not scale them."""
_SWITCH = "NEO_CUDA_FOLD"


def foldable(weights: Weights) -> bool:
    """Whether norms can be folded: bf16, no bias but that of Q, K and V, which is added behind the scale."""
    if os.environ.get(_SWITCH) == "0" or weights.embedding.dtype is not torch.bfloat16:
        return False
    return all(w.out_bias is w.gate_up_bias is w.down_bias is None for w in weights.layers)


def fold_norms(layers: tuple[LayerWeights, ...]) -> None:
    """Multiply the norms' weights into the matrices behind them, in place, and make them ones.

    What the layers compute is the same with a norm of ones and without. Folding again changes nothing.
    """
    for layer in layers:
        for norm, matrix in ((layer.input_norm, layer.qkv), (layer.post_norm, layer.gate_up)):
            matrix.mul_(norm)
            norm.fill_(1.0)

"""The smallest preset of a model, for tests that name one in a file."""

from __future__ import annotations

TINY_TOML = """
name = "tiny"
source = "test"
layers = 2
hidden = 64
heads = 2
kv_heads = 1
head_dim = 64
intermediate = 96
vocab = 256
max_positions = 128
mlp_matrices = 3
tied_embeddings = true
dtype_bytes = 4
"""
"""A preset of a model that commands can run with random weights."""

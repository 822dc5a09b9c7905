"""Layers without kernels for norms: the same model, by `neo.runtime.model` and by the kernels of a step."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_cases import Device, device
from torch import Tensor

from neo.runtime.cuda_fold import fold_norms, foldable
from neo.runtime.cuda_linear import Tuned
from neo.runtime.cuda_rows import Layout, Rows
from neo.runtime.kv_memory import KVMemory
from neo.runtime.model import Model
from neo.runtime.model_config import ModelConfig
from neo.runtime.step_inputs import Append, BatchInputs, DecodeRows
from neo.runtime.weights import LayerWeights, RandomWeights, Weights, load_weights

__all__ = ["device"]

CONFIG = ModelConfig(
    "folded", "LlamaForCausalLM", hidden=192, layers=3, heads=4, kv_heads=2, head_dim=64, intermediate=264,
    vocab=96, max_positions=128,
)  # fmt: skip


def spread(weights: Weights, seed: int = 0) -> Weights:
    """The same with norms and biases as trained ones are: far from 1, and apart."""
    generator = torch.Generator().manual_seed(seed)
    for layer in weights.layers:
        for norm in (layer.input_norm, layer.post_norm):
            norm.copy_(torch.exp2(4 * torch.rand(norm.shape, generator=generator) - 3))
        if layer.qkv_bias is not None:
            layer.qkv_bias.copy_(torch.randn(layer.qkv_bias.shape, generator=generator) / 2)
    return weights


def model_of(dtype: torch.dtype, place: str = "cpu", **over: Any) -> Model:
    config = replace(CONFIG, dtype=str(dtype).removeprefix("torch."), **over)
    weights = load_weights(config, RandomWeights(1, config.layers), dtype, torch.device(place))
    return Model(config, spread(weights))


def in_float64(model: Model) -> Model:
    def wide(layer: LayerWeights) -> LayerWeights:
        found = {f.name: getattr(layer, f.name) for f in fields(layer)}
        return LayerWeights(**{n: None if t is None else t.double().cpu() for n, t in found.items()})

    weights = model.weights
    layers = tuple(wide(w) for w in weights.layers)
    ends = [t.double().cpu() for t in (weights.embedding, weights.norm, weights.head)]
    return Model(model.config, Weights(ends[0], layers, ends[1], ends[2]))


def hidden_of(model: Model, tokens: Tensor) -> Tensor:
    """Of every token of rows ``tokens`` [rows, tokens]: [rows, tokens, hidden]."""
    found = []
    for row in tokens:
        rope, hidden = model.rope(torch.arange(len(row))), model.embed(row)
        for layer in range(model.config.layers):
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in model.pre(layer, hidden, rope))
            attended = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
            hidden = model.post(layer, hidden, attended[0].transpose(0, 1))
        found.append(hidden)
    return torch.stack(found)


@torch.inference_mode()
def test_folding_changes_nothing_but_rounding_and_can_be_repeated() -> None:
    model = model_of(torch.float64, qkv_bias=True)
    tokens = torch.arange(20).view(2, 10)
    before = hidden_of(model, tokens)
    fold_norms(model.weights.layers)
    folded = [w.qkv.clone() for w in model.weights.layers]
    assert torch.allclose(hidden_of(model, tokens), before, rtol=1e-12, atol=1e-12)
    fold_norms(model.weights.layers)
    assert all(torch.equal(w.qkv, f) for w, f in zip(model.weights.layers, folded, strict=True))


def test_what_is_folded() -> None:
    assert foldable(model_of(torch.bfloat16, qkv_bias=True).weights)
    assert not foldable(model_of(torch.float16).weights)  # too small a range for rows that are not scaled
    assert not foldable(model_of(torch.float32).weights)  # compared exactly
    assert not foldable(model_of(torch.bfloat16, out_bias=True).weights)
    assert not foldable(model_of(torch.bfloat16, mlp_bias=True).weights)


def decoded(model: Model, tokens: Tensor, device: Device) -> Tensor:
    """`hidden_of` by the kernels of decode steps, all rows a token further in each."""
    rows, count = tokens.shape
    config = model.config
    memory = KVMemory.allocate(rows * config.layers, config.kv_heads, config.head_dim, 32, model.dtype)
    if device.name != "cpu":
        memory.tensor = device(memory.tensor)
    tuned = Tuned(model.weights)
    own = Rows(model, memory, rows, rows, tuned.layers)
    tables = device(torch.arange(rows * config.layers, dtype=torch.int32).view(config.layers, rows, 1))
    slots, none = np.arange(rows, dtype=np.int32), np.empty(0, dtype=np.int32)
    nobody = DecodeRows(0, none, none)
    found = []
    for at in range(count):
        places = np.full(rows, at, dtype=np.int32)
        batch = BatchInputs(
            tokens=tokens[:, at].numpy(), positions=places.astype(np.int64), chunks=(),
            gpu=DecodeRows(0, slots, places + 1), stream=nobody, cpu=nobody,
            append=Append(0, slots, places), late=Append(0, none, none), late_streams=frozenset(),
            spill=Append(0, none, none), sampled=(),
        )  # fmt: skip
        layout = Layout(rows, 0, rows, rows, 0)
        own.inputs.fill(batch, layout)
        own.inputs.send()
        own.begin(layout, torch.zeros(1, dtype=torch.int32, device=device.name))
        for layer, weights in enumerate(model.weights.layers):
            table = tables[layer].data_ptr(), 1
            own.pre(layer, weights, table, layer == 0)
            own.attend(layer, table, early=True)
            own.post(layer, weights)
        found.append(own.ended().clone())
        device.wait()
    return torch.stack(found, 1)


@torch.inference_mode()
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_a_step(device: Device, monkeypatch: pytest.MonkeyPatch, folded: bool, bias: bool) -> None:
    """Within the rounding of bf16, either way: by how much is measured on what keeps its norms."""
    if device.name == "cpu":
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setenv("NEO_CUDA_FOLD", str(int(folded)))
    model = model_of(torch.bfloat16, device.name, qkv_bias=bias)
    tokens = (torch.arange(15).view(3, 5) * 7) % CONFIG.vocab
    exact = hidden_of(in_float64(model), tokens)
    got = decoded(model, tokens, device).double().cpu()
    assert bool((model.weights.layers[0].input_norm == 1).all()) == folded
    errors = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert errors.max() < 3 * 2.0**-8, errors

"""Frequencies and rotation against transformers' at long positions, and against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("torch", reason="the model runner needs torch")
pytest.importorskip("transformers", reason="frequencies are compared with transformers'")

import torch
from model_builders import quiet, tiny_config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from neo.runtime.model_config import RopeConfig
from neo.runtime.rope import RotaryEmbedding, frequencies, rotate

# As published: Llama 3.1 and 3.2, Qwen2.5 with YaRN, and plain ones.
PUBLISHED: dict[str, tuple[RopeConfig, dict[str, Any]]] = {
    "llama-2": (RopeConfig(), {"rope_type": "default", "rope_theta": 10000.0}),
    "qwen": (RopeConfig(theta=1e6), {"rope_type": "default", "rope_theta": 1e6}),
    "linear": (
        RopeConfig("linear", factor=8.0),
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
    ),
    "llama-3.1": (
        RopeConfig("llama3", 500000.0, 8.0, 8192, 1.0, 4.0),
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama-3.2": (
        RopeConfig("llama3", 500000.0, 32.0, 8192, 1.0, 4.0),
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen-yarn": (
        RopeConfig("yarn", 1e6, 4.0, 32768, attention_factor=0.1 * math.log(4.0) + 1.0),
        {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    ),
}
POSITIONS = [0, 1, 2, 63, 1000, 4095, 8191, 8192, 32767, 32768, 100_003, 131_071]


def theirs(parameters: dict[str, Any], head_dim: int, positions: Any, dtype: Any) -> Any:
    config = tiny_config(
        "llama", head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters
    )
    with quiet():
        return LlamaRotaryEmbedding(config)(torch.empty(1, dtype=dtype), positions[None])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", PUBLISHED)
def test_angles_of_long_positions(name: str, head_dim: int) -> None:
    rope, parameters = PUBLISHED[name]
    positions = torch.tensor(POSITIONS)
    cos, sin = theirs(parameters, head_dim, positions, torch.float32)
    ours = RotaryEmbedding(rope, head_dim, torch.float32, torch.device("cpu"))(positions)
    assert ours.cos.shape == (len(POSITIONS), 1, head_dim)
    half = head_dim // 2
    signed = torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)
    exact = name in ("llama-2", "qwen", "linear")
    tolerance = 0.0 if exact else 1e-4  # radians: frequencies differ in their last bit, times the position
    assert float((ours.cos[:, 0] - cos[0]).abs().max()) <= tolerance
    assert float((ours.sin[:, 0] - signed).abs().max()) <= tolerance


@pytest.mark.parametrize("name", PUBLISHED)
def test_scaling_stays_between_its_bounds(name: str) -> None:
    """Between the plain frequency and that divided by the factor, with both reached by the ramps."""
    rope, _ = PUBLISHED[name]
    plain, scaled = frequencies(RopeConfig(theta=rope.theta), 128), frequencies(rope, 128)
    ratio = (plain / scaled).double()
    assert bool((ratio >= 1 - 1e-6).all())
    assert bool((ratio <= rope.factor * (1 + 1e-6)).all())
    assert float(ratio[-1]) == pytest.approx(rope.factor)
    assert float(ratio[0]) == pytest.approx(rope.factor if rope.kind == "linear" else 1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotation(dtype: str) -> None:
    """Each pair of dimensions is a complex number that is multiplied by exp(i position frequency)."""
    kind = getattr(torch, dtype)
    heads = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0)).to(kind)
    positions = torch.tensor([0, 1, 5, 100, 255])
    embed = RotaryEmbedding(RopeConfig(), 16, kind, torch.device("cpu"))
    kept = heads.clone()
    got = rotate(heads, embed(positions))
    assert torch.equal(heads, kept)
    angles = positions.double()[:, None] * torch.tensor([10000.0 ** (-i / 8) for i in range(8)]).double()
    turned = torch.complex(heads.double()[..., :8], heads.double()[..., 8:])
    turned = turned * torch.polar(torch.ones(5, 8).double(), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    assert float((got.double() - expected).abs().max()) < (5e-5 if dtype == "float32" else 0.04)


def test_scores_depend_on_distance_only() -> None:
    """What rotary embedding is for: q at p + d with k at p scores the same for every p."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 1, 64, generator=generator) for _ in range(2))
    embed = RotaryEmbedding(PUBLISHED["llama-3.1"][0], 64, torch.float32, torch.device("cpu"))
    scores = [
        float((rotate(q, embed(torch.tensor([p + 17]))) * rotate(k, embed(torch.tensor([p])))).sum())
        for p in (0, 5, 400, 9000)
    ]
    assert scores == pytest.approx([scores[0]] * 4, abs=5e-3)

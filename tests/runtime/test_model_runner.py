"""The model runner against transformers: same weights, same logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the model runner needs torch")
pytest.importorskip("safetensors", reason="the model runner needs safetensors")
pytest.importorskip("transformers", reason="its results are compared with transformers'")

import json

import torch
from model_builders import ARCHITECTURES, hf_greedy, hf_logits, old_rope, save_tiny

from neo.runtime.model import Model

TOKENS = [5, 9, 111, 3, 77, 77, 20, 64, 1, 126, 42, 8, 99, 30, 31, 32, 7]


def attend(q: Any, k: Any, v: Any) -> Any:
    """Causal attention of one sequence from its beginning, ``[T, heads, head_dim]``."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


@torch.inference_mode()
def logits_of(model: Model, tokens: Sequence[int]) -> Any:
    """Logits of every position of a sequence."""
    rope = model.rope(torch.arange(len(tokens)))
    hidden = model.embed(torch.tensor(tokens))
    for layer in range(model.config.layers):
        hidden = model.post(layer, hidden, attend(*model.pre(layer, hidden, rope)))
    return model.head(hidden)


def error(got: Any, expected: Any) -> float:
    """Largest difference, as a share of the largest logit."""
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    return float((got - expected).abs().max() / expected.abs().max())


def assert_same_as_transformers(folder: Path, tokens: Sequence[int] = TOKENS) -> None:
    model = Model.load(folder, dtype="float32")
    assert error(logits_of(model, tokens), hf_logits(folder, tokens)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits(tmp_path: Path, arch: str, tied: bool) -> None:
    folder = save_tiny(tmp_path, arch, tie_word_embeddings=tied)
    model = Model.load(folder)
    assert (model.config.architecture, model.config.dtype, model.dtype) == (arch, "float32", torch.float32)
    assert (model.weights.head is model.weights.embedding) == tied
    assert_same_as_transformers(folder)


@pytest.mark.parametrize(
    ("arch", "over"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("mistral", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),
        ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
        ("llama", {"head_dim": 48}),
        ("qwen3", {"head_dim": 32, "attention_bias": True}),
        ("llama", {"num_hidden_layers": 1, "rms_norm_eps": 0.1}),
    ],
)
def test_variants(tmp_path: Path, arch: str, over: dict[str, Any]) -> None:
    assert_same_as_transformers(save_tiny(tmp_path, arch, **over))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shards(tmp_path: Path, arch: str) -> None:
    folder = save_tiny(tmp_path, arch, max_shard_size="30KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    assert_same_as_transformers(folder)


def spread(got: Any, expected: Any) -> float:
    """Root mean square difference, as a share of that of the logits."""
    return float((got - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.04), ("float16", 0.006)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sixteen_bits(tmp_path: Path, arch: str, dtype: str, tolerance: float) -> None:
    """As near to float32 of the same rounded weights as transformers comes in that dtype."""
    ours, theirs = [], []
    for seed in range(3):
        folder = save_tiny(tmp_path / str(seed), arch, seed, dtype=dtype)
        exact = hf_logits(folder, TOKENS)
        model = Model.load(folder)
        assert (model.config.dtype, model.config.spec().dtype_bytes) == (dtype, 2)
        ours.append(spread(logits_of(model, TOKENS), exact))
        theirs.append(spread(hf_logits(folder, TOKENS, dtype), exact))
    assert max(ours) < tolerance
    assert sum(ours) < 1.25 * sum(theirs)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("run", ["float32", "float16", "bfloat16"])
def test_dtype_is_converted(tmp_path: Path, stored: str, run: str) -> None:
    folder = save_tiny(tmp_path, "qwen2", dtype=stored)
    model = Model.load(folder, dtype=run)
    assert model.config.dtype == run
    assert {model.dtype, model.weights.layers[0].down.dtype} == {getattr(torch, run)}
    exact = Model.load(folder, dtype="float32").weights.layers[2].qkv
    assert torch.equal(model.weights.layers[2].qkv, exact.to(model.dtype))


ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn-odd": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
    },
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_rope_scaling_in_a_whole_model(tmp_path: Path, arch: str, kind: str) -> None:
    """Past the original 64 positions, dimensions on every side of the ramps, in both files' spellings."""
    folder = save_tiny(tmp_path, arch, head_dim=32, rope_parameters=ROPES[kind])
    tokens = [(i * 37 + i * i) % 128 for i in range(200)]
    expected = hf_logits(folder, tokens)
    assert error(logits_of(Model.load(folder), tokens), expected) < 2e-5
    path = folder / "config.json"
    data = json.loads(path.read_text())
    for field in ("rope_parameters", "rope_theta", "rope_scaling"):
        data.pop(field, None)
    old = old_rope(ROPES[kind])
    if old["rope_scaling"]:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    for spelling in (old, {"rope_parameters": ROPES[kind]}):
        path.write_text(json.dumps({**data, **spelling}))
        assert error(logits_of(Model.load(folder), tokens), expected) < 2e-5


@pytest.mark.parametrize(("arch", "over"), [("mistral", {}), ("qwen2", {"use_sliding_window": True})])
def test_a_sliding_window_limits_positions(tmp_path: Path, arch: str, over: dict[str, Any]) -> None:
    """Up to the limit that neo states, transformers' windowed attention is the full one; beyond it is not."""
    if over:
        over = {**over, "max_window_layers": 1}
    folder = save_tiny(tmp_path, arch, sliding_window=24, **over)
    model = Model.load(folder)
    assert model.config.max_positions == 24
    assert "sliding_window 24" in (model.config.limit_reason or "")
    tokens = [(i * 37 + i * i) % 128 for i in range(32)]
    expected, got = hf_logits(folder, tokens), logits_of(model, tokens)
    assert error(got[:24], expected[:24]) < 1e-5
    assert error(got[24:], expected[24:]) > 1e-2


def test_rows_do_not_mix(tmp_path: Path) -> None:
    """Rows of several requests in one call give what each gives alone."""
    model = Model.load(save_tiny(tmp_path, "qwen3"))
    tokens, positions = torch.tensor([5, 9, 111, 3, 77]), torch.tensor([0, 200, 7, 31, 2])
    with torch.inference_mode():
        q, k, v = model.pre(0, model.embed(tokens), model.rope(positions))
        heads = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(0))
        after = model.post(0, model.embed(tokens), heads)
        for i in range(5):
            alone = model.pre(0, model.embed(tokens[i : i + 1]), model.rope(positions[i : i + 1]))
            for got, expected in zip((q, k, v), alone, strict=True):
                torch.testing.assert_close(got[i], expected[0], rtol=1e-5, atol=1e-5)
            one = model.post(0, model.embed(tokens[i : i + 1]), heads[i : i + 1])
            torch.testing.assert_close(after[i], one[0], rtol=1e-5, atol=1e-5)


def test_layout_of_q_k_v(tmp_path: Path) -> None:
    """Heads of a row are contiguous, as the kernels read them; ``post`` works in place."""
    model = Model.load(save_tiny(tmp_path, "llama"))
    with torch.inference_mode():
        hidden = model.embed(torch.tensor([1, 2, 3]))
        q, k, v = model.pre(1, hidden, model.rope(torch.arange(3)))
        assert [x.shape for x in (q, k, v)] == [(3, 4, 16), (3, 2, 16), (3, 2, 16)]
        assert all(x.stride()[1:] == (16, 1) for x in (q, k, v))
        assert model.post(1, hidden, q).data_ptr() == hidden.data_ptr()
        assert model.head(hidden[2:]).shape == (1, 128)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_generation(tmp_path: Path, arch: str) -> None:
    folder = save_tiny(tmp_path, arch, seed=3)
    model = Model.load(folder)
    tokens = list(TOKENS)
    gaps = []
    for _ in range(12):
        best = logits_of(model, tokens)[-1].topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    made = tokens[len(TOKENS) :]
    assert made == hf_greedy(folder, TOKENS, 12)
    assert len(set(made)) > 6, "a generation that says something about the model"
    assert min(gaps) > 1e-3, "no near ties"


def test_greedy_generation_that_ends(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", seed=3)
    free = hf_greedy(folder, TOKENS, 8)
    ended = save_tiny(tmp_path / "ended", "llama", seed=3, eos_token_id=[1, free[3]])
    assert hf_greedy(ended, TOKENS, 8, eos=True) == free[: free.index(free[3]) + 1]
    assert hf_greedy(ended, TOKENS, 8) == free
    assert Model.load(ended).config.eos_token_ids == (1, free[3])


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    def state() -> list[Any]:
        return [
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
        ]

    before = state()
    logits_of(Model.load(save_tiny_unseen(tmp_path), load_format="dummy", seed=7), TOKENS)
    assert state() == before


def save_tiny_unseen(folder: Path) -> Path:
    """A tiny model, saved without a trace in torch's generator (transformers draws from it)."""
    kept = torch.get_rng_state()
    save_tiny(folder, "llama")
    torch.set_rng_state(kept)
    return folder

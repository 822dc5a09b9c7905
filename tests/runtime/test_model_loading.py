"""Weights: random ones, and every way in which a folder of files can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the model runner needs torch")
pytest.importorskip("safetensors", reason="the model runner needs safetensors")
pytest.importorskip("transformers", reason="its files are made with transformers")

import torch
from model_builders import save_tiny
from safetensors.torch import load_file, save_file

from neo.core.errors import InputError
from neo.runtime import model as model_module
from neo.runtime.model import Model
from neo.runtime.model_config import ModelConfig
from neo.runtime.weights import RandomWeights, Weights, load_weights

Q1 = "model.layers.1.self_attn.q_proj.weight"


def refused(folder: Path, *parts: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        Model.load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the tensors of a folder's single file; returns the file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_missing_tensors(tmp_path: Path) -> None:
    path = edit(save_tiny(tmp_path, "llama"), lambda t: t.pop(Q1))
    refused(tmp_path, f"checkpoint {path}: tensor {Q1}: is missing")
    edit(save_tiny(tmp_path, "llama"), lambda t: t.pop("lm_head.weight"))
    refused(tmp_path, "tensor lm_head.weight: is missing")
    edit(save_tiny(tmp_path, "qwen2"), lambda t: t.pop("model.layers.2.self_attn.v_proj.bias"))
    refused(tmp_path, "tensor model.layers.2.self_attn.v_proj.bias: is missing")


def test_shape(tmp_path: Path) -> None:
    path = edit(save_tiny(tmp_path, "llama"), lambda t: t.update({Q1: torch.zeros(64, 48)}))
    refused(tmp_path, f"{path}: tensor {Q1}: shape [64, 48], but the config makes it [64, 64]")


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_dtype(tmp_path: Path, dtype: Any, name: str) -> None:
    path = edit(save_tiny(tmp_path, "llama"), lambda t: t.update({Q1: torch.zeros(64, 64).to(dtype)}))
    refused(tmp_path, f"{path}: tensor {Q1}: dtype {name} is not one of F32, F16, BF16")


def test_tensors_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    """They would be left out silently: a bias that the config denies, a layer more than it says."""
    path = edit(
        save_tiny(tmp_path, "llama"),
        lambda t: t.update(
            {
                Q1.replace("weight", "bias"): torch.ones(64),
                "model.layers.9.input_layernorm.weight": torch.ones(64),
            }
        ),
    )
    refused(tmp_path, f"{path}: tensor model.layers.1.self_attn.q_proj.bias (and 1 more)", "3 layers")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit(save_tiny(tmp_path, "llama"), lambda t: t.update(old))
    Model.load(tmp_path)


def test_a_tied_head_that_is_stored(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert Model.load(folder).weights.head is not None
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refused(folder, "tensor lm_head.weight: differs from the embedding", "tie_word_embeddings")


def test_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    path = edit(folder, lambda t: t[Q1].__setitem__((3, 3), 7e4))
    refused(folder, f"{path}: tensor {Q1}: holds values that float16 cannot", dtype="float16")
    assert Model.load(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-100], "cut off or damaged"),
        (lambda data: data[:40], "cut off or damaged"),
        (lambda data: b"", "cut off or damaged"),
        (lambda data: b"\x80\x02}q\x00." * 9, "cut off or damaged"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid x\nsize 9\n", "git lfs pull"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = save_tiny(tmp_path, "llama") / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(tmp_path, f"checkpoint {path}: ", message)


def test_shards_that_are_not_as_the_index_says(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", max_shard_size="30KB")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = listed["weight_map"][Q1]

    def with_map(weight_map: Any) -> None:
        index.write_text(json.dumps({**listed, "weight_map": weight_map}))

    with_map({k: v for k, v in listed["weight_map"].items() if k != Q1})
    refused(folder, f"checkpoint {index}: tensor {Q1}: is missing")
    with_map({**listed["weight_map"], Q1: listed["weight_map"]["model.embed_tokens.weight"]})
    refused(folder, f"tensor {Q1}: is missing (the index names this file)")
    for wrong in ("../" + shard, "/etc/passwd", "sub/x.safetensors", 3):
        with_map({**listed["weight_map"], Q1: wrong})
        refused(folder, f"checkpoint index {index}: weight_map.{Q1}: ", "is not a file name")
    for wrong in ({}, None, ["x"]):
        with_map(wrong)
        refused(folder, f"checkpoint index {index}: weight_map: is missing")
    with_map(listed["weight_map"])
    Model.load(folder)
    (folder / shard).unlink()
    refused(folder, f"checkpoint index {index}: names {shard}, which is not in the folder")
    index.write_text("{")
    refused(folder, f"checkpoint index {index}: not valid JSON")


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    refused(
        folder, f"model folder {folder}: holds neither model.safetensors nor model.safetensors.index.json"
    )
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    refused(folder, "holds pytorch_model.bin", "does not unpickle", "save_pretrained")


def test_what_is_asked_for(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    refused(folder, "dtype 'float8' is not one of", dtype="float8")
    refused(folder, "load format 'dumy' is not one of", "did you mean 'dummy'", load_format="dumy")
    refused(folder, "device 'gpu0' cannot be used: ", device="gpu0")
    refused(folder, "device 'cuda:99' cannot be used: ", device="cuda:99")
    refused(folder / "config.json", "give the folder")
    refused(tmp_path / "nowhere", "no such folder")


# -- random weights -----------------------------------------------------------------------------------------


def tensors(weights: Weights) -> list[Any]:
    of_layers = [
        getattr(layer, name)
        for layer in weights.layers
        for name in ("input_norm", "qkv", "qkv_bias", "qk_norm", "out", "gate_up", "down")
    ]
    return [weights.embedding, weights.norm, weights.head, *(t for t in of_layers if t is not None)]


def test_random_weights_are_reproducible(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen3")
    first, again = (Model.load(folder, load_format="dummy", seed=5) for _ in range(2))
    for a, b in zip(tensors(first.weights), tensors(again.weights), strict=True):
        assert torch.equal(a, b)
    other = Model.load(folder / "config.json", load_format="dummy", seed=6)
    assert not torch.equal(first.weights.layers[1].down, other.weights.layers[1].down)
    assert not torch.equal(first.weights.layers[1].down, first.weights.layers[0].down)
    assert other.config.name == first.config.name
    assert torch.equal(first.weights.norm, torch.ones(64))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_random_weights_stay_finite_in_deep_models(dtype: str) -> None:
    config = ModelConfig("deep", "qwen2", 96, 64, 6, 2, 16, 256, 500, 64, qkv_bias=True, dtype=dtype)
    weights = load_weights(
        config, RandomWeights(0, config.layers), getattr(torch, dtype), torch.device("cpu")
    )
    model = Model(config, weights)
    with torch.inference_mode():
        hidden, rope = model.embed(torch.arange(8)), model.rope(torch.arange(8))
        for layer in range(config.layers):
            q, _, v = model.pre(layer, hidden, rope)
            hidden = model.post(layer, hidden, v.repeat_interleave(3, 1).contiguous())
            assert 0.01 < float(hidden.float().std()) < 10
            assert 0.1 < float(q.float().std()) < 10
        logits = model.head(hidden)
    assert 0.3 < float(logits.std()) < 3


def test_a_preset_with_random_weights() -> None:
    model = Model.load("stories15m", load_format="dummy")
    assert (model.config.architecture, model.dtype) == ("llama", torch.float32)
    count = sum(t.numel() for t in tensors(model.weights)) - model.weights.head.numel()
    assert count == pytest.approx(model.config.spec().params, rel=1e-3)
    assert Model.load("stories15m", load_format="dummy", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(InputError, match="no such folder"):
        Model.load("stories15m")
    with pytest.raises(InputError, match="unknown model 'nothing'"):
        Model.load("nothing", load_format="dummy")


def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/models.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    exec(code, {})
    assert capsys.readouterr().out == code.rpartition("# ")[2]


def test_a_model_that_memory_cannot_hold_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "available_bytes", lambda: 1 << 20)
    with pytest.raises(InputError, match=r"stories15m.*weights in float32 take 0\.\d GiB, 0\.0 GiB of"):
        Model.load("stories15m", load_format="dummy")

"""What is read from a Hugging Face folder's JSON files, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neo.core.errors import InputError
from neo.cost.presets import load_model, model_names
from neo.runtime.model_config import ModelConfig, RopeConfig, named_config, read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
PLAIN = {k: v for k, v in LLAMA.items() if k != "rope_scaling"}
MISTRAL = {**PLAIN, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
QWEN2 = {
    **PLAIN,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
}
QWEN3 = {**QWEN2, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}


def write(folder: Path, content: Any, name: str = "config.json") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(folder: Path, content: Any) -> ModelConfig:
    return read_config(write(folder, content))


def test_llama_as_published(tmp_path: Path) -> None:
    config = read(tmp_path / "Llama-3.1-8B", LLAMA)
    assert config == read_config(tmp_path / "Llama-3.1-8B") == read_config(str(tmp_path / "Llama-3.1-8B"))
    assert config == ModelConfig(
        name="Llama-3.1-8B",
        architecture="llama",
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=14336,
        vocab=128256,
        max_positions=131072,
        rms_eps=1e-5,
        rope=RopeConfig("llama3", 500000.0, 8.0, 8192, 1.0, 4.0),
        dtype="bfloat16",
        eos_token_ids=(128001,),
    )
    assert config.spec() == load_model(tmp_path / "Llama-3.1-8B")


def test_both_generations_of_fields(tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters, theta inside, and dtype; 4 wrote rope_scaling, torch_dtype."""
    new = {k: v for k, v in PLAIN.items() if k not in ("rope_theta", "torch_dtype")}
    new["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    new["dtype"] = "bfloat16"
    assert read(tmp_path, new) == read(tmp_path, LLAMA)
    plain = {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert read(tmp_path, plain).rope == RopeConfig(theta=1e6)
    silent = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype")}
    assert read(tmp_path, silent).rope == RopeConfig(theta=10000.0)
    assert read(tmp_path, silent).dtype == "bfloat16"
    assert read(tmp_path, {**silent, "torch_dtype": "torch.float16"}).dtype == "float16"


@pytest.mark.parametrize(
    ("content", "qkv", "out", "mlp", "norm"),
    [
        (LLAMA, False, False, False, False),
        ({**LLAMA, "attention_bias": True}, True, True, False, False),
        ({**LLAMA, "mlp_bias": True}, False, False, True, False),
        ({**MISTRAL, "attention_bias": True, "mlp_bias": True}, False, False, False, False),
        (QWEN2, True, False, False, False),
        (QWEN3, False, False, False, True),
        ({**QWEN3, "attention_bias": True}, True, True, False, True),
    ],
)
def test_what_a_family_has(tmp_path: Path, content: Any, qkv: bool, out: bool, mlp: bool, norm: bool) -> None:
    config = read(tmp_path, content)
    assert (config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm) == (qkv, out, mlp, norm)


@pytest.mark.parametrize(
    ("content", "positions", "reason"),
    [
        (MISTRAL, 4096, "sliding_window 4096"),
        ({k: v for k, v in MISTRAL.items() if k != "sliding_window"}, 4096, "sliding_window 4096"),
        ({**MISTRAL, "sliding_window": None}, 131072, None),
        ({**MISTRAL, "sliding_window": 1 << 20}, 131072, None),
        (QWEN2, 131072, None),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 8192}, 8192, "sliding_window 8192"),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": None}, 131072, None),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 32}, 131072, None),
        ({**QWEN3, "layer_types": ["full_attention"] * 32}, 131072, None),
        (
            {
                **QWEN3,
                "use_sliding_window": True,
                "sliding_window": 512,
                "layer_types": ["full_attention"] * 31 + ["sliding_attention"],
            },
            512,
            "sliding_window 512",
        ),
        (
            {
                **QWEN3,
                "use_sliding_window": True,
                "sliding_window": 512,
                "layer_types": ["full_attention"] * 32,
            },
            131072,
            None,
        ),
        ({**PLAIN, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 131072, "'dynamic' would change"),
        ({**PLAIN, "rope_scaling": {"type": "linear", "factor": 2.0}}, 131072, None),
        (LLAMA, 131072, None),
        (
            {
                **QWEN2,
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
            "'yarn': 32768 positions times 4",
        ),
        ({**QWEN2, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072, None),
    ],
)
def test_positions_and_their_reason(tmp_path: Path, content: Any, positions: int, reason: str | None) -> None:
    config = read(tmp_path, content)
    assert config.max_positions == positions
    assert config.spec().max_positions == positions
    if reason is None:
        assert config.limit_reason is None
    else:
        assert reason in (config.limit_reason or "")


def test_end_of_sequence(tmp_path: Path) -> None:
    assert read(tmp_path, {**LLAMA, "eos_token_id": [1, 2]}).eos_token_ids == (1, 2)
    assert read(tmp_path, {**LLAMA, "eos_token_id": None}).eos_token_ids == ()
    write(tmp_path, {"eos_token_id": [128001, 128008, 128009]}, "generation_config.json")
    assert read(tmp_path, LLAMA).eos_token_ids == (128001, 128008, 128009)
    write(tmp_path, {"temperature": 0.6}, "generation_config.json")
    assert read(tmp_path, LLAMA).eos_token_ids == (128001,)
    path = write(tmp_path, {"eos_token_id": "</s>"}, "generation_config.json")
    with pytest.raises(InputError, match=r"generation config .*eos_token_id") as caught:
        read(tmp_path, LLAMA)
    assert str(path) in str(caught.value)


def scaled(**over: Any) -> dict[str, Any]:
    given = {**LLAMA["rope_scaling"], **over}
    return {**LLAMA, "rope_scaling": {k: v for k, v in given.items() if v is not None}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**LLAMA, "model_type": "gemma2"}, "model_type: 'gemma2' is not supported.*llama, mistral, qwen2"),
        ({**LLAMA, "model_type": "lama"}, "model_type: 'lama' is not supported, did you mean 'llama'"),
        ({k: v for k, v in LLAMA.items() if k != "model_type"}, "model_type: is missing"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "architectures: 'LlamaForSeq"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; neo computes 'silu'"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config: not supported: quantized"),
        ({**LLAMA, "num_key_value_heads": 5}, "num_key_value_heads: 5 does not divide"),
        ({**LLAMA, "head_dim": 127}, "head_dim: 127 is odd"),
        ({**LLAMA, "rms_norm_eps": "small"}, "rms_norm_eps"),
        ({**LLAMA, "vocab_size": None}, "vocab_size"),
        ({**LLAMA, "torch_dtype": "int8"}, "torch_dtype: 'int8'"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1"),
        ({**LLAMA, "rope_theta": 1.0}, "rope_theta: 1 is not above 1"),
        ({**LLAMA, "eos_token_id": "x"}, "eos_token_id"),
        ({**LLAMA, "eos_token_id": [-1]}, "eos_token_id"),
        (scaled(rope_type="longrope"), "rope_scaling.rope_type: 'longrope' is not supported.*yarn"),
        (scaled(rope_type="mrope"), "rope_scaling.rope_type: 'mrope'"),
        (scaled(factor=None), r"rope_scaling.factor: is missing \(rope_type 'llama3'\)"),
        (scaled(low_freq_factor=None), "rope_scaling.low_freq_factor: is missing"),
        (scaled(low_freq_factor=4.0), "high_freq_factor: must exceed"),
        (scaled(factor="8"), "rope_scaling.factor"),
        (scaled(factor=0), "rope_scaling.factor"),
        (scaled(rope_type=3), "rope_scaling.rope_type"),
        ({**PLAIN, "rope_scaling": ["yarn"]}, "rope_scaling"),
        (
            {**QWEN3, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters: one set per layer type",
        ),
        ({**QWEN3, "head_dim": None}, "head_dim: is missing"),
        ({**MISTRAL, "num_key_value_heads": None}, "num_key_value_heads: is missing"),
        ({**QWEN3, "layer_types": ["full_attention"]}, "layer_types: names 1 of 32 layers"),
        ({**QWEN3, "layer_types": ["linear_attention"] * 32}, "layer_types: 'linear_attention'"),
        (
            {**QWEN3, "layer_types": ["sliding_attention"] * 32},
            "layer_types: sliding_attention, but no window",
        ),
        ({**MISTRAL, "sliding_window": -1}, "sliding_window"),
        ("{", "not valid JSON: line 1"),
        ("[1]", "holds no JSON object"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        read_config(tmp_path)
    with pytest.raises(InputError, match=r"no such folder \(neo downloads nothing"):
        read_config("meta-llama/Llama-3.1-8B")


def test_every_preset_of_the_family_can_be_run() -> None:
    families = set()
    for name in model_names():
        if load_model(name).mlp_matrices != 3:
            with pytest.raises(InputError, match=f"model '{name}': not of the Llama family.*llama-2-7b"):
                named_config(name)
            continue
        config = named_config(name)
        assert config.spec() == load_model(name)
        families.add(config.architecture)
        assert config.qk_norm == name.startswith("qwen3")
        assert config.qkv_bias == name.startswith("qwen2")
    assert {"llama", "qwen2", "qwen3"} <= families
    with pytest.raises(InputError, match=r"unknown model 'stories14m', did you mean .*'stories15m'"):
        named_config("stories14m")


def test_reading_a_config_needs_no_torch() -> None:
    code = "import sys; import neo.runtime.model_config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", [["llama"], {}, 3])
def test_a_model_type_that_is_no_name_is_refused(tmp_path: Path, kind: object) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind}))
    with pytest.raises(InputError, match=r"model_type: .* is not supported"):
        read_config(path)

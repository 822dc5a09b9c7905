import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from neo.core.errors import InputError
from neo.core.specs import HardwareSpec
from neo.cost import presets
from neo.cost.factors import RooflineFactors
from neo.cost.presets import load_hardware, load_model
from neo.cost.roofline import Roofline
from neo.cost.schemas import HardwareFile, check_hardware, check_model

MACHINES = {
    "g4dn.4xlarge",
    "g5.2xlarge",
    "g5.4xlarge",
    "g5.8xlarge",
    "g5.16xlarge",
    "a100",
    "h100",
    "2xh100",
    "gh200",
    "h200-16c",
}


def test_the_promised_presets_exist() -> None:
    assert set(presets.hardware_names()) == MACHINES
    names = presets.model_names()
    assert {"llama-2-7b", "llama-2-13b", "llama-3.1-8b", "llama-3.1-70b", "opt-13b"} <= set(names)
    assert len([n for n in names if n.startswith("qwen2.5-")]) == 7
    assert len([n for n in names if n.startswith("qwen3-")]) == 6


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_hardware_preset(name: str) -> None:
    path = presets.profiles_dir() / "hardware" / f"{name}.toml"
    data = tomllib.loads(path.read_text())
    assert check_hardware(data, path) == {
        "efficiency": {},
        **data,
    }  # the shipped files are read without this check
    hardware = load_hardware(name)
    assert hardware.name == name
    assert hardware == load_hardware(path) == load_hardware(name.upper())
    assert hardware.cpu_bandwidth_beside_copy <= hardware.cpu_bandwidth
    assert hardware.duplex_bandwidth <= hardware.h2d_bandwidth + hardware.d2h_bandwidth
    assert set(hardware.efficiency) <= set(RooflineFactors.names())
    rows = presets.hardware_sources(name)
    assert all(row["source"].strip() for row in rows)
    figures = {row["field"] for row in rows if not row["field"].startswith("efficiency.")}
    optional = {"gpu_count", "gpu_link_bandwidth", "gpu_link_latency"}
    texts = {"name", "gpu", "cpu", "efficiency"}
    assert set(HardwareSpec.__dataclass_fields__) - texts - optional <= figures
    assert Roofline(load_model("llama-3.1-8b"), hardware).describe()["hardware"]["name"] == name


@pytest.mark.parametrize("name", presets.model_names())
def test_model_preset(name: str) -> None:
    path = presets.profiles_dir() / "models" / f"{name}.toml"
    data = tomllib.loads(path.read_text())
    assert {k: v for k, v in check_model(data, path).items() if k in data} == data
    model = load_model(name)
    assert model.name == name
    number, unit = re.fullmatch(r".*?([\d.]+)([bm])", name).groups()  # type: ignore[union-attr]
    billions = float(number) * {"b": 1.0, "m": 1e-3}[unit]
    assert model.params / 1e9 == pytest.approx(billions, rel=0.25)
    assert all(row["source"].strip() for row in presets.model_sources(name))


def test_published_parameter_counts() -> None:
    expected = {"llama-2-7b": 6.74, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "qwen3-32b": 32.76}
    for name, billions in expected.items():
        assert load_model(name).params / 1e9 == pytest.approx(billions, abs=0.01)


def test_tables_for_the_command_line() -> None:
    assert [row["name"] for row in presets.hardware_rows()] == presets.hardware_names()
    assert [row["name"] for row in presets.model_rows()] == presets.model_names()


def test_names_that_are_not_there() -> None:
    with pytest.raises(
        InputError, match=r"unknown hardware 'g5.4xlrge', did you mean 'g5.4xlarge'.*neo hardware"
    ):
        load_hardware("g5.4xlrge")
    with pytest.raises(
        InputError, match=r"unknown model 'lama-3.1-8b', did you mean 'llama-3.1-8b'.*neo models"
    ):
        load_model("lama-3.1-8b")
    with pytest.raises(InputError, match="no such file"):
        load_hardware("some/where.toml")


def test_ranks_and_element_size() -> None:
    assert load_model("llama-3.1-70b", tp=8).tp == 8
    assert load_model("llama-3.1-8b", dtype="float32").dtype_bytes == 4
    with pytest.raises(InputError, match="tensor parallelism 3 must divide its 8 KV heads"):
        load_model("llama-3.1-8b", tp=3)
    with pytest.raises(InputError, match="tensor parallelism 0"):
        load_model("llama-3.1-8b", tp=0)
    with pytest.raises(InputError, match=r"dtype 'flot16' is not one of .*did you mean 'float16'"):
        load_model("llama-3.1-8b", dtype="flot16")


def _edited(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _shipped(kind: str, name: str) -> str:
    return (presets.profiles_dir() / kind / f"{name}.toml").read_text()


EXPECTED = r'gpu_bandwidth: expected {value = \.\.\., source = "\.\.\."}'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 600e9", "value = -1", r"gpu_bandwidth.value: -1 is not within 1e-12 \.\. 1e\+24"),
        ("value = 600e9", "value = 0", "gpu_bandwidth.value: 0 is not within"),
        ("value = 600e9", "value = 1e-300", "gpu_bandwidth.value: 1e-300 is not within"),
        ("value = 600e9", "value = inf", "gpu_bandwidth.value"),
        ("value = 600e9", 'value = "600"', "gpu_bandwidth.value: Input should be a valid number"),
        ("value = 600e9", "value = true", "gpu_bandwidth.value: Input should be a valid number"),
        ("value = 8\n", "value = true\n", "cpu_cores.value: Input should be a valid integer"),
        ("value = 1e-6", "value = -1e-6", "link_latency.value: -1e-06 is neither 0 nor within"),
        (
            "[gpu_bandwidth]",
            "gpu_bandwidth = 6e9\n[gpu_bw]",
            EXPECTED + r" under \[gpu_bandwidth\]; here it is a key of",
        ),
        (
            "[link_latency]",
            "[efficiency]\nlink_efficiency = 1\n[link_latency]",
            "efficiency.link_efficiency: expected {value = ",
        ),
        (
            "[link_latency]",
            '[efficiency.link_efficiency]\nvalue = 1.5\nsource = "x"\n[link_latency]',
            "efficiency: link_efficiency=1.5 must be a share above 0",
        ),
        ("value = 600e9", "value = nan", "gpu_bandwidth.value"),
        ("[gpu_flops]", "[gpu_flps]", r"gpu_flops: is missing \(and 1 more\)"),
        ('gpu = "NVIDIA A10G"', "", "gpu: is missing"),
        ('gpu = "NVIDIA A10G"', "gpu = ", "not valid TOML"),
        (
            "[link_latency]",
            '[efficiency.speed]\nvalue = 1.0\nsource = "x"\n[link_latency]',
            "efficiency.speed",
        ),
        (
            "[link_latency]",
            '[gpu_count]\nvalue = 2\nsource = "x"\n[link_latency]',
            "gpu_link_bandwidth: is missing",
        ),
        ('source = "NVIDIA A10G datasheet: 600 GB/s"', "", "gpu_bandwidth.source: is missing"),
    ],
)
def test_errors_in_a_hardware_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = _shipped("hardware", "g5.4xlarge")
    assert old in text
    path = _edited(tmp_path, text.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        load_hardware(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [6e9, "600", True, [600]])
def test_a_figure_without_a_source(value: object) -> None:
    with pytest.raises(InputError, match=EXPECTED + ", got ") as caught:
        check_hardware({"name": "mine", "gpu_bandwidth": value}, Path("mine.toml"))
    assert str(caught.value).endswith(f", got {value!r}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers = 32", "layers = 0", "layers: Input should be greater than 0"),
        ("layers = 32", "layers = 1.5", "layers"),
        ("layers = 32", 'layers = "32"', "layers: Input should be a valid integer"),
        ("layers = 32", "layers = true", "layers: Input should be a valid integer"),
        (
            "tied_embeddings = false",
            'tied_embeddings = "no"',
            "tied_embeddings: Input should be a valid boolean",
        ),
        ("kv_heads = 8", "kv_heads = 7", "kv_heads: 7 does not divide heads 32"),
        ("layers = 32", "layer = 32", "layers: is missing"),
        ("mlp_matrices = 3", "mlp_matrices = 4", "mlp_matrices"),
    ],
)
def test_errors_in_a_model_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = _edited(tmp_path, _shipped("models", "llama-3.1-8b").replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_own_files(tmp_path: Path) -> None:
    path = _edited(tmp_path, _shipped("models", "qwen3-8b").replace('"qwen3-8b"', '"mine"'))
    assert load_model(path).name == "mine"
    assert presets.model_sources(path)[0]["field"] == "layers"
    path = _edited(tmp_path, _shipped("hardware", "a100").replace('"a100"', '"mine"'))
    assert load_hardware(str(path)).name == "mine"


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "ffn_dim": 20480,
    "word_embed_proj_dim": 5120,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
}


def _config(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(("content", "preset"), [(LLAMA, "llama-3.1-8b"), (OPT, "opt-13b")])
def test_hugging_face_config(tmp_path: Path, content: dict[str, Any], preset: str) -> None:
    from dataclasses import replace

    path = _config(tmp_path, content)
    model = load_model(path)
    assert model == load_model(tmp_path)
    assert replace(model, name=preset) == load_model(preset)
    assert model.name == tmp_path.name


def test_hugging_face_variants(tmp_path: Path) -> None:
    model = load_model(_config(tmp_path, {**LLAMA, "head_dim": 64, "_name_or_path": "org/My-Model"}))
    assert (model.head_dim, model.name) == (64, "My-Model")
    without = {k: v for k, v in LLAMA.items() if k not in ("torch_dtype", "tie_word_embeddings")}
    model = load_model(_config(tmp_path, {**without, "dtype": "float32"}))
    assert (model.dtype_bytes, model.tied_embeddings) == (4, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**LLAMA, "hidden_size": "big"}, "hidden_size"),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "vocab_size: is missing"),
        ({k: v for k, v in LLAMA.items() if k != "intermediate_size"}, "intermediate_size: is missing"),
        ({**LLAMA, "num_key_value_heads": 5}, "num_key_value_heads: 5 does not divide"),
        ({**LLAMA, "num_attention_heads": 24}, "num_attention_heads: does not divide hidden_size"),
        ({**LLAMA, "torch_dtype": "int3"}, "torch_dtype: 'int3'"),
        ({**LLAMA, "num_local_experts": 8}, "num_local_experts: not supported: mixtures"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config: not supported: quantized"),
        ({**LLAMA, "kv_lora_rank": 512}, "kv_lora_rank: not supported: latent attention"),
        ({**LLAMA, "is_encoder_decoder": True}, "is_encoder_decoder: not supported: encoder-decoder"),
        ({**LLAMA, "model_type": "t5"}, "model_type: not supported: encoder-decoder models"),
        ({**OPT, "word_embed_proj_dim": 512}, "word_embed_proj_dim"),
        ("{", "line 1"),
        ("[]", "holds no JSON object"),
    ],
)
def test_errors_in_a_hugging_face_config(tmp_path: Path, content: Any, message: str) -> None:
    path = _config(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_says_no_to_what_is_not_supported(tmp_path: Path) -> None:
    no = {"is_encoder_decoder": False, "quantization_config": None, "kv_lora_rank": None}
    assert load_model(_config(tmp_path, {**LLAMA, **no})).layers == 32


def test_the_machine_shown_in_the_docs_loads(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/cost-models.md").read_text(encoding="utf-8")
    shown = [b.partition("```")[0] for b in page.split("```toml\n")[1:]]
    (whole,) = [b for b in shown if b.startswith("name = ")]
    hardware = load_hardware(_edited(tmp_path, whole))
    assert hardware.efficiency == {"link_efficiency": 1.0}
    required = {n for n, f in HardwareFile.model_fields.items() if f.is_required()}
    assert required <= set(tomllib.loads(whole))
    assert Roofline(load_model("llama-3.1-8b"), hardware).describe()["hardware"]["name"] == hardware.name


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_presets_do_not_import_pydantic() -> None:
    code = (
        "import sys; from neo.cost.presets import load_hardware, load_model; from neo.cost.loading import *;"
        "load_cost_model('roofline', load_model('llama-3.1-8b'), load_hardware('g5.4xlarge'));"
        "assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

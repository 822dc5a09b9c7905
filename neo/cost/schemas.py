"""Validation of files that a user gives: hardware and model TOML, Hugging Face configs, cost tables.

Imported only when such a file is read, because pydantic costs more start-up time than the rest of neo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from neo.core.errors import InputError
from neo.core.plugins import close_matches
from neo.cost.factors import RooflineFactors

LEAST, MOST = 1e-12, 1e24
"""Figures lie within these, so that no time becomes infinite (some also may be 0)."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, le=10**12, strict=True)]

_FIGURE = '{value = ..., source = "..."}'
_ENCODER_DECODERS = (
    "t5",
    "mt5",
    "umt5",
    "longt5",
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "m2m_100",
    "whisper",
)
_BYTES_OF_DTYPE = {"float16": 2, "bfloat16": 2, "half": 2, "float32": 4, "float": 4}


def _in_range(value: float) -> float:
    if not LEAST <= value <= MOST:
        raise PydanticCustomError("figure_range", f"{value:g} is not within {LEAST:g} .. {MOST:g}")
    return value


def _in_range_or_zero(value: float) -> float:
    if value and not LEAST <= value <= MOST:
        raise PydanticCustomError("figure_range", f"{value:g} is neither 0 nor within {LEAST:g} .. {MOST:g}")
    return value


Positive = Annotated[Number, AfterValidator(_in_range)]
NotNegative = Annotated[Number, AfterValidator(_in_range_or_zero)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Figure(_Strict):
    """A number above zero and where it comes from."""

    value: Positive
    source: str = Field(min_length=1)


class FigureOrZero(_Strict):
    """A number that may be zero and where it comes from."""

    value: NotNegative
    source: str = Field(min_length=1)


class CountFigure(_Strict):
    """A whole number and where it comes from."""

    value: Count
    source: str = Field(min_length=1)


class HardwareFile(_Strict):
    """A machine; units as in ``neo.core.specs.HardwareSpec``."""

    name: str = Field(min_length=1)
    gpu: str
    cpu: str
    gpu_memory_bytes: Figure
    gpu_bandwidth: Figure
    gpu_flops: Figure
    cpu_cores: CountFigure
    cpu_memory_bytes: Figure
    cpu_bandwidth: Figure
    cpu_bandwidth_beside_copy: Figure
    cpu_flops: Figure
    h2d_bandwidth: Figure
    d2h_bandwidth: Figure
    duplex_bandwidth: Figure
    link_latency: FigureOrZero
    gpu_count: CountFigure | None = None
    gpu_link_bandwidth: FigureOrZero | None = None
    gpu_link_latency: FigureOrZero | None = None
    efficiency: dict[str, FigureOrZero] = Field(default_factory=dict)


class ModelFile(_Strict):
    """A model; fields as in ``neo.core.specs.ModelSpec``."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    intermediate: Count
    vocab: Count
    max_positions: Count
    mlp_matrices: Literal[2, 3] = 3
    tied_embeddings: bool = False
    dtype_bytes: Literal[1, 2, 4] = 2


class HFConfig(BaseModel):
    """The fields of a Hugging Face ``config.json`` that describe a dense decoder (OPT's names included)."""

    model_config = ConfigDict(strict=True)

    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    intermediate_size: Count | None = None
    ffn_dim: Count | None = None
    word_embed_proj_dim: Count | None = None
    vocab_size: Count
    max_position_embeddings: Count
    tie_word_embeddings: bool | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    model_type: str = ""


def first_error(error: ValidationError) -> str:
    """The first validation error as ``field path: what is wrong``, and how many more there are."""
    errors = error.errors(include_url=False)
    first = errors[0]
    path = ".".join(str(part) for part in first["loc"]) or "the file"
    message = first["msg"].replace("\n", " ")
    if first["type"] == "missing":
        message = "is missing"
    elif first["type"] == "extra_forbidden":
        message = "is not a known field"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{path}: {message}{more}"


def check_hardware(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """``data`` of a hardware file, validated; an InputError names file and field."""
    _check_form(data, path)
    try:
        checked = HardwareFile.model_validate(data)
    except ValidationError as error:
        raise InputError(f"hardware file {path}: {first_error(error)}") from error
    known = RooflineFactors.names()
    for factor in checked.efficiency:
        if factor not in known:
            raise InputError(
                f"hardware file {path}: efficiency.{factor} is not a factor of the roofline"
                f"{close_matches(factor, known)}"
            )
    values = {name: figure.value for name, figure in checked.efficiency.items()}
    RooflineFactors().with_values(values, f"hardware file {path}: efficiency")
    if checked.gpu_count is not None and checked.gpu_count.value > 1 and checked.gpu_link_bandwidth is None:
        raise InputError(f"hardware file {path}: gpu_link_bandwidth: is missing (gpu_count is above 1)")
    return checked.model_dump(exclude_none=True)


def _check_form(data: dict[str, Any], path: Path) -> None:
    """Figures must be tables; a plain number gets an error that says what to write instead."""
    figures = [name for name in HardwareFile.model_fields if name not in ("name", "gpu", "cpu")]
    for key, entry in data.items():
        if key not in figures:
            continue
        if not isinstance(entry, dict):
            wanted = "tables [efficiency.FACTOR] of" if key == "efficiency" else "expected"
            raise InputError(f"hardware file {path}: {key}: {wanted} {_FIGURE}, got {entry!r}")
        for inner, value in entry.items():
            if inner in HardwareFile.model_fields:
                form = (
                    f"expected {_FIGURE} under [{inner}]"
                    if inner in figures
                    else "expected before all tables"
                )
                raise InputError(f"hardware file {path}: {inner}: {form}; here it is a key of [{key}]")
            if key == "efficiency" and not isinstance(value, dict):
                raise InputError(f"hardware file {path}: {key}.{inner}: expected {_FIGURE}, got {value!r}")


def check_model(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """``data`` of a model file, validated; an InputError names file and field."""
    try:
        checked = ModelFile.model_validate(data)
    except ValidationError as error:
        raise InputError(f"model file {path}: {first_error(error)}") from error
    return _heads_fit(checked.model_dump(), path, "heads", "kv_heads")


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file; an InputError that names file (and line) where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{what} {path}: not valid JSON: line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise InputError(f"{what} {path}: not valid JSON: nested too deep") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path}: cannot be read: {error}") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise InputError(f"{what} {path}: not valid JSON: {error}") from error
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be read: {error}") from error


def read_hf_config(path: Path) -> dict[str, Any]:
    """Model fields from a Hugging Face ``config.json``.

    Raises:
        InputError: file and field, where a field is missing or wrong, or changes sizes in a way that
            ``ModelSpec``, which describes dense decoders, does not hold.
    """
    data = read_json(path, "model config")
    if not isinstance(data, dict):
        raise InputError(f"model config {path}: holds no JSON object")
    _refuse_unmodelled(data, path)
    try:
        config = HFConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(f"model config {path}: {first_error(error)}") from error
    intermediate = config.intermediate_size or config.ffn_dim
    if intermediate is None:
        raise InputError(f"model config {path}: intermediate_size: is missing")
    if config.word_embed_proj_dim not in (None, config.hidden_size):
        raise InputError(f"model config {path}: word_embed_proj_dim: differs from hidden_size: not supported")
    if config.head_dim is None and config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"model config {path}: num_attention_heads: does not divide hidden_size, and no head_dim"
        )
    fields = {
        "name": _hf_name(data, path),
        "source": str(path),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
        "intermediate": intermediate,
        "vocab": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "mlp_matrices": 2 if config.ffn_dim is not None else 3,
        "tied_embeddings": _hf_tied(config),
        "dtype_bytes": _hf_dtype_bytes(config, path),
    }
    return _heads_fit(fields, path, "num_attention_heads", "num_key_value_heads")


def _refuse_unmodelled(data: dict[str, Any], path: Path) -> None:
    """An InputError for what makes a model's weights or KV another size than its other fields say."""
    refused = {
        "num_experts": "mixtures of experts",
        "num_local_experts": "mixtures of experts",
        "n_routed_experts": "mixtures of experts",
        "quantization_config": "quantized weights",
        "kv_lora_rank": "latent attention (MLA)",
        "is_encoder_decoder": "encoder-decoder models",
    }
    for key, what in refused.items():
        if data.get(key):
            raise InputError(f"model config {path}: {key}: not supported: {what}")
    if data.get("model_type") in _ENCODER_DECODERS:
        raise InputError(
            f"model config {path}: model_type: not supported: encoder-decoder models ('{data['model_type']}')"
        )


def _hf_tied(config: HFConfig) -> bool:
    """Whether embedding and head share weights; a config may leave it to its class's default."""
    if config.tie_word_embeddings is not None:
        return config.tie_word_embeddings
    return config.model_type not in ("llama", "mistral", "qwen2", "qwen3")  # these classes default to False


def _hf_dtype_bytes(config: HFConfig, path: Path) -> int:
    name = (config.torch_dtype or config.dtype or "bfloat16").removeprefix("torch.")
    if name not in _BYTES_OF_DTYPE:
        field = "torch_dtype" if config.torch_dtype else "dtype"
        known = ", ".join(_BYTES_OF_DTYPE)
        raise InputError(f"model config {path}: {field}: '{name}' is not one of {known}")
    return _BYTES_OF_DTYPE[name]


def _hf_name(data: dict[str, Any], path: Path) -> str:
    given = data.get("_name_or_path")
    if isinstance(given, str) and given.strip("./"):
        return Path(given).name
    return path.resolve().parent.name if path.name == "config.json" else path.stem


def _heads_fit(fields: dict[str, Any], path: Path, heads: str, kv_heads: str) -> dict[str, Any]:
    if fields["heads"] % fields["kv_heads"]:
        raise InputError(
            f"model file {path}: {kv_heads}: {fields['kv_heads']} does not divide {heads} {fields['heads']}"
        )
    return fields

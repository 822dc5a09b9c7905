"""Validation of files that a user gives: hardware and model TOML, Hugging Face configs, cost tables.

Imported only when such a file is read, because pydantic costs more start-up time than the rest of neo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neo.core.errors import InputError
from neo.core.plugins import close_matches
from neo.cost.factors import RooflineFactors

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, strict=True)]

_BYTES_OF_DTYPE = {"float16": 2, "bfloat16": 2, "half": 2, "float32": 4, "float": 4}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


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
    if checked.gpu_count is not None and checked.gpu_count.value > 1 and checked.gpu_link_bandwidth is None:
        raise InputError(f"hardware file {path}: gpu_link_bandwidth: is missing (gpu_count is above 1)")
    return checked.model_dump(exclude_none=True)


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
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path}: cannot be read: {error}") from error


def read_hf_config(path: Path) -> dict[str, Any]:
    """Model fields from a Hugging Face ``config.json``.

    Raises:
        InputError: file and field, where a field is missing or wrong; a mixture of experts is refused, for
            ``ModelSpec`` describes dense models only.
    """
    data = read_json(path, "model config")
    if not isinstance(data, dict):
        raise InputError(f"model config {path}: holds no JSON object")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if data.get(key):
            raise InputError(f"model config {path}: {key}: mixtures of experts are not supported")
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

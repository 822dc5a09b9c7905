"""What the engine must know of a model to run it: read from a Hugging Face folder, or from a preset.

Sizes are read by ``neo.cost.schemas`` (one reader for simulator and engine); this module adds what changes
the arithmetic, and refuses by name what neo would compute wrongly. Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from neo.core.errors import InputError
from neo.core.plugins import close_matches
from neo.core.specs import ModelSpec
from neo.cost.presets import DTYPE_BYTES, load_model, model_names
from neo.cost.schemas import Count, Positive, first_error, read_hf_config, read_json

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""``model_type`` of what can be run, and the class that Hugging Face gives it."""

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

_THETA, _EPS = 10_000.0, 1e-6  # what transformers' classes take where config.json is silent
_MISTRAL_WINDOW, _QWEN_FULL_LAYERS = 4096, 28  # likewise: sliding_window, max_window_layers
_DTYPE_NAMES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding; which fields count depends on ``kind`` (see ``neo.runtime.rope``)."""

    kind: str = "default"
    theta: float = _THETA
    factor: float = 1.0
    original_max_positions: int = 0  # positions before scaling: llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-like decoder. Sizes are those of the whole model.

    ``max_positions`` is how many positions may be served; where that is fewer (or more) than the file's
    ``max_position_embeddings``, ``limit_reason`` says why. ``eos_token_ids`` end a generation.
    """

    name: str
    architecture: str  # a key of ARCHITECTURES
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    rms_eps: float = _EPS
    rope: RopeConfig = RopeConfig()
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"  # float32, float16 or bfloat16
    eos_token_ids: tuple[int, ...] = ()
    sliding_window: int | None = None  # of the file, where active; max_positions never exceeds it
    limit_reason: str | None = None

    def spec(self) -> ModelSpec:
        """The same model as accounting and cost models see it."""
        return ModelSpec(
            name=self.name,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            vocab=self.vocab,
            max_positions=self.max_positions,
            tied_embeddings=self.tied_embeddings,
            dtype_bytes=DTYPE_BYTES[self.dtype],
        )


def _as_tuple(value: Any) -> Any:
    """Token ids: one or several (a list); None for none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


TokenIds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_tuple)]


class _Rope(BaseModel):
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (4)."""

    model_config = ConfigDict(strict=True)

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: Positive | None = None


class _Arithmetic(BaseModel):
    """The fields of a ``config.json`` that change what is computed, beside the sizes."""

    model_config = ConfigDict(strict=True)

    model_type: str
    architectures: list[str] | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Positive = _EPS
    rope_theta: Positive | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Count | None = None
    use_sliding_window: bool = False
    max_window_layers: int = _QWEN_FULL_LAYERS
    layer_types: list[str] | None = None
    eos_token_id: TokenIds = ()
    torch_dtype: str | None = None
    dtype: str | None = None


class _Generation(BaseModel):
    """The field of a ``generation_config.json`` that the engine follows."""

    model_config = ConfigDict(strict=True)

    eos_token_id: TokenIds = ()


def read_config(folder_or_json: str | Path) -> ModelConfig:
    """The model of a Hugging Face folder, or of a ``config.json``.

    Raises:
        InputError: file and field, where one is missing, wrong, or asks for what the engine does not compute.
    """
    path = _config_path(Path(folder_or_json).expanduser())
    data = read_json(path, "model config")
    if isinstance(data, dict):
        _check_architecture(data, path)
    sizes = read_hf_config(path)
    fields = _checked(_Arithmetic, data, path, "model config")
    _refuse(fields, data, sizes, path)
    kind = fields.model_type
    positions, rope, reason = _positions(fields, sizes["max_positions"], path)
    window = _sliding_window(fields, data, sizes["layers"], path)
    if window is not None and window < positions:
        reason = f"sliding_window {window}: neo attends to everything, which is the same up to that length"
        positions = window
    dtype = (fields.torch_dtype or fields.dtype or "bfloat16").removeprefix("torch.")
    return ModelConfig(
        name=sizes["name"],
        architecture=kind,
        hidden=sizes["hidden"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        intermediate=sizes["intermediate"],
        vocab=sizes["vocab"],
        max_positions=positions,
        rms_eps=fields.rms_norm_eps,
        rope=rope,
        tied_embeddings=sizes["tied_embeddings"],
        qkv_bias=kind == "qwen2" or (kind in ("llama", "qwen3") and fields.attention_bias),
        out_bias=kind in ("llama", "qwen3") and fields.attention_bias,
        mlp_bias=kind == "llama" and fields.mlp_bias,
        qk_norm=kind == "qwen3",
        dtype=_DTYPE_NAMES.get(dtype, dtype),
        eos_token_ids=_eos(fields, path),
        sliding_window=window,
        limit_reason=reason,
    )


def named_config(name: str) -> ModelConfig:
    """A preset of ``profiles/models`` (or a model TOML) as a model to fill with random weights.

    Presets hold sizes only, so the rotary embedding is the plain one.

    Raises:
        InputError: unknown name, or a model that is not of a supported family.
    """
    spec = load_model(name)
    if spec.mlp_matrices != 3:
        supported = ", ".join(n for n in model_names() if load_model(n).mlp_matrices == 3)
        raise InputError(f"model '{spec.name}': not of the Llama family; the engine runs {supported}")
    low = spec.name.lower()
    kind = next((k for prefix, k in _FAMILIES if low.startswith(prefix)), "llama")
    return ModelConfig(
        name=spec.name,
        architecture=kind,
        hidden=spec.hidden,
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        intermediate=spec.intermediate,
        vocab=spec.vocab,
        max_positions=spec.max_positions,
        tied_embeddings=spec.tied_embeddings,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        dtype="float32" if spec.dtype_bytes == 4 else "bfloat16",
    )


_FAMILIES = (("qwen3", "qwen3"), ("qwen2", "qwen2"), ("mistral", "mistral"))


def _config_path(path: Path) -> Path:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {path}: holds no config.json")
        return path / "config.json"
    if not path.exists():
        raise InputError(f"model '{path}': no such folder (neo downloads nothing: give a local one)")
    return path


def _checked(model: type[Any], data: Any, path: Path, what: str) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{what} {path}: {first_error(error)}") from error


def _check_architecture(data: dict[str, Any], path: Path) -> None:
    """First of all checks, so that another family is refused by its name, not by a field it lacks."""
    kind = data.get("model_type")
    supported = f"neo serves {', '.join(ARCHITECTURES)}"
    if kind is None:
        raise InputError(f"model config {path}: model_type: is missing; {supported}")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise InputError(
            f"model config {path}: model_type: '{kind}' is not supported"
            f"{close_matches(str(kind), ARCHITECTURES)}; {supported}"
        )
    classes = data.get("architectures") or [ARCHITECTURES[kind]]
    if isinstance(classes, list) and classes and str(classes[0]).lower() != ARCHITECTURES[kind].lower():
        raise InputError(
            f"model config {path}: architectures: '{classes[0]}' is not supported; "
            f"a {kind} model must be {ARCHITECTURES[kind]}"
        )


def _refuse(fields: _Arithmetic, data: dict[str, Any], sizes: dict[str, Any], path: Path) -> None:
    """An InputError for what the engine would compute wrongly."""

    def refuse(field: str, message: str) -> None:
        raise InputError(f"model config {path}: {field}: {message}")

    if fields.hidden_act != "silu":
        refuse("hidden_act", f"'{fields.hidden_act}' is not supported; neo computes 'silu'")
    kind = fields.model_type
    if kind != "llama" and data.get("num_key_value_heads") is None:  # the classes' defaults differ
        refuse("num_key_value_heads", "is missing")
    if kind == "qwen3" and data.get("head_dim") is None:
        refuse("head_dim", "is missing")
    if sizes["head_dim"] % 2:
        refuse("head_dim", f"{sizes['head_dim']} is odd: rotary embedding turns pairs")
    for name in ("rope_scaling", "rope_parameters"):
        if any(isinstance(value, dict) for value in (data.get(name) or {}).values()):
            refuse(name, "one set per layer type is not supported")
    for i, layer in enumerate(fields.layer_types or ()):
        if layer not in ("full_attention", "sliding_attention"):
            refuse("layer_types", f"'{layer}' (layer {i}) is not supported")
    if fields.layer_types is not None and len(fields.layer_types) != sizes["layers"]:
        refuse("layer_types", f"names {len(fields.layer_types)} of {sizes['layers']} layers")


def _sliding_window(fields: _Arithmetic, data: dict[str, Any], layers: int, path: Path) -> int | None:
    """The window that some layer's attention is limited to, as transformers decides it."""
    kind = fields.model_type
    sliding = "sliding_attention" in (fields.layer_types or ())
    if kind == "mistral":
        window = fields.sliding_window if "sliding_window" in data else _MISTRAL_WINDOW
    elif kind in ("qwen2", "qwen3") and fields.use_sliding_window:
        window = fields.sliding_window if "sliding_window" in data else _MISTRAL_WINDOW
        if not (sliding if fields.layer_types is not None else fields.max_window_layers < layers):
            window = None
    else:
        window = None
    if sliding and window is None:
        raise InputError(f"model config {path}: layer_types: sliding_attention, but no window is in use")
    return window


def _positions(fields: _Arithmetic, positions: int, path: Path) -> tuple[int, RopeConfig, str | None]:
    """Positions that can be served, the rotary embedding, and why the number is not the file's."""
    name = "rope_scaling" if fields.rope_scaling is not None else "rope_parameters"
    given = fields.rope_scaling or fields.rope_parameters or _Rope()
    kind = given.rope_type or given.type or "default"
    if kind not in ROPE_KINDS:
        raise InputError(
            f"model config {path}: {name}.rope_type: '{kind}' is not supported; neo computes "
            f"{', '.join(ROPE_KINDS)}"
        )
    if (given.partial_rotary_factor or fields.partial_rotary_factor or 1.0) != 1.0:
        raise InputError(f"model config {path}: partial_rotary_factor: only 1 is supported")
    theta = given.rope_theta or fields.rope_theta or _THETA
    if theta <= 1.0:
        raise InputError(f"model config {path}: rope_theta: {theta:g} is not above 1")
    if kind == "default":
        return positions, RopeConfig(theta=theta), None
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    for field in needed:
        if getattr(given, field) is None:
            raise InputError(f"model config {path}: {name}.{field}: is missing (rope_type '{kind}')")
    factor = given.factor or 1.0
    if kind == "linear":
        return positions, RopeConfig("linear", theta, factor), None
    if kind == "dynamic":  # scales only what lies beyond: the plain embedding up to there
        reason = f"{name} 'dynamic' would change earlier keys beyond {positions} positions"
        return positions, RopeConfig(theta=theta), reason
    original = fields.original_max_position_embeddings or given.original_max_position_embeddings
    if kind == "llama3":
        low, high = given.low_freq_factor or 1.0, given.high_freq_factor or 4.0
        if high <= low:
            raise InputError(f"model config {path}: {name}.high_freq_factor: must exceed low_freq_factor")
        rope = RopeConfig("llama3", theta, factor, original or positions, low, high)
        return positions, rope, None
    rope = RopeConfig(
        "yarn",
        theta,
        factor,
        original or positions,
        beta_fast=given.beta_fast or 32.0,
        beta_slow=given.beta_slow or 1.0,
        attention_factor=given.attention_factor or _yarn_attention_factor(given, factor),
        truncate=given.truncate,
    )
    scaled = int((original or 0) * factor)
    if scaled <= positions:
        return positions, rope, None
    return scaled, rope, f"{name} 'yarn': {original} positions times {factor:g}"


def _yarn_attention_factor(rope: _Rope, factor: float) -> float:
    """YaRN's temperature, as a factor of cos and sin: 0.1 ln(s) + 1 (arXiv 2309.00071, eq. 22)."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:  # DeepSeek's generalisation
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _eos(fields: _Arithmetic, path: Path) -> tuple[int, ...]:
    """Of ``generation_config.json`` beside the config where it names any, else of the config."""
    beside = path.parent / "generation_config.json"
    if path.name == "config.json" and beside.is_file():
        data = read_json(beside, "generation config")
        ids: tuple[int, ...] = _checked(_Generation, data, beside, "generation config").eos_token_id
        if ids:
            return ids
    return fields.eos_token_id

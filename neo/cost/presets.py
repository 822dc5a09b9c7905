"""Machines and models by name: reads ``profiles/`` and files of the user's own.

A hardware file (TOML) holds ``name``, ``gpu``, ``cpu`` and one table per figure with its ``value`` and the
``source`` it comes from; ``[efficiency.FACTOR]`` tables set this machine's defaults of the roofline's
factors.
A model file (TOML) holds the fields of ``ModelSpec`` and one ``source``; a Hugging Face ``config.json`` (or
its folder) serves as well.

The presets that come with neo are checked by the tests and read without pydantic, whose import would double
the start-up time of ``neo simulate``; every other file is validated by ``neo.cost.schemas``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
from pathlib import Path
from typing import Any

from neo.core.errors import InputError
from neo.core.plugins import close_matches
from neo.core.specs import HardwareSpec, ModelSpec

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_TEXT_FIELDS = ("name", "gpu", "cpu")
_UNITS = {
    "gpu_memory_bytes": "bytes",
    "gpu_bandwidth": "bytes/s",
    "gpu_flops": "FLOP/s",
    "cpu_cores": "cores",
    "cpu_memory_bytes": "bytes",
    "cpu_bandwidth": "bytes/s",
    "cpu_bandwidth_beside_copy": "bytes/s",
    "cpu_flops": "FLOP/s",
    "h2d_bandwidth": "bytes/s",
    "d2h_bandwidth": "bytes/s",
    "duplex_bandwidth": "bytes/s",
    "link_latency": "s",
    "gpu_count": "GPUs",
    "gpu_link_bandwidth": "bytes/s",
    "gpu_link_latency": "s",
}


@functools.cache
def profiles_dir() -> Path:
    """Folder of the presets: ``neo/_profiles`` in an installed wheel, ``profiles`` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_profiles", package.parent / "profiles"):
        if (folder / "hardware").is_dir():
            return folder
    raise InputError(
        f"the presets are missing: neither {package / '_profiles'} nor {package.parent / 'profiles'}"
    )


def hardware_names() -> list[str]:
    """Names of the machines that come with neo."""
    return _names("hardware")


def model_names() -> list[str]:
    """Names of the models that come with neo."""
    return _names("models")


def load_hardware(name_or_path: str | Path) -> HardwareSpec:
    """The machine of this name, or that of a TOML file of the user's own.

    Raises:
        InputError: unknown name (with close matches), unreadable file, or a wrong field (file and field).
    """
    data, _ = _hardware_data(name_or_path)
    figures = {k: data[k]["value"] for k in _UNITS if k in data}
    factors = {k: float(v["value"]) for k, v in data.get("efficiency", {}).items()}
    texts = {k: data[k] for k in _TEXT_FIELDS}
    return HardwareSpec(**texts, **figures, efficiency=factors)


def load_model(name_or_path: str | Path, tp: int = 1, dtype: str | None = None) -> ModelSpec:
    """The model of this name, or that of a TOML file, a ``config.json``, or a folder that holds one.

    Args:
        name_or_path: preset name (case does not matter) or path.
        tp: tensor-parallel degree; must divide the KV heads.
        dtype: ``float16``, ``bfloat16`` or ``float32``; None for what the file says.

    Raises:
        InputError: unknown name (with close matches), unreadable file, a wrong field (file and field), or a
            ``tp`` that does not divide the heads.
    """
    data, _ = _model_data(name_or_path)
    data = {k: v for k, v in data.items() if k != "source"}
    if dtype is not None:
        if dtype not in DTYPE_BYTES:
            raise InputError(
                f"dtype '{dtype}' is not one of {', '.join(DTYPE_BYTES)}{close_matches(dtype, DTYPE_BYTES)}"
            )
        data["dtype_bytes"] = DTYPE_BYTES[dtype]
    spec = ModelSpec(**data, tp=tp)
    if tp < 1 or spec.kv_heads % tp or spec.heads % tp:
        raise InputError(
            f"model '{spec.name}': tensor parallelism {tp} must divide its {spec.kv_heads} KV heads "
            f"and {spec.heads} heads"
        )
    return spec


def shipped_table(hardware: str, model: ModelSpec) -> Path | None:
    """The measured cost table of a preset machine for this shape of model; None where neo brings none."""
    if hardware not in _names("hardware"):
        return None
    for path in sorted((profiles_dir() / hardware).glob("*.json")):
        table = json.loads(path.read_text())
        shape = {field: value for field, value in table["model"].items() if field != "name"} | {
            "tp": table["tp"]
        }
        if all(value == getattr(model, field) for field, value in shape.items()):
            return path
    return None


def hardware_rows() -> list[dict[str, Any]]:
    """One row per shipped machine for ``neo hardware``, in bytes, bytes/s and FLOP/s."""
    specs = (load_hardware(name) for name in hardware_names())
    return [
        {
            "name": s.name,
            "gpu": s.gpu,
            "gpus": s.gpu_count,
            "gpu_memory_bytes": s.gpu_memory_bytes,
            "gpu_bandwidth": s.gpu_bandwidth,
            "gpu_flops": s.gpu_flops,
            "cpu": s.cpu,
            "cpu_memory_bytes": s.cpu_memory_bytes,
            "cpu_bandwidth": s.cpu_bandwidth,
            "h2d_bandwidth": s.h2d_bandwidth,
        }
        for s in specs
    ]


def hardware_sources(name_or_path: str | Path) -> list[dict[str, Any]]:
    """Every figure of a machine for ``neo hardware NAME``: field, value, unit, source."""
    data, _ = _hardware_data(name_or_path)
    rows = [
        {"field": k, "value": data[k]["value"], "unit": _UNITS[k], "source": data[k]["source"]}
        for k in _UNITS
        if k in data
    ]
    for factor, entry in data.get("efficiency", {}).items():
        rows.append({"field": f"efficiency.{factor}", "unit": "", **entry})
    return rows


def model_rows() -> list[dict[str, Any]]:
    """One row per shipped model for ``neo models``: shape, parameters, weight bytes, KV bytes per token."""
    rows = []
    for name in model_names():
        s = load_model(name)
        rows.append(
            {
                "name": s.name,
                "layers": s.layers,
                "hidden": s.hidden,
                "heads": s.heads,
                "kv_heads": s.kv_heads,
                "params": s.params,
                "weight_bytes": s.weight_bytes,
                "kv_bytes_per_token": s.kv_bytes_per_token,
                "max_positions": s.max_positions,
            }
        )
    return rows


def model_sources(name_or_path: str | Path) -> list[dict[str, Any]]:
    """Every figure of a model for ``neo models NAME``: field, value, source."""
    data, path = _model_data(name_or_path)
    source = data.get("source") or str(path)
    fields = [f.name for f in dataclasses.fields(ModelSpec) if f.name not in ("name", "tp")]
    spec = load_model(name_or_path)
    return [{"field": f, "value": getattr(spec, f), "source": source} for f in fields]


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file; an InputError that names the file where it cannot be read."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{what} file {path}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{what} file {path}: not valid TOML: nested too deep") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} file {path}: cannot be read: {error}") from error


@functools.cache
def _names(folder: str) -> list[str]:
    return sorted(p.stem for p in (profiles_dir() / folder).glob("*.toml"))


def _find(name_or_path: str | Path, folder: str, what: str, command: str) -> tuple[Path, bool]:
    """Path of a preset (True) or of the user's file (False)."""
    text = str(name_or_path)
    names = {n.lower(): n for n in _names(folder)}
    if text.lower() in names:
        return profiles_dir() / folder / f"{names[text.lower()]}.toml", True
    path = Path(text).expanduser()
    if path.exists():
        return path, False
    if path.suffix in (".toml", ".json") or len(path.parts) > 1:
        raise InputError(f"{what} '{text}': no such file; '{command}' lists the built-in names")
    raise InputError(f"unknown {what} '{text}'{close_matches(text, _names(folder))} ('{command}' lists all)")


def _hardware_data(name_or_path: str | Path) -> tuple[dict[str, Any], Path]:
    path, shipped = _find(name_or_path, "hardware", "hardware", "neo hardware")
    data = read_toml(path, "hardware")
    if not shipped:
        from neo.cost.schemas import check_hardware

        data = check_hardware(data, path)
    return data, path


def _model_data(name_or_path: str | Path) -> tuple[dict[str, Any], Path]:
    path, shipped = _find(name_or_path, "models", "model", "neo models")
    if shipped:
        return read_toml(path, "model"), path
    from neo.cost.schemas import check_model, read_hf_config

    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise InputError(f"model folder {path.parent}: holds no config.json")
    if path.suffix == ".json":
        return read_hf_config(path), path
    return check_model(read_toml(path, "model"), path), path

"""From the header of a run log back to the System that ran."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from neo.core.errors import InputError
from neo.core.specs import HardwareSpec, ModelSpec
from neo.core.view import Limits
from neo.cost.interface import CostModel
from neo.cost.loading import load_cost_model, table_of, with_table
from neo.cost.presets import load_hardware, load_model
from neo.policy.registry import load_policy
from neo.system.config import System, SystemConfig


@dataclass(frozen=True, slots=True)
class Substitutes:
    """What to use instead of what a header names; None: what it names.

    ``policy`` is for a policy from a file, of which a header has no folders.
    """

    policy: str | None = None
    cost_model: str | None = None
    cost_options: Mapping[str, str] | None = None


def systems_of(
    header: Mapping[str, Any], where: str, folder: Path, instead: Substitutes | None = None
) -> tuple[System, System, list[str]]:
    """The system whose decisions a log holds, and the one that predicts its times.

    They differ in the cost model only, and only if ``instead`` names another. A profile table is looked for
    where the header says, then in ``folder``. If the run's own cost model cannot be found, the one of
    ``instead`` serves for its decisions too; a note says so.

    Args:
        header: of a run log, as ``System.describe`` writes it; ``model_spec`` and ``hardware_spec`` (the
            fields of these classes) go before ``model`` and ``hardware`` (names or files).
        where: file and line of the header, for messages.
        folder: of the run.

    Raises:
        InputError: a key is missing or wrong, or a file it names cannot be found.
    """
    instead = instead or Substitutes()
    model, hardware = _model(header, where), _hardware(header, where)
    config = SystemConfig(
        policy=instead.policy or _text(header, "policy", where),
        hardware=hardware.name,
        model=model.name,
        policy_options=_texts(header, "policy_options", where),
        cost_model=_text(header, "cost_model", where),
        cost_options=_texts(header, "cost_options", where),
        limits=_limits(header, where),
        tp=model.tp,
    )
    blocks = [_whole(header, key, least, where) for key, least in (("gpu_blocks", 1), ("cpu_blocks", 0))]
    try:
        load_policy(config.policy, config.policy_options)
    except InputError as error:
        hint = "" if instead.policy else "; --policy PATH says where a policy's file is"
        raise InputError(f"{where}: {error}{hint}") from error
    other = None
    if instead.cost_model is not None:
        other = load_cost_model(instead.cost_model, model, hardware, dict(instead.cost_options or {}))
    notes: list[str] = []
    try:
        cost = _cost_model(config, model, hardware, folder)
    except InputError as error:
        if other is None:
            raise InputError(
                f"{where}: the cost model that the policy planned with cannot be had ({error}); "
                "give it: --cost profiled:PATH"
            ) from error
        notes.append(f"decisions replayed with {instead.cost_model}: {error}")
        cost = other
    decided = System(config, hardware, model, cost, *blocks)
    return decided, System(config, hardware, model, other or cost, *blocks), notes


def _cost_model(config: SystemConfig, model: ModelSpec, hardware: HardwareSpec, folder: Path) -> CostModel:
    spec = config.cost_model
    path = table_of(spec)
    if path and not Path(path).exists() and (folder / path).exists():
        spec = with_table(spec, str(folder / path))
    return load_cost_model(spec, model, hardware, dict(config.cost_options))


def _model(header: Mapping[str, Any], where: str) -> ModelSpec:
    if "model_spec" in header:
        spec: ModelSpec = _spec(ModelSpec, header["model_spec"], f"{where}: model_spec", 1)
        if spec.heads % spec.tp or spec.kv_heads % spec.tp:
            raise InputError(f"{where}: model_spec, tp: {spec.tp} does not divide the heads")
        return spec
    try:
        return load_model(_text(header, "model", where), tp=_whole(header, "tp", 1, where))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _hardware(header: Mapping[str, Any], where: str) -> HardwareSpec:
    if "hardware_spec" in header:
        spec: HardwareSpec = _spec(HardwareSpec, header["hardware_spec"], f"{where}: hardware_spec", 0)
        return spec
    try:
        return load_hardware(_text(header, "hardware", where))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _limits(header: Mapping[str, Any], where: str) -> Limits:
    limits: Limits = _spec(Limits, header.get("limits"), f"{where}: limits", 0)
    return limits


def _spec(cls: type, data: Any, where: str, least: int) -> Any:
    """A dataclass of texts and numbers from an object of a header, its numbers at least ``least``."""
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected an object, got {data!r}")
    hints = get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise InputError(f"{where}: unknown field {key!r}")
    for f in fields(cls):
        if f.name not in data:
            if f.default is MISSING and f.default_factory is MISSING:
                raise InputError(f"{where}: {f.name} is missing")
            continue
        _check_value(data[f.name], hints[f.name], f"{where}, {f.name}", least)
    try:
        return cls(**data)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _check_value(value: Any, hint: Any, where: str, least: int) -> None:
    if hint in (str, bool):
        good = isinstance(value, hint)
    elif hint is int or hint is float:
        numbers = (int,) if hint is int else (int, float)
        good = isinstance(value, numbers) and not isinstance(value, bool) and least <= value < math.inf
    else:  # dict[str, float]
        good = isinstance(value, dict) and all(
            isinstance(v, (int, float)) and math.isfinite(v) for v in value.values()
        )
    if not good:
        name = getattr(hint, "__name__", str(hint))
        raise InputError(
            f"{where}: expected {name}{f' of at least {least}' * (name in ('int', 'float'))}, got {value!r}"
        )


def _text(header: Mapping[str, Any], key: str, where: str) -> str:
    value = header.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {key}: expected a text, got {value!r}")
    return value


def _whole(header: Mapping[str, Any], key: str, least: int, where: str) -> int:
    value = header.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{where}: {key}: expected a whole number of at least {least}, got {value!r}")
    return value


def _texts(header: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    value = header.get(key, {})
    if not isinstance(value, dict):
        raise InputError(f"{where}: {key}: expected an object, got {value!r}")
    return {name: str(given) for name, given in value.items()}

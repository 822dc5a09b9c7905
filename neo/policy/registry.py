"""Finding a policy by name, by entry point or in a file, and constructing it with its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from neo.core.errors import InputError, NeoError, PolicyError
from neo.core.plugins import close_matches, load_object
from neo.policy.interface import Policy

ENTRY_POINTS = "neo.policies"
BUILT_IN = {
    "gpu-only": "neo.policy.gpu_only:GpuOnly",
    "neo": "neo.policy.neo:Neo",
    "fastdecode": "neo.policy.fastdecode:FastDecode",
    "pie": "neo.policy.pie:Pie",
    "flexgen": "neo.policy.flexgen:FlexGen",
}


@dataclass(frozen=True, slots=True)
class OptionInfo:
    """One option of a policy, for listings."""

    name: str
    type: str
    default: str
    help: str


def policy_names() -> list[str]:
    """Built-in policies, then those that installed packages register."""
    return [*BUILT_IN, *sorted(e.name for e in entry_points(group=ENTRY_POINTS) if e.name not in BUILT_IN)]


def policy_class(spec: str) -> Any:
    """The class that ``spec`` names: a registered name or ``path/to/file.py:Class``.

    Raises InputError in one line: unknown name (with close matches), missing file, syntax error with line.
    """
    if spec in BUILT_IN:
        module, _, name = BUILT_IN[spec].partition(":")
        return getattr(import_module(module), name)
    if ":" in spec or spec.endswith(".py"):
        return load_object(spec, "policy")
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == spec:
            try:
                return entry.load()
            except Exception as error:
                raise PolicyError(
                    f"policy '{spec}' ({entry.value}): {type(error).__name__}: {error}"
                ) from error
    raise InputError(
        f"unknown policy '{spec}'{close_matches(spec, policy_names()) or '.'} 'neo policies' lists them; "
        "your own: --policy path/to/file.py:Class"
    )


def policy_options(cls: Any) -> list[OptionInfo]:
    """The options a policy class declares."""
    declared = getattr(cls, "Options", None)
    if declared is None:
        return []
    hints = get_type_hints(declared)
    return [
        OptionInfo(f.name, _type_name(hints[f.name]), _default(f), f.metadata.get("help", ""))
        for f in dataclasses.fields(declared)
    ]


def load_policy(spec: str, options: Mapping[str, str] | None = None) -> Policy:
    """A policy ready to plan, constructed with ``options`` (text values, as on the command line)."""
    cls = policy_class(spec)
    options = dict(options or {})
    declared = getattr(cls, "Options", None)
    arguments = []
    if declared is not None:
        arguments.append(_parse(spec, declared, options))
    elif options:
        raise InputError(f"policy '{spec}' has no options, got {', '.join(options)}")
    try:
        policy = cls(*arguments)
    except NeoError:
        raise
    except Exception as error:
        raise PolicyError(
            f"policy '{spec}' cannot be constructed: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(policy, "plan", None)):
        raise PolicyError(f"policy '{spec}' has no method plan(view, cost)")
    return policy  # type: ignore[no-any-return]


def _parse(spec: str, declared: Any, options: Mapping[str, str]) -> Any:
    if not (isinstance(declared, type) and dataclasses.is_dataclass(declared)):
        raise PolicyError(f"policy '{spec}': Options must be a dataclass")
    known = [f.name for f in dataclasses.fields(declared)]
    for name in options:
        if name not in known:
            close = close_matches(name, known) or "."
            raise InputError(f"policy '{spec}' has no option '{name}'{close} Options: {', '.join(known)}")
    if not options:
        return declared()
    presets: Mapping[str, Mapping[str, Any]] = getattr(declared, "PRESETS", {})
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(declared)
    values = {}
    for name, text in options.items():
        try:
            values[name] = TypeAdapter(hints[name]).validate_python(text)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise InputError(f"policy '{spec}', option {name}={text}: {reason}") from error
    for name, implied in presets.items():
        if values.get(name):
            values = {**implied, **values}  # what is given beside it wins
    try:
        return declared(**values)
    except ValueError as error:
        raise InputError(f"policy '{spec}', {_shown(options)}: {error}") from error


def _shown(options: Mapping[str, str]) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items())


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    return "" if field.default_factory is dataclasses.MISSING else str(field.default_factory())

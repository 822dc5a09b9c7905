"""Finding a cost model by what the user wrote: a built-in name, a registered one, or a file of their own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from neo.core.errors import InputError, NeoError
from neo.core.plugins import close_matches, load_object
from neo.core.specs import HardwareSpec, ModelSpec
from neo.cost.interface import CostModel
from neo.cost.presets import shipped_table

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "neo.cost_models"
BUILT_IN = ("auto", "calibrated", "profiled", "roofline")
_CALIBRATED = "calibrated:"


def cost_model_names() -> list[str]:
    """Built-in and registered names, for help texts and messages."""
    return sorted({*BUILT_IN, *_registered()})


def load_cost_model(
    spec: str, model: ModelSpec, hardware: HardwareSpec, options: Mapping[str, Any] | None = None
) -> CostModel:
    """The cost model that ``spec`` names.

    Args:
        spec: ``roofline``, ``profiled:TABLE.json``, a name registered under the entry points
            ``neo.cost_models``, or ``path/to/file.py:Class`` (``package.module:Class`` works too); a class is
            constructed with ``(model, hardware, **options)``. ``calibrated:`` before any of them corrects it
            online; ``auto``: see ``resolve_cost``.
        model: what runs.
        hardware: where it runs.
        options: keyword options of the cost model, as text (``--cost-opt key=value``).

    Raises:
        InputError: one line: what was wrong and where.
    """
    options = dict(options or {})
    spec = resolve_cost(spec, model, hardware.name, options)
    name, _, rest = spec.partition(":")
    if name == "calibrated":
        return _calibrated(rest, model, hardware, options)
    if name == "roofline" and not rest:
        from neo.cost.roofline import Roofline

        return Roofline(model, hardware, **options)
    if name == "profiled":
        return _profiled(rest, model, options)
    if ":" in spec or spec.endswith(".py"):
        return _construct(load_object(spec, "cost model"), spec, model, hardware, options)
    registered = _registered()
    if spec in registered:
        try:
            loaded = registered[spec].load()
        except Exception as error:
            text = " ".join(str(error).split())
            raise InputError(
                f"cost model '{spec}' ({registered[spec].value}): {type(error).__name__}: {text}"
            ) from error
        return _construct(loaded, spec, model, hardware, options)
    known = cost_model_names()
    raise InputError(
        f"unknown cost model '{spec}'{close_matches(spec, known)} "
        f"(known: {', '.join(known)}; or path/to/file.py:Class)"
    )


def resolve_cost(spec: str, model: ModelSpec, hardware: str, options: Mapping[str, Any] | None = None) -> str:
    """``spec`` with ``auto`` replaced: by the table that was measured on the hardware of that name with this
    shape of model and comes with neo, else by the roofline, whose ``options`` a table would not take."""
    before, _, last = spec.rpartition(":")
    if last != "auto" or before not in ("", "calibrated"):
        return spec
    table = None if options else shipped_table(hardware, model)
    found = "roofline" if table is None else f"profiled:{table}"
    return f"{before}:{found}" if before else found


def is_calibrated(spec: str) -> bool:
    """Whether the cost model of that name learns from measured steps."""
    return spec.partition(":")[0] == "calibrated"


def table_of(spec: str) -> str | None:
    """The file with the measured table that a cost model of that name reads, if it reads one."""
    kind, _, path = spec.removeprefix(_CALIBRATED).partition(":")
    return path if kind == "profiled" else None


def with_table(spec: str, path: str) -> str:
    """``spec``, which reads a table, with another file for it."""
    return f"{_CALIBRATED if is_calibrated(spec) else ''}profiled:{path}"


def _calibrated(base: str, model: ModelSpec, hardware: HardwareSpec, options: dict[str, Any]) -> CostModel:
    if not base:
        raise InputError("cost model 'calibrated' needs what it corrects: calibrated:roofline")
    if is_calibrated(base):
        raise InputError(f"cost model 'calibrated:{base}': it corrects others, not itself")
    from neo.cost.calibrated import TIME_CONSTANT, Calibrated

    given = options.pop("time_constant", TIME_CONSTANT)
    try:
        steps = float(given)
    except (TypeError, ValueError):
        steps = math.nan
    if not 1.0 <= steps < math.inf:
        raise InputError(f"cost model 'calibrated': time_constant={given}: expected steps, at least 1")
    return Calibrated(load_cost_model(base, model, hardware, options), steps)


def _registered() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # imported late: it takes longer than the rest of this module

    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _profiled(path: str, model: ModelSpec, options: dict[str, Any]) -> CostModel:
    if not path:
        raise InputError("cost model 'profiled' needs a table: profiled:PATH.json")
    if options:
        raise InputError(f"cost model 'profiled' takes no options, got {', '.join(sorted(options))}")
    from neo.cost.profiled import Profiled

    return Profiled.load(path, model)


def _construct(
    factory: Any, spec: str, model: ModelSpec, hardware: HardwareSpec, options: dict[str, Any]
) -> CostModel:
    """Call what was loaded: its options must fit the signature, its result the interface."""
    if not callable(factory):
        raise InputError(f"cost model '{spec}': {type(factory).__name__} is not a class or function")
    _check_options(factory, spec, options)
    try:
        made = factory(model, hardware, **options)
    except NeoError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"cost model '{spec}': constructing it failed: {type(error).__name__}: {text}"
        ) from error
    if not isinstance(made, CostModel):
        missing = [m for m in ("seconds", "describe") if not callable(getattr(made, m, None))]
        raise InputError(
            f"cost model '{spec}': {type(made).__name__} lacks {' and '.join(f'{m}()' for m in missing)}"
        )
    return made


def _check_options(factory: Any, spec: str, options: dict[str, Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    keyword_only = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    known = [n for i, n in enumerate(named) if n in keyword_only or i >= 2]  # after (model, hardware)
    for option in options:
        if option not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            raise InputError(
                f"cost model '{spec}': unknown option '{option}'{close_matches(option, known)} ({takes})"
            )

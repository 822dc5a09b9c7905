"""Studies: many simulated points under one heading, from a TOML file or from flags. Format: docs/compare.md.

A point is one run of ``neo simulate``: settings by the names of its flags. A study lays them out as a grid,
systems (columns to compare) by axes (what is varied), and may ask for each system's sustained rate.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from neo.core.errors import InputError, has_control
from neo.core.plugins import close_matches

LATENCY = "latency_per_output_token_s_mean"
CASE = "case"  # the axis that [[case]] tables span
TRACES = "NEO_TRACES"  # the environment variable that says where traces are

MOST_POINTS = 100_000
"""More are taken for a mistake: they would run for days."""

Plain = str | bool | int | float


def _option_text(value: Plain) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Settings(BaseModel):
    """What one point runs: the flags of ``neo simulate``, dashes as underscores; None where not given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trace: str | None = None
    format: str | None = None
    limit: int | None = Field(default=None, ge=1)
    prompt_lengths: str | None = None
    output_lengths: str | None = None
    requests: int | None = Field(default=None, ge=1)
    arrivals: str | None = None
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    speedup: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    cv: float | None = None
    seed: int = Field(default=0, ge=0)
    timeout: float | None = None
    policy: str = "neo"
    policy_opt: dict[str, str] = Field(default_factory=dict)
    hardware: str = "g5.16xlarge"
    model: str = "llama-3.1-8b"
    tp: int | None = Field(default=None, ge=1)
    dtype: str | None = None
    cost: str = "auto"
    cost_opt: dict[str, str] = Field(default_factory=dict)
    kv_gpu_blocks: int | None = Field(default=None, ge=1)
    kv_cpu_blocks: int | None = Field(default=None, ge=0)
    kv_gpu_bytes: str | None = None
    kv_cpu_bytes: str | None = None
    gpu_memory_utilization: float | None = Field(default=None, ge=0, le=1)
    block_size: int = Field(default=16, ge=1)
    max_seqs: int = Field(default=1024, ge=1)
    max_batch_tokens: int = Field(default=8192, ge=1)
    slo: str | None = None
    drop_first: float = Field(default=0.0, ge=0, lt=1)
    bubbles: bool = False

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name != "bubbles":
            raise ValueError("only bubbles is true or false")
        return value

    @field_validator("policy_opt", "cost_opt", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): _option_text(v) for k, v in value.items()}
        return value


class Sustained(BaseModel):
    """The search for the highest rate at which ``metric`` stays within ``limit``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: float = Field(gt=0, allow_inf_nan=False)
    metric: str = LATENCY
    tolerance: float = Field(default=0.01, gt=0, lt=1)  # of the rate
    start: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # requests/s, where no rate is known


class Published(BaseModel):
    """Which published points to lay over the results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    figure: str


class StudyFile(BaseModel):
    """A study as its TOML file holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    note: str = ""
    metric: str = LATENCY
    gain: str = "total_token_throughput"
    plots: list[Literal["curves", "gain", "distribution"]] = Field(default=["curves", "gain"])
    settings: dict[str, Any] = Field(default_factory=dict)
    system: list[dict[str, Any]] = Field(min_length=1)
    case: list[dict[str, Any]] = Field(default_factory=list)
    vary: dict[str, list[Plain] | dict[str, Plain]] = Field(default_factory=dict)
    sustained: Sustained | None = None
    published: Published | None = None

    @field_validator("title")
    @classmethod
    def _is_plain(cls, title: str) -> str:
        if has_control(title):
            raise ValueError(f"control characters in {title!r}")
        return title

    @model_validator(mode="after")
    def _labels_differ(self) -> StudyFile:
        for name, tables in (("system", self.system), ("case", self.case)):
            labels = [str(t.get("label", t.get("policy", ""))) for t in tables]
            for label in labels:
                if not label:
                    raise ValueError(f"every [[{name}]] needs a label")
                if has_control(label):
                    raise ValueError(f"[[{name}]]: control characters in the label {label!r}")
                if labels.count(label) > 1:
                    raise ValueError(f"two [[{name}]] tables have the label '{label}'")
        return self


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a study.

    Attributes:
        system: the label of what is compared.
        at: (axis, label) for each axis, in the study's order.
        settings: validated, with every default in place.
    """

    system: str
    at: tuple[tuple[str, str], ...]
    settings: Settings

    @property
    def name(self) -> str:
        """Where this point is, for messages and progress."""
        return ", ".join([self.system, *(f"{axis} {label}" for axis, label in self.at)])

    def with_rate(self, rate: float) -> Point:
        """The same point under another request rate."""
        at = tuple((a, label) for a, label in self.at if a != "rate")
        return Point(
            self.system, (*at, ("rate", f"{rate:g}")), self.settings.model_copy(update={"rate": rate})
        )

    def without_rate(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """What the points of one load-latency curve have in common."""
        return self.system, tuple((a, label) for a, label in self.at if a != "rate")


@dataclass(frozen=True, slots=True)
class Study:
    """A checked study: its points laid out, paths resolved.

    Attributes:
        axes: per varied flag, its labels in order; ``case`` comes first.
        published_path: the file of published points, if there is one.
    """

    file: StudyFile
    where: str
    systems: tuple[str, ...]
    axes: tuple[tuple[str, tuple[str, ...]], ...]
    points: tuple[Point, ...]
    published_path: Path | None = None


def read_study_file(path: str | Path) -> dict[str, Any]:
    """The TOML of a study file, unchecked. InputError if it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read study {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"study {path}: not valid TOML: {error}") from None


def load_study(
    source: str | Path | Mapping[str, Any],
    *,
    settings: Mapping[str, Any] | None = None,
    vary: Mapping[str, Any] | None = None,
    traces: str | Path | None = None,
    where: str = "study",
    home: Path | None = None,
) -> Study:
    """A study from a TOML file, or from the same as a dict.

    Args:
        source: path of the file, or its content.
        settings: replaces entries of ``[settings]``, e.g. ``{"limit": 100}`` for a smaller study.
        vary: replaces axes of ``[vary]``.
        traces: folder in which traces are looked for, beside the working directory and the study's own
            folder; ``$NEO_TRACES`` by default.
        where: what errors call a study that is given as a dict.
        home: the folder such a study's files lie in.

    Raises:
        InputError: in one line, naming file, table and field.
    """
    if isinstance(source, Mapping):
        data = dict(source)
    else:
        data, where, home = read_study_file(source), str(source), Path(source).parent
    home = home or Path()
    if settings:
        data["settings"] = {**data.get("settings", {}), **settings}
    if vary:
        data["vary"] = {**data.get("vary", {}), **vary}
    try:
        file = StudyFile.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_problem(error, data)}") from None
    folders = [Path(), home]
    named = traces or os.environ.get(TRACES)
    folders += [Path(named)] if named else []
    published = None
    if file.published is not None:
        published = _found(file.published.file, [home, Path()])
        if published is None:
            raise InputError(f"{where}: [published] file: no such file: {file.published.file}")
    axes = _axes(file, where)
    points = tuple(_points(file, axes, where, folders))
    return Study(
        file,
        where,
        tuple(_label(s) for s in file.system),
        tuple((name, tuple(values)) for name, values in axes.items()),
        points,
        published,
    )


def _label(table: Mapping[str, Any]) -> str:
    return str(table.get("label", table.get("policy")))


def _first_problem(error: ValidationError, data: Mapping[str, Any]) -> str:
    """The first problem of a study file as ``[table] field: what is wrong``."""
    # a misspelt name comes before the one that is missing for it
    problem = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place = [p for p in problem["loc"] if p not in ("list[union[str,bool,int,float]]",)]
    table, *fields = place or [""]
    known: list[str] = [*StudyFile.model_fields] if not fields else []
    where = f"{table}" if not fields else f"[{table}] {'.'.join(map(str, fields))}"
    message = _message(problem)
    if problem["type"] == "extra_forbidden":
        models: dict[Any, type[BaseModel]] = {"sustained": Sustained, "published": Published}
        known = known or [*models[table].model_fields]
        message = f"unknown{close_matches(str(place[-1]), known)}"
    return f"{where}: {message}" if where else message


def _message(problem: Mapping[str, Any]) -> str:
    return str(problem["msg"]).removeprefix("Value error, ")


def _axes(file: StudyFile, where: str) -> dict[str, dict[str, Any]]:
    """Per axis, label -> value (for ``case``, its settings)."""
    axes: dict[str, dict[str, Any]] = {}
    if file.case:
        axes[CASE] = {_label(c): {k: v for k, v in c.items() if k != "label"} for c in file.case}
    for raw, values in file.vary.items():
        name = raw.replace("-", "_")
        if name not in Settings.model_fields or name in ("policy_opt", "cost_opt"):
            known = [n for n in Settings.model_fields if not n.endswith("_opt")]
            raise InputError(
                f"{where}: [vary] {raw}: not a flag that can be varied{close_matches(name, known)}"
            )
        labelled = values if isinstance(values, dict) else {_axis_label(v): v for v in values}
        if not labelled or (isinstance(values, list) and len(labelled) != len(values)):
            raise InputError(f"{where}: [vary] {raw}: expected different values, got {values}")
        if wrong := next((label for label in labelled if has_control(label)), None):
            raise InputError(f"{where}: [vary] {raw}: control characters in {wrong!r}")
        axes[name] = dict(labelled)
    count = len(file.system) * prod(map(len, axes.values()))
    if count > MOST_POINTS:
        sizes = [f"system {len(file.system)}", *(f"{name} {len(values)}" for name, values in axes.items())]
        raise InputError(f"{where}: {count} points ({' x '.join(sizes)}), at most {MOST_POINTS} are run")
    return axes


def _axis_label(value: Plain) -> str:
    """How a value is called: ``around:200:0.1`` and ``fixed:200`` by their mean, numbers by themselves."""
    if isinstance(value, float):
        return f"{value:g}"
    form, _, rest = str(value).partition(":")
    return rest.partition(":")[0] if form in ("around", "fixed") and rest else str(value)


def _points(
    file: StudyFile, axes: Mapping[str, Mapping[str, Any]], where: str, folders: list[Path]
) -> Iterator[Point]:
    base = _flags(file.settings, where, "[settings]")
    for system in file.system:
        label = _label(system)
        own = _flags({k: v for k, v in system.items() if k != "label"}, where, f"[[system]] '{label}'")
        for combination in product(*(values.items() for values in axes.values())):
            merged = _merged(base, own)
            for axis, (name, value) in zip(axes, combination, strict=True):
                more = _flags(value, where, f"[[case]] '{name}'") if axis == CASE else {axis: value}
                merged = _merged(merged, more)
            at = tuple((axis, name) for axis, (name, _) in zip(axes, combination, strict=True))
            yield Point(label, at, _settings(merged, where, label, folders))


def _flags(table: Any, where: str, heading: str) -> dict[str, Any]:
    """Names of flags, checked one by one so that an error names its table."""
    if not isinstance(table, Mapping):
        raise InputError(f"{where}: {heading}: expected a table of flags")
    flags = {}
    for raw, value in table.items():
        name = raw.replace("-", "_")
        if name not in Settings.model_fields:
            close = close_matches(name, Settings.model_fields)
            raise InputError(f"{where}: {heading} {raw}: not a flag of a study{close}")
        try:
            Settings.model_validate({name: value})
        except ValidationError as error:
            raise InputError(
                f"{where}: {heading} {raw}: {_message(error.errors()[0])}, got {value!r}"
            ) from None
        flags[name] = value
    return flags


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """``second`` over ``first``; options add up."""
    merged = {**first, **second}
    for name in ("policy_opt", "cost_opt"):
        if name in first and name in second:
            merged[name] = {**first[name], **second[name]}
    for one, other in (("kv_gpu_blocks", "kv_gpu_bytes"), ("kv_cpu_blocks", "kv_cpu_bytes")):
        for given, dropped in ((one, other), (other, one)):
            if given in second and dropped in first:  # the same budget, said anew
                merged.pop(dropped, None)
    return merged


def _settings(merged: dict[str, Any], where: str, label: str, folders: list[Path]) -> Settings:
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(
            f"{where}: {label}: {'.'.join(map(str, problem['loc']))}: {_message(problem)}"
        ) from None
    changes: dict[str, str] = {}
    if settings.trace is not None:
        path = _found(settings.trace, folders)
        if path is None:
            raise InputError(
                f"{where}: trace {settings.trace}: no such file here, beside the study, "
                f"or in the folder that --traces or ${TRACES} names"
            )
        changes["trace"] = str(path)
    for name in ("policy", "cost", "hardware", "model", "format"):
        file, colon, rest = (getattr(settings, name) or "").partition(":")
        prefix = "profiled:" if name == "cost" and file == "profiled" else ""
        if prefix:
            file, colon, rest = rest, "", ""
        if file.endswith((".py", ".toml", ".json")) and (path := _found(file, folders[:2])) is not None:
            changes[name] = f"{prefix}{path}{colon}{rest}"
    return settings.model_copy(update=changes)


def _found(name: str, folders: list[Path]) -> Path | None:
    return next((p for folder in folders if (p := folder / name).is_file()), None)

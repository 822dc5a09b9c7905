"""What an engine process is started with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from neo.core.record import RunRecord
from neo.runtime.engine_config import EngineConfig
from neo.system.config import System

if TYPE_CHECKING:
    from neo.runtime.engine import Engine  # brings torch, which only the engine's process needs

Built: TypeAlias = "tuple[Engine, System]"


@dataclass(frozen=True, slots=True)
class Launch:
    """What an engine process is started with; pickled, as both sides are ours.

    Attributes:
        config: the engine.
        build: makes it, given config, record and the open log file or None; by default ``build_engine``.
        record_dir: where to write the run log; None for nowhere.
        write_results: called at the end with (folder, record, system, the executor's description): writes the
            results beside the log.
    """

    config: EngineConfig
    build: Callable[[EngineConfig, RunRecord, TextIO | None], Built] | None = None
    record_dir: Path | None = None
    write_results: Callable[[Path, RunRecord, System, dict[str, Any]], None] | None = None

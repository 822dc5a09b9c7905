"""What can go wrong while an engine runs."""

from __future__ import annotations

from neo.core.errors import NeoError


class EngineError(NeoError):
    """The device or its kernels failed in a step: the engine's memory can no longer be trusted."""

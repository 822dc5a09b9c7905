"""The errors a user may meet. Each message says what was wrong, where, and what to do about it."""

from __future__ import annotations

import re
import traceback

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def has_control(text: str) -> bool:
    """Whether a text holds control characters: a terminal obeys some of them."""
    return _CONTROL.search(text) is not None


def one_line(text: str) -> str:
    """A message in one line, for a terminal: blanks joined, other control characters replaced."""
    return _CONTROL.sub("\ufffd", " ".join(text.split()))


def raised(error: BaseException, file: str | None = None) -> str:
    """``ValueError at mine.py:12: its message``; the innermost line, of ``file`` if it was running."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename == file), frames[-1])
    text = str(error)
    where = f"{type(error).__name__} at {frame.filename.rpartition('/')[2]}:{frame.lineno}"
    return f"{where}: {text}" if text else where


class NeoError(Exception):
    """Base of every error neo raises on purpose. The command line prints it as one line and exits with 2."""


class InputError(NeoError):
    """Something the user gave is wrong: a file, a field of a row, a name, an option."""


class PlanError(NeoError):
    """A policy returned a plan that breaks an invariant. Nothing of the plan has been applied.

    Attributes:
        rule: name of the broken rule, e.g. ``"gpu-blocks"`` (see ``neo.core.validate.RULES``).
        request_id: the offending request, or None if the rule concerns the whole step.
    """

    def __init__(self, rule: str, message: str, request_id: str | None = None) -> None:
        self.rule = rule
        self.request_id = request_id
        where = f" (request {request_id})" if request_id is not None else ""
        super().__init__(f"invalid plan, rule '{rule}'{where}: {message}")


class PolicyError(NeoError):
    """A policy raised an exception, returned something that is not a plan, or could not be loaded."""

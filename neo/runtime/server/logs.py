"""One line a request, as text or JSON; no text of prompts unless asked for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

from neo.runtime.server.generation import Outcome

QUIET_PATHS = frozenset({"/health", "/metrics"})
"""Asked for every few seconds by monitors: logged only where the answer is an error."""

_MOST_TEXT = 2000  # characters of a prompt or error in a line


class RequestLog:
    """Writes the lines.

    Args:
        style: ``text``, ``json``, or ``none``.
        prompts: put prompts into the lines.
        stream: where to; stderr by default.
    """

    def __init__(self, style: str, prompts: bool, stream: TextIO | None = None) -> None:
        self.style = style
        self.prompts = prompts
        self._stream = stream or sys.stderr

    def request(self, method: str, path: str, status: int, seconds: float, note: dict[str, Any]) -> None:
        """A request was answered; ``note`` holds what its handler left: outcome, error, id, prompt."""
        if self.style == "none" or (path in QUIET_PATHS and status < 400):
            return
        fields: dict[str, Any] = {"method": method, "path": path[:200], "status": status}
        fields["seconds"] = round(seconds, 6)
        if "id" in note:
            fields["id"] = note["id"]
        outcome = note.get("outcome")
        if isinstance(outcome, Outcome):
            fields["prompt_tokens"] = outcome.prompt_tokens
            fields["output_tokens"] = outcome.output_tokens
            if outcome.first_s is not None:
                fields["ttft_s"] = round(outcome.first_s, 6)
            fields["finish"] = ",".join(outcome.reasons)
        if "error" in note:
            fields["error"] = str(note["error"])[:_MOST_TEXT]
        if self.prompts and "prompt" in note:
            fields["prompt"] = str(note["prompt"])[:_MOST_TEXT]
        self._write(fields)

    def event(self, message: str) -> None:
        """Something about the server itself."""
        self._write({"message": message})

    def _write(self, fields: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self.style == "json":
            line = json.dumps({"time": now, **fields}, ensure_ascii=True)
        else:
            shown = [
                str(value) if key in ("method", "path", "status", "message") else f"{key}={_plain(value)}"
                for key, value in fields.items()
            ]
            line = f"{now} {' '.join(shown)}"
        self._stream.write(line + "\n")
        self._stream.flush()


def _plain(value: Any) -> str:
    """A value without spaces or line ends that would break the line apart."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


class LogMiddleware:
    """Notes status and time of every HTTP request."""

    def __init__(self, app: Any, log: RequestLog, answered: Callable[[int], None]) -> None:
        self._app = app
        self._log = log
        self._answered = answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application and log."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        note: dict[str, Any] = {}
        scope.setdefault("state", {})["note"] = note
        status = 0

        async def observed(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            self._answered(status)
            self._log.request(scope["method"], scope["path"], status, time.perf_counter() - start, note)

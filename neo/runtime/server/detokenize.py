"""Tokens to text as they come: whole characters only, and nothing of or behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_TAIL = 6
"""Tokens of the prompt that the first generated one is decoded behind, so that a leading space stays: a
character takes at most 4 bytes, and as many byte tokens."""
_MOST_PENDING = 16
"""Tokens without a whole character after which what is there is given as it is: several characters' worth of
bytes that are none."""


class Detokenizer:
    """The text of one sequence, token by token."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._pending: list[int] = []
        self._stream = DecodeStream(list(prompt[-_TAIL:]), skip_special)

    def push(self, token: int) -> str:
        """What ``token`` adds; empty while a character is not whole, or is U+FFFD, which looks like that."""
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # the library has one error: the text so far is no beginning of the text now
            text = self._restart()
        if text is None and len(self._pending) > _MOST_PENDING:
            text = self._restart()
        if text is None:
            return ""
        self._pending.clear()
        return str(text)

    def _restart(self) -> str:
        text = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip)
        self._stream = DecodeStream([], self._skip)
        return text


class StopStrings:
    """Watches text for stop strings; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that was met or None). The earliest one counts."""
        if not self._stops:
            return text, None
        text = self._held + text
        at, met = min(((i, s) for s in self._stops if (i := text.find(s)) >= 0), default=(-1, ""))
        if at >= 0:
            self._held = ""
            return text[: at + len(met)] if self._include else text[:at], met
        keep = max(_overlap(text, s) for s in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)

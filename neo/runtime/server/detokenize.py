"""Tokens to text as they come: whole characters only, and nothing of or behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_TAIL = 6
"""Tokens of the prompt that the first generated one is decoded behind, so that a leading space stays: a
character takes at most 4 bytes, and as many byte tokens."""
_MOST_PENDING = 16
"""Tokens without a whole character after which what can no longer change is given as it is: bytes that are no
character, or characters that look like that."""


class Detokenizer:
    """The text of one sequence, token by token; ``flush`` it when it ends."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._before = list(prompt[-_TAIL:])  # what the pending ones stand behind
        self._pending: list[int] = []
        self._stream = DecodeStream(self._before, skip_special)

    def push(self, token: int) -> str:
        """What ``token`` adds; empty while a character is not whole, or is U+FFFD, which looks like that."""
        return self.push_all((token,))[0]

    def push_all(self, tokens: Sequence[int]) -> list[str]:
        """What each of some tokens adds."""
        tokenizer = self._tokenizer
        found: list[str] = []
        for token in tokens:
            self._pending.append(token)
            try:
                text = self._stream.step(tokenizer, token)
            except Exception:  # the library has one error: the text so far is no beginning of the text now
                text = self._restart()
            if text is None:
                found.append(self._settled() if len(self._pending) > _MOST_PENDING else "")
            else:
                self._before, self._pending = self._pending, []
                found.append(text)
        return found

    def flush(self) -> str:
        """What was held back, at the end: nothing comes that could make whole characters of it."""
        if not self._pending:
            return ""
        before, whole = self._decode(self._before), self._decode(self._before + self._pending)
        behind = whole[len(before) :] if whole.startswith(before) else self._decode(self._pending)
        self._before, self._pending = self._pending, []
        self._stream = DecodeStream([], self._skip)
        return behind

    def _settled(self) -> str:
        """As much of the pending text as no further token can change: up to where it can be cut in two."""
        pending, whole = self._pending, self._decode(self._pending)
        cuts = (at for at in range(len(pending) - 1, 0, -1) if self._cut(at) == whole)
        at = next(cuts, len(pending))
        self._pending = pending[:at]
        text = self._restart()
        self._before, self._pending = self._pending, []
        return text + "".join([self.push(token) for token in pending[at:]])

    def _cut(self, at: int) -> str:
        return self._decode(self._pending[:at]) + self._decode(self._pending[at:])

    def _restart(self) -> str:
        self._stream = DecodeStream([], self._skip)
        return self._decode(self._pending)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
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

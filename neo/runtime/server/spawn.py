"""Starting the engine's process: imports nothing heavy, so that both processes can load at the same time."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Child:
    """The engine's process, and our end of the socket to it. It ends by itself when this end closes.

    As a context manager it leaves neither behind.
    """

    process: subprocess.Popen[bytes]
    sock: socket.socket

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_error: object) -> None:
        self.sock.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def spawn() -> Child:
    """Start a process that loads its libraries and then waits for a Launch."""
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        command = [sys.executable, "-m", "neo.runtime.server.engine_process", str(number)]
        with _ignored(signal.SIGINT, signal.SIGTERM):  # which the child inherits
            process = subprocess.Popen(command, pass_fds=(number,), stdin=subprocess.DEVNULL)
    return Child(process, ours)


@contextmanager
def _ignored(*numbers: signal.Signals) -> Iterator[None]:
    """Signals ignored for a moment; not possible, and left out, on threads other than the main one."""
    before = {}
    with suppress(ValueError):
        before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

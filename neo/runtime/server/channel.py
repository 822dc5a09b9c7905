"""The engine's end of the socket between the two processes."""

from __future__ import annotations

import select
import socket

import msgspec

from neo.runtime.server.messages import Failed, Frames, Ready, ToEngine, Update, frame

_SEND_TIMEOUT_S = 60.0  # an HTTP process that reads nothing for so long hangs
_READ = 1 << 18
_UNREAD = 1 << 15
"""Bytes that may wait for the HTTP process, what the system adds to each message among them: some ten
thousand tokens. More would only make tokens old, and requests wait, where the engine is the faster one."""


class Channel:
    """The engine's end of the socket: reads without waiting unless asked to, writes whole messages."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD)
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        self._poll = poll.poll  # a fraction of what a read costs that finds nothing
        self._frames = Frames()
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._encode = msgspec.msgpack.Encoder(enc_hook=str).encode  # a description may hold anything
        self.closed = False

    def receive(self, wait_s: float | None) -> list[ToEngine]:
        """Messages that are there; if none is, the first within ``wait_s`` seconds (None: however long)."""
        if not self._poll(None if wait_s is None else 1000.0 * wait_s):
            return []
        data = self._read()
        found: list[ToEngine] = []
        while data is not None and not self.closed:
            found += map(self._decode, self._frames.feed(data))
            data = self._read() if len(data) == _READ else None
        return found

    def _read(self) -> bytes | None:
        """Bytes that are there; None if none are. Sets ``closed``."""
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return None
        except ConnectionError:
            data = b""
        self.closed = self.closed or not data
        return data

    def send(self, message: Update | Ready | Failed) -> None:
        """Write a message. Closed: the other side is gone, or has read nothing for a minute."""
        if self.closed:
            return
        data = frame(self._encode(message))
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.closed = True
            return
        if sent < len(data):
            self._send_rest(data[sent:])

    def _send_rest(self, data: bytes) -> None:
        """Wait until the other side has read enough to take it."""
        try:
            self._socket.settimeout(_SEND_TIMEOUT_S)
            self._socket.sendall(data)
        except OSError:
            self.closed = True
        finally:
            self._socket.setblocking(False)

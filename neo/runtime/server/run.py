"""Running a server: start the engine, bind, serve, end in order. Exit codes are in ``docs/serve.md``."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from prometheus_client import disable_created_metrics

from neo.core.errors import InputError
from neo.runtime.heap import settled_heap
from neo.runtime.server.app import Server, make_app
from neo.runtime.server.bridge import Bridge
from neo.runtime.server.errors import server_error
from neo.runtime.server.launch import Launch
from neo.runtime.server.limits import Keys, ServerLimits
from neo.runtime.server.logs import RequestLog
from neo.runtime.server.metrics import Metrics
from neo.runtime.server.open_files import raise_file_limit
from neo.runtime.server.spawn import Child
from neo.runtime.server.text import TextSide
from neo.runtime.server.wanted import Reader

EXIT_OK, EXIT_ENGINE, EXIT_CUT_OFF = 0, 3, 4
_BACKLOG = 2048
_POLL_S = 0.05
_CLOSE_S = 2  # connections get this long to take what was written, once nothing more comes


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """A server.

    Attributes:
        child: the engine's process, waiting.
        launch: the engine.
        tokenizer: folder of the tokenizer.
        names: of the model; the first is the one in answers.
        port: 0 lets the system choose.
        api_keys: none: everybody may enter.
        announce: called with the address once requests are answered.
    """

    child: Child
    launch: Launch
    tokenizer: Path
    names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    limits: ServerLimits = field(default_factory=ServerLimits)
    log_style: str = "text"
    log_prompts: bool = False
    announce: Callable[[str], None] | None = None


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: ending is ours."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def run_server(config: ServeConfig) -> int:
    """Serve until a signal or a failure; the exit code. NeoError if it cannot begin."""
    raise_file_limit()
    disable_created_metrics()  # type: ignore[no-untyped-call]  # times of birth, which nobody reads
    listener = _bind(config.host, config.port)  # before a model is loaded for minutes
    with listener:
        return _runner()(_serve(config, listener))


def _runner() -> Callable[..., int]:
    """``asyncio.run``, on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    found: Callable[..., int] = uvloop.run
    return found


async def _serve(config: ServeConfig, listener: socket.socket) -> int:
    log = RequestLog(config.log_style, config.log_prompts)
    metrics = Metrics(config.names[0])
    bridge = Bridge(config.limits.max_queued, metrics)
    ending = _Ending()
    try:
        starting = asyncio.ensure_future(bridge.start(config.child, config.launch))
        try:
            text = await asyncio.to_thread(TextSide, config.tokenizer)
        except BaseException:
            starting.cancel()
            raise
        stopped = asyncio.ensure_future(ending.asked.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not starting.done():
            starting.cancel()
            return EXIT_OK
        ready = await starting
        metrics.engine(ready)
        server = Server(
            bridge,
            text,
            metrics,
            log,
            config.limits,
            config.names,
            Keys(config.api_keys),
            Reader(text, ready, config.names),
            config.cors_origins,
        )
        lifecycle = _Lifecycle(config, server, listener, ending)
        with settled_heap():
            return await lifecycle.run()
    finally:
        await bridge.stop()


class _Ending:
    """SIGTERM and SIGINT: the first asks to end in order, the second to end now."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.now = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(NotImplementedError, ValueError, RuntimeError):  # not on this system or thread
                loop.add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        (self.now if self.asked.is_set() else self.asked).set()


class _Lifecycle:
    """Serving, and the ways in which it ends."""

    def __init__(self, config: ServeConfig, server: Server, listener: socket.socket, ending: _Ending) -> None:
        self.config = config
        self.server = server
        self.listener = listener
        self.ending = ending
        self.uvicorn = _Uvicorn(
            uvicorn.Config(
                make_app(server),
                log_level="error",
                access_log=False,
                lifespan="off",
                backlog=_BACKLOG,
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_S,
            )
        )

    async def run(self) -> int:
        """Serve; the exit code."""
        serving = asyncio.ensure_future(self.uvicorn.serve([self.listener]))
        while not self.uvicorn.started and not serving.done():
            await asyncio.sleep(_POLL_S / 10)
        if self.config.announce is not None:
            self.config.announce(address_of(self.listener))
        asked = asyncio.ensure_future(self.ending.asked.wait())
        gone = asyncio.ensure_future(self.server.bridge.gone.wait())
        await asyncio.wait({serving, asked, gone}, return_when=asyncio.FIRST_COMPLETED)
        code = await self._drain() if asked.done() and not gone.done() else EXIT_OK
        if self.server.bridge.dead is not None:
            code = EXIT_ENGINE
            self.server.log.event(f"the engine is gone: {self.server.bridge.dead}")
            await _first(
                self.config.limits.linger_s, self.ending.asked if not asked.done() else self.ending.now
            )
        self.uvicorn.should_exit = True
        await serving
        asked.cancel()
        gone.cancel()
        return code

    async def _drain(self) -> int:
        """Let what was accepted end within the grace time, and cut off the rest."""
        server = self.server
        server.draining = True
        grace = self.config.limits.grace_s
        server.log.event(f"ending: {len(server.open)} requests have {grace:g} s")
        loop = asyncio.get_running_loop()
        until = loop.time() + grace
        while server.open and loop.time() < until and not self.ending.now.is_set():
            if server.bridge.dead is not None:
                return EXIT_ENGINE
            await asyncio.sleep(_POLL_S)
        if not server.open:
            return EXIT_OK
        left = list(server.open)
        server.log.event(f"cut off: {len(left)} requests")
        for generation in left:
            generation.fail(server_error("the server ended before the request did", 503))
        return EXIT_CUT_OFF


async def _first(seconds: float, event: asyncio.Event) -> None:
    """Wait that long, or until the event."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def _bind(host: str, port: int) -> socket.socket:
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(info[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(info[4])
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}"
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """``http://host:port`` of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

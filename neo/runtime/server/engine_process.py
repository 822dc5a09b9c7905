"""The engine's process: take messages, step, answer with one message a step (see ``reports``).

Its loop looks like the engine's: ``receive``, ``step``, ``send``. It ends when it is told to, when the HTTP
process is gone (the socket closes), or when the engine fails; the HTTP process sees that the socket closed.
Signals that a terminal or a supervisor sends to every process are left to the HTTP process.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from neo.core.errors import InputError, NeoError, PlanError, one_line
from neo.core.logreader import LOG_FILE
from neo.core.record import RunRecord
from neo.core.request import FinishReason, Tier
from neo.core.runlog import RunLog
from neo.runtime.engine import Engine, Output
from neo.runtime.engine_config import EngineConfig
from neo.runtime.errors import EngineError
from neo.runtime.heap import settled_heap
from neo.runtime.server.channel import Channel
from neo.runtime.server.launch import Built, Launch
from neo.runtime.server.messages import (
    Abort,
    Add,
    Event,
    Failed,
    Ready,
    ToEngine,
)
from neo.runtime.server.reports import Reports
from neo.runtime.server.watching import LiveRecord, StepWatch
from neo.runtime.setup import EngineParts
from neo.runtime.warm import prepare_engine
from neo.system.config import System

EXIT_INPUT, EXIT_FAILED = 2, 1
STALL_S = 10.0
"""Seconds a policy may stay idle with requests waiting before one of them fails: none of ours ever does."""
_IDLE_POLL_S = 0.005  # a policy may be idle until some time has passed: ask it again this often


def build_engine(config: EngineConfig, record: RunRecord, log_file: TextIO | None) -> Built:
    """The engine that the config describes. InputError for anything in it that is wrong."""
    parts = EngineParts(config)
    system = parts.system()
    engine = parts.engine(system, record=record)
    prepare_engine(engine, parts.spec)
    if log_file is not None:
        header = {
            **system.describe(),
            "engine": engine.executor.describe(),
            "max_model_len": engine.options.max_model_len,
        }
        engine.log = RunLog(log_file, header, system.cost)
    return engine, system


class EngineLoop:
    """Serves one engine until it is told to end."""

    def __init__(
        self,
        engine: Engine,
        system: System,
        channel: Channel,
        record: LiveRecord,
        log_file: TextIO | None = None,
    ) -> None:
        self.engine = engine
        self.channel = channel
        self.log_file = log_file
        self._zero = time.perf_counter() - engine.clock()
        self.reports = Reports(engine, channel, StepWatch(record, system.cost))
        self._stopping = False
        self._idle_since: float | None = None
        self._steps = 0  # of the engine when it last brought nothing

    def run(self) -> None:
        """The loop."""
        engine, channel, reports = self.engine, self.channel, self.reports
        try:
            while not channel.closed:
                messages = channel.receive(self._patience())
                for message in messages:
                    self._handle(message)
                reports.step(self._step() if engine.has_work else (), bool(messages))
                while not reports.due:
                    reports.step(self._step(), False)
                if not engine.has_work:
                    if self._stopping:
                        return
                    self._rest()
        finally:
            reports.flush()

    def _rest(self) -> None:
        """The engine is idle. EngineError if its accounts do not add up."""
        self.engine.check_integrity()
        self.reports.rest()
        if self.log_file is not None:
            self.log_file.flush()

    def _patience(self) -> float | None:
        """How long to wait for messages: not at all while steps run, for ever without work."""
        if not self.engine.has_work:
            return None
        return 0.0 if self._idle_since is None else _IDLE_POLL_S

    def _handle(self, message: ToEngine) -> None:
        reports = self.reports
        if isinstance(message, Add):
            reports.accepted += 1
            self._add(message)
        elif isinstance(message, Abort):
            request = reports.forget(message.key)
            if request is not None:
                self.engine.abort(request.id, FinishReason(message.reason))
        else:
            self._stopping = True
            for key in list(reports.requests):
                request = reports.forget(key)
                if request is not None:
                    self.engine.abort(request.id)

    def _add(self, message: Add) -> None:
        try:
            request = self.engine.add(
                message.id,
                message.prompt,
                message.params,
                arrival_s=message.arrival_s - self._zero,
                priority=message.priority,
            )
        except InputError as error:
            self.reports.events.append(Event(message.key, reason="invalid", detail=str(error)))
            return
        self.reports.add(message.key, request)

    def _step(self) -> Sequence[Output]:
        try:
            outputs = self.engine.step()
            if outputs or self.engine.plain is not None:
                self._idle_since = None
            else:
                self._watch_idle()
        except EngineError:
            raise
        except NeoError as error:
            self._fail(error)
            return ()
        return outputs

    def _watch_idle(self) -> None:
        """If the policy planned nothing although requests wait: PlanError if that lasts."""
        now = time.perf_counter()
        if self.engine.steps != self._steps or not self.engine.has_work:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since > STALL_S:
            self._idle_since = now
            raise self.engine.scheduler.stalled()
        self._steps = self.engine.steps

    def _fail(self, error: NeoError) -> None:
        """The policy failed, nothing of its plan is applied: end the request it names, or else all."""
        keys = self.reports.keys
        named = error.request_id if isinstance(error, PlanError) else None
        which = [named] if named in keys else list(keys)
        for request_id in which:
            key = keys[request_id]
            self.reports.forget(key)
            self.engine.abort(request_id)
            self.reports.events.append(Event(key, reason="policy", detail=str(error)))
        print(
            f"policy error, {len(which)} request(s) ended: {one_line(str(error))}",
            file=sys.stderr,
            flush=True,
        )


def ready_message(engine: Engine, system: System) -> Ready:
    """What the HTTP process must know of an engine."""
    pools = engine.scheduler.view.pools
    size = system.config.limits.block_size
    described = system.describe()
    described["executor"] = engine.executor.describe()
    return Ready(
        model=system.model.name,
        vocab=engine.vocab,
        max_model_len=engine.options.max_model_len,
        capacity_tokens=max(pool.blocks for pool in pools.values()) * size,
        max_seqs=system.config.limits.max_seqs,
        kv_total=(pools[Tier.GPU].total, pools[Tier.CPU].total),
        description=described,
    )


def serve(launch: Launch, channel: Channel) -> int:
    """Build the engine, run its loop, write its results. Returns the process's exit code."""
    record = LiveRecord(keep=launch.record_dir is not None)
    with ExitStack() as stack:
        try:
            file = _open_log(launch.record_dir, stack)
            engine, system = (launch.build or build_engine)(launch.config, record, file)
            stack.callback(engine.close)
            ready = ready_message(engine, system)
        except NeoError as error:
            channel.send(Failed(str(error), input_error=True))
            return EXIT_INPUT
        loop = EngineLoop(engine, system, channel, record, file)
        stack.enter_context(settled_heap())
        channel.send(ready)
        try:
            loop.run()
            if channel.closed:
                record.interrupted = "the HTTP process ended"
                print("the HTTP process is gone: the engine ends", file=sys.stderr, flush=True)
        except NeoError as error:
            record.interrupted = str(error)
            print(f"engine error: {error}", file=sys.stderr, flush=True)
            channel.send(Failed(str(error)))
            return EXIT_FAILED
        finally:
            if file is not None:
                file.flush()  # whoever sees the results may read the log
            if launch.record_dir is not None and launch.write_results is not None:
                launch.write_results(launch.record_dir, record, system, engine.executor.describe())
    return 0


def _open_log(folder: Path | None, stack: ExitStack) -> TextIO | None:
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return stack.enter_context((folder / LOG_FILE).open("w", encoding="utf-8", buffering=1 << 16))
    except OSError as error:
        raise InputError(f"cannot write into --record {folder}: {error.strerror or error}") from error


def main(descriptor: int) -> int:
    """Entry point of the process: ``descriptor`` is its end of the socket; a pickled Launch comes first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(True)
    length = int.from_bytes(_exactly(sock, 8), "little")
    launch: Any = pickle.loads(_exactly(sock, length))
    channel = Channel(sock)
    try:
        return serve(launch, channel)
    except Exception as error:  # a fault of ours: said here in full, and to the HTTP process in one line
        traceback.print_exc()
        channel.send(Failed(f"{type(error).__name__}: {error}"))
        return EXIT_FAILED


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            os._exit(EXIT_FAILED)  # the HTTP process ended before it said what to run
        data += more
    return bytes(data)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

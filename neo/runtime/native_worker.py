"""Workers of the native backend: jobs, tickets and the thread that runs them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from neo.runtime import cpu_library as c
from neo.runtime.backend import ANSWER_S, Job, Ticket, check_threads
from neo.runtime.cpu_kernels import Pool
from neo.runtime.cpu_worker import Worker
from neo.runtime.native_args import Slot

_CAPACITY = 4096  # jobs that a worker of the library holds
_LOOK_S = 0.25  # a wait returns to Python this often, for Ctrl-C


class NativeJob:
    """See `neo.runtime.backend.Job`. Its parts run one after the other."""

    __slots__ = ("keep", "kind", "parts")

    def __init__(self, kind: str, parts: tuple[Slot, ...], keep: tuple[object, ...]) -> None:
        self.kind, self.parts, self.keep = kind, parts, keep


class NativeTicket:
    """See `neo.runtime.backend.Ticket`."""

    __slots__ = ("_end_ns", "_start_ns", "keep", "kind", "message", "number", "parts", "status", "worker")

    def __init__(self, worker: NativeWorker, job: NativeJob) -> None:
        self.worker = worker
        self.kind, self.parts, self.keep = job.kind, job.parts, job.keep
        job.parts = job.keep = ()  # a job is submitted once
        self.number = 0  # of the job's last part
        self.status = -1  # until it is known
        self.message = ""
        self._start_ns = self._end_ns = 0

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        if self.status < 0:
            self.worker._settle()
        return self.status >= 0

    @property
    def start_s(self) -> float:
        """When it began, in seconds of ``time.perf_counter``."""
        self._require_done()
        return self._start_ns * 1e-9

    @property
    def end_s(self) -> float:
        """When it ended, likewise."""
        self._require_done()
        return self._end_ns * 1e-9

    def _require_done(self) -> None:
        if not self.done:
            raise ValueError(f"the {self.kind} job of worker {self.worker.name} has not ended")

    def settle(self, free: deque[Slot]) -> None:
        """Take over what the structs say, and give them back. The job has ended."""
        parts = self.parts
        self._start_ns, self._end_ns = parts[0].job.start_ns, parts[-1].job.end_ns
        status = 0
        for part in parts:
            if not status and part.job.status:
                status, self.message = part.job.status, part.job.message.decode(errors="replace")
        free.extend(parts)
        self.parts = self.keep = ()
        self.status = status


class NativeWorker:
    """See `neo.runtime.backend.Worker`."""

    def __init__(
        self, name: str, threads: int, cores: Sequence[int] | None, spin_us: int, free: deque[Slot]
    ) -> None:
        check_threads(threads, cores)
        self.name = name
        self._free = free
        self._in_flight: deque[NativeTicket] = deque()
        self._parts = 0  # submitted and not settled
        self._lock = threading.RLock()
        self._pool = Pool(threads, cores, max(0, spin_us))
        if spin_us < 0:
            self._pool.begin()
        self._worker = Worker(self._pool, cores[0] if cores is not None else -1, spin_us)

    @property
    def idle(self) -> bool:
        """Whether every job has ended."""
        self._settle()
        return not self._in_flight

    def submit(self, job: Job, after: Sequence[Ticket] = ()) -> NativeTicket:
        """Queue a job; see `neo.runtime.backend.Worker.submit`."""
        if not isinstance(job, NativeJob) or not job.parts:
            raise ValueError(f"worker {self.name}: not a job of this backend, or submitted before: {job!r}")
        before = [pair for earlier in after if (pair := self._before(earlier, job)) is not None]
        ticket = NativeTicket(self, job)
        with self._lock:
            while self._parts + len(ticket.parts) > _CAPACITY:
                self._await(self._in_flight[0], ANSWER_S)
            self._settle()
            for part in ticket.parts:
                ticket.number = self._worker.submit(part.job, before)
                before = [(self._worker, ticket.number)]
            self._in_flight.append(ticket)
            self._parts += len(ticket.parts)
        return ticket

    def _before(self, ticket: Ticket, job: NativeJob) -> tuple[Worker, int] | None:
        if not isinstance(ticket, NativeTicket):
            raise ValueError(f"worker {self.name}: not a ticket of this backend: {ticket!r}")
        if ticket.status == 0:
            return None
        if ticket.worker._worker.closed:
            raise c.CpuKernelError(
                f"worker {self.name}, {job.kind} job: dependency failed: worker {ticket.worker.name}, "
                f"{ticket.kind} job: {ticket.message}"
            )
        return ticket.worker._worker, ticket.number

    def wait(self, ticket: Ticket, timeout_s: float = ANSWER_S) -> None:
        """Return when the job has ended; see `neo.runtime.backend.Worker.wait`."""
        if not isinstance(ticket, NativeTicket) or ticket.worker is not self:
            raise ValueError(f"worker {self.name}: not a ticket of this worker: {ticket!r}")
        if ticket.status < 0:
            self._await(ticket, timeout_s)
        if ticket.status:
            raise c.CpuKernelError(f"worker {self.name}, {ticket.kind} job: {ticket.message}")

    def _await(self, ticket: NativeTicket, timeout_s: float) -> None:
        until = time.perf_counter() + timeout_s
        left = timeout_s
        while self._worker.await_end(ticket.number, max(0.0, min(left, _LOOK_S))) == c.TIMEOUT:
            left = until - time.perf_counter()
            if left <= 0:
                raise c.CpuKernelError(
                    f"worker {self.name} does not answer: its {ticket.kind} job has not ended after "
                    f"{timeout_s:g} s"
                )
        with self._lock:  # another thread may be taking note of this very job
            self._settle()

    def _settle(self) -> None:
        """Take note of all jobs that have ended."""
        in_flight = self._in_flight
        if not in_flight or self._worker.closed:
            return
        finished = self._worker.finished
        with self._lock:
            while in_flight and in_flight[0].number <= finished:
                self._settle_first()

    def _settle_first(self) -> None:
        ticket = self._in_flight.popleft()
        self._parts -= len(ticket.parts)
        ticket.settle(self._free)

    def close(self) -> None:
        """End the thread; see `neo.runtime.backend.Worker.close`."""
        self._worker.close()
        while self._in_flight:
            self._settle_first()
        self._pool.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):  # its thread may still use the structs of jobs in flight
            self.close()

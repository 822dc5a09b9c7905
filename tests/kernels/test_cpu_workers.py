"""Workers of the library: order, dependencies, flags, failures, closing."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from kernel_cases import make_case, needs_library

from neo.runtime import cpu_kernels as ck
from neo.runtime import cpu_library as c
from neo.runtime.cpu_kernels import KVType
from neo.runtime.cpu_worker import Worker

pytestmark = needs_library

CAPACITY = 4096


class Bytes:
    """One memory of 8 blocks of 16 bytes, and jobs that copy one block of it onto another."""

    def __init__(self) -> None:
        self.memory = np.repeat(np.arange(8, dtype=np.uint8), 16)
        self.kept: list[Any] = []

    def job(self, source: int, target: int, **fields: Any) -> c.Job:
        blocks = np.array([source, target], np.int32)
        copy = c.Copy(
            src=self.memory.ctypes.data,
            dst=self.memory.ctypes.data,
            block_bytes=16,
            src_blocks=blocks.ctypes.data,
            dst_blocks=blocks[1:].ctypes.data,
            src_count=8,
            dst_count=8,
            count=1,
        )
        job = c.Job(copy=ctypes.pointer(copy), **fields)
        self.kept.append((blocks, copy, job))  # until they have ended
        return job

    @property
    def blocks(self) -> list[int]:
        return self.memory[::16].tolist()


class Flag:
    """A number in memory that somebody else sets."""

    def __init__(self, value: int = 0) -> None:
        self._number = ctypes.c_uint32(value)
        self.address = ctypes.addressof(self._number)

    @property
    def value(self) -> int:
        return self._number.value

    @value.setter
    def value(self, value: int) -> None:
        self._number.value = value


@pytest.fixture(params=[0, 30], ids=lambda spin: f"spin{spin}")
def workers(request: pytest.FixtureRequest) -> Iterator[list[Worker]]:
    made = [Worker(spin_us=request.param, flag_timeout_s=5) for _ in range(2)]
    yield made
    for worker in made:
        worker.close()


def test_jobs_run_in_order(workers: list[Worker]) -> None:
    """Block i goes to block i + 1, one after the other: the first block reaches the last only in order."""
    data = Bytes()
    jobs = [data.job(i, i + 1) for i in range(7)]
    tickets = [workers[0].submit(job) for job in jobs]
    assert tickets == list(range(1, 8))
    workers[0].wait(tickets[-1])
    assert workers[0].finished == 7
    assert data.blocks == [0] * 8
    assert all(job.status == 0 and job.message == b"" for job in jobs)
    times = [t for job in jobs for t in (job.start_ns, job.end_ns)]
    assert times == sorted(times)


def test_times_are_those_of_perf_counter(workers: list[Worker]) -> None:
    data = Bytes()
    job = data.job(0, 1)
    begin = time.perf_counter_ns()
    workers[0].wait(workers[0].submit(job))
    assert begin <= job.start_ns <= job.end_ns <= time.perf_counter_ns()


def test_a_job_comes_after_those_of_another_worker(workers: list[Worker]) -> None:
    """Turn by turn on two workers, the first of all held back by a flag."""
    one, two = workers
    data, flag = Bytes(), Flag()
    jobs = [data.job(0, 1, wait_flag=flag.address, wait_value=1)]
    jobs += [data.job(i, i + 1) for i in range(1, 7)]
    before: list[tuple[Worker, int]] = []
    for i, job in enumerate(jobs):
        worker = workers[i % 2]
        before = [(worker, worker.submit(job, before))]
    with pytest.raises(TimeoutError, match="job 1 has not ended"):
        one.wait(1, timeout_s=0.02)
    assert (one.finished, two.finished) == (0, 0)
    assert data.blocks == list(range(8))
    flag.value = 1
    before[0][0].wait(before[0][1], timeout_s=5)
    two.wait(3)
    assert data.blocks == [0] * 8


@pytest.mark.parametrize(
    ("value", "wanted", "begins"),
    [(5, 5, True), (6, 5, True), (4, 5, False), (0, 2**32 - 1, True), (2**32 - 1, 0, False)],
)
def test_flags_wrap_around(value: int, wanted: int, begins: bool) -> None:
    data, flag, done = Bytes(), Flag(value), Flag()
    job = data.job(3, 4, wait_flag=flag.address, wait_value=wanted, done_flag=done.address, done_value=9)
    with Worker(flag_timeout_s=0.01) as worker:
        ticket = worker.submit(job)
        if begins:
            worker.wait(ticket)
        else:
            with pytest.raises(c.CpuKernelError, match=f"wait_flag is {value} and not yet {wanted} after"):
                worker.wait(ticket)
    assert data.blocks[4] == (3 if begins else 4)
    assert done.value == 9


def test_a_failure_reaches_all_that_depends_on_it(workers: list[Worker]) -> None:
    one, two = workers
    data, done = Bytes(), Flag()
    jobs = [
        data.job(0, 8),
        data.job(0, 1, done_flag=done.address, done_value=3),
        data.job(0, 2),
        data.job(0, 3),
    ]
    bad = one.submit(jobs[0])
    dependent = two.submit(jobs[1], [(one, bad)])
    further = one.submit(jobs[2], [(two, dependent)])
    free = one.submit(jobs[3])
    one.wait(free)
    with pytest.raises(ValueError, match=r"^dst_blocks\[0\] is 8, there are 8 blocks"):
        one.wait(bad)
    for worker, ticket in ((two, dependent), (one, further), (two, dependent)):
        with pytest.raises(c.CpuKernelError, match=r"^dependency failed: dst_blocks\[0\] is 8"):
            worker.wait(ticket)
    assert data.blocks == [0, 1, 2, 0, 4, 5, 6, 7]
    assert done.value == 3
    late = data.job(0, 5)
    with pytest.raises(c.CpuKernelError, match="dependency failed"):
        two.wait(two.submit(late, [(one, bad), (one, free)]))


def test_attention_with_the_pool_of_the_worker_and_with_its_own() -> None:
    case = make_case(np.random.default_rng(0), [20, 3, 1500], KVType.FP16, 64, (4, 2), 16)
    with ck.Pool(2) as pool, ck.Pool(1) as other, Worker(pool) as worker, Worker() as bare:
        expected, _ = case.run(pool)
        struct, out = case.cache.struct(), np.zeros_like(case.q)
        args = ck._decode_struct(case.cache, struct, case.q, out, case.tables, case.lengths, case.scale, None)
        for who, own in ((worker, None), (worker, other), (bare, other)):
            job = c.Job(decode=ctypes.pointer(args), pool=None if own is None else own.handle)
            out[:] = 0
            who.wait(who.submit(job))
            assert np.array_equal(out, expected)
        with pytest.raises(ValueError, match="pool must not be NULL"):
            bare.wait(bare.submit(c.Job(decode=ctypes.pointer(args))))


def test_a_full_worker_refuses() -> None:
    data, flag = Bytes(), Flag()
    with Worker() as worker:
        first = data.job(0, 1, wait_flag=flag.address, wait_value=1)
        worker.submit(first)
        other = data.job(2, 3)
        for _ in range(CAPACITY - 1):
            last = worker.submit(other)
        with pytest.raises(c.CpuKernelError, match=f"{CAPACITY} jobs have not ended"):
            worker.submit(other)
        flag.value = 1
        worker.wait(last)
        worker.wait(worker.submit(other))


def test_closing_ends_what_has_not_begun() -> None:
    data, never, done = Bytes(), Flag(), Flag()
    waiting, after = Worker(spin_us=0), Worker(spin_us=0)
    jobs = [data.job(0, 1, wait_flag=never.address, wait_value=1), data.job(0, 2), data.job(0, 3)]
    jobs[2].done_flag, jobs[2].done_value = done.address, 1
    ticket = waiting.submit(jobs[0])
    waiting.submit(jobs[1])
    depends = after.submit(jobs[2], [(waiting, ticket)])
    waiting.close()
    with pytest.raises(c.CpuKernelError, match="dependency failed: the worker was closed"):
        after.wait(depends)
    after.close()
    assert [job.status for job in jobs] == [8, 8, 6]
    assert b"closed" in jobs[0].message
    assert b"closed" in jobs[1].message
    assert done.value == 1
    assert data.blocks == list(range(8))
    with pytest.raises(ValueError, match="closed"):
        after.submit(jobs[0])


def test_bad_workers_and_jobs_are_refused() -> None:
    for options, message in (
        ({"core": -2}, "core is -2"),
        ({"spin_us": -2}, "spin_us is -2"),
        ({"flag_timeout_s": -1}, "flag_timeout_us is -1000000"),
    ):
        with pytest.raises(ValueError, match=message):
            Worker(**options)  # type: ignore[arg-type]
    library, data = c.load(), Bytes()
    with Worker() as worker:
        job, ticket = data.job(0, 1), ctypes.c_int64()
        submit = library.neo_cpu_worker_submit
        one = c.After(worker.handle, 1)
        cases = [
            ((None, job, None, 0, ticket), b"worker must not be NULL"),
            ((worker.handle, None, None, 0, ticket), b"job must not be NULL"),
            ((worker.handle, job, None, 1, ticket), b"after must not be NULL"),
            ((worker.handle, job, None, -1, ticket), b"n_after is -1"),
            ((worker.handle, job, c.After(None, 1), 1, ticket), b"after[0]: worker must not be NULL"),
            ((worker.handle, job, one, 1, ticket), b"after[0]: there is no job 1, the last is 0"),
        ]
        for args, message in cases:
            assert submit(*args) == 1
            assert message in library.neo_cpu_last_error()
        job.size = 8
        assert submit(worker.handle, job, None, 0, ticket) == 1
        assert b"job has size 8" in library.neo_cpu_last_error()
        for missing in (0, 1, -1):
            with pytest.raises(ValueError, match=f"there is no job {missing}, the last is 0"):
                worker.wait(missing)
    assert library.neo_cpu_worker_finished(None) == 0
    library.neo_cpu_worker_destroy(None)


def test_many_threads_submit_and_wait(workers: list[Worker]) -> None:
    """Every thread moves its own byte along through both workers; no job is lost and none overtakes."""
    failures: list[BaseException] = []

    def use() -> None:
        try:
            data = Bytes()
            for _ in range(40):
                data.memory[:] = np.repeat(np.arange(8, dtype=np.uint8), 16)
                before: list[tuple[Worker, int]] = []
                for i in range(7):
                    worker = workers[i % 2]
                    before = [(worker, worker.submit(data.job(i, i + 1), before))]
                before[0][0].wait(before[0][1])
                assert data.blocks == [0] * 8
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_callback_keeps_time_and_flags() -> None:
    """`neo_cpu_run` without a worker: the same flags and times."""
    data, flag, done = Bytes(), Flag(1), Flag()
    job = data.job(6, 7, wait_flag=flag.address, wait_value=1, done_flag=done.address, done_value=2)
    c.load().neo_cpu_run(ctypes.addressof(job))
    assert (job.status, done.value, data.blocks[7]) == (0, 2, 6)
    assert 0 < job.start_ns <= job.end_ns

"""Jobs of both backends: beside synchronous calls, in chains over workers, failing, closing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

pytest.importorskip("torch", reason="KV memory is torch's")

import torch
from backend_cases import make_case, queries

from neo.core.errors import InputError
from neo.runtime import cpu_library
from neo.runtime.backend import Backend, Job, KVMemory, Worker, backend
from neo.runtime.cpu_library import CpuKernelError

KINDS = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            not cpu_library.available(), reason="the CPU kernels are not built here (make kernels)"
        ),
    ),
    "torch",
]


@pytest.fixture(params=KINDS)
def back(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = backend(request.param, threads=2)
    yield made
    made.close()


@pytest.fixture
def workers(back: Backend) -> Iterator[list[Worker]]:
    made = [back.worker("first", threads=2, spin_us=20), back.worker("second", spin_us=0)]
    yield made
    for worker in made:
        worker.close()


def numbered(blocks: int = 8) -> KVMemory:
    """Block i holds the number i."""
    memory = KVMemory.allocate(blocks, 1, 16, 8, torch.float32)
    memory.tensor[:] = torch.arange(blocks)[:, None, None, None]
    return memory


def numbers(memory: KVMemory) -> list[int]:
    return memory.tensor[:, 0, 0, 0].int().tolist()


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def move(back: Backend, memory: KVMemory, source: int, target: int) -> Job:
    return back.copy_job(memory, memory, ints(source), ints(target))


def test_attention_jobs_append_then_attend(back: Backend, workers: list[Worker]) -> None:
    case = make_case([40, 17, 300], dtype=torch.bfloat16)
    k, v, slots, positions = case.rows()
    last = positions == np.array(case.lengths)[slots] - 1
    before = torch.from_numpy(~last)
    back.append(case.memory, k[before], v[before], case.tables, slots[~last], positions[~last])
    q = queries(case, 3)
    out = torch.full_like(q, float("nan"))
    new = torch.from_numpy(last)
    job = back.attention_job(
        case.memory, k[new], v[new], q, out, case.tables, slots[last], positions[last], positions[last] + 1
    )
    assert job.kind == "attention"
    begin = time.perf_counter()
    ticket = workers[0].submit(job)
    workers[0].wait(ticket)
    assert ticket.done
    assert workers[0].idle
    assert begin <= ticket.start_s <= ticket.end_s <= time.perf_counter()
    case.check(out, q, slots[last], positions[last] + 1)


def test_jobs_keep_what_they_compute_on(back: Backend, workers: list[Worker]) -> None:
    """The caller drops every tensor and array right after submitting, and memory is used again at once."""
    case = make_case([60, 60], io=torch.bfloat16)  # k and v are converted, so that copies are made as well
    k, v, slots, positions = case.rows()
    for first in range(0, len(slots), 3):
        part = slice(first, first + 3)
        job = back.append_job(
            case.memory,
            k[part].clone(),
            v[part].clone(),
            case.tables.copy(),
            slots[part].copy(),
            positions[part].copy(),
        )
        ticket = workers[first % 2].submit(job)
        del job
        torch.full((3, 2, 32), 1e4)
    for worker in workers:
        while not worker.idle:
            time.sleep(0.001)
    assert ticket.done
    for slot in (0, 1):
        got = case.memory.gather(case.tables[slot], 60)
        assert torch.equal(got[0], case.k[slot].half())
        assert torch.equal(got[1], case.v[slot].half())


def test_jobs_run_beside_calls(back: Backend, workers: list[Worker]) -> None:
    """The worker attends over one memory while this thread appends to, and attends over, another."""
    here, there = make_case([50, 9], seed=1), make_case([700, 33], seed=2)
    there.fill(back)
    q_there, slots = queries(there, 2), ints(1, 0)
    q_here = queries(here, 2)
    rounds = 40 if back.kind == "native" else 5
    outs = [torch.full_like(q_there, float("nan")) for _ in range(rounds)]
    k, v = (torch.stack([x[1][32], x[0][699]]) for x in (there.k, there.v))
    tickets = []
    for out in outs:
        job = back.attention_job(
            there.memory, k, v, q_there, out, there.tables, slots, ints(32, 699), ints(33, 700)
        )
        tickets.append(workers[0].submit(job))
        here.fill(back)
        mine = torch.empty_like(q_here)
        back.decode(here.memory, q_here, mine, here.tables, slots, ints(9, 50))
        here.check(mine, q_here, slots, ints(9, 50))
    for ticket, out in zip(tickets, outs, strict=True):
        workers[0].wait(ticket)
        there.check(out, q_there, slots, ints(33, 700))


def test_chains_over_two_workers(back: Backend, workers: list[Worker]) -> None:
    """Every copy needs the one before it, on the other worker."""
    memory = numbered()
    tickets = []
    for i in range(7):
        tickets.append(workers[i % 2].submit(move(back, memory, i, i + 1), tickets[-1:]))
    workers[0].wait(tickets[-1])
    assert numbers(memory) == [0] * 8
    times = [t for ticket in tickets for t in (ticket.start_s, ticket.end_s)]
    assert times == sorted(times)
    for _ in range(20):  # fan out, fan in; finished tickets are still good to come after
        fan = [workers[i % 2].submit(move(back, memory, 0, i), tickets[:1]) for i in range(1, 5)]
        workers[1].wait(workers[1].submit(move(back, memory, 1, 7), fan))
    assert all(ticket.done for ticket in tickets)


def test_a_failure_surfaces_at_wait_and_stops_what_depends_on_it(
    back: Backend, workers: list[Worker]
) -> None:
    memory = numbered()
    one, two = workers
    bad = one.submit(move(back, memory, 0, 99))
    dependent = two.submit(move(back, memory, 0, 1), [bad])
    further = one.submit(move(back, memory, 0, 2), [dependent])
    free = one.submit(move(back, memory, 0, 3))
    one.wait(free)
    for _ in range(2):
        with pytest.raises(
            CpuKernelError, match=r"^worker first, copy job: dst_blocks\[0\] is 99, there are 8"
        ):
            one.wait(bad)
        for worker, ticket in ((two, dependent), (one, further)):
            with pytest.raises(
                CpuKernelError, match=rf"^worker {worker.name}, copy job: dependency failed: dst_b"
            ):
                worker.wait(ticket)
    assert numbers(memory) == [0, 1, 2, 0, 4, 5, 6, 7]
    with pytest.raises(CpuKernelError, match="dependency failed"):
        two.wait(two.submit(move(back, memory, 0, 4), [free, bad]))
    two.wait(two.submit(move(back, memory, 7, 5), [free]))
    assert numbers(memory) == [0, 1, 2, 0, 4, 7, 6, 7]


def test_a_bad_block_of_a_table_fails_the_job(back: Backend, workers: list[Worker]) -> None:
    memory, rows = numbered(), torch.ones(2, 1, 16)
    job = back.append_job(memory, rows, rows, ints(8, -1)[:, None], ints(0, 1), ints(0, 0))
    with pytest.raises(CpuKernelError, match=r"^worker first, append job: .* 8"):
        workers[0].wait(workers[0].submit(job))
    assert numbers(memory) == list(range(8))


def test_jobs_together_are_one(back: Backend, workers: list[Worker]) -> None:
    memory = numbered()
    job = back.together([move(back, memory, i, i + 1) for i in range(4)])
    assert job is not None
    assert job.kind == "copy+copy+copy+copy"
    ticket = workers[0].submit(job)
    other = workers[1].submit(move(back, memory, 4, 7), [ticket])
    workers[1].wait(other)
    workers[0].wait(ticket)
    assert numbers(memory) == [0, 0, 0, 0, 0, 5, 6, 0]
    assert ticket.start_s <= ticket.end_s <= other.start_s
    assert back.together([]) is None
    failing = back.together([move(back, memory, 5, 1), move(back, memory, 99, 2), move(back, memory, 5, 3)])
    assert failing is not None
    with pytest.raises(CpuKernelError, match=r"copy\+copy\+copy job: src_blocks\[0\] is 99"):
        workers[0].wait(workers[0].submit(failing))
    assert numbers(memory)[:4] == [0, 5, 0, 0]


def test_copies_between_memories(back: Backend, workers: list[Worker]) -> None:
    source, target = numbered(8), numbered(5)
    workers[0].wait(workers[0].submit(back.copy_job(source, target, ints(7, 5), torch.tensor([0, 4]).int())))
    assert numbers(target) == [7, 1, 2, 3, 5]
    other = KVMemory.allocate(5, 2, 16, 8, torch.float32)
    for wrong in (
        other,
        KVMemory.allocate(5, 1, 16, 8, torch.float16),
        KVMemory.allocate(5, 1, 8, 16, torch.float32),
    ):
        with pytest.raises(ValueError, match="cannot be copied"):
            back.copy_job(source, wrong, ints(0), ints(0))
    with pytest.raises(ValueError, match="int32"):
        back.copy_job(source, target, ints(0, 1), ints(0))


def test_empty_jobs_end(back: Backend, workers: list[Worker]) -> None:
    empty = KVMemory.allocate(0, 1, 16, 8, torch.float32)
    rows, tables = torch.empty(0, 1, 16), np.empty((0, 0), np.int32)
    for job in (
        back.append_job(empty, rows, rows, tables, ints(), ints()),
        back.attention_job(empty, rows, rows, rows, rows.clone(), tables, ints(), ints(), ints()),
        back.copy_job(empty, empty, ints(), ints()),
    ):
        workers[0].wait(workers[0].submit(job))


def test_closing_fails_what_has_not_begun(back: Backend) -> None:
    """A long line of jobs; some ran, the rest say why they did not, and none is left hanging."""
    memory = KVMemory.allocate(64, 8, 128, 16, torch.float32)
    one, two = back.worker("closing"), back.worker("other")
    halves = np.arange(32, dtype=np.int32), np.arange(32, 64, dtype=np.int32)
    tickets = [one.submit(back.copy_job(memory, memory, *halves)) for _ in range(500)]
    dependent = two.submit(back.copy_job(memory, memory, *halves), tickets[-1:])
    one.close()
    assert all(ticket.done for ticket in tickets)
    with pytest.raises(CpuKernelError, match="closing, copy job: the worker was closed"):
        one.wait(tickets[-1])
    with pytest.raises(CpuKernelError, match="dependency failed: the worker was closed"):
        two.wait(dependent)
    with pytest.raises(ValueError, match="closed"):
        one.submit(back.copy_job(memory, memory, *halves))
    one.close()
    two.close()


def test_a_worker_that_does_not_answer_is_named(back: Backend, workers: list[Worker]) -> None:
    memory = KVMemory.allocate(64, 8, 128, 16, torch.float32)
    halves = np.arange(32, dtype=np.int32), np.arange(32, 64, dtype=np.int32)
    tickets = [workers[1].submit(back.copy_job(memory, memory, *halves)) for _ in range(300)]
    assert not tickets[-1].done
    assert not workers[1].idle
    with pytest.raises(ValueError, match="copy job of worker second has not ended"):
        _ = tickets[-1].end_s
    with pytest.raises(
        CpuKernelError, match="worker second does not answer: its copy job has not ended after 0"
    ):
        workers[1].wait(tickets[-1], timeout_s=0)
    workers[1].wait(tickets[-1])


def test_more_jobs_than_a_worker_holds(back: Backend, workers: list[Worker]) -> None:
    memory = numbered()
    for _ in range(5000):
        ticket = workers[1].submit(move(back, memory, 1, 2))
    workers[1].wait(ticket)
    assert workers[1].idle


def test_submitting_and_waiting_from_several_threads(back: Backend, workers: list[Worker]) -> None:
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        return run

    def use() -> None:
        memory = numbered()
        for _ in range(20):
            memory.tensor[:] = torch.arange(8)[:, None, None, None]
            tickets = []
            for i in range(7):
                tickets.append(workers[i % 2].submit(move(back, memory, i, i + 1), tickets[-1:]))
            workers[0].wait(tickets[-1])
            assert numbers(memory) == [0] * 8

    threads = [threading.Thread(target=guarded(use)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_misuse_is_refused(back: Backend, workers: list[Worker]) -> None:
    memory = numbered()
    job = move(back, memory, 0, 1)
    ticket = workers[0].submit(job)
    with pytest.raises(ValueError, match="submitted before"):
        workers[0].submit(job)
    with pytest.raises(ValueError, match="not a ticket of this worker"):
        workers[1].wait(ticket)
    with pytest.raises(ValueError, match="not a job"):
        workers[0].submit(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of this backend"):
        workers[0].submit(move(back, memory, 0, 1), [object()])  # type: ignore[list-item]
    with pytest.raises(InputError, match="2 given for 1 threads"):
        back.worker("x", 1, [0, 1])
    workers[0].wait(ticket)


def test_jobs_work_on_tensors_of_inference_mode(back: Backend, workers: list[Worker]) -> None:
    """The engine's tensors are made in inference mode, the worker's thread has its own."""
    case = make_case([20], dtype=torch.float32)
    case.fill(back)
    with torch.inference_mode():
        q = queries(case, 1)
        out = torch.empty_like(q)
        k, v = case.k[0][19:] + 0, case.v[0][19:] + 0
        job = back.attention_job(case.memory, k, v, q, out, case.tables, ints(0), ints(19), ints(20))
        workers[0].wait(workers[0].submit(job))
        case.check(out, q, ints(0), ints(20))

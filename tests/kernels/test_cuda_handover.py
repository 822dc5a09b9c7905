"""Rows to the host and back: the device's half alone, the CPU's half alone, and the two together."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cuda_cases import Device, attention, device, paged
from kernel_cases import needs_library

from neo.runtime import cpu_kernels
from neo.runtime import cpu_library as host
from neo.runtime import cuda_transfers as ct
from neo.runtime.cpu_worker import Worker
from neo.runtime.kv_memory import KVMemory
from neo.runtime.native_args import fill_append, fill_decode

__all__ = ["device"]

HEADS, KV_HEADS, DIM = 4, 2, 64
WIDTH = (HEADS + 2 * KV_HEADS) * DIM


def word(address: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(address)


def channel(where: Device) -> ct.Channel:
    return ct.Channel(where.name)


def rows(count: int, heads: int, seed: int) -> torch.Tensor:
    return torch.randn(count, heads, DIM, generator=torch.Generator().manual_seed(seed)).half()


@contextmanager
def answering(flags: ct.Channel, numbers: int, answer: object) -> Iterator[None]:
    """Another thread that answers so many requests, after calling `answer` for each."""

    def serve() -> None:
        for number in range(1, numbers + 1):
            until = time.monotonic() + 20
            while word(flags.request).value < number and time.monotonic() < until:
                time.sleep(1e-5)
            answer(number)  # type: ignore[operator]
            word(flags.answer).value = number

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize("count", [0, 1, 3, 70])
def test_rows_go_and_come_back(device: Device, count: int) -> None:
    """Twice over one channel, as by a graph that is replayed."""
    flags = channel(device)
    q, k, v = rows(count, HEADS, 1), rows(count, KV_HEADS, 2), rows(count, KV_HEADS, 3)
    packed = device.pinned(torch.zeros(max(count, 1), WIDTH + 8, dtype=torch.float16))
    answers = device.pinned(torch.zeros(max(count, 1), HEADS * DIM, dtype=torch.float16))
    out = device(torch.zeros(count, HEADS * DIM, dtype=torch.float16))
    post = ct.post_rows(flags, device(q), device(k), device(v), packed)
    wait = ct.await_rows(flags, answers, out, timeout_s=20)
    seen = []

    def answer(number: int) -> None:
        seen.append(packed[:count, :WIDTH].clone())
        answers.fill_(number)

    with answering(flags, 2, answer):
        for number in (1, 2):
            post(device.stream)
            wait(device.stream)
            device.wait()
            assert torch.equal(out.cpu(), torch.full((count, HEADS * DIM), float(number)).half())
    assert flags.requested == 2
    assert not flags.failed
    expected = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1)
    assert all(torch.equal(one, expected) for one in seen)


def test_only_the_rows_that_count(device: Device) -> None:
    flags = channel(device)
    q, k, v = rows(4, HEADS, 1), rows(4, KV_HEADS, 2), rows(4, KV_HEADS, 3)
    packed = device.pinned(torch.zeros(4, WIDTH, dtype=torch.float16))
    count = device.pinned(torch.tensor([2], dtype=torch.int32))
    ct.post_rows(flags, device(q), device(k), device(v), packed, rows_at=count)(device.stream)
    device.wait()
    assert torch.equal(packed[:2, : HEADS * DIM], q[:2].flatten(1))
    assert not packed[2:].any()


def test_no_answer_is_an_error_and_ends_all_waiting(device: Device) -> None:
    flags = channel(device)
    q, k, v = (device(rows(2, n, 1)) for n in (HEADS, KV_HEADS, KV_HEADS))
    packed = device.pinned(torch.zeros(2, WIDTH, dtype=torch.float16))
    answers = device.pinned(torch.ones(2, HEADS * DIM, dtype=torch.float16))
    out = device(torch.zeros(2, HEADS * DIM, dtype=torch.float16))
    post = ct.post_rows(flags, q, k, v, packed)
    wait = ct.await_rows(flags, answers, out, timeout_s=0.05)
    began = time.monotonic()
    for _ in range(100):
        post(device.stream)
        wait(device.stream)
    device.wait()
    assert time.monotonic() - began < 2.5  # not 100 times the patience
    assert flags.failed
    assert flags.requested == 1
    assert not out.any()
    flags.reset()
    word(flags.answer).value = 1
    post(device.stream)
    wait(device.stream)
    device.wait()
    assert out.all()
    assert not flags.failed


# -- the CPU's half -----------------------------------------------------------------------------------------


class Stage:
    """CPU decodes of one sub-batch over a cache whose layers have tables one behind the other."""

    def __init__(self, lengths: tuple[int, ...], layers: int, seed: int) -> None:
        self.lengths, self.layers = lengths, layers
        before = [n - 1 for n in lengths] * layers  # the new token is appended
        self.case = paged(before, torch.float16, KV_HEADS, DIM, 16, seed=seed, room=1)
        self.tables = self.case.tables.contiguous()
        self.memory = KVMemory(self.case.blocks, 16)
        count = len(lengths)
        self.packed = torch.zeros(count, WIDTH, dtype=torch.float16)
        self.out = torch.zeros(count, HEADS * DIM, dtype=torch.float16)
        parts = self.packed.view(count, HEADS + 2 * KV_HEADS, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
        slots = torch.arange(count, dtype=torch.int32)
        upto = torch.tensor(lengths, dtype=torch.int32)
        self.append, self.decode = host.Append(), host.Decode()
        table = self.tables[:count]
        self.kept = [
            fill_append(self.append, self.memory, parts[1], parts[2], table, slots, upto - 1),
            fill_decode(
                self.decode, self.memory, parts[0], self.out.view(count, HEADS, DIM), table, slots, upto
            ),
        ]

    def inputs(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = len(self.lengths)
        return tuple(rows(count, h, 100 * layer + i) for i, h in enumerate((HEADS, KV_HEADS, KV_HEADS)))  # type: ignore[return-value]

    def struct(self, flags: ct.Channel, first: int) -> host.Stage:
        return host.Stage(
            append=ctypes.pointer(self.append),
            decode=ctypes.pointer(self.decode),
            request=flags.request,
            answer=flags.answer,
            first=first,
            layer_stride=len(self.lengths) * self.tables.shape[1],
        )

    def expected(self, layer: int) -> torch.Tensor:
        q, k, v = self.inputs(layer)
        found = []
        for i in range(len(self.lengths)):
            at = layer * len(self.lengths) + i
            all_k, all_v = (
                torch.cat([self.case.k[at], k[i : i + 1]]),
                torch.cat([self.case.v[at], v[i : i + 1]]),
            )
            found.append(attention(q[i], all_k, all_v, DIM**-0.5).flatten())
        return torch.stack(found)


def handover(
    stages: list[host.Stage], layers: int, times: torch.Tensor | None = None
) -> tuple[host.Job, object]:
    array = (host.Stage * len(stages))(*stages)
    struct = host.Handover(
        stages=array,
        n_stages=len(stages),
        layers=layers,
        times=times.data_ptr() if times is not None else None,
    )
    return host.Job(handover=ctypes.pointer(struct)), (array, struct)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with cpu_kernels.Pool(2) as pool, Worker(pool, flag_timeout_s=20) as made:
        yield made


@needs_library
def test_cpu_serves_all_layers_of_two_stages(worker: Worker) -> None:
    """A thread stands for the device: it asks for the next layer when the last one was answered."""
    layers, first = 5, 0xFFFFFFFE  # numbers wrap around on the way
    stages = [Stage((17, 40), layers, 1), Stage((1, 33, 16), layers, 2)]
    flags = [ct.Channel("cpu") for _ in stages]
    for one in flags:
        word(one.request).value = word(one.answer).value = first - 1
    times = torch.zeros(layers, len(stages), 2, dtype=torch.int64)
    job, kept = handover([s.struct(f, first) for s, f in zip(stages, flags, strict=True)], layers, times)
    ticket = worker.submit(job)
    for layer in range(layers):
        for stage, one in zip(stages, flags, strict=True):
            number = (first + layer) & 0xFFFFFFFF
            stage.packed.copy_(torch.cat([x.flatten(1) for x in stage.inputs(layer)], 1))
            word(one.request).value = number
            until = time.monotonic() + 20
            while word(one.answer).value != number:
                assert time.monotonic() < until
            assert (stage.out.double() - stage.expected(layer)).abs().max() < 2e-3
    worker.wait(ticket, 20)
    assert (times.flatten().diff() >= 0).all()
    assert times[0, 0, 0] > 0
    assert kept


@needs_library
@pytest.mark.parametrize("wrong", ["late", "block"])
def test_a_failing_handover_answers_everything(wrong: str) -> None:
    """The device never waits for a CPU that has given up, and the job says what happened."""
    stages = [Stage((17,), 3, 1), Stage((20,), 3, 2)]
    flags = [ct.Channel("cpu") for _ in stages]
    if wrong == "block":
        stages[1].tables[1, 0] = 99999  # layer 1
        for one in flags:
            word(one.request).value = 3
    else:
        word(flags[0].request).value = 3
    job, kept = handover([s.struct(f, 1) for s, f in zip(stages, flags, strict=True)], 3)
    with cpu_kernels.Pool(1) as pool, Worker(pool, flag_timeout_s=0.05) as worker:
        ticket = worker.submit(job)
        said = (
            "layer 1, stage 1: .*99999"
            if wrong == "block"
            else "layer 0, stage 1: the request is 0 and not yet 1"
        )
        kind = ValueError if wrong == "block" else host.CpuKernelError
        with pytest.raises(kind, match=said):
            worker.wait(ticket, 20)
    assert [word(f.answer).value for f in flags] == [3, 3]
    assert kept


@needs_library
def test_bad_handovers_are_refused(worker: Worker) -> None:
    for change, said in (
        ({"n_stages": 65537}, "n_stages is 65537"),
        ({"layers": -1}, "layers is -1"),
        ({"n_stages": 1}, "stages must not be NULL"),
        ({"size": 3}, "hand-over has size 3"),
    ):
        struct = host.Handover(**change)
        with pytest.raises(ValueError, match=said):
            worker.wait(worker.submit(host.Job(handover=ctypes.pointer(struct))), 20)


@needs_library
def test_device_and_cpu_together(device: Device, worker: Worker) -> None:
    """Three layers of one sub-batch: post, CPU attention, await; numbers go on from step to step."""
    layers = 3
    stage = Stage((17, 5), layers, 3)
    flags = channel(device)
    if device.name != "cpu":  # the CPU reads and writes where the device does
        for tensor in (stage.packed, stage.out):
            pin(tensor)
    out = device(torch.zeros(2, HEADS * DIM, dtype=torch.float16))
    inputs = [device(x) for x in stage.inputs(0)]
    post = ct.post_rows(flags, *inputs, stage.packed)
    wait = ct.await_rows(flags, stage.out, out, timeout_s=20)
    try:
        for step in range(2):
            job, kept = handover([stage.struct(flags, flags.requested + 1)], layers)
            ticket = worker.submit(job)
            for layer in range(layers):
                for there, new in zip(inputs, stage.inputs(layer), strict=True):
                    there.copy_(new)
                post(device.stream)
                wait(device.stream)
                device.wait()
                assert (out.cpu().double() - stage.expected(layer)).abs().max() < 2e-3, (step, layer)
            worker.wait(ticket, 20)
            assert kept
        assert flags.requested == 2 * layers
    finally:
        if device.name != "cpu":
            for tensor in (stage.packed, stage.out):
                torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def pin(tensor: torch.Tensor) -> None:
    """Memory that is there already."""
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    assert int(status) == 0

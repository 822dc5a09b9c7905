"""What the engine's process says of steps: when it may wait, and that nothing is lost or late by it."""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch", reason="the engine needs torch")

from neo.core.record import Mode
from neo.core.request import FinishReason
from neo.cost.calibrated import PARTS, Calibrated
from neo.runtime import tiny
from neo.runtime.engine_config import EngineConfig
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.server import watching
from neo.runtime.server.bridge import ends_of
from neo.runtime.server.channel import Channel
from neo.runtime.server.engine_process import EngineLoop
from neo.runtime.server.messages import (
    Abort,
    Add,
    Event,
    Failed,
    Frames,
    FromEngine,
    StepInfo,
    Stop,
    Update,
    frame,
)
from neo.runtime.server.watching import LiveRecord
from neo.runtime.setup import EngineParts


@dataclass
class Far:
    """The HTTP process's end: sends messages, keeps what comes."""

    sock: socket.socket
    updates: list[Update] = field(default_factory=list)
    frames: Frames = field(default_factory=Frames)

    def send(self, *messages: Any) -> None:
        for message in messages:
            self.sock.sendall(frame(msgspec.msgpack.encode(message)))

    def receive(self) -> list[Update]:
        """What has come since the last call."""
        self.sock.setblocking(False)
        found: list[Update] = []
        try:
            while data := self.sock.recv(1 << 20):
                for payload in self.frames.feed(data):
                    message = msgspec.msgpack.decode(payload, type=FromEngine)
                    assert isinstance(message, Update)
                    found.append(message)
        except BlockingIOError:
            pass
        self.sock.setblocking(True)
        self.updates += found
        return found

    def tokens(self) -> dict[int, list[int]]:
        """All tokens so far, by key."""
        found: dict[int, list[int]] = {}
        for update in self.updates:
            for tokens in update.tokens:
                for key, token in zip(update.keys, tokens, strict=True):
                    found.setdefault(key, []).append(token)
            for event in update.events:
                if event.token is not None:
                    found.setdefault(event.key, []).append(event.token)
        return found


class Clock:
    """An engine's clock that shows what it is told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step_s = 0.0

    def __call__(self) -> float:
        self.now += self.step_s / 2  # read when a step is planned and when it has ended
        return self.now


@dataclass
class Served:
    loop: EngineLoop
    far: Far
    clock: Clock
    record: LiveRecord

    def step(self) -> list[Update]:
        """One round of the loop; what it said."""
        loop = self.loop
        messages = loop.channel.receive(0.0) if loop.reports.due else []
        for message in messages:
            loop._handle(message)
        loop.reports.step(loop._step() if loop.engine.has_work else (), bool(messages))
        return self.far.receive()


@pytest.fixture(scope="module")
def parts() -> EngineParts:
    return EngineParts(EngineConfig(str(tiny.FOLDER), kv_gpu_blocks=256, kv_cpu_blocks=256, gpu_threads=1))


@pytest.fixture
def served(parts: EngineParts, request: pytest.FixtureRequest) -> Iterator[Served]:
    """A loop without a process; a parameter names the cost model."""
    system = parts.system(cost_model=getattr(request, "param", "roofline"))
    record = LiveRecord(keep=False)
    engine = parts.engine(system, record=record)
    clock, executor = Clock(), engine.executor
    engine.clock = clock  # type: ignore[method-assign]
    near, far = socket.socketpair()
    with near, far:
        loop = EngineLoop(engine, system, Channel(near), record)
        loop._zero = 0.0
        assert engine.executor is executor, "wrapped, it could not be seen to queue steps"
        yield Served(loop, Far(far), clock, record)
    engine.close()


def adds(count: int, tokens: int, **params: Any) -> list[Add]:
    return [
        Add(i, f"r{i}", [65 + i], SamplingParams(tokens, 0.0, ignore_eos=True, **params), 0.0)
        for i in range(count)
    ]


def test_short_steps_share_a_message_and_long_ones_do_not(served: Served) -> None:
    served.far.send(*adds(3, 200))
    for i in range(20):
        served.clock.step_s = 0.01 if i % 2 else 0.002
        (update,) = served.step()
        assert len(update.events) == 3 * (i == 0)
        assert [len(t) for t in update.tokens] == [3] * (i > 0)
        assert update.accepted == update.running == 3
        assert update.step is not None
        assert len(update.step.seconds) == 1
    served.clock.step_s = 0.0006
    said = [served.step() for _ in range(42)]
    sizes = [len(update.tokens) for updates in said for update in updates]
    assert sizes == [7] * 6, "the seventh ends behind 4 ms"
    assert sum(not updates for updates in said) == 36


def test_tiny_steps_share_a_message_for_longer_but_listen_all_the_same(served: Served) -> None:
    served.far.send(*adds(3, 500))
    served.clock.step_s = 0.0003
    while not served.far.tokens().get(0, [])[5:]:
        served.step()
    while not served.step():
        pass
    said, heard = [], []
    for _ in range(67 * 4):
        said.append(sum(len(update.tokens) for update in served.step()))
        heard.append(served.loop.reports.due)
    assert [n for n in said if n] == [67] * 4, "the 67th ends behind 20 ms"
    listened = [i for i, due in enumerate(heard) if due]
    assert max(b - a for a, b in pairwise(listened)) == 7, "the seventh ends behind 2 ms"
    assert served.loop.engine.scheduler.unfinished == 3


def test_who_comes_or_goes_waits_for_no_shared_message(served: Served) -> None:
    """Between tiny steps: a first token is told with its step, and memory is free with the next one."""
    served.far.send(*adds(2, 1000))
    served.clock.step_s = 0.0001
    pools = served.loop.engine.scheduler.view.pools
    draw = random.Random(3)
    for key in range(10, 30):
        for _ in range(draw.randrange(1, 150)):
            served.step()
        before = sum(pool.used for pool in pools.values())
        served.far.send(Add(key, f"r{key}", [70] * 20, SamplingParams(900, 0.0, ignore_eos=True), 0.0))
        waited = 0
        while not any(event.key == key for update in served.step() for event in update.events):
            waited += 1
        assert waited <= 20, "2 ms until somebody listens"
        assert sum(pool.used for pool in pools.values()) > before
        served.far.send(Abort(key, str(FinishReason.ABORT)))
        waited = 0
        while f"r{key}" in served.loop.engine._live:
            served.step()
            waited += 1
        assert waited <= 21


def test_steps_that_differ_share_neither_message_nor_price(served: Served) -> None:
    served.far.send(*adds(2, 100))
    served.clock.step_s = 0.0005
    loop, record = served.loop, served.record
    for _ in range(5):
        served.step()
    del served.far.updates[:]
    for mode in (Mode.GPU_ONLY,) * 3 + (Mode.PIPELINED,) * 20:
        outputs = loop._step()
        assert record.last is not None
        record.last = (*record.last[:3], mode, *record.last[4:])
        loop.reports.step(outputs, False)
    served.far.receive()
    told = [u.step for u in served.far.updates if u.step is not None]
    assert [s.mode for s in told[:3]] == [Mode.GPU_ONLY, Mode.PIPELINED, Mode.PIPELINED]
    counts = [count for s in told for _, count in s.predicted_s]
    before = sum(len(s.seconds) for s in told if s.mode == Mode.GPU_ONLY)
    assert before <= counts[0] <= 6, "of the steps before, nothing of those behind"


def test_nothing_is_held_over_a_step_that_may_take_longer_or_a_pause(served: Served) -> None:
    served.far.send(*adds(2, 100))
    served.clock.step_s = 0.0005
    for _ in range(50):
        served.step()
    while served.loop.reports.due:
        served.step()
    executor, seen = served.loop.engine.executor, []
    run = executor.run

    def noticing(plan: Any, *rest: Any) -> Any:
        seen.append((any(b.prefill for b in plan.batches), served.far.receive()))
        return run(plan, *rest)

    executor.run = noticing  # type: ignore[method-assign]
    before = served.far.tokens()
    served.loop._handle(Add(9, "long", [66] * 500, SamplingParams(4, 0.0), 0.0))
    served.step()
    ((prefill, said),) = seen
    assert prefill
    assert sum(len(update.tokens) for update in said) > 0, "they wait for no prefill"
    assert served.far.tokens() != before


def test_steps_before_a_pause_have_their_price_then(served: Served) -> None:
    """The last request is aborted, so that no step with another row follows those that wait for a price."""
    served.far.send(*adds(1, 400))
    served.clock.step_s = 0.0005
    for _ in range(100):
        served.step()
    served.far.send(Abort(0, str(FinishReason.ABORT)))
    while served.loop.engine.has_work:
        served.step()
    served.loop._rest()
    served.far.receive()
    steps = [u.step for u in served.far.updates if u.step is not None]
    assert sum(len(s.seconds) for s in steps) == served.loop.engine.steps
    assert sum(count for s in steps for _, count in s.predicted_s) == served.loop.engine.steps
    served.loop._rest()
    assert not served.far.receive(), "and nothing is said twice"


@pytest.mark.parametrize("share", [True, False])
def test_every_token_end_and_step_is_told_once(served: Served, share: bool) -> None:
    """Requests of many lengths that come, end and are aborted at any time, with steps of any length."""
    draw = random.Random(share)
    log: dict[int, list[int]] = {}
    engine, reports = served.loop.engine, served.loop.reports
    if not share:
        reports._share = False
    step, key, wanted, aborted, ran = engine.step, 0, {}, set(), 0

    def noting() -> Any:
        nonlocal ran
        before = engine.steps
        outputs = step()
        ran += engine.steps - before
        brought = [(o.request_id, o.token) for o in outputs]
        if engine.plain is not None:
            assert not brought, "the server wants no object a token"
            brought = list(zip(*engine.plain, strict=True))
        for request_id, token in brought:
            if token is not None and request_id in reports.keys:
                log.setdefault(reports.keys[request_id], []).append(token)
        return outputs

    engine.step = noting  # type: ignore[method-assign]
    while key < 60 or engine.has_work:
        served.clock.step_s = draw.choice((0.0001, 0.0001, 0.0001, 0.005))
        if key < 60 and draw.random() < 0.2:
            wanted[key] = draw.randrange(1, 60)
            params = SamplingParams(wanted[key], 1.0, ignore_eos=True, logprobs=draw.choice((None, None, 2)))
            served.far.send(Add(key, f"r{key}", [65] * draw.randrange(1, 40), params, served.clock.now))
            key += 1
        if wanted and draw.random() < 0.02:
            victim = draw.choice(list(wanted))
            aborted.add(victim)
            served.far.send(Abort(victim, str(FinishReason.ABORT)))
        served.step()
    served.far.receive()
    assert served.far.tokens() == log
    ends = Counter(e.key for u in served.far.updates for e in u.events if e.reason is not None)
    assert set(ends.values()) <= {1}
    assert set(ends) | aborted >= set(wanted)
    told = [u.step for u in served.far.updates if u.step is not None]
    assert sum(len(s.seconds) for s in told) == ran
    assert sum(count for s in told for _, count in s.predicted_s) == ran
    assert (max(len(u.tokens) for u in served.far.updates) > 1) == share


def test_alike_steps_share_a_price_for_a_while(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.far.send(*adds(2, 400))
    served.clock.step_s = 0.0005
    for _ in range(10):
        served.step()
    served.far.receive()
    first = len(served.far.updates)
    for _ in range(200):
        served.step()
    told = [u.step for u in served.far.updates[first:] if u.step is not None]
    counts = [count for s in told for _, count in s.predicted_s]
    assert all(20 <= count * 0.5 <= 30 for count in counts), "a price counts for about 20 ms of steps"
    prices = [seconds for s in told for seconds, _ in s.predicted_s]
    assert prices == sorted(prices), "each reads more KV"
    monkeypatch.setattr(watching, "durations", lambda *_: 1 / 0)
    for _ in range(80):
        served.step()
    assert not any(u.step.predicted_s for u in served.far.updates[-10:] if u.step is not None)


@pytest.mark.parametrize("served", ["calibrated:roofline"], indirect=True)
def test_a_calibrated_model_has_a_price_for_each_step(served: Served) -> None:
    model = served.loop.engine.scheduler.cost
    assert isinstance(model, Calibrated)
    prices: list[float | None] = []
    observe = model.observe

    def noting(*step: Any) -> None:
        observe(*step)
        prices.append(model.predicted_s)

    model.observe = noting  # type: ignore[method-assign]
    served.far.send(*adds(2, 300))
    served.clock.step_s = 0.0005
    shared = 0
    for i in range(320):
        if i == 100:
            served.far.send(Add(9, "more", [66] * 30, SamplingParams(20, 0.0, ignore_eos=True), 0.0))
        version = model.version
        for update in served.step():
            assert update.step is not None
            shared += len(update.step.seconds) > 1
            assert len(update.step.predicted_s) == len(update.step.seconds)
            if model.version == version and update.step.cost_factors is not None:
                assert update.step.cost_factors == model.factors
    assert shared > 10
    told = [u.step for u in served.far.updates if u.step is not None]
    assert [s for step in told for s in step.predicted_s] == [(p, 1) for p in prices]
    said = [step.cost_factors for step in told if step.cost_factors is not None]
    assert said[-1] == model.factors != dict.fromkeys(PARTS, 1.0)
    assert all(a != b for a, b in pairwise(said)), "only where they have changed"


def test_what_waits_is_told_before_the_engine_fails(served: Served) -> None:
    served.far.send(*adds(2, 100))
    served.clock.step_s = 0.00001
    for _ in range(30):
        served.step()
    assert not served.loop.reports.due
    engine = served.loop.engine

    def broken() -> Any:
        raise RuntimeError("broken")

    engine.step = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        served.loop.run()
    served.far.receive()
    assert [len(t) for t in served.far.tokens().values()] == [30, 30]


def test_a_message_larger_than_the_socket_takes_arrives_whole() -> None:
    near, far = socket.socketpair()
    with near, far:
        channel = Channel(near)
        message = Failed("a" * 1_000_000)
        thread = threading.Thread(target=channel.send, args=(message,))
        thread.start()
        frames = Frames()
        found: list[bytes] = []
        while not found:
            found = frames.feed(far.recv(1 << 16))
        thread.join()
        assert msgspec.msgpack.decode(found[0], type=FromEngine) == message
        assert not channel.closed
        assert channel.receive(0.0) == [], "it does not wait afterwards"
        far.close()
        channel.send(message)
        assert channel.closed


def test_a_closed_socket_is_seen_with_and_without_waiting() -> None:
    for wait_s in (0.0, 0.001, None):
        near, far = socket.socketpair()
        with near, far:
            channel = Channel(near)
            far.sendall(frame(msgspec.msgpack.encode(Stop())))
            assert [type(m) for m in channel.receive(wait_s)] == [Stop]
            assert not channel.closed
            far.close()
            assert channel.receive(wait_s) == []
            assert channel.closed


def test_tokens_of_a_shared_message_came_one_after_the_other() -> None:
    update = Update([1], [[2], [3], [4]], [], 1, 1, 0, (0, 0))
    assert ends_of(update, 9.0, 10.0) == [10.0] * 3
    update.step = msgspec.convert([0, [0.5, 0.25, 0.125], [], 0, 1, 0, 0, 0, 0, 0], StepInfo)
    assert ends_of(update, 9.0, 10.0) == [9.625, 9.875, 10.0]
    assert ends_of(update, 9.9, 10.0) == [9.9, 9.9, 10.0], "never before the message before it"
    assert ends_of(Update([], [], [Event(1)], 1, 1, 0, (0, 0)), 9.0, 10.0) == []


def test_the_loop_ends_when_it_is_told_to(served: Served) -> None:
    served.far.send(*adds(2, 50), Stop())
    served.loop.run()
    assert not served.loop.engine.has_work
    assert served.far.receive()[-1].running == 0

"""Tokens of several steps in one message: the same events, text and metrics as if each came alone."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the server needs its extra")

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest

from neo.runtime import tiny
from neo.runtime.sampling_params import SamplingParams
from neo.runtime.server.answers import Answers, ChatAnswers
from neo.runtime.server.bridge import Bridge
from neo.runtime.server.counted import CountedHistogram
from neo.runtime.server.generation import Generation, Run, Wanted
from neo.runtime.server.limits import ServerLimits
from neo.runtime.server.messages import Event, Ready, Update, frame
from neo.runtime.server.metrics import Metrics
from neo.runtime.server.schemas import ChatRequest, CompletionRequest
from neo.runtime.server.text import TextSide

TEXT = TextSide(tiny.FOLDER)
READY = Ready("m", 264, 1 << 16, 1 << 20, 64, (9, 9), {})
PROMPT = list(b"ab")
bodies = st.builds(
    lambda chat, **fields: (
        ChatRequest(messages=[{"role": "user", "content": "ab"}], **fields)
        if chat
        else CompletionRequest(prompt="ab", echo=True, **fields)
    ),
    chat=st.booleans(),
    stream_options=st.sampled_from(
        [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
    ),
    stop=st.sampled_from([None, ["a☃"], ["b", "\n"]]),
)
tokens = st.integers(0, 255) | st.sampled_from("☃\ufffd👋".encode()) | st.sampled_from(b'"\\\n\x00/')


class Streamed:
    """A stream that is fed with messages, without sockets and engine."""

    def __init__(self, body: CompletionRequest | ChatRequest, choices: int) -> None:
        chat = isinstance(body, ChatRequest)
        stops = tuple(body.stop or ())
        wanted = Wanted("id", [PROMPT], SamplingParams(1000), [1000], choices, stops)
        if not chat:
            wanted = Wanted("id", [PROMPT], SamplingParams(1000), [1000], choices, stops, texts=["ab"])
        self.metrics = Metrics("m")
        self.bridge = Bridge(100, self.metrics)
        self.bridge.ready = READY
        self.metrics.engine(READY)
        self.generation = Generation(self.bridge, TEXT, wanted, ServerLimits(), 0.0, set())
        self.answers = (ChatAnswers if chat else Answers)(body, wanted, "a model", TEXT)
        self.bytes = b""
        self.runs = 0

    async def take(self, update: Update) -> None:
        """A message of the engine, and what the stream makes of it."""
        self.bridge.data_received(frame(msgspec.msgpack.encode(update)))
        async for batch in self.generation.batches():
            self.runs += sum(isinstance(part, Run) for part in batch)
            self.bytes += self.answers.events(batch, self.generation)
            break

    def events(self) -> Counter[str]:
        """What each event says; those of different choices may change places."""
        found = Counter[str]()
        for event in self.bytes.split(b"\n\n")[:-1]:
            assert event.startswith(b"data: ")
            data = json.loads(event[6:])
            del data["created"]
            found[json.dumps(data)] += 1
        return found

    def counts(self) -> list[str]:
        page = self.metrics.page().decode()
        return re.findall(r"^neo:(?:\w+_count|generation_tokens_total|prompt_tokens_total).*$", page, re.M)


def stream(body: Any, steps: Sequence[Sequence[int]], cuts: Sequence[int]) -> Streamed:
    """First tokens, then a message for the steps between two cuts, then the ends."""

    async def run() -> Streamed:
        keys = list(range(len(steps[0])))
        found = Streamed(body, len(keys))
        await found.take(Update([], [], [Event(k, 65 + k) for k in keys], 1, 1, 0, (0, 0)))
        for begin, end in zip((0, *cuts), (*cuts, len(steps)), strict=True):
            if begin < end:
                await found.take(Update(keys, [list(s) for s in steps[begin:end]], [], 1, 1, 0, (0, 0)))
        await found.take(Update([], [], [Event(k, 66, reason="length") for k in keys], 1, 0, 0, (0, 0)))
        return found

    return asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(
    body=bodies,
    steps=st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(tokens, min_size=n, max_size=n), min_size=1, max_size=30)
    ),
    cuts=st.lists(st.integers(0, 30), max_size=4).map(sorted),
)
def test_steps_that_share_a_message_give_the_events_they_give_alone(
    body: Any, steps: list[list[int]], cuts: list[int]
) -> None:
    together = stream(body, steps, [min(c, len(steps)) for c in cuts])
    alone = stream(body, steps, range(1, len(steps)))
    assert together.events() == alone.events()
    if not body.stop:
        assert together.runs <= alone.runs == len(steps) * len(steps[0])
        assert together.counts() == alone.counts()
        total = len(steps[0]) * (len(steps) + 2)
        assert f'neo:generation_tokens_total{{model_name="m"}} {float(total)}' in together.counts()


def test_each_token_of_a_run_has_an_event_of_its_own() -> None:
    found = stream(CompletionRequest(prompt="ab"), [[ord(c)] for c in 'x"☃\n'.encode().decode("latin-1")], [])
    events = [json.loads(e[6:]) for e in found.bytes.split(b"\n\n")[:-1]]
    assert found.runs == 1
    assert [e["choices"][0]["text"] for e in events] == ["abA", "x", '"', "", "", "☃", "\n", "B"]
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 7 + ["length"]
    assert {e["model"] for e in events} == {"a model"}


@given(
    st.lists(st.tuples(st.floats(-1, 20) | st.sampled_from([0.1, 1.0, 10.0]), st.integers(0, 5)), max_size=30)
)
def test_a_counted_histogram_is_the_library_s(observed: list[tuple[float, int]]) -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    bounds = (0.1, 1.0, 10.0)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counted = CountedHistogram("neo:x", "Some seconds.", {"model_name": 'a "b"'}, bounds)
    ours.register(counted)
    known = Histogram("neo:x", "Some seconds.", ["model_name"], buckets=bounds, registry=theirs)
    child = known.labels('a "b"')
    for value, count in observed:
        counted.observe(value, count)
        for _ in range(count):
            child.observe(value)
    a, b = (re.sub(r"_sum.*", "", generate_latest(r).decode()) for r in (ours, theirs))
    assert a == b
    total = sum(v * n for v, n in observed)
    assert next(iter(counted.collect())).samples[-1].value == pytest.approx(total)


def test_a_registry_takes_one_counted_histogram_of_a_name() -> None:
    registry = CollectorRegistry()
    registry.register(CountedHistogram("neo:x", "Some seconds.", {"model_name": "m"}, (1.0,)))
    with pytest.raises(ValueError, match="neo:x"):
        Histogram("neo:x", "Others.", registry=registry)

"""The messages between the two processes survive any cutting of the byte stream."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from neo.runtime.sampling_params import SamplingParams
from neo.runtime.server.messages import HEADER, Abort, Add, Event, Frames, FromEngine, ToEngine, Update, frame


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=50), max_size=10), st.integers(1, 40))
def test_frames_come_out_as_they_went_in(payloads: list[bytes], size: int) -> None:
    data = b"".join(map(frame, payloads))
    frames = Frames()
    found = [p for at in range(0, len(data), size) for p in frames.feed(data[at : at + size])]
    assert found == payloads


def test_an_impossible_length_is_refused() -> None:
    with pytest.raises(ValueError, match="frame of"):
        Frames().feed(HEADER.pack(2**32 - 1))


def test_messages_keep_everything() -> None:
    params = SamplingParams(max_tokens=5, logit_bias={3: -1.5}, stop_token_ids=(1, 2), seed=2**64 - 1)
    for message in (Add(1, "a", [1, 2], params, 0.5, -3), Abort(2, "stop")):
        data = msgspec.msgpack.encode(message)
        assert msgspec.msgpack.decode(data, type=ToEngine) == message
    update = Update([1], [[2]], [Event(3, 4, reason="stop")], 5, 6, 7, (8, 9))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(update), type=FromEngine) == update

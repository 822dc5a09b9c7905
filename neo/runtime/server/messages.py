"""What the HTTP process and the engine process tell each other: msgpack, one length-prefixed frame a message.

Requests go by a number that the HTTP process gives them (``key``); times are those of ``time.perf_counter``,
which is one clock for all processes of a machine.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from neo.runtime.sampling_params import SamplingParams

HEADER = struct.Struct("<I")
MAX_FRAME = 1 << 30
"""Bytes of the largest frame: more than any prompt or step can need; a longer length is a broken stream."""


class Add(msgspec.Struct, array_like=True, tag="add"):
    """To the engine: queue a request that arrived at ``arrival_s``."""

    key: int
    id: str
    prompt: list[int]
    params: SamplingParams
    arrival_s: float
    priority: int = 0


class Abort(msgspec.Struct, array_like=True, tag="abort"):
    """To the engine: end a request; nothing more is said of it."""

    key: int
    reason: str


class Stop(msgspec.Struct, array_like=True, tag="stop"):
    """To the engine: abort what is left and end the process."""


class Logprobs(msgspec.Struct, array_like=True):
    """As ``neo.runtime.sampling.TokenLogprobs``."""

    token_logprob: float
    rank: int
    top: list[tuple[int, float]]


class Event(msgspec.Struct, array_like=True):
    """More of a request than a token: log-probabilities, its first token, its end.

    Attributes:
        queued_s: with the first token: seconds from arrival to when the request was first scheduled.
        reason: why it ended, a FinishReason; ``invalid``: refused; ``policy``: the policy failed; None if it
            goes on.
    """

    key: int
    token: int | None = None
    logprobs: Logprobs | None = None
    queued_s: float | None = None
    reason: str | None = None
    detail: str = ""


class StepInfo(msgspec.Struct, array_like=True):
    """Steps for the metrics: one, or several short ones that are alike.

    Attributes:
        mode: a neo.core.record.Mode.
        seconds: measured, of each step.
        predicted_s: the cost model's, and for how many steps each: also of messages before, where those had
            no price yet. Nothing where the cost model has none.
        prefill_tokens: in each step; so are decodes.
        bytes_h2d: since the message before, a step that follows at most among them; so are ``bytes_d2h`` and
            preemptions.
    """

    mode: int
    seconds: list[float]
    predicted_s: list[tuple[float, int]]
    prefill_tokens: int
    gpu_decodes: int
    cpu_decodes: int
    stream_decodes: int
    bytes_h2d: int
    bytes_d2h: int
    preemptions: int
    cost_factors: dict[str, float] | None = None  # corrections of the cost model, where they have changed


class Update(msgspec.Struct, array_like=True, tag="update"):
    """From the engine, after steps or after requests came or went without one.

    ``keys[i]`` got ``tokens[s][i]`` in step s and nothing else happened to it; other requests are in
    ``events``, which belong to a single step.
    """

    keys: list[int]
    tokens: list[list[int]]
    events: list[Event]
    accepted: int  # Add messages handled so far
    running: int
    waiting: int
    kv_used: tuple[int, int]  # layer-blocks on GPU, CPU
    step: StepInfo | None = None


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """From the engine: it can serve.

    Attributes:
        capacity_tokens: prompt and output together that fit into the larger of the tiers.
        description: policy, hardware, budgets... as the run log's header has them, and the device's words.
    """

    model: str
    vocab: int
    max_model_len: int
    capacity_tokens: int
    max_seqs: int
    kv_total: tuple[int, int]
    description: dict[str, Any]


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """From the engine: it ends. ``input_error``: because of what it was given, not by a fault."""

    message: str
    input_error: bool = False


ToEngine = Add | Abort | Stop
FromEngine = Update | Ready | Failed


def frame(payload: bytes) -> bytes:
    """``payload`` with its length before it."""
    return HEADER.pack(len(payload)) + payload


class Frames:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Frames that ``data`` completes. ValueError for a length that cannot be one."""
        buffer = self._buffer
        buffer += data
        found, at = [], 0
        while len(buffer) - at >= HEADER.size:
            (length,) = HEADER.unpack_from(buffer, at)
            if length > MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes")
            end = at + HEADER.size + length
            if end > len(buffer):
                break
            found.append(bytes(buffer[at + HEADER.size : end]))
            at = end
        del buffer[:at]
        return found

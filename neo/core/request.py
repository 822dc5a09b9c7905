"""Request and its life: WAITING -> PREFILL -> DECODE -> FINISHED (or ABORTED, or REJECTED)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

from neo.core.errors import InputError


class Tier(StrEnum):
    """A place where KV lives."""

    GPU = "gpu"
    CPU = "cpu"


class State(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"  # no KV anywhere: new, or preempted with recomputation
    PREFILL = "prefill"  # some of its known tokens have KV, not all
    DECODE = "decode"  # all but the last known token have KV; each step yields one token
    FINISHED = "finished"
    ABORTED = "aborted"
    REJECTED = "rejected"


class FinishReason(StrEnum):
    """Why a request ended, as ``requests.csv`` and the API report it."""

    LENGTH = "length"
    STOP = "stop"
    ABORT = "abort"
    TIMEOUT = "timeout"
    REJECTED = "rejected"


TERMINAL = frozenset({State.FINISHED, State.ABORTED, State.REJECTED})


@dataclass(slots=True, eq=False)
class Request:
    """One generation request. Policies read it; only the Scheduler writes it.

    A request *knows* ``prompt_tokens + generated`` tokens, of which ``computed`` have KV. Prefill computes
    known tokens chunk by chunk; the chunk that reaches the last known token yields the next one. From then
    on ``computed == known - 1`` and each decode step computes one token and yields one. A preemption with
    recomputation sets ``computed`` to 0 and keeps what was generated.

    ``max_tokens`` is the length limit the client asked for; in trace replays, the recorded output length.
    Times are seconds on the driver's clock.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    arrival_s: float = 0.0
    priority: int = 0

    state: State = State.WAITING
    computed: int = 0
    generated: int = 0
    tier: Tier | None = None  # where all its KV is; None if it has none, or if it is split over both tiers
    host_layers: int = 0  # bit l is set if layer l's KV is on the CPU
    relay_layers: int = 0  # of a relayed token: layers whose PRE is behind it; 0 between two tokens
    sequence: int = -1  # order of admission to this scheduler

    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finish_s: float | None = None
    finish_reason: FinishReason | None = None
    detail: str = ""  # for rejected requests: the numbers
    preemptions: int = 0
    cpu_steps: int = 0  # decode steps whose attention ran on the CPU

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise InputError(f"request {self.id}: prompt_tokens must be at least 1, got {self.prompt_tokens}")
        if self.max_tokens < 1:
            raise InputError(f"request {self.id}: max_tokens must be at least 1, got {self.max_tokens}")

    @property
    def known(self) -> int:
        """Tokens known so far: prompt and generated."""
        return self.prompt_tokens + self.generated

    @property
    def remaining_prefill(self) -> int:
        """Known tokens without KV; for a decode, 1."""
        return self.prompt_tokens + self.generated - self.computed

    @property
    def peak_kv_tokens(self) -> int:
        """KV tokens held when it ends at ``max_tokens``: the last token's KV is never computed."""
        return self.prompt_tokens + self.max_tokens - 1

    @property
    def done(self) -> bool:
        """Whether its life has ended."""
        return self.state in TERMINAL

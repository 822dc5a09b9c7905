"""When the operations of a step ran: CUDA events around them, brought onto the host's clock.

Events keep apart what they stand between, and kernels of a step that is replayed as one graph overlap.
``seconds_each`` times such steps as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from neo.core.graph import RESOURCE_OF, OpKind, Resource
from neo.core.record import Slice
from neo.runtime.cuda_program import Step

_HELD_BACK = 1 << 25  # clock cycles, about 17 ms: longer than launching a step that decodes takes
_HELD_BRIEFLY = 1 << 23  # about 4 ms: longer than launching two replays of one takes
_IN_A_ROW = 2  # replays that are timed: inputs have two buffers on the host, so that neither is written twice


class _Timed(NamedTuple):
    step: Step
    layer: int | None
    start: torch.cuda.Event
    end: torch.cuda.Event


class Timeline:
    """Events of one step on a device.

    Args:
        main: the stream of the GPU's operations; nothing may be running.
        hold_back: let the GPU wait while the step is launched, so that no time has a launch in it.
    """

    def __init__(self, main: torch.cuda.Stream, hold_back: bool) -> None:
        self._found: list[_Timed] = []
        main.synchronize()
        self._base = _event()
        self._base.record(main)
        self._zero = time.perf_counter()
        if hold_back:
            torch.cuda._sleep(_HELD_BACK)  # type: ignore[no-untyped-call]

    @contextmanager
    def measure(self, step: Step, layer: int | None, stream: torch.cuda.Stream) -> Iterator[None]:
        """Events around what is launched on a stream inside."""
        start, end = _event(), _event()
        start.record(stream)
        yield
        end.record(stream)
        self._found.append(_Timed(step, layer, start, end))

    def slices(self, number: int, answers: dict[int, npt.NDArray[np.int64]]) -> list[tuple[int, Slice]]:
        """Every operation with its work, once the device has ended the step.

        ``answers``: by sub-batch, when CPU attention of each layer began and ended, in nanoseconds. RECV
        counts from the answer on: until then it only waits.
        """
        found = []
        for step, layer, start_at, end_at in self._found:
            start = self._zero + self._base.elapsed_time(start_at) * 1e-3
            end = self._zero + self._base.elapsed_time(end_at) * 1e-3
            if step.kind is OpKind.RECV and layer is not None:
                start = min(end, max(start, float(answers[step.batch][layer, 1]) * 1e-9))
            found.append(
                (step.work, Slice(number, RESOURCE_OF[step.kind], step.kind, layer, step.batch, start, end))
            )
        return found


def seconds_each(main: torch.cuda.Stream, launch: Callable[[], None]) -> float:
    """Seconds from one start to the next of what is launched several times, one right behind the other.

    It runs once before, uncounted, so that it is captured, and finds the caches as its like leaves them. The
    device is held back until all are launched: what a host takes between two of them is no part of it. A host
    that did not keep up gets more time, up to ``_HELD_BACK``.
    """
    launch()
    held = _HELD_BRIEFLY
    while True:
        main.synchronize()
        torch.cuda._sleep(held)  # type: ignore[no-untyped-call]
        start, end = _event(), _event()
        start.record(main)
        for _ in range(_IN_A_ROW):
            launch()
        end.record(main)
        kept_up = not start.query()  # type: ignore[no-untyped-call]
        end.synchronize()
        if kept_up or held >= _HELD_BACK:  # one that is too long is an outlier among its repeats
            milliseconds: float = start.elapsed_time(end)
            return milliseconds * 1e-3 / _IN_A_ROW
        held *= 2


def host_slices(number: int, batch: int, times: npt.NDArray[np.int64]) -> list[Slice]:
    """CPU attention of a sub-batch, layer by layer, of ``times`` [layers, (begin, end)] in nanoseconds."""
    return [
        Slice(number, Resource.CPU, OpKind.CPU_ATTN, layer, batch, start * 1e-9, end * 1e-9)
        for layer, (start, end) in enumerate(times.tolist())
    ]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

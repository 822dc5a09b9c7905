"""The CostModel interface: how long an operation takes."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from neo.core.graph import OpKind, Work


@runtime_checkable
class CostModel(Protocol):
    """Prices operations.

    A model must be a pure function of ``(kind, work)`` between two calls of the same step, and monotone:
    more work never takes less time. Contention between copies and CPU attention, launch and hand-over
    overheads are its business: the ``beside_bytes`` of a Work say what else moves. One whose prices change
    between steps has a ``version`` that grows with every change (``neo.core.learning.Learning``).
    """

    def seconds(self, kind: OpKind, work: Work) -> Any:
        """Seconds one operation takes, for one layer (float >= 0).

        A model with the attribute ``vectorized = True`` also accepts a numpy integer array in
        ``work.kv_tokens`` (for GPU_ATTN and CPU_ATTN) and then returns a float64 array of that length
        whose entries equal the scalar results bit for bit.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What it is and where its numbers come from, for logs and reports (JSON-serialisable).

        If it has a key ``"warnings"``, its list of strings is shown to the user after a run
        (extrapolation, corrected tables).
        """
        ...

"""A RunRecord as numpy columns, and the sharing out of rows over time bins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neo.core.record import RunRecord
from neo.core.request import Request, State

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RequestColumns:
    """The requests of a run in arrival order (ties: order of submission), one array per field.

    Times are seconds; NaN stands for what did not happen. ``ttft_s`` needs a first token, ``tpot_s`` two
    tokens, ``e2e_s`` and ``latency_per_output_token_s`` a request that finished (not aborted, not rejected).
    """

    requests: tuple[Request, ...]
    arrival_s: Floats
    finish_s: Floats
    prompt_tokens: Ints
    generated: Ints
    finished: NDArray[np.bool_]
    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    latency_per_output_token_s: Floats


def request_columns(record: RunRecord) -> RequestColumns:
    """The requests of ``record`` as columns in arrival order."""
    requests = tuple(sorted(record.requests, key=lambda r: r.arrival_s))
    arrival = np.array([r.arrival_s for r in requests], dtype=np.float64)
    # numpy turns None into NaN for a float dtype
    first = np.array([r.first_token_s for r in requests], dtype=np.float64)
    last = np.array([r.last_token_s for r in requests], dtype=np.float64)
    finish = np.array([r.finish_s for r in requests], dtype=np.float64)
    generated = np.array([r.generated for r in requests], dtype=np.int64)
    finished = np.array([r.state is State.FINISHED for r in requests], dtype=np.bool_)
    e2e = np.where(finished, finish - arrival, np.nan)
    return RequestColumns(
        requests=requests,
        arrival_s=arrival,
        finish_s=finish,
        prompt_tokens=np.array([r.prompt_tokens for r in requests], dtype=np.int64),
        generated=generated,
        finished=finished,
        ttft_s=first - arrival,
        tpot_s=np.where(generated >= 2, last - first, np.nan) / np.maximum(generated - 1, 1),
        e2e_s=e2e,
        latency_per_output_token_s=np.where(generated >= 1, e2e, np.nan) / np.maximum(generated, 1),
    )


def step_columns(record: RunRecord) -> Mapping[str, Floats]:
    """The step rows of ``record``: field name of ``StepColumns`` -> float64 array (a copy)."""
    columns = record.columns
    return {name: np.array(getattr(columns, name), dtype=np.float64) for name in type(columns).__slots__}


@dataclass(frozen=True, slots=True, eq=False)
class Bins:
    """Which row overlaps which time bin, and for how long: what ``spread`` returns.

    ``row``, ``bin`` and ``share`` are parallel: ``share`` is the part (0..1) of that row's length that lies
    in that bin. ``edges`` are the n + 1 borders of the bins in seconds.
    """

    edges: Floats
    row: Ints
    bin: Ints
    share: Floats
    length: Floats  # per row, seconds

    @property
    def width(self) -> Floats:
        """Seconds per bin."""
        return np.diff(self.edges)

    def total(self, values: Floats) -> Floats:
        """Per bin, the sum of ``values`` (one per row), each row's shared out by overlap."""
        weights = values[self.row] * self.share
        return np.bincount(self.bin, weights, minlength=len(self.edges) - 1).astype(np.float64)

    def occupied(self) -> Floats:
        """Seconds of each bin covered by rows."""
        return self.total(self.length)

    def mean(self, values: Floats) -> Floats:
        """Per bin, the mean of ``values`` over the time that rows cover; 0 where none does."""
        covered = self.occupied()
        return np.divide(
            self.total(values * self.length), covered, out=np.zeros_like(covered), where=covered > 0
        )

    def peak(self, values: Floats) -> Floats:
        """Per bin, the largest of ``values`` among the rows that touch it; 0 where none does."""
        out = np.zeros(len(self.edges) - 1)
        np.maximum.at(out, self.bin, values[self.row])
        return out


def spread(start_s: Floats, end_s: Floats, edges: Floats) -> Bins:
    """Share rows ``[start_s, end_s]`` out over the bins between ``edges`` (ascending, seconds).

    A row without length belongs wholly to the bin it lies in. Parts outside the edges are dropped. The cost
    is proportional to the number of overlaps: rows plus bins, where rows do not overlap each other.
    """
    bins = len(edges) - 1
    length = end_s - start_s
    first = np.clip(np.searchsorted(edges, start_s, side="right") - 1, 0, bins - 1)
    last = np.clip(np.searchsorted(edges, end_s, side="left") - 1, first, bins - 1)
    counts = last - first + 1
    row = np.repeat(np.arange(len(start_s)), counts)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    bin_ = first[row] + offset
    overlap = np.minimum(end_s[row], edges[bin_ + 1]) - np.maximum(start_s[row], edges[bin_])
    inside = (start_s >= edges[0]) & (start_s <= edges[-1])
    share = np.where(
        length[row] > 0,
        np.maximum(overlap, 0.0) / np.where(length[row] > 0, length[row], 1.0),
        inside[row].astype(np.float64),
    )
    return Bins(edges=edges, row=row, bin=bin_, share=share, length=length)

"""A Prometheus histogram that takes a value many times at once."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class CountedHistogram(Collector):
    """For values that many tokens share: prometheus-client's own takes them one by one, each under a lock.

    Args:
        labels: name and value of each.
        bounds: upper bounds of the buckets, ascending; the last bucket, without one, comes by itself.
    """

    def __init__(self, name: str, help: str, labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        self._name, self._help, self._labels = name, help, dict(labels)
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """``value`` came ``count`` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """What a registry asks for to refuse a second metric of the name."""
        return self.collect()

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What stands on the page."""
        family = HistogramMetricFamily(self._name, self._help, labels=list(self._labels))
        bounds = map(floatToGoString, (*self._bounds, math.inf))
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family

"""Arrival processes."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.core.errors import InputError
from neo.workload import ARRIVALS, TraceRequest, Workload, apply_arrivals, describe


def _workload(times: list[float], timed: bool = True) -> Workload:
    requests = tuple(TraceRequest(f"r{i}", time, 10, 5, abort_s=1.0) for i, time in enumerate(times))
    return Workload("w", requests, {"format": "test"}, timed)


def _times(workload: Workload) -> list[float]:
    return [request.arrival_s for request in workload.requests]


LENGTHS_ONLY = _workload([0.0] * 20_000, timed=False)


def test_recorded_times_are_kept_or_scaled() -> None:
    recorded = _workload([1.0, 3.0, 3.0, 9.0])
    assert _times(apply_arrivals(recorded, "recorded")) == [1.0, 3.0, 3.0, 9.0]
    assert _times(apply_arrivals(recorded, "recorded", speedup=2)) == [0.5, 1.5, 1.5, 4.5]
    scaled = apply_arrivals(recorded, "recorded", rate=6.0)
    assert scaled.mean_rate == pytest.approx(6.0)
    assert scaled.source["arrivals"] == {"kind": "recorded", "rate": 6.0}
    assert recorded.source == {"format": "test"}


def test_constant_and_all_at_once() -> None:
    constant = apply_arrivals(_workload([0.0] * 4, timed=False), "constant", rate=2)
    assert _times(constant) == [0.0, 0.5, 1.0, 1.5]
    assert constant.has_arrivals
    assert _times(apply_arrivals(_workload([1.0, 2.0]), "all-at-once")) == [0.0, 0.0]


@pytest.mark.parametrize("seed", [0, 1, 2024])
@pytest.mark.parametrize(("kind", "cv"), [("poisson", None), ("gamma", 0.25), ("gamma", 1.0), ("gamma", 3.0)])
def test_random_arrivals_have_their_rate_and_variation(kind: str, cv: float | None, seed: int) -> None:
    made = apply_arrivals(LENGTHS_ONLY, kind, rate=7.5, cv=cv, seed=seed)
    wanted = 1.0 if cv is None else cv
    stats = describe(made)
    assert stats["mean_rate"] == pytest.approx(7.5, rel=4 * wanted / math.sqrt(len(made)))  # four sigma
    assert stats["interarrival_cv"] == pytest.approx(wanted, rel=0.08)
    assert _times(made)[0] == 0.0
    assert made.source["arrivals"]["seed"] == seed
    json.dumps(made.source)


@given(
    st.sampled_from(list(ARRIVALS)),
    st.integers(1, 50),
    st.floats(1e-3, 1e4),
    st.floats(0.01, 100),
    st.integers(0, 2**70),
)
def test_arrivals_are_sorted_reproducible_and_keep_the_rest(
    kind: str, n: int, rate: float, cv: float, seed: int
) -> None:
    workload = _workload([0.25 * i for i in range(n)])
    given_numbers = {name: {"rate": rate, "cv": cv}[name] for name in ARRIVALS[kind]}
    made = apply_arrivals(workload, kind, seed=seed, **given_numbers)  # type: ignore[arg-type]
    times = _times(made)
    assert times == sorted(times)
    assert all(math.isfinite(time) and time >= 0 for time in times)
    assert made == apply_arrivals(workload, kind, seed=seed, **given_numbers)  # type: ignore[arg-type]
    assert [r._replace(arrival_s=0.0) for r in made.requests] == [
        r._replace(arrival_s=0.0) for r in workload.requests
    ]


def test_the_seed_matters() -> None:
    first, second = (apply_arrivals(LENGTHS_ONLY, "poisson", rate=1, seed=seed) for seed in (0, 1))
    assert first.requests != second.requests


def test_poisson_is_gamma_with_cv_1() -> None:
    poisson = apply_arrivals(LENGTHS_ONLY, "poisson", rate=2, seed=5)
    assert poisson.requests == apply_arrivals(LENGTHS_ONLY, "gamma", rate=2, cv=1, seed=5).requests


def test_numpy_numbers_are_taken() -> None:
    made = apply_arrivals(LENGTHS_ONLY, "poisson", rate=np.float32(2.0), seed=np.int64(3))  # type: ignore[arg-type]
    assert json.dumps(made.source["arrivals"]) == '{"kind": "poisson", "rate": 2.0, "seed": 3}'


@pytest.mark.parametrize(
    ("kind", "numbers", "message"),
    [
        ("uniform", {}, "unknown arrivals 'uniform'; known: recorded, poisson, gamma, constant, all-at-once"),
        ("poisson", {}, "arrivals 'poisson' needs a rate"),
        ("gamma", {"rate": 1}, "arrivals 'gamma' needs a cv"),
        ("poisson", {"rate": 1, "cv": 2}, "arrivals 'poisson' takes no cv, got 2"),
        ("all-at-once", {"rate": 1}, "arrivals 'all-at-once' takes no rate, got 1"),
        ("constant", {"rate": 1, "speedup": 2}, "arrivals 'constant' takes no speedup, got 2"),
        ("recorded", {"rate": 1, "speedup": 2}, "arrivals 'recorded' takes a rate or a speedup, not both"),
        ("recorded", {"speedup": 0}, "speedup: expected a number above zero, got 0"),
        ("constant", {"rate": -1.0}, "rate: expected a number above zero, got -1.0"),
        ("constant", {"rate": math.nan}, "rate: expected a number above zero, got nan"),
        ("constant", {"rate": math.inf}, "rate: expected a number above zero, got inf"),
        ("constant", {"rate": True}, "rate: expected a number above zero, got True"),
        ("constant", {"rate": "2"}, "rate: expected a number above zero, got '2'"),
        ("gamma", {"rate": 1, "cv": 1e-3}, "cv: expected a number from 0.01 to 100, got 0.001"),
        ("poisson", {"rate": 1, "seed": -1}, "seed: expected a non-negative integer, got -1"),
        ("poisson", {"rate": 1, "seed": 1.5}, "seed: expected a non-negative integer, got 1.5"),
        ("poisson", {"rate": 1e-320}, "arrivals 'poisson': the times overflow with these numbers"),
        ("constant", {"rate": 1e-320}, "arrivals 'constant': the times overflow with these numbers"),
        ("recorded", {"speedup": 1e-320}, "arrivals 'recorded': the times overflow with these numbers"),
    ],
)
def test_wrong_numbers_are_refused(kind: str, numbers: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError) as caught:
        apply_arrivals(_workload([0.0, 1.0]), kind, **numbers)
    assert str(caught.value).startswith(message)


def test_recorded_needs_recorded_times() -> None:
    with pytest.raises(InputError, match=r"'w' has no arrival times; choose arrivals from: poisson, gamma"):
        apply_arrivals(_workload([0.0, 0.0], timed=False), "recorded")
    with pytest.raises(InputError, match=r"every request arrives at the same time"):
        apply_arrivals(_workload([3.0, 3.0]), "recorded", rate=1.0)

"""The calibrated cost model against machines whose true times are known: the base's, times known factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import pytest
from cost_works import MACHINE, MODEL, kinds, works
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ToyCost

from neo.core.errors import InputError
from neo.core.graph import OpKind, Resource, StepGraph
from neo.core.learning import Learning, StepSeconds, learning
from neo.core.pipeline import compile
from neo.core.plan import PrefillChunk, StepPlan, SubBatch
from neo.core.request import Request, State, Tier
from neo.core.timing import busy_seconds, durations, step_seconds
from neo.cost.calibrated import PART_OF, PARTS, Calibrated, Corrected
from neo.cost.loading import cost_model_names, load_cost_model
from neo.cost.roofline import Roofline

GPU_ONLY = {"host": 3.0, "dense": 0.6, "attention": 2.5}
ALL = {**GPU_ONLY, "cpu": 1.8, "copies": 1.3}


def on(tier: Tier, kv: int) -> Request:
    request = Request(f"{tier}{kv}", kv, 1 << 20)
    request.state, request.tier, request.computed, request.generated = State.DECODE, tier, kv, 1
    request.host_layers = (1 << MODEL.layers) - 1 if tier is Tier.CPU else 0
    return request


def graphs(seed: int, offload: bool) -> Iterator[StepGraph]:
    """Steps as they come while serving: prefills and decodes in changing numbers; halves on the CPU."""
    draw = Random(seed)
    while True:
        members = tuple(on(Tier.GPU, draw.randrange(100, 4000)) for _ in range(draw.randrange(1, 40)))
        chunks: tuple[PrefillChunk, ...] = ()
        if draw.random() < 0.4:
            prompt = draw.randrange(50, 2000)
            chunks = (PrefillChunk(Request("p", prompt, 9), 0, prompt, Tier.GPU),)
        batches = [SubBatch(chunks, members)]
        if offload and draw.random() < 0.7:
            host = tuple(on(Tier.CPU, draw.randrange(50, 2000)) for _ in range(draw.randrange(1, 20)))
            batches = [SubBatch(chunks, members, host)]
            if draw.random() < 0.5:
                batches.append(SubBatch(cpu_decode=(on(Tier.CPU, draw.randrange(500, 4000)),)))
        yield compile(StepPlan(tuple(batches)), MODEL, 16)


class Machine:
    """Measures steps: the base's times, part by part times a factor, with noise on every operation."""

    def __init__(self, base: Any, factors: Mapping[str, float], noise: float = 0.0, seed: int = 0) -> None:
        self.truth = Corrected(base, factors)
        self.noise = noise
        self.draw = Random(seed)

    def run(self, graph: StepGraph) -> StepSeconds:
        seconds = [s * math.exp(self.draw.gauss(0.0, self.noise)) for s in durations(graph, self.truth)]
        busy = busy_seconds(graph.template, seconds)
        total = float(step_seconds(graph.template, seconds))
        return StepSeconds(total, busy.get(Resource.HOST), busy.get(Resource.CPU))


def errors(model: Calibrated, machine: Machine, steps: Iterator[StepGraph], count: int) -> list[float]:
    """Serve some steps; |predicted / measured - 1| of each, as predicted before it ran."""
    found = []
    for _ in range(count):
        graph = next(steps)
        predicted = float(step_seconds(graph.template, durations(graph, model)))
        measured = machine.run(graph)
        model.observe(graph, measured)
        assert model.predicted_s == pytest.approx(predicted, rel=1e-12)
        found.append(abs(predicted / measured.total - 1.0))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("base", "offload", "truth"),
    [
        (Roofline(MODEL, MACHINE), False, GPU_ONLY),
        (Roofline(MODEL, MACHINE), True, ALL),
        (ToyCost(), True, ALL),
    ],
    ids=["gpu-only", "offloaded", "toy"],
)
def test_predictions_come_within_a_few_percent(base: Any, offload: bool, truth: dict[str, float]) -> None:
    """From the base's error, far above, to under 5 % on average, noise of 5 % on every operation included."""
    model, steps = Calibrated(base), graphs(1, offload)
    found = errors(model, Machine(base, truth, noise=0.05), steps, 1200)
    plain = errors(Calibrated(base, 1e9), Machine(base, truth), graphs(1, offload), 1)
    assert plain[0] > 0.2
    assert mean(found[-400:]) < 0.05
    assert mean(found[100:200]) < 0.1


def test_factors_become_those_of_the_machine() -> None:
    base = Roofline(MODEL, MACHINE)
    model, steps = Calibrated(base), graphs(2, True)
    errors(model, Machine(base, ALL), steps, 3000)
    for part in ("host", "cpu", "dense"):
        assert model.factors[part] == pytest.approx(ALL[part], rel=0.1), part
    assert model.describe()["factors"] == model.factors
    assert model.describe()["steps_seen"] == 3000


def test_a_machine_that_changes_is_followed_within_a_few_time_constants() -> None:
    base = Roofline(MODEL, MACHINE)
    model, steps = Calibrated(base, time_constant=20), graphs(3, False)
    errors(model, Machine(base, {}), steps, 300)
    assert mean(errors(model, Machine(base, {"dense": 2.0, "attention": 2.0}), steps, 300)[100:]) < 0.05


def test_ten_times_off_is_no_hopeless_beginning() -> None:
    base = Roofline(MODEL, MACHINE)
    truth = dict.fromkeys(PARTS, 10.0)
    assert mean(errors(Calibrated(base), Machine(base, truth), graphs(4, True), 400)[200:]) < 0.1


def test_one_bad_step_moves_little() -> None:
    base = Roofline(MODEL, MACHINE)
    model, steps, machine = Calibrated(base), graphs(5, True), Machine(base, ALL)
    errors(model, machine, steps, 1000)
    for _ in range(3):
        before, graph = model.factors, next(steps)
        total, host, cpu = machine.run(graph)
        assert host is not None
        model.observe(graph, StepSeconds(total * 1000, host * 1000, cpu and cpu * 1000))
        for part, factor in model.factors.items():
            assert factor == pytest.approx(before[part], rel=0.06), part


def test_a_tenth_of_all_steps_may_be_anything() -> None:
    base = Roofline(MODEL, MACHINE)
    model, steps, machine, draw = Calibrated(base), graphs(6, False), Machine(base, GPU_ONLY), Random(0)
    found = []
    for i in range(3000):
        graph = next(steps)
        measured = machine.run(graph)
        if draw.random() < 0.1:
            model.observe(graph, StepSeconds(measured.total * 1000, measured.host, measured.cpu))
            continue
        model.observe(graph, measured)
        assert model.predicted_s is not None
        found += [abs(model.predicted_s / measured.total - 1.0)] * (i > 1000)
    assert mean(found) < 0.15


HOSTILE = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -1.0, math.nan, math.inf, 5e-324, 1e308, 1e-3]),
    st.none(),
)


@given(st.lists(st.tuples(HOSTILE, HOSTILE, HOSTILE), max_size=30), st.integers(0, 100))
@settings(max_examples=20)
def test_whatever_a_clock_gives_factors_stay_bounded_and_recover(
    readings: list[tuple[float | None, ...]], seed: int
) -> None:
    base = Roofline(MODEL, MACHINE)
    model, steps = Calibrated(base), graphs(seed, True)
    for total, host, cpu in readings:
        model.observe(next(steps), StepSeconds(0.0 if total is None else total, host, cpu))
        assert all(0.0099 <= f <= 101 for f in model.factors.values())
    errors(model, Machine(base, ALL), steps, 300)
    assert mean(errors(model, Machine(base, ALL), steps, 100)) < 0.1


def test_steps_that_are_queued_behind_others_have_no_time_of_the_host() -> None:
    base = Roofline(MODEL, MACHINE)
    model, steps, machine = Calibrated(base), graphs(12, False), Machine(base, GPU_ONLY)
    found = []
    for _ in range(1000):
        graph = next(steps)
        total, host, _ = machine.run(graph)
        assert host is not None
        model.observe(graph, StepSeconds(total - host, 0.0))
        assert model.predicted_s is not None
        found.append(abs(model.predicted_s / (total - host) - 1.0))
    assert mean(found[-200:]) < 0.04
    assert model.factors["host"] < 0.05


def test_what_is_not_heard_of_returns_to_the_base() -> None:
    """A policy that was scared off the CPU by a bad step would else never learn that it was one."""
    base = Roofline(MODEL, MACHINE)
    model = Calibrated(base, time_constant=10)
    errors(model, Machine(base, {"cpu": 8.0}), graphs(11, True), 200)
    assert model.factors["cpu"] > 7.0
    errors(model, Machine(base, {}), graphs(11, False), 200)  # one time constant of returning
    assert model.factors["cpu"] == pytest.approx(8.0 ** math.exp(-1.0), rel=0.05)
    errors(model, Machine(base, {}), graphs(11, False), 1000)
    assert model.factors["cpu"] == pytest.approx(1.0, rel=0.03)


def test_what_is_no_time_changes_nothing() -> None:
    base = Roofline(MODEL, MACHINE)
    model, steps = Calibrated(base), graphs(7, False)
    errors(model, Machine(base, ALL), steps, 50)
    before = model.factors, model.version
    for total in (0.0, -1.0, math.nan, math.inf):
        model.observe(next(steps), StepSeconds(total, 1.0, 1.0))
    assert (model.factors, model.version) == before


def test_a_base_that_fails_does_not_stop_what_runs() -> None:
    class Broken(ToyCost):
        price: Any = 1.0

        def seconds(self, kind: OpKind, work: Any) -> Any:
            if self.price is None:
                raise ValueError("no price")
            return self.price

    base, steps = Broken(), graphs(8, True)
    model = Calibrated(base)
    for price in (None, math.nan, -1.0, math.inf, 0.0, "a"):
        base.price = price
        model.observe(next(steps), StepSeconds(1.0, 0.1, 0.1))
        assert model.predicted_s is None
    assert model.factors == dict.fromkeys(PARTS, 1.0)


def test_prices_change_only_when_it_is_worth_it() -> None:
    """Policies ask everything again with every version: noise around the truth must not make them."""
    base = Roofline(MODEL, MACHINE)
    model, steps, machine = Calibrated(base), graphs(9, False), Machine(base, GPU_ONLY, noise=0.03)
    errors(model, machine, steps, 300)
    before = model.version
    errors(model, machine, steps, 300)
    assert model.version - before < 50


@given(kinds, works, st.dictionaries(st.sampled_from(PARTS), st.floats(0.01, 100), min_size=1))
def test_prices_are_the_bases_times_a_factor(kind: OpKind, work: Any, factors: dict[str, float]) -> None:
    base = Roofline(MODEL, MACHINE)
    model = Calibrated(base)
    assert model.seconds(kind, work) == base.seconds(kind, work)
    version = model.version
    model.restore(factors)
    assert model.version == version + any(f != 1.0 for f in factors.values())
    expected = factors.get(PART_OF[kind], 1.0) * base.seconds(kind, work)
    assert model.seconds(kind, work) == expected
    assert model.fixed().seconds(kind, work) == expected
    model.begin()
    assert model.seconds(kind, work) == base.seconds(kind, work)


def test_a_fixed_model_learns_no_more() -> None:
    model = Calibrated(ToyCost())
    assert learning(model) is model
    assert isinstance(model, Learning)
    assert learning(model.fixed()) is None
    assert learning(ToyCost()) is None


@pytest.mark.parametrize("factors", [{"gpu": 1.0}, {"cpu": 0.0}, {"cpu": math.nan}, {"cpu": -1.0}])
def test_only_factors_are_restored(factors: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"unknown part|is no factor"):
        Calibrated(ToyCost()).restore(factors)


def test_names() -> None:
    assert "calibrated" in cost_model_names()
    options = {"matmul_efficiency": "0.5", "time_constant": "7"}
    found = load_cost_model("calibrated:roofline", MODEL, MACHINE, options)
    assert isinstance(found, Calibrated)
    assert isinstance(found.base, Roofline)
    assert (found.base.factors.matmul_efficiency, found.time_constant) == (0.5, 7.0)
    for spec, options, words in (
        ("calibrated", {}, "needs what it corrects"),
        ("calibrated:", {}, "needs what it corrects"),
        ("calibrated:calibrated:roofline", {}, "not itself"),
        ("calibrated:rooflin", {}, "did you mean 'roofline'"),
        ("calibrated:roofline", {"time_constant": "0"}, "expected steps, at least 1"),
        ("calibrated:roofline", {"time_constant": "nan"}, "expected steps"),
        ("calibrated:roofline", {"time": "3"}, "unknown factor 'time'"),
    ):
        with pytest.raises(InputError, match=words):
            load_cost_model(spec, MODEL, MACHINE, options)

"""Length distributions and synthetic workloads."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.core.errors import InputError
from neo.workload import GRAMMAR, parse_lengths, synthetic
from neo.workload.azure_shapes import LEVELS, QUANTILES
from neo.workload.source import MAX_TOKENS
from neo.workload.synthetic import Role, Uniform


def _draw(text: str, n: int = 50_000, role: Role = "prompt") -> np.ndarray:
    return parse_lengths(text).sample(np.random.default_rng(1), n, role)


@pytest.mark.parametrize(
    ("text", "lo", "hi"),
    [
        ("fixed:7", 7, 7),
        ("uniform:3:5", 3, 5),
        ("uniform:4:4", 4, 4),
        ("around:1000:0.1", 900, 1100),
        ("around:1000:0.15", 850, 1150),
        ("around:5:.9", 1, 9),
        ("around:10:0", 10, 10),
        (" fixed:10000000 ", MAX_TOKENS, MAX_TOKENS),
    ],
)
def test_uniform_kinds_reach_exactly_their_bounds(text: str, lo: int, hi: int) -> None:
    assert parse_lengths(text) == Uniform(lo, hi)
    drawn = _draw(text)
    assert (drawn.min(), drawn.max()) == (lo, hi)
    assert drawn.mean() == pytest.approx((lo + hi) / 2, rel=0.01)


def test_lognormal_has_its_mean_and_sigma() -> None:
    drawn = _draw("lognormal:500:0.8")
    assert drawn.mean() == pytest.approx(500, rel=0.02)
    assert np.log(drawn).std() == pytest.approx(0.8, rel=0.02)
    assert _draw("lognormal:10000000:5").max() <= MAX_TOKENS
    assert _draw("lognormal:1:5").min() == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "unknown distribution ''"),
        ("normal:5:1", "unknown distribution 'normal'"),
        ("fixed", "expected fixed:N"),
        ("fixed:1:2", "expected fixed:N"),
        ("azure-code:1", "expected azure-code"),
        ("lognormal:500", "expected lognormal:MEAN:SIGMA"),
        ("fixed:0", "N must be an integer from 1 to 10000000, got '0'"),
        ("fixed:1.5", "N must be an integer from 1 to 10000000, got '1.5'"),
        ("fixed:10000001", "N must be an integer from 1 to 10000000, got '10000001'"),
        ("fixed:٣", "N must be an integer from 1 to 10000000, got '٣'"),
        ("uniform:5:4", "LO 5 is above HI 4"),
        ("uniform:-1:4", "LO must be an integer from 1 to 10000000, got '-1'"),
        ("around:100:1", "SPREAD must be below 1 (0.1 means ±10 %), got 1"),
        ("around:100:-0.1", "SPREAD must be a number like 0.5, got '-0.1'"),
        ("around:100:1/2", "SPREAD must be a number like 0.5, got '1/2'"),
        ("around:9999999:0.5", "lengths reach 14999998 tokens, more than 10000000"),
        ("lognormal:0.5:1", "MEAN must be from 1 to 10000000 tokens, got 0.5"),
        ("lognormal:5:nan", "SIGMA must be a number like 0.5, got 'nan'"),
        ("lognormal:5:0", "SIGMA must be above 0 and at most 5, got 0"),
    ],
)
def test_a_wrong_distribution_says_why_and_shows_the_grammar(text: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_lengths(text)
    assert str(caught.value) == f"lengths {text!r}: {problem} (grammar: {GRAMMAR})"


@given(st.text())
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_lengths("?" + text)
    assert len(str(caught.value).splitlines()) == 1


@given(
    st.sampled_from(["fixed:9", "around:50:0.3", "lognormal:20:1.5", "azure-code", "azure-conv"]),
    st.integers(1, 40),
    st.integers(0, 2**70),
)
def test_synthetic_is_reproducible_and_valid(lengths: str, n: int, seed: int) -> None:
    workload = synthetic(lengths, "azure-conv", n, seed)
    assert workload == synthetic(lengths, "azure-conv", n, seed)
    assert [request.id for request in workload.requests] == [str(i) for i in range(n)]
    for request in workload.requests:
        assert type(request.prompt_tokens) is type(request.output_tokens) is int
        assert 1 <= request.prompt_tokens <= MAX_TOKENS
        assert 1 <= request.output_tokens <= MAX_TOKENS
    assert not workload.has_arrivals
    json.dumps(workload.source)


def test_streams_are_independent() -> None:
    first, second = (
        synthetic("azure-code", "azure-code", 2000, 3),
        synthetic("fixed:5", "azure-code", 2000, 3),
    )
    outputs = [request.output_tokens for request in first.requests]
    assert outputs == [request.output_tokens for request in second.requests]
    prompts = [request.prompt_tokens for request in first.requests]
    ranks = np.argsort(np.argsort(prompts)), np.argsort(np.argsort(outputs))
    assert abs(np.corrcoef(*ranks)[0, 1]) < 0.1
    assert outputs != [
        request.output_tokens for request in synthetic("fixed:5", "azure-code", 2000, 4).requests
    ]


@pytest.mark.parametrize(
    ("n", "seed", "message"),
    [
        (0, 0, "number of requests: expected a positive integer, got 0"),
        (True, 0, "number of requests: expected a positive integer, got True"),
        (2.0, 0, "number of requests: expected a positive integer, got 2.0"),
        (10**8, 0, "number of requests: expected at most 10000000, got 100000000"),
        (1, -1, "seed: expected a non-negative integer, got -1"),
    ],
)
def test_wrong_counts_and_seeds(n: int, seed: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        synthetic("fixed:1", "fixed:1", n, seed)
    assert str(caught.value) == message


def test_the_tables_are_well_formed() -> None:
    assert list(LEVELS) == sorted(set(LEVELS))
    assert (LEVELS[0], LEVELS[-1]) == (0.0, 1.0)
    for shape in QUANTILES.values():
        for values in shape.values():
            assert len(values) == len(LEVELS)
            assert list(values) == sorted(values)


@pytest.mark.traces
@pytest.mark.parametrize("kind", ["code", "conv"])
@pytest.mark.parametrize(("role", "field"), [("prompt", "ContextTokens"), ("output", "GeneratedTokens")])
def test_the_tables_come_from_the_traces(traces_dir: Path, kind: str, role: Role, field: str) -> None:
    path = traces_dir / f"AzureLLMInferenceTrace_{kind}.csv"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {traces_dir}")
    with path.open(newline="") as file:
        real = np.array([int(row[field]) for row in csv.DictReader(file)])
    table = QUANTILES[f"azure-{kind}"][role]
    assert np.rint(np.quantile(real, LEVELS)).astype(int).tolist() == list(table)
    drawn = _draw(f"azure-{kind}", 200_000, role)
    assert drawn.mean() == pytest.approx(real.mean(), rel=0.03)
    assert drawn.min() >= real.min()
    assert drawn.max() <= real.max()

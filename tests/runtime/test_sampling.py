"""Sampling against float64 references: what may be drawn, how often, and that a row stands alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

torch = pytest.importorskip("torch")

from neo.core.errors import InputError, NeoError  # noqa: E402
from neo.runtime.sampling import (  # noqa: E402
    Sampler,
    SamplerState,
    SamplingError,
    SamplingParams,
    TokenLogprobs,
    maxima_in_parts,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def state(
    vocab: int, request_seed: int = 0, prompt: Any = (), tokens: Any = (), **params: Any
) -> SamplerState:
    made = SamplerState(SamplingParams(**{"max_tokens": 10_000, **params}), prompt, vocab, request_seed)
    for token in tokens:
        made.append(token)
    return made


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> Any:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((scale * rng.standard_normal((rows, vocab))).astype(np.float32))


def one(logits: Any, of: SamplerState) -> int:
    return Sampler(of.vocab).sample(torch.as_tensor(logits).reshape(1, -1), [of])[0][0]


def many(logits: Any, count: int, **params: Any) -> Any:
    """Tokens of `count` requests of different seeds from the same logits, as often as each token came."""
    vocab = len(logits)
    states = [state(vocab, seed, **params) for seed in range(count)]
    tokens, _ = Sampler(vocab).sample(logits.expand(count, vocab), states)
    return np.bincount(tokens, minlength=vocab)


def reference(
    logits: Any, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Any, float]:
    """Probabilities in float64, and how near a cumulative sum came to `top_p`, or a share to `min_p`."""
    x = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-x, kind="stable")
    p = np.exp(x[order] - x.max())
    if top_k > 0:
        p[top_k:] = 0
    p /= p.sum()
    near = [1.0]
    if top_p < 1:
        sums = np.cumsum(p)
        near.append(np.abs(sums - top_p).min())
        p[np.searchsorted(sums, top_p) + 1 :] = 0
    if min_p > 0:
        near.append(np.abs(p / p[0] - min_p).min())
        p[p < min_p * p[0]] = 0
    found = np.empty_like(p)
    found[order] = p / p.sum()
    return found, min(near)


def assert_drawn_from(counts: Any, probabilities: Any) -> None:
    assert not counts[probabilities == 0].any()
    expected = probabilities * counts.sum()
    common = expected >= 5  # the usual rule for chi-square; the rare ones are one class
    seen = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] < 5:
        seen, wanted = seen[:-1], wanted[:-1]
    if len(wanted) > 1:
        statistic = ((seen - wanted) ** 2 / wanted).sum()
        assert stats.chi2.sf(statistic, len(wanted) - 1) > 1e-4


# -- what is drawn ----------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.12},
    ],
    ids=str,
)
def test_draws_follow_the_exact_probabilities(params: dict[str, Any]) -> None:
    logits = random_logits(1, 40, seed=3)[0]
    assert_drawn_from(many(logits, 20_000, **params), reference(logits, **params)[0])


def test_draws_of_one_request_follow_the_probabilities_too() -> None:
    logits = random_logits(1, 12, seed=5)
    request = state(12, seed=9)
    for _ in range(5_000):
        request.append(one(logits, request))
    assert_drawn_from(np.bincount(request.tokens, minlength=12), reference(logits[0])[0])
    pairs = np.bincount(np.array(request.tokens[:-1:2]) * 12 + np.array(request.tokens[1::2]), minlength=144)
    p = reference(logits[0])[0]
    assert_drawn_from(pairs, np.outer(p, p).ravel())  # successive draws are independent


@given(
    vocab=st.integers(2, 30),
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(-1, 35),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 0.9]),
)
@settings(max_examples=60)
def test_the_support_is_exact(
    vocab: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(1, vocab, seed, scale=1.0)[0]
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    probabilities, near = reference(logits, **params)
    if near < 1e-5:
        return  # float32 may fall on either side
    drawn = many(logits, 600, **params) > 0
    assert not drawn[probabilities == 0].any()
    assert drawn[probabilities > 0.03].all()  # missed by chance with probability 1e-8 each


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_p": 0.5}, 5),  # equals are taken by token id until the mass is there
        ({"top_k": 3}, 3),
        ({"top_k": 8, "top_p": 0.5}, 4),  # half of the eight that top_k leaves
        ({"min_p": 1.0}, 10),
        ({"top_p": 1e-300}, 1),
    ],
    ids=str,
)
def test_equal_logits_are_kept_by_token_id(params: dict[str, Any], kept: int) -> None:
    drawn = many(torch.zeros(10), 500, **params) > 0
    assert drawn.tolist() == [i < kept for i in range(10)]


def test_equals_at_the_edge_of_the_support_are_each_drawn() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.0])
    drawn = many(logits, 4000, top_k=3)
    p = np.array([math.e, 0, math.e**2, math.e, 0, 0])
    assert_drawn_from(drawn, p / p.sum())


def test_greedy_takes_the_first_of_the_most_likely(device: str) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-9.0, -8.0, -math.inf, -8.0]])
    for params in ({"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-9}):
        states = [state(4, seed, **params) for seed in range(3)]
        assert Sampler(4).sample(logits.to(device), states) == ([1, 0, 1], [None] * 3)


@pytest.mark.parametrize("temperature", [2e-5, 0.01, 1e30, 1e300])
def test_extreme_temperatures_and_logits_do_not_overflow(temperature: float) -> None:
    logits = torch.tensor([3e38, -3e38, 2.9e38, -math.inf])
    drawn = many(logits, 300, temperature=temperature)
    assert drawn[3] == 0
    if temperature < 1:
        assert drawn[0] == 300
    if temperature > 1e299:
        assert drawn[:3].sum() == 300


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.999999}, {"min_p": 1e-9}], ids=str)
def test_the_outermost_draws_do_not_leave_the_support(params: dict[str, Any], device: str) -> None:
    never = -math.inf
    logits = torch.tensor([[never, never, 0.0, 1.0, never, 0.5, never]], device=device)
    for uniform in (0.0, 1.0 - 2.0**-53):
        request = state(7, **params)
        request.uniform = lambda u=uniform: u  # type: ignore[method-assign]
        assert Sampler(7).sample(logits, [request])[0][0] in (2, 3, 5)


def test_a_vocabulary_of_one() -> None:
    assert one([[0.3]], state(1, top_p=0.5, top_k=5)) == 0
    assert one([[-5.0]], state(1)) == 0


# -- penalties, bias, barred tokens ----------------------------------


@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, 11), max_size=12),
    output=st.lists(st.integers(0, 11), max_size=150),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.6, -1.0]),
    frequency=st.sampled_from([0.0, 0.4, -2.0]),
    bias=st.dictionaries(st.integers(0, 11), st.floats(-5, 5), max_size=4),
)
@settings(max_examples=80)
def test_penalties_and_bias_are_those_of_the_reference(
    seed: int,
    prompt: list[int],
    output: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> None:
    logits = random_logits(1, 12, seed)
    x = logits[0].numpy().astype(np.float64)
    for token, value in bias.items():
        x[token] += value
    for token in {*prompt, *output}:
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(output):
        x[token] -= frequency * output.count(token) + presence
    params = {
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "logit_bias": bias,
    }
    ordered = np.sort(x)
    if ordered[-1] - ordered[-2] > 1e-4:
        assert one(logits, state(12, 0, prompt, output, temperature=0.0, **params)) == x.argmax()
    # What was drawn tells the probabilities only roughly; the draw itself tells them to the last digits.
    request = state(12, seed, prompt, output, **params)
    p = np.exp(x - x.max())
    sums = np.cumsum(p / p.sum())
    if np.abs(sums - request.uniform()).min() > 1e-5:
        assert one(logits, request) == np.searchsorted(sums, request.uniform(), side="right")


def test_end_and_stop_tokens_are_barred_before_min_tokens() -> None:
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(2,))
    request = SamplerState(params, [], 4, 0, eos_token_ids=(3, 700))
    logits, seen = torch.tensor([[0.0, 1.0, 3.0, 4.0]]), []
    for _ in range(3):
        seen.append(one(logits, request))
        request.append(seen[-1])
    assert seen == [1, 1, 3]


@pytest.mark.parametrize("vocab", [1, 2, 7, 512, 1021, 1024, 128256 // 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maxima_in_two_rounds_are_those_of_one(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[3, vocab // 2] = torch.nan
    best, tokens = maxima_in_parts(logits)
    assert torch.equal(best.nan_to_num(99.0), logits.max(-1).values.nan_to_num(99.0))
    assert torch.equal(
        logits.gather(1, tokens.unsqueeze(1)).squeeze(1).nan_to_num(99.0), best.nan_to_num(99.0)
    )


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(3, 50)
    before = logits.clone()
    states = [
        state(50, 1, [4], [5], repetition_penalty=2.0, logit_bias={3: 9}, top_p=0.4, logprobs=3)
        for _ in range(3)
    ]
    Sampler(50).sample(logits, states)
    assert torch.equal(logits, before)


# -- rows and seeds ----------------------------------

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 20, "logprobs": 3},
    {"temperature": 1.4, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0.0, "frequency_penalty": 0.5, "presence_penalty": -0.5},
    {"temperature": 5.0, "top_k": 700, "top_p": 0.95, "seed": 11, "logit_bias": {5: 3.0}},
    {"min_tokens": 3, "stop_token_ids": (1, 2), "logprobs": 0},
]


@pytest.mark.parametrize("vocab", [37, 1001])
def test_a_row_alone_gives_what_it_gives_in_any_batch(vocab: int, device: str) -> None:
    rng = np.random.default_rng(1)
    count = 40
    logits = random_logits(count, vocab, seed=2).to(device)
    logits[::3] = logits[::3].half().float()  # coarse, so that there are equals

    def fresh() -> list[SamplerState]:
        kinds = [KINDS[i % len(KINDS)] for i in range(count)]
        return [state(vocab, i, [i % vocab, 3, 3], [1, 2, i % vocab], **k) for i, k in enumerate(kinds)]

    states, sampler = fresh(), Sampler(vocab)
    whole, whole_logprobs = sampler.sample(logits, states)
    assert (whole, whole_logprobs) == sampler.sample(logits, fresh())
    for i in range(count):
        assert sampler.sample(logits[i : i + 1], [states[i]]) == ([whole[i]], [whole_logprobs[i]])
    some = rng.permutation(count)[:11].tolist()
    assert sampler.sample(logits[some], [states[i] for i in some])[0] == [whole[i] for i in some]
    strided = torch.zeros(count, vocab + 5, device=device)
    strided[:, :vocab] = logits
    assert sampler.sample(strided[:, :vocab], states)[0] == whole


def test_a_seed_gives_its_tokens_again_and_other_seeds_give_others() -> None:
    logits = random_logits(30, 500, scale=0.5)

    def tokens(**params: Any) -> list[int]:
        request = state(500, **params)
        for row in logits:
            request.append(one(row, request))
        return request.tokens

    assert tokens(seed=5) == tokens(seed=5)
    assert len({tuple(tokens(seed=s)) for s in (*range(20), -1, 2**63, -(2**62))}) == 23
    by_caller = SamplerState(SamplingParams(seed=7), [], 500, request_seed=1)
    assert by_caller.uniform() == state(500, 7).uniform() != state(500, 1).uniform()


def test_sampling_twice_without_appending_gives_the_same() -> None:
    logits, request = random_logits(1, 500), state(500, 3)
    assert one(logits, request) == one(logits, request)
    assert request.tokens == []


def test_random_numbers_are_uniform_over_seeds_and_positions() -> None:
    over_seeds = [state(2, seed).uniform() for seed in range(3000)]
    request, over_positions = state(2, 1), []
    for _ in range(3000):
        over_positions.append(request.uniform())
        request.append(0)
    for numbers in (over_seeds, over_positions):
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06


def test_an_empty_batch() -> None:
    assert Sampler(5).sample(torch.zeros(0, 5), []) == ([], [])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4\), must be \(1, 5\)"):
        Sampler(5).sample(torch.zeros(1, 4), [state(5)])
    with pytest.raises(ValueError, match="must be from 1"):
        Sampler(0)


# -- log-probabilities ----------------------------------


def test_logprobs_are_those_of_the_raw_logits(device: str) -> None:
    vocab, asked = 300, [0, 1, 5, 64, None, 3]
    logits = random_logits(len(asked), vocab, seed=8, scale=4.0)
    exact = logits.double().log_softmax(-1).numpy()
    states = [
        state(vocab, i, [7, 8], [7, 9], logprobs=n, temperature=2.0, top_p=0.9, repetition_penalty=1.5)
        for i, n in enumerate(asked)
    ]
    tokens, found = Sampler(vocab).sample(logits.to(device), states)
    for row, (token, n, got) in enumerate(zip(tokens, asked, found, strict=True)):
        if n is None:
            assert got is None
            continue
        assert got is not None
        order = np.argsort(-exact[row], kind="stable")
        assert got.token_logprob == pytest.approx(exact[row, token], abs=1e-5)
        assert got.rank == order.tolist().index(token) + 1
        assert [t for t, _ in got.top] == order[:n].tolist()
        assert [p for _, p in got.top] == pytest.approx(exact[row, order[:n]].tolist(), abs=1e-5)


def test_ranks_and_tops_of_equals() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0]])
    _, (found,) = Sampler(6).sample(logits, [state(6, temperature=0.0, logprobs=4)])
    assert isinstance(found, TokenLogprobs)
    assert (found.rank, [t for t, _ in found.top]) == (1, [1, 2, 4, 0])
    _, (found,) = Sampler(6).sample(logits, [state(6, temperature=0, logprobs=20, logit_bias={5: 50})])
    assert isinstance(found, TokenLogprobs)
    assert (found.rank, len(found.top)) == (4, 6)


# -- what is refused ----------------------------------


@pytest.mark.parametrize("params", KINDS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution_are_named(params: dict[str, Any], bad: float, device: str) -> None:
    logits = random_logits(4, 30)
    logits[1] = bad
    logits[3, 17] = math.nan
    states = [state(30, i, [1], [2], **params) for i in range(4)]
    with pytest.raises(SamplingError, match="from rows 1, 3: its logits hold NaN") as caught:
        Sampler(30).sample(logits.to(device), states)
    assert caught.value.row == 1
    assert caught.value.rows == (1, 3)
    assert isinstance(caught.value, NeoError)
    good = [states[0], states[2]]
    assert len(Sampler(30).sample(logits[[0, 2]].to(device), good)[0]) == 2


def test_a_row_in_which_everything_is_barred_is_named() -> None:
    params = SamplingParams(min_tokens=1, stop_token_ids=(0, 1))
    with pytest.raises(SamplingError, match="row 1: nothing finite is left after bias"):
        Sampler(2).sample(torch.zeros(2, 2), [state(2), SamplerState(params, [], 2, 0)])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens is 0, must be an integer of at least 1"),
        ("max_tokens", 1.5, "max_tokens is 1.5, must be an integer"),
        ("max_tokens", True, "max_tokens is True"),
        ("min_tokens", 17, r"min_tokens is 17, must be an integer from 0 to max_tokens \(16\)"),
        ("temperature", -0.1, "temperature is -0.1, must be a finite number of at least 0"),
        ("temperature", math.nan, "temperature is nan"),
        ("temperature", math.inf, "temperature is inf"),
        ("temperature", 10**400, "temperature is 1000"),
        ("temperature", "hot", "temperature is 'hot'"),
        ("top_k", -2, "top_k is -2, must be an integer of at least -1"),
        ("top_p", 0.0, "top_p is 0.0, must be a number above 0 and at most 1"),
        ("top_p", 1.01, "top_p is 1.01"),
        ("min_p", -0.1, "min_p is -0.1, must be a number from 0 to 1"),
        ("min_p", 1.1, "min_p is 1.1"),
        ("repetition_penalty", 0.0, "repetition_penalty is 0.0, must be a number from 0.01 to 100"),
        ("presence_penalty", 2.1, "presence_penalty is 2.1, must be a number from -2 to 2"),
        ("frequency_penalty", -2.1, "frequency_penalty is -2.1"),
        ("seed", 2**64, "seed is 18446744073709551616"),
        ("seed", 1.0, "seed is 1.0"),
        ("logprobs", 65, "logprobs is 65, must be an integer from 0 to 64"),
        ("logprobs", -1, "logprobs is -1"),
        ("stop_token_ids", "12", "stop_token_ids is '12', must be a list"),
        ("stop_token_ids", (3, -1), "stop_token_ids: an entry is -1"),
        ("ignore_eos", 1, "ignore_eos is 1, must be true or false"),
        ("logit_bias", [1], r"logit_bias is \[1\], must map"),
        ("logit_bias", {"5": 1.0}, "logit_bias: a token id is '5'"),
        ("logit_bias", {5: 101}, "logit_bias of token 5 is 101, must be a number from -100 to 100"),
        ("logit_bias", {5: math.nan}, "logit_bias of token 5 is nan"),
    ],
)
def test_parameters_out_of_range_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("params", "prompt", "message"),
    [
        ({"stop_token_ids": (4, 5)}, [], "stop_token_ids: token 5 is not in the vocabulary of 5"),
        ({"logit_bias": {9: 1.0}}, [], "logit_bias: token 9"),
        ({"repetition_penalty": 1.1}, [0, -1], "prompt: token -1"),
    ],
)
def test_tokens_outside_the_vocabulary_are_named(
    params: dict[str, Any], prompt: list[int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        SamplerState(SamplingParams(**params), prompt, 5, 0)
    with pytest.raises(ValueError, match="token 5 is not"):
        state(5).append(5)


def test_parameters_compare_and_hash_and_keep_no_reference() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias, stop_token_ids=[7])  # type: ignore[arg-type]
    bias[4] = 2.0
    assert params == SamplingParams(logit_bias={3: 1.0}, stop_token_ids=(7,))
    assert hash(params) == hash(SamplingParams(logit_bias={3: 1.0}, stop_token_ids=(7,)))

"""The engine's loop: who comes, who leaves and when, what comes out and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the engine needs torch")

import torch
from engine_builders import VOCAB, Collected, add, make_engine, prompt_of, run, tiny_model, watch
from support import ToyCost
from torch.nn.functional import scaled_dot_product_attention

from neo.core.errors import InputError
from neo.core.plan import KVMove, PrefillChunk, StepPlan, SubBatch
from neo.core.request import FinishReason, State, Tier
from neo.policy.gpu_only import GpuOnly
from neo.policy.registry import load_policy
from neo.runtime.engine import Engine
from neo.runtime.errors import EngineError
from neo.runtime.model import Model
from neo.runtime.sampling_params import SamplingParams

AHEAD = pytest.mark.parametrize("ahead", [False, True])
ABORT, LENGTH, STOP = FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP


@cache
def model() -> Model:
    return tiny_model()


Make = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[Make]:
    """Engines of a policy, by name or as an object; closed at the end of the test."""
    made: list[Engine] = []

    def engine(policy: Any = "gpu-only", **more: Any) -> Engine:
        found = load_policy(policy, {}) if isinstance(policy, str) else policy
        made.append(make_engine(model(), found, **{"gpu": 40, "cpu": 40, "cost": ToyCost(cpu=0.02), **more}))
        return made[-1]

    yield engine
    for each in made:
        each.close()


def greedy(make: Make, prompt: list[int], tokens: int) -> list[int]:
    """What a prompt gives on an engine of its own."""
    engine = make()
    add(engine, "alone", prompt, tokens)
    return run(engine).tokens["alone"]


def empty(engine: Engine) -> bool:
    """Whether nobody holds any memory."""
    engine.check_integrity()
    return not any(pool.used for pool in engine.scheduler.view.pools.values())


# -- coming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ([], 4, "request 'x': the prompt is empty"),
        ([5, VOCAB], 4, f"request 'x': token {VOCAB} is not in the vocabulary of {VOCAB}"),
        ([-1], 4, "request 'x': token -1 is not in the vocabulary"),
        ([5] * 60, 5, "request 'x': 60 prompt tokens and 5 to generate are more than max_model_len = 64"),
    ],
)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    make: Make, prompt: list[int], tokens: int, message: str
) -> None:
    engine = make(max_model_len=64)
    with pytest.raises(InputError, match=message):
        add(engine, "x", prompt, tokens)
    assert not engine.has_work
    assert engine.step() == []
    add(engine, "x", [5] * 60, 4)
    assert run(engine).reasons == {"x": LENGTH}


def test_stop_tokens_outside_the_vocabulary_are_refused(make: Make) -> None:
    engine = make()
    with pytest.raises(InputError, match=f"stop_token_ids: token {VOCAB} is not in the vocabulary"):
        add(engine, "x", [5], 4, stop_token_ids=(VOCAB,))
    assert not engine.has_work


def test_an_id_is_free_again_when_its_request_has_ended(make: Make) -> None:
    engine = make()
    add(engine, "a", prompt_of(5), 3)
    with pytest.raises(InputError, match="request id 'a' is already in use"):
        add(engine, "a", prompt_of(6), 3)
    first = run(engine)
    add(engine, "a", prompt_of(5), 3)
    assert run(engine).tokens == first.tokens


def test_policies_see_arrival_and_priority(make: Make) -> None:
    seen: dict[str, tuple[float, int]] = {}

    class Looks(GpuOnly):
        def plan(self, view: Any, cost: Any) -> StepPlan:
            seen.update({r.id: (r.arrival_s, r.priority) for r in view.waiting})
            return super().plan(view, cost)

    engine = make(Looks())
    params = SamplingParams(max_tokens=1)
    engine.add("late", [5], params, arrival_s=0.25, priority=7)
    before = engine.clock()
    engine.add("now", [5], params)
    run(engine)
    assert seen["late"] == (0.25, 7)
    assert before <= seen["now"][0] <= engine.clock()
    assert seen["now"][1] == 0


def test_a_request_that_fits_nowhere_ends_with_the_numbers(make: Make) -> None:
    engine = make(gpu=3)
    add(engine, "big", prompt_of(100), 5)
    add(engine, "small", prompt_of(5), 2)
    found = run(engine)
    assert found.reasons == {"big": FinishReason.REJECTED, "small": LENGTH}
    assert "13 KV blocks" in found.details["big"]
    assert "big" not in found.tokens


# -- leaving ------------------------------------------------------------------------------------------------


class Park(GpuOnly):
    """Brings a request to where it is wanted, and leaves it there while others run."""

    def __init__(self, state: str) -> None:
        super().__init__()
        self.state = state

    def plan(self, view: Any, cost: Any) -> StepPlan:
        target = view.requests.get("target")
        plan = super().plan(view, cost)
        if target is None or self.state == "decode on the GPU":
            return plan
        others = SubBatch(
            tuple(c for b in plan.batches for c in b.prefill if c.request is not target),
            tuple(r for r in view.gpu_decodes if r is not target),
        )
        if self.state == "waiting":
            return StepPlan((others,)) if others.sequences else StepPlan()
        if self.state == "prefill":
            if target.state is State.WAITING:
                return StepPlan((SubBatch((PrefillChunk(target, 0, 5),), others.gpu_decode),))
            return StepPlan((others,))
        if target.state is State.DECODE and target.tier is Tier.GPU:
            return StepPlan((others,), (KVMove(target, Tier.CPU),))
        if target.tier is Tier.CPU and self.state == "decode on the CPU":
            return StepPlan((SubBatch(others.prefill, others.gpu_decode, (target,)),))
        return plan if target.tier is None else StepPlan((others,))


STATES = ("waiting", "prefill", "decode on the GPU", "decode on the CPU", "on the host, without a role")


@AHEAD
@pytest.mark.parametrize("inside", [False, True], ids=["between steps", "while a step runs"])
@pytest.mark.parametrize("state", STATES)
def test_abort_in_every_state(make: Make, state: str, inside: bool, ahead: bool) -> None:
    """It ends once, with a prefix of its tokens; its memory is free, and the other does not notice."""
    prompts = {"other": prompt_of(9), "target": prompt_of(21)}
    expected = {name: greedy(make, prompt, 14) for name, prompt in prompts.items()}
    engine = make(Park(state), ahead=ahead)
    add(engine, "other", prompts["other"], 14)
    found = Collected()
    found.take(engine.step())
    add(engine, "target", prompts["target"], 14)
    for _ in range(5):
        found.take(engine.step())
    target = engine.scheduler.view.requests["target"]
    where = {"waiting": State.WAITING, "prefill": State.PREFILL}.get(state, State.DECODE)
    assert target.state is where
    assert (target.tier is Tier.CPU) is ("CPU" in state or "host" in state)
    told: list[bool] = []

    def abort(_plan: Any = None) -> None:
        if not told:
            told.extend([engine.abort("target"), engine.abort("target")])

    if inside:
        watch(engine, abort)
        found.take(engine.step())
    else:
        abort()
    assert told[0] is True
    assert told[1] is False or state == "waiting", "who is on its way out cannot be aborted again"
    found = run(engine, found=found)
    assert engine.abort("target") is False
    assert found.reasons == {"other": LENGTH, "target": ABORT}
    assert found.tokens["other"] == expected["other"]
    got = found.tokens.get("target", [])
    assert got == expected["target"][: len(got)]
    assert len(got) < 14
    assert empty(engine)


def test_abort_of_a_stranger(make: Make) -> None:
    engine = make()
    assert engine.abort("nobody") is False
    add(engine, "a", [5], 2)
    run(engine)
    assert engine.abort("a") is False


def test_a_reason_for_leaving_is_kept(make: Make) -> None:
    engine = make()
    add(engine, "a", [5], 9)
    engine.step()
    engine.abort("a", FinishReason.TIMEOUT)
    (output,) = engine.step()
    assert (output.request_id, output.token, output.finish_reason) == ("a", None, FinishReason.TIMEOUT)


@AHEAD
def test_stop_tokens_end_a_request_with_them(make: Make, ahead: bool) -> None:
    prompt = prompt_of(13, 2)
    tokens = greedy(make, prompt, 20)
    at = next(i for i in range(4, 20) if tokens.index(tokens[i]) == i)
    engine = make(ahead=ahead, eos_token_ids=(tokens[at],))
    add(engine, "stop", prompt, 20, stop_token_ids=(tokens[at],))
    add(engine, "eos", prompt, 20, ignore_eos=False)
    add(engine, "deaf", prompt, 20)
    add(engine, "both at once", prompt, at + 1, stop_token_ids=(tokens[at],))
    add(engine, "not yet", prompt, 20, stop_token_ids=(tokens[0], tokens[at]), min_tokens=1)
    add(engine, "shorter", prompt, at)
    found = run(engine)
    cut = tokens[: at + 1]
    assert found.tokens["stop"] == found.tokens["eos"] == found.tokens["both at once"] == cut
    assert found.tokens["deaf"] == tokens
    assert found.tokens["shorter"] == tokens[:at]
    assert found.tokens["not yet"][0] != tokens[0]
    reasons = {name: found.reasons[name] for name in ("stop", "eos", "deaf", "both at once", "shorter")}
    assert reasons == {"stop": STOP, "eos": STOP, "deaf": LENGTH, "both at once": STOP, "shorter": LENGTH}
    assert empty(engine)


# -- what comes out -----------------------------------------------------------------------------------------


def test_a_step_tells_of_each_request_once_tokens_first(make: Make) -> None:
    engine = make()
    for i in range(4):
        add(engine, f"r{i}", prompt_of(6, i), 3 if i == 1 else 6)
    first = engine.step()
    assert [o.request_id for o in first] == ["r0", "r1", "r2", "r3"]
    engine.step()
    engine.abort("r2")
    add(engine, "late", prompt_of(4), 6)
    engine.abort("late")
    outputs = engine.step()
    assert [(o.request_id, o.token is None, o.finish_reason) for o in outputs] == [
        ("r0", False, None),
        ("r1", False, LENGTH),
        ("r3", False, None),
        ("r2", True, ABORT),
        ("late", True, ABORT),
    ]


POLICIES = ("gpu-only", "neo", "fastdecode")


@pytest.mark.parametrize("policy", POLICIES)
def test_planning_ahead_changes_no_token(make: Make, policy: str) -> None:
    """Sampled ones with stops, in memory that is too small, with requests that come and go."""
    found = []
    for ahead in (False, True):
        engine = make(policy, ahead=ahead, gpu=14, cpu=50)
        got = Collected()
        for i in range(16):
            stops = tuple(range(3, VOCAB, 11)) if i % 3 == 0 else ()
            add(
                engine, f"r{i}", prompt_of(3 + 2 * i, i), 4 + i, temperature=0.9, seed=i, stop_token_ids=stops
            )
            if i % 2:
                got.take(engine.step())
        found.append(run(engine, found=got))
        assert empty(engine)
    plain, ahead_of = found
    assert plain.tokens == ahead_of.tokens
    assert plain.reasons == ahead_of.reasons
    assert {STOP, LENGTH} == set(plain.reasons.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_gives_its_tokens_in_any_company(make: Make, policy: str) -> None:
    alone, crowd = make(policy), make(policy, gpu=14)
    params: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 42}
    add(alone, "x", prompt_of(17), 12, **params)
    for i in range(9):
        add(crowd, f"r{i}", prompt_of(5 + 3 * i, i), 10, temperature=1.3, seed=i)
    add(crowd, "x", prompt_of(17), 12, **params)
    add(crowd, "again", prompt_of(17), 12, **params)
    add(crowd, "another", prompt_of(17), 12, **{**params, "seed": 43})
    one, many = run(alone).tokens["x"], run(crowd).tokens
    assert one == many["x"] == many["again"]
    assert one != many["another"]


def test_requests_without_a_seed_differ_and_the_engines_seed_repeats_them(make: Make) -> None:
    found = []
    for seed in (5, 5, 6):
        engine = make(seed=seed)
        for name in ("a", "b"):
            add(engine, name, prompt_of(8), 12, temperature=1.5)
        found.append(run(engine).tokens)
    assert found[0]["a"] != found[0]["b"]
    assert found[0] == found[1]
    assert found[0] != found[2]


def reference_logits(tokens: list[int]) -> np.ndarray:
    """Logits [tokens, vocab] of the whole sequence at once: no cache, no batch, no engine."""
    with torch.inference_mode():
        m = model()
        rope, hidden = m.rope(torch.arange(len(tokens))), m.embed(torch.tensor(tokens))
        for layer in range(m.config.layers):
            q, k, v = (x.transpose(0, 1)[None] for x in m.pre(layer, hidden, rope))
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            hidden = m.post(layer, hidden, out[0].transpose(0, 1))
        return m.head(hidden).double().numpy()


@pytest.mark.parametrize("policy", POLICIES)
def test_logprobs_are_those_of_a_float64_softmax(make: Make, policy: str) -> None:
    """Of the model's own distribution: sampling bends what is drawn, never what is reported."""
    engine = make(policy, gpu=14, cpu=50)
    prompts = {f"r{i}": prompt_of(4 + 5 * i, i) for i in range(6)}
    for i, (name, prompt) in enumerate(prompts.items()):
        more = {"temperature": 0.8, "top_k": 20, "presence_penalty": 1.0} if i % 2 else {}
        add(engine, name, prompt, 9, logprobs=5, seed=i, **more)
    found = run(engine)
    for name, prompt in prompts.items():
        tokens = found.tokens[name]
        logits = reference_logits(prompt + tokens[:-1])[len(prompt) - 1 :]
        # Float32 logits agree to 1e-5 of the largest (docs/models.md); the softmax doubles that at most.
        close = 2e-5 * max(1.0, float(np.abs(logits).max()))
        exact = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        exact -= logits.max(-1, keepdims=True)
        for row, token, told in zip(exact, tokens, found.logprobs[name], strict=True):
            assert told.token_logprob == pytest.approx(row[token], abs=close)
            equals = int((abs(row - row[token]) < close).sum()) - 1  # whose order rounding may change
            assert abs(told.rank - 1 - int((row > row[token]).sum())) <= equals
            assert [p for _, p in told.top] == pytest.approx(sorted(row, reverse=True)[:5], abs=close)
            assert [row[t] for t, _ in told.top] == pytest.approx([p for _, p in told.top], abs=close)
    assert all(o is None for o in run_one(make).logprobs["x"]), "who asks for none gets none"


def run_one(make: Make) -> Collected:
    engine = make()
    add(engine, "x", [5, 6], 3)
    return run(engine)


# -- books --------------------------------------------------------------------------------------------------


def test_the_integrity_check_sees_a_block_too_few_and_a_block_too_many(make: Make) -> None:
    engine = make()
    add(engine, "a", prompt_of(20), 9)
    engine.step()
    engine.check_integrity()
    tables, pool = engine.executor.tables, engine.scheduler.view.pools[Tier.GPU]
    pool.take("a", 1)
    with pytest.raises(EngineError, match=r"gpu memory holds {'a': 9}, the scheduler accounts {'a': 10}"):
        engine.check_integrity()
    pool.release("a", 1)
    engine.check_integrity()
    tables.release("a")
    with pytest.raises(EngineError, match=r"gpu memory holds {}, the scheduler accounts {'a': 9}"):
        engine.check_integrity()


def test_an_engine_without_work_does_nothing(make: Make) -> None:
    engine = make()
    assert not engine.has_work
    assert [engine.step() for _ in range(3)] == [[], [], []]
    assert engine.steps == 0
    assert engine.last is None


# -- the page ----------------------------------------------------------------------------------------------


def test_the_example_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/engine.md").read_text(encoding="utf-8")
    (code,) = [b for b in page.split("```python\n")[1:] if "EngineConfig" in b]
    code = code.partition("```")[0]
    exec(code, {})
    assert capsys.readouterr().out == code.rpartition("# ")[2]

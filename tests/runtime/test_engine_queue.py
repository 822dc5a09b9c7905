"""Steps queued behind the one that runs: the same tokens, and nobody's end, abort or fault is lost."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

import torch
from engine_builders import add, make_engine, prompt_of, run, tiny_model
from exactness import Reference, ToFinish, reference_of, serve

from neo.core.plan import StepPlan
from neo.core.request import FinishReason
from neo.core.runlog import RunLog
from neo.policy.registry import load_policy
from neo.runtime.engine import Output
from neo.runtime.executor import Queueing, StepTimes
from neo.runtime.step_inputs import pending_token


class Queue:
    """A device that has its own copy of the latest tokens; the host sees a step's when it waits for its end.

    ``spoil``: called with the logits and requests of every step before tokens are chosen.
    """

    def __init__(
        self, inner: Any, spoil: Callable[[torch.Tensor, tuple[str, ...]], None] | None = None
    ) -> None:
        self.inner, self.tables, self.spoil = inner, inner.tables, spoil
        self.latest: dict[int, int] = {}
        self.running = 0
        self.queued = 0
        self.resolved = 0

    may_be_followed = True

    def start(
        self, plan: StepPlan, graph: Any, inputs: Any, copies: Any, sample: Any
    ) -> Callable[[], StepTimes]:
        self.queued += self.running
        self.running += 1
        assert self.running <= 2
        for batch in inputs.batches:
            for row, token in enumerate(batch.tokens.tolist()):
                if token < 0:
                    batch.tokens[row] = self.latest[pending_token(token)]
                    self.resolved += 1
        slots = [self.tables.slot(r) for r in inputs.sampled]

        def choose(logits: torch.Tensor, requests: tuple[str, ...]) -> None:
            if self.spoil is not None:
                self.spoil(logits, requests)
            tokens = sample(logits, requests)
            if tokens is not None:
                self.latest.update(zip(slots, tokens.tolist(), strict=True))

        times = self.inner.run(plan, graph, inputs, copies, choose)

        def wait() -> StepTimes:
            self.running -= 1
            return times

        return wait

    def run(self, *job: Any) -> StepTimes:
        return self.start(*job)()

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()

    def close(self) -> None:
        self.inner.close()


def queue_of(engine: Any) -> Queue:
    assert isinstance(engine.executor, Queue)
    assert isinstance(engine.executor, Queueing)
    return engine.executor


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of("llama", Path(tmp_path_factory.getbasetemp()) / "exactness")


@pytest.mark.parametrize("policy", ["gpu-only", "neo", "pie"])
@pytest.mark.parametrize("gpu", [14, 120])
def test_queued_steps_generate_what_transformers_does(reference: Reference, policy: str, gpu: int) -> None:
    engine = make_engine(reference.model, load_policy(policy, {}), gpu=gpu, cpu=60, ahead=True, wrap=Queue)
    serve(reference, engine, seed=5, abort=0.05)
    assert queue_of(engine).resolved > 20 or policy == "pie"


@pytest.mark.parametrize("seed", range(6))
def test_any_plan_does(reference: Reference, seed: int) -> None:
    engine = make_engine(reference.model, ToFinish(seed), gpu=16, cpu=40, ahead=True, wrap=Queue)
    serve(reference, engine, seed, abort=0.03)


SAMPLED = (
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 2},
    {"temperature": 0.9, "min_p": 0.05, "seed": 3},
    {"temperature": 0.0},
)


@pytest.mark.parametrize(
    "more", [{}, {"presence_penalty": 0.7}, {"logprobs": 2}], ids=["plain", "edited", "logprobs"]
)
def test_drawn_tokens_are_those_of_an_engine_that_waits(more: dict[str, Any]) -> None:
    found = []
    for wrap in (None, Queue):
        options = {"ahead": True, "wrap": wrap} if wrap else {}
        engine = make_engine(tiny_model(), load_policy("gpu-only", {}), gpu=60, **options)
        for i, params in enumerate(SAMPLED):
            extra = more if i == 1 else {}
            add(engine, f"r{i}", prompt_of(5 + i), 12, ignore_eos=True, **{**params, **extra})
        found.append(run(engine))
        if wrap:
            queue = queue_of(engine)
            assert (queue.resolved > 0) == (not more), "who must see the logits is waited for"
        engine.close()
    assert found[0].tokens == found[1].tokens
    assert found[0].logprobs == found[1].logprobs


def test_an_end_token_voids_what_was_queued_behind_it() -> None:
    probe = make_engine(tiny_model(), load_policy("gpu-only", {}), gpu=60)
    add(probe, "a", prompt_of(9), 12)
    tokens = run(probe).tokens["a"]
    at = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    engine = make_engine(
        tiny_model(), load_policy("gpu-only", {}), gpu=60, ahead=True, wrap=Queue, eos_token_ids=(tokens[at],)
    )
    add(engine, "a", prompt_of(9), 12, ignore_eos=False)
    add(engine, "b", prompt_of(4), 20)
    found = run(engine)
    assert found.tokens["a"] == tokens[: at + 1]
    assert found.reasons["a"] is FinishReason.STOP
    assert len(found.tokens["b"]) == 20
    engine.check_integrity()
    assert queue_of(engine).queued > 5


def test_a_request_without_numbers_ends_alone() -> None:
    def spoil(logits: torch.Tensor, requests: tuple[str, ...]) -> None:
        if "bad" in requests and seen.pop() == 0:
            logits[requests.index("bad")] = math.nan

    seen = [0, 0, 0, 0, 1, 1, 1]
    log = RunLog(io.StringIO(), {})
    engine = make_engine(
        tiny_model(), load_policy("gpu-only", {}), gpu=60, ahead=True, log=log, wrap=lambda e: Queue(e, spoil)
    )
    add(engine, "bad", prompt_of(6), 12)
    add(engine, "good", prompt_of(7), 12)
    found = run(engine)
    assert found.reasons == {"bad": FinishReason.ABORT, "good": FinishReason.LENGTH}
    assert len(found.tokens["bad"]) == 3
    assert "NaN" in found.details["bad"]
    engine.check_integrity()


@pytest.mark.parametrize("wrap", [None, Queue], ids=["waits", "queues"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_plain_step_is_told_as_ids_and_tokens_too(wrap: Any, ahead: bool) -> None:
    """Never less than its outputs; and always, where no row of a request that ended is in the step."""
    options = {"wrap": wrap} if wrap else {}
    engine = make_engine(tiny_model(), load_policy("gpu-only", {}), gpu=60, ahead=ahead, **options)
    add(engine, "first", prompt_of(5), 30)
    add(engine, "short", prompt_of(6), 6)
    add(engine, "shown", prompt_of(7), 12, logprobs=1)
    add(engine, "drawn", prompt_of(8), 20, temperature=0.9)
    add(engine, "gone", prompt_of(9), 30)
    plain = 0
    while engine.has_work:
        if engine.steps == 16:
            engine.abort("gone")
        outputs = engine.step()
        bare = all(o.token is not None and o.logprobs is None and o.finish_reason is None for o in outputs)
        if engine.plain is not None:
            plain += 1
            requests, tokens = engine.plain
            assert bare
            assert list(zip(requests, tokens, strict=True)) == [(o.request_id, o.token) for o in outputs]
        else:
            assert ahead or not (bare and outputs)
    assert 10 < plain < engine.steps - 12
    engine.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_brief_engine_brings_the_same_without_outputs_of_plain_steps(ahead: bool) -> None:
    """An end token, aborts, log-probabilities and ends come as ever; the twin says what is due."""
    engines = [make_engine(tiny_model(), load_policy("gpu-only", {}), gpu=60, ahead=ahead) for _ in range(2)]
    engine, twin = engines
    engine.brief = True
    for one in engines:
        add(one, "first", prompt_of(5), 30)
        add(one, "short", prompt_of(6), 6)
        add(one, "shown", prompt_of(7), 12, logprobs=1)
        add(one, "drawn", prompt_of(8), 20, temperature=0.9, seed=1)
        add(one, "gone", prompt_of(9), 30)
    bare = 0
    while twin.has_work:
        if twin.steps == 16:
            assert engine.abort("gone") == twin.abort("gone")
        outputs, due = engine.step(), twin.step()
        assert engine.plain == twin.plain
        if engine.plain is not None:
            assert outputs == []
            outputs = list(map(Output, *engine.plain))
            bare += 1
        assert outputs == due
    assert not engine.has_work
    assert bare > 10
    for one in engines:
        one.close()

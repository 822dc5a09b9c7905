"""The engine's greedy tokens are those of transformers' generate, whatever the scheduler does to the KV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

import torch
from engine_builders import Collected, add, make_engine, run
from model_builders import hf_generate, hf_model, save_tiny
from support import Chaos, ToyCost

from neo.core.record import Mode, RunRecord
from neo.core.request import FinishReason
from neo.policy.registry import load_policy
from neo.runtime.backend import backend
from neo.runtime.model import Model

LONGEST = 20  # tokens generated of each prompt
PROMPTS = 24


@dataclass(frozen=True)
class Reference:
    """A tiny model, prompts, and what transformers generates from each."""

    model: Model
    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return _reference(request.param, tmp_path_factory.getbasetemp() / "exactness")


@cache
def _reference(arch: str, folder: Path) -> Reference:
    path = save_tiny(folder / arch, arch, seed=7)
    rnd = Random(11)
    prompts = tuple(tuple(rnd.randrange(3, 128) for _ in range(rnd.randint(1, 60))) for _ in range(PROMPTS))
    torch.set_num_threads(1)  # a test's matrices are too small to be shared out
    hf = hf_model(path)
    tokens = tuple(tuple(hf_generate(hf, p, LONGEST)) for p in prompts)
    return Reference(Model.load(path), prompts, tokens)


def serve(ref: Reference, engine: Any, seed: int, abort: float = 0.0, most: int = 3000) -> Collected:
    """Requests come in a few at a time, with random lengths; some are aborted."""
    rnd, found = Random(seed), Collected()
    waiting = list(range(len(ref.prompts)))
    rnd.shuffle(waiting)
    lengths = {i: rnd.randint(1, LONGEST) for i in waiting}
    for _ in range(most):
        if not (waiting or engine.has_work):
            break
        for _ in range(rnd.randint(0, 3)):
            if waiting:
                i = waiting.pop()
                add(engine, str(i), ref.prompts[i], lengths[i])
        if rnd.random() < abort and (live := list(engine.scheduler.view.requests)):
            engine.abort(rnd.choice(live))
        found.take(engine.step())
        if not engine.options.ahead:
            engine.check_integrity()
    assert not engine.has_work
    engine.check_integrity()
    for tier in engine.scheduler.view.pools.values():
        assert tier.used == 0
    check(ref, lengths, found)
    engine.close()
    return found


def check(ref: Reference, lengths: dict[int, int], found: Collected) -> None:
    assert sorted(found.reasons) == sorted(str(i) for i in lengths)
    for i, length in lengths.items():
        reason, tokens = found.reasons[str(i)], tuple(found.tokens.get(str(i), ()))
        if reason is FinishReason.LENGTH:
            assert tokens == ref.tokens[i][:length], f"prompt {i} ({len(ref.prompts[i])} tokens)"
        else:
            assert reason is FinishReason.ABORT
            assert tokens == ref.tokens[i][: len(tokens)], f"aborted prompt {i}"


BUDGETS: dict[str, dict[str, Any]] = {
    "ample": {"gpu": 120, "cpu": 120},
    "tight": {"gpu": 14, "cpu": 60},
    "blocks of 16": {"gpu": 9, "cpu": 30, "limits": {"block_size": 16}},
    "tiny chunks": {"gpu": 14, "cpu": 60, "limits": {"max_batch_tokens": 9}},
    "planned ahead": {"gpu": 14, "cpu": 60, "ahead": True},
    "two kernel threads": {"gpu": 14, "cpu": 60, "threads": 2},
}
POLICIES = ("gpu-only", "neo", "fastdecode")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_generate_what_transformers_does(reference: Reference, policy: str, budget: str) -> None:
    record = RunRecord()
    # Fast CPU attention, so that offloading pays for the policies that weigh it.
    engine = make_engine(
        reference.model, load_policy(policy, {}), record=record, cost=ToyCost(cpu=0.02), **BUDGETS[budget]
    )
    serve(reference, engine, seed=5, abort=0.05)
    if policy == "fastdecode":
        assert set(record.columns.mode) & {Mode.CPU_SEQUENTIAL, Mode.PIPELINED}
    if policy == "gpu-only" and budget == "tight":
        assert record.preemptions


def test_neo_offloads_swaps_and_pipelines_here(reference: Reference) -> None:
    """Without this the test above could pass with everything on the GPU."""
    record = RunRecord()
    policy = load_policy("neo", {"eager": "true", "worth": "tokens"})
    engine = make_engine(reference.model, policy, gpu=14, cpu=60, record=record, cost=ToyCost(cpu=0.02))
    serve(reference, engine, seed=6)
    assert Mode.PIPELINED in set(record.columns.mode)
    assert record.bytes_d2h > 0
    assert record.bytes_h2d > 0


@pytest.mark.parametrize("seed", range(12))
def test_any_plan_that_keeps_the_rules_generates_the_same(reference: Reference, seed: int) -> None:
    """Random chunks, swaps of layer ranges, streams, evictions: all that the plan language can say."""
    engine = make_engine(reference.model, ToFinish(seed), gpu=16, cpu=40, ahead=seed % 3 == 2)
    serve(reference, engine, seed, abort=0.03)


class ToFinish(Chaos):
    """Random decisions that lead somewhere: eviction only drops so much work."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, staging_layers=1 + seed % 3)


@pytest.fixture
def torch_backend() -> Iterator[None]:
    made = backend("torch")
    assert made.note
    yield
    made.close()


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize("policy", POLICIES)
def test_without_the_library_torch_computes_the_same(reference: Reference, policy: str) -> None:
    engine = make_engine(
        reference.model, load_policy(policy, {}), gpu=14, cpu=60, kind="torch", cost=ToyCost(cpu=0.02)
    )
    serve(reference, engine, seed=8, abort=0.05)


def test_an_end_token_ends_a_request(reference: Reference) -> None:
    """Also one that was not foreseen when the next step was planned."""
    for ahead in (False, True):
        index = next(i for i, t in enumerate(reference.tokens) if t.index(t[5]) == 5)
        tokens = reference.tokens[index]
        engine = make_engine(
            reference.model, load_policy("neo", {}), ahead=ahead, eos_token_ids=(tokens[5],), gpu=30
        )
        add(engine, "stops", reference.prompts[index], 15, ignore_eos=False)
        add(engine, "goes on", reference.prompts[index], 15)
        found = run(engine)
        assert found.tokens == {"stops": list(tokens[:6]), "goes on": list(tokens[:15])}
        assert found.reasons == {"stops": FinishReason.STOP, "goes on": FinishReason.LENGTH}
        engine.check_integrity()
        engine.close()

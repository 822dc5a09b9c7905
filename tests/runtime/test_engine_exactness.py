"""The engine's greedy tokens are those of transformers' generate, whatever the scheduler does to the KV."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch", reason="the engine needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

from engine_builders import add, make_engine, run
from exactness import BUDGETS, Reference, ToFinish, reference_of, serve
from support import ToyCost

from neo.core.record import Mode, RunRecord
from neo.core.request import FinishReason
from neo.policy.registry import load_policy
from neo.runtime.backend import backend


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of(request.param, tmp_path_factory.getbasetemp() / "exactness")


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


@pytest.mark.parametrize("seed", range(6))
def test_relayed_decodes_generate_the_same(reference: Reference, seed: int) -> None:
    """A token takes a step more than there are layers, beside whatever else the steps do."""
    record = RunRecord()
    policy = ToFinish(seed, relays=0.9)
    engine = make_engine(reference.model, policy, gpu=16, cpu=60, ahead=seed % 2 == 1, record=record)
    serve(reference, engine, seed, abort=0.03)
    assert list(record.columns.mode).count(Mode.RELAYED) > 50


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

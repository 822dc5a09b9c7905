"""The engine on a GPU generates what transformers does, whatever the scheduler does to the KV."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

from engine_builders import make_engine
from exactness import BUDGETS, Reference, ToFinish, reference_of, serve
from support import ToyCost

from neo.core.record import Mode, RunRecord
from neo.policy.registry import load_policy
from neo.runtime.cuda_device import why_no_gpu
from neo.runtime.model import Model

pytestmark = pytest.mark.skipif(bool(why_no_gpu()), reason=why_no_gpu() or "a GPU is here")


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    on_cpu = reference_of(request.param, tmp_path_factory.getbasetemp() / "exactness")
    return replace(on_cpu, model=Model.load(on_cpu.folder, device="cuda"))


def engine_of(ref: Reference, policy: Any, **more: Any) -> Any:
    return make_engine(ref.model, policy, kind="cuda", **more)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "launches"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("policy", ["gpu-only", "neo", "fastdecode", "pie"])
def test_policies_generate_what_transformers_does(
    reference: Reference, policy: str, budget: str, graphs: bool
) -> None:
    engine = engine_of(
        reference, load_policy(policy, {}), cost=ToyCost(cpu=0.02), graphs=graphs, **BUDGETS[budget]
    )
    serve(reference, engine, seed=5, abort=0.05)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "launches"])
def test_neo_offloads_swaps_and_pipelines_here(reference: Reference, graphs: bool) -> None:
    record = RunRecord()
    policy = load_policy("neo", {"eager": "true", "worth": "tokens"})
    engine = engine_of(
        reference, policy, gpu=14, cpu=60, record=record, cost=ToyCost(cpu=0.02), graphs=graphs
    )
    serve(reference, engine, seed=6)
    assert Mode.PIPELINED in set(record.columns.mode)
    assert record.bytes_d2h > 0
    assert record.bytes_h2d > 0


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "launches"])
@pytest.mark.parametrize("seed", range(4))
def test_relayed_decodes_generate_the_same(reference: Reference, seed: int, graphs: bool) -> None:
    record = RunRecord()
    policy = ToFinish(seed, relays=0.9)
    engine = engine_of(reference, policy, gpu=16, cpu=60, ahead=seed % 2 == 1, record=record, graphs=graphs)
    serve(reference, engine, seed, abort=0.03)
    assert list(record.columns.mode).count(Mode.RELAYED) > 50


@pytest.mark.parametrize("seed", range(12))
def test_any_plan_that_keeps_the_rules_generates_the_same(reference: Reference, seed: int) -> None:
    """Random chunks, swaps of layer ranges, streams, evictions: all that the plan language can say."""
    engine = engine_of(
        reference, ToFinish(seed), gpu=16, cpu=40, ahead=seed % 3 == 2, slices_of=20 * (seed % 2)
    )
    serve(reference, engine, seed, abort=0.03)

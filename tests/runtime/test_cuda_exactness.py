"""The engine on a GPU generates what transformers does, whatever the scheduler does to the KV."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

from engine_builders import make_engine
from exactness import BUDGETS, Ferry, Reference, ToFinish, reference_of, serve
from support import ToyCost

from neo.core.graph import OpKind, Template
from neo.core.record import Mode, RunRecord
from neo.policy.registry import load_policy
from neo.runtime import cuda_operations
from neo.runtime.block_tables import Copies
from neo.runtime.cuda_copies import FixedCopies
from neo.runtime.cuda_device import why_no_gpu
from neo.runtime.cuda_operations import Operations
from neo.runtime.model import Model
from neo.runtime.warm import prepare_engine

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


@pytest.mark.parametrize("ahead", [False, True], ids=["alone", "ahead"])
@pytest.mark.parametrize("relays", [False, True], ids=["steps", "relays"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "launches"])
def test_decodes_whose_kv_moves_ahead_generate_the_same(
    reference: Reference, graphs: bool, relays: bool, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped out and in by turns, in steps without a chunk, which graphs replay with their copies."""
    moved, captured = set(), Operations.captured

    def watched(self: Operations, template: Template, *rest: Any) -> Any:
        moved.add(frozenset(template.kinds) & {OpKind.SWAP_IN, OpKind.SWAP_OUT})
        return captured(self, template, *rest)

    monkeypatch.setattr(Operations, "captured", watched)
    policy = Ferry(3, relays)
    engine = engine_of(reference, policy, gpu=30, cpu=90, ahead=ahead, graphs=graphs)
    serve(reference, engine, seed=8, abort=0.02)
    assert policy.moving > 60
    assert len(moved) == (4 if graphs else 0), "into it, out of it, both and neither"


def test_steps_that_move_more_than_lists_hold_are_launched(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between others that are replayed."""
    monkeypatch.setattr(cuda_operations, "FixedCopies", partial(FixedCopies, most=4))
    asked: list[tuple[int, bool]] = []
    fits = FixedCopies.fits

    def watched(self: FixedCopies, copies: Copies) -> bool:
        fit = fits(self, copies)
        asked.append((max(int(way.counts(3).max()) for way in (copies.swap_in, copies.swap_out)), fit))
        return fit

    monkeypatch.setattr(FixedCopies, "fits", watched)
    engine = engine_of(reference, Ferry(4, relays=True), gpu=30, cpu=90)
    serve(reference, engine, seed=9)
    assert all(fit == (blocks <= 4) for blocks, fit in asked)
    moving = [blocks for blocks, _ in asked if blocks]
    assert min(sum(blocks <= 4 for blocks in moving), sum(blocks > 4 for blocks in moving)) > 10


def test_steps_made_up_at_start_leave_nothing(reference: Reference) -> None:
    """Relayed tokens were given up half way, and their layers' channels count on."""
    engine = engine_of(reference, ToFinish(1, relays=0.9), gpu=16, cpu=60)
    prepare_engine(engine, reference.model.config.spec())
    tables = engine.executor.tables
    assert (tables.owners, engine.steps) == ((), 0)
    assert (tables.gpu.free, tables.cpu.free) == (tables.gpu.total, tables.cpu.total)
    serve(reference, engine, 1, abort=0.03)

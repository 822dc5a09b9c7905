"""What is done at start leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")

from engine_builders import add, make_engine, prompt_of, run, tiny_model, watch

from neo.core.plan import StepPlan, relay_rows
from neo.core.request import FinishReason
from neo.policy.registry import load_policy
from neo.runtime.warm import prepare_engine

QUIET = [("gpu-only", {}, {}), ("neo", {"relay": "false"}, {}), ("neo", {}, {"relay_rows": 0})]


@pytest.mark.parametrize(("policy", "options", "limits"), QUIET)
def test_steps_of_all_sizes_run_and_leave_nothing(
    policy: str, options: dict[str, str], limits: dict[str, int]
) -> None:
    """Of those who never relay none has relayed decodes."""
    model = tiny_model()
    engine = make_engine(model, load_policy(policy, options), gpu=12, limits=limits)
    executor: Any = watch(engine)
    executor.sizes = (1, 2, 4, 64)
    prepare_engine(engine, model.config.spec())
    sizes = [len(b.gpu_decode) for r in executor.ran for b in r.plan.batches]
    assert sizes == [0, 0, 4, 2, 1], "two chunks, then decodes from the most that fit down"
    assert sum(c.length for b in executor.ran[0].plan.batches for c in b.prefill) == 48
    engine.check_integrity()
    assert not engine.has_work
    assert engine.steps == 0
    add(engine, "a", prompt_of(9), 5)
    assert run(engine).reasons == {"a": FinishReason.LENGTH}


@pytest.mark.parametrize("layers", [1, 3])
def test_relayed_steps_are_those_of_the_midst_of_a_run(layers: int) -> None:
    """Some come back from the host and some leave, and in every second one a request is swapped in."""
    model = tiny_model(layers)
    engine = make_engine(model, load_policy("neo", {}), gpu=12, limits={"relay_rows": 4})
    executor: Any = watch(engine)
    executor.sizes = (1, 2, 4, 8)
    seen: list[tuple[int, int, bool, bool, int]] = []

    def before(plan: StepPlan) -> None:
        (batch,) = plan.batches
        if relayed := batch.relay_decode:
            there = {r.relay_layers for r in relayed}
            seen.append(
                (
                    relay_rows(relayed),
                    len(batch.gpu_decode),
                    bool(there - {0}),
                    bool(there - {layers}),
                    len(plan.moves),
                )
            )
            assert all(m.request in batch.gpu_decode for m in plan.moves)

    executor.before = before
    prepare_engine(engine, model.config.spec())
    shapes = [(4, 8), (4, 4), (2, 8), (2, 6), (2, 2), (1, 8), (1, 7), (1, 3), (1, 1)]
    usual = [(*shape, True, True, moves) for shape in shapes for moves in (0, 1)]
    assert set(seen) - set(usual) == {(4, 8, False, True, 0)}, "the first of all"
    assert set(usual) <= set(seen)
    assert len(seen) == len(usual) + 3, "a group of another size begins in a step like the one before"
    tables = engine.executor.tables
    assert tables.owners == ()
    assert (tables.gpu.free, tables.cpu.free) == (tables.gpu.total, tables.cpu.total)
    add(engine, "a", prompt_of(9), 5)
    assert run(engine).reasons == {"a": FinishReason.LENGTH}


@pytest.mark.parametrize("cpu", [0, 3, 4, 40])
def test_relayed_steps_fit_host_memory_and_are_bounded(cpu: int) -> None:
    model = tiny_model()
    engine = make_engine(model, load_policy("neo", {}), gpu=60, cpu=cpu, limits={"max_batch_tokens": 64})
    executor: Any = watch(engine)
    executor.sizes = tuple(range(1, 21))
    rows: set[int] = set()
    executor.before = lambda plan: rows.update(relay_rows(b.relay_decode) for b in plan.batches)
    prepare_engine(engine, model.config.spec())
    assert rows == {0: {0}, 3: {0}, 4: {0, 1}, 40: {0, 8, 4, 2}}[cpu], "no more than max_seqs, and most first"
    assert len(executor.ran) <= 2 + 96 + len(rows)


@pytest.mark.parametrize("policy", ["gpu-only", "neo"])
def test_tables_stay_where_graphs_of_the_first_steps_know_them(policy: str) -> None:
    """Slots of made-up requests are there again for the next step's: growing would void all graphs."""
    model = tiny_model()
    limits = {"max_seqs": 96, "max_batch_tokens": 128, "relay_rows": 32}
    engine = make_engine(model, load_policy(policy, {}), gpu=120, cpu=120, limits=limits)
    executor: Any = watch(engine)
    executor.sizes = (1, 48, 72, 96)
    shapes: set[tuple[int, ...]] = set()
    executor.before = lambda plan: shapes.add(engine.executor.tables.gpu.tables.shape)
    prepare_engine(engine, model.config.spec())
    assert len(executor.ran) > 4
    assert len(shapes) == 1


def test_an_executor_that_prepares_nothing_runs_nothing() -> None:
    model = tiny_model()
    engine = make_engine(model, load_policy("gpu-only", {}))
    executor = watch(engine)
    prepare_engine(engine, model.config.spec())
    assert not executor.ran

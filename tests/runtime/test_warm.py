"""What is done at start leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")

from engine_builders import add, make_engine, prompt_of, run, tiny_model, watch

from neo.core.request import FinishReason
from neo.policy.registry import load_policy
from neo.runtime.warm import prepare_engine


@pytest.mark.parametrize("policy", ["gpu-only", "neo"])
def test_steps_of_all_sizes_run_and_leave_nothing(policy: str) -> None:
    model = tiny_model()
    engine = make_engine(model, load_policy(policy, {}), gpu=12)
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


def test_an_executor_that_prepares_nothing_runs_nothing() -> None:
    model = tiny_model()
    engine = make_engine(model, load_policy("gpu-only", {}))
    executor = watch(engine)
    prepare_engine(engine, model.config.spec())
    assert not executor.ran

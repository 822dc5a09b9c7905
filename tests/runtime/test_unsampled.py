"""A request whose logits are no numbers ends; the requests beside it do not notice."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")

import torch
from engine_builders import add, make_engine, run

from neo.core.errors import InputError
from neo.core.request import FinishReason
from neo.core.runlog import RunLog
from neo.policy.registry import load_policy
from neo.runtime import tiny
from neo.runtime.model import Model

PROMPTS = {"a": [65, 66, 67], "bad": [70, 71], "c": [80] * 20}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(str(tiny.FOLDER))


class Broken:
    """An executor with a fault: from some token on, one request's logits are NaN."""

    def __init__(self, inner: Any, victim: str, after: int) -> None:
        self.inner, self.victim, self.after = inner, victim, after
        self.tables = inner.tables

    def run(self, plan: Any, graph: Any, inputs: Any, copies: Any, sample: Any) -> Any:
        def spoilt(logits: torch.Tensor, requests: tuple[str, ...]) -> None:
            if self.victim in requests:
                self.after -= 1
                if self.after < 0:
                    logits[requests.index(self.victim)] = math.nan
            sample(logits, requests)

        return self.inner.run(plan, graph, inputs, copies, spoilt)

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("alone", [False, True])
def test_one_request_ends_and_the_others_go_on(model: Model, ahead: bool, after: int, alone: bool) -> None:
    found = []
    for broken in (False, True):
        file = io.StringIO()
        engine = make_engine(model, load_policy("gpu-only", {}), ahead=ahead, log=RunLog(file, {}))
        if broken:
            engine.executor = Broken(engine.executor, "bad", after)
        for name, prompt in PROMPTS.items():
            if name == "bad" or not alone:
                add(engine, name, prompt, 9)
        found.append(run(engine))
        engine.check_integrity()
        add(engine, "later", PROMPTS["a"], 9)
        assert run(engine).reasons["later"] is FinishReason.LENGTH
        engine.close()
    whole, spoilt = found
    assert spoilt.reasons["bad"] is FinishReason.ABORT
    assert spoilt.details["bad"] == "no token can be sampled: its logits hold NaN or +inf, or nothing finite"
    assert spoilt.tokens.get("bad", []) == whole.tokens["bad"][:after]
    for name in whole.tokens.keys() - {"bad"}:
        assert spoilt.tokens[name] == whole.tokens[name]
        assert spoilt.reasons[name] is FinishReason.LENGTH


def test_a_request_that_leaves_no_token_to_choose_is_refused(model: Model) -> None:
    engine = make_engine(model, load_policy("gpu-only", {}))
    with pytest.raises(InputError, match="'a': stop_token_ids with min_tokens leave no token"):
        add(engine, "a", [1], 4, min_tokens=1, stop_token_ids=tuple(range(engine.vocab)))
    assert not engine.has_work
    engine.close()

"""``neo``: its options, as published and ours; how many requests it sends to the host."""

from __future__ import annotations

from typing import Any

import pytest
from support import Drive, Fixed, ToyCost, decoding, make_scheduler

from neo.core.errors import InputError
from neo.core.plan import StepPlan
from neo.core.request import Request, Tier
from neo.core.scheduler import Scheduler
from neo.core.validate import check
from neo.policy.neo import NeoOptions
from neo.policy.registry import load_policy, policy_class, policy_options

CPU, GPU = Tier.CPU, Tier.GPU

# -- as published -------------------------------------------------------------------------------------------


def test_faithful_is_the_published_behaviour_and_what_is_given_beside_it_wins() -> None:
    def options(**given: str) -> NeoOptions:
        return load_policy("neo", given).options  # type: ignore[attr-defined, no-any-return]

    got = options(faithful="true")
    assert (got.prefill, got.worth, got.eager, got.patience_s) == ("whole", "requests", True, 1e9)
    got = options(faithful="true", prefill="chunked", patience_s="10")
    assert (got.prefill, got.worth, got.eager, got.patience_s) == ("chunked", "requests", True, 10.0)
    assert options(faithful="false") == NeoOptions()


def test_faithful_in_name_only_is_refused() -> None:
    with pytest.raises(ValueError, match="as published"):
        NeoOptions(faithful=True)
    given = {"faithful": "true", "prefill": "chunked", "worth": "time", "eager": "false", "patience_s": "1"}
    with pytest.raises(InputError, match="faithful=true, but no option"):
        load_policy("neo", given)


def test_faithful_plans_as_its_options_spelled_out() -> None:
    spelled = {"prefill": "whole", "worth": "requests", "eager": "true", "patience_s": "1e9"}
    ends = []
    for options in ({"faithful": "true"}, spelled):
        drive = Drive(make_scheduler(load_policy("neo", options), gpu=12, cpu=40, cost=ToyCost(cpu=0.02)))
        for i in range(8):
            drive.add(6 + i, 9)
        drive.drain(500)
        ends.append([r.finish_s for r in drive.submitted])
    assert ends[0] == ends[1]


def test_it_is_listed() -> None:
    assert "faithful" in [o.name for o in policy_options(policy_class("neo"))]


def scene(options: dict[str, str], **sizes: Any) -> Scheduler:
    """A scheduler to set up by hand, with the staging room that ``neo`` under these options asks for."""
    layers = getattr(load_policy("neo", options), "staging_layers")  # noqa: B009
    return make_scheduler(Fixed(staging_layers=layers), **sizes)


def planned(s: Scheduler, options: dict[str, str]) -> StepPlan:
    plan = load_policy("neo", options).plan(s.view, s.cost)
    check(s.view, plan)
    return plan


def test_a_prompt_counts_as_one_request_or_by_its_tokens() -> None:
    """A long prefill, and CPU decodes that slow the step: by tokens they do not pay, by requests they do."""
    cost = ToyCost(cpu=0.05)
    for worth, pipelined in (("requests", True), ("tokens", False)):
        options = {"faithful": "true", "worth": worth, "swap_in_limit": "0.01"}
        s = scene(options, gpu=100, cpu=80, cost=cost, max_seqs=20, max_batch_tokens=400)
        for name in "ab":
            decoding(s, name, 8, 40)
        for name in "uvwxyz":
            decoding(s, name, 8, 40, tier=CPU)
        s.add(Request("long", 200, 4))
        plan = planned(s, options)
        assert [c.request.id for c in plan.batches[0].prefill] == ["long"]
        assert any(b.cpu_decode for b in plan.batches) is pipelined, plan.why


def test_only_eager_neo_sets_a_staging_layer_aside() -> None:
    assert [
        make_scheduler(load_policy("neo", o), gpu=10).view.pools[GPU].blocks
        for o in ({}, {"eager": "true"}, {"faithful": "true"})
    ] == [10, 8, 8]


# -- how many requests go to the host -----------------------------------------------------------------------

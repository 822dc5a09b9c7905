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
from neo.policy.estimate import StageTimes
from neo.policy.host_target import HostTarget, Load, Outlook, arrival_rate
from neo.policy.neo import NeoOptions
from neo.policy.registry import load_policy, policy_class, policy_options
from neo.sim.setup import System, SystemConfig, build_system, simulation
from neo.workload import synthetic

CPU, GPU = Tier.CPU, Tier.GPU

# -- as published -------------------------------------------------------------------------------------------


def test_faithful_is_the_published_behaviour_and_what_is_given_beside_it_wins() -> None:
    def options(**given: str) -> NeoOptions:
        return load_policy("neo", given).options  # type: ignore[attr-defined, no-any-return]

    got = options(faithful="true")
    assert (got.prefill, got.worth, got.eager, got.patience_s) == ("whole", "requests", True, 1e9)
    assert got.swap_in_limit == 0.95
    got = options(faithful="true", prefill="chunked", patience_s="10")
    assert (got.prefill, got.worth, got.eager, got.patience_s) == ("chunked", "requests", True, 10.0)
    assert options(faithful="false") == NeoOptions()


def test_faithful_in_name_only_is_refused() -> None:
    with pytest.raises(ValueError, match="as published"):
        NeoOptions(faithful=True)
    given = {"faithful": "true", "prefill": "chunked", "worth": "time", "eager": "false", "patience_s": "1",
             "swap_in_limit": "0.9", "relay": "true"}  # fmt: skip
    with pytest.raises(InputError, match="faithful=true, but no option"):
        load_policy("neo", given)


def test_faithful_plans_as_its_options_spelled_out() -> None:
    spelled = {"prefill": "whole", "worth": "requests", "eager": "true", "patience_s": "1e9"}
    spelled |= {"swap_in_limit": "0.95", "relay": "false"}
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


def machine(hardware: str = "g5.16xlarge", **more: Any) -> System:
    return build_system(SystemConfig(hardware=hardware, model="llama-3.1-8b", **more))


def target(system: System) -> HostTarget:
    return HostTarget(StageTimes(system.cost, system.model))


def load(system: System, prompt: int, output: int) -> Load:
    return Load(prompt, output, system.gpu_blocks * 16, system.cpu_blocks * 16, 1024, 2048)


@pytest.mark.parametrize(("prompt", "output"), [(1000, 50), (1000, 200), (100, 300), (3000, 50)])
def test_the_rate_without_the_host_is_what_gpu_only_reaches(prompt: int, output: int) -> None:
    """Within what watermarks, growth and the run's end cost: the estimate is a steady state's."""
    system = machine(policy="gpu-only")
    work = synthetic(f"around:{prompt}:0.1", f"around:{output}:0.1", n=1200, seed=3)
    record = simulation(system, work).run()
    estimate = target(system).rate(load(system, prompt, output), 0)
    assert 0.9 < estimate / (len(work) / record.end_s) < 1.35


def test_more_on_the_host_pays_until_the_cpu_is_no_longer_hidden() -> None:
    strong, weak = machine(), machine("g5.4xlarge")
    rates = [target(strong).rate(load(strong, 1000, 300), n) for n in (0, 50, 200, 400)]
    assert rates[0] < rates[1] < rates[2]
    assert rates[3] == pytest.approx(rates[2], rel=0.02)
    slow = load(weak, 1000, 300)
    assert target(weak).rate(slow, 200) / target(weak).rate(slow, 0) < rates[2] / rates[0]


RATES = ((0, 1.0), (10, 1.1), (40, 1.6), (80, 1.6))


@pytest.mark.parametrize(
    ("everyone", "arriving", "best"),
    [
        (30, 0.0, 0),  # a short burst: every request on the host delays the others
        (2000, 0.0, 60),  # a long one: the queue is what matters
        (30, 0.8, 15),  # arrivals that the GPU alone could just serve make every gain worth more
        (60, 0.8, 60),
        (12, 0.8, 15),  # no more than run at a time, and half as many again
    ],
)
def test_how_many_go_to_the_host(everyone: int, arriving: float, best: int) -> None:
    outlook = Outlook(RATES, everyone, 20, arriving)
    assert outlook.on_host() == best


def test_a_step_with_more_requests_must_be_worth_it_the_less_the_more_arrive() -> None:
    assert Outlook(RATES, 30, 20, 0.0).crowding(10, 20) == pytest.approx(1.2)
    assert Outlook(RATES, 30, 20, 0.5).crowding(10, 20) == pytest.approx(1.1)


def test_the_arrival_rate_is_told_from_those_who_wait() -> None:
    s = make_scheduler()
    assert arrival_rate(s.view, 5.0, 1.0) == 0.0
    for i in range(41):
        s.add(Request(f"w{i}", 8, 8, arrival_s=0.5 * i))
    s.view.now = 20.0
    assert arrival_rate(s.view, 0.0, 1e-9) == pytest.approx(2.0)
    assert arrival_rate(s.view, 1.0, 20.0) == pytest.approx(1.5)  # half seen, half expected
    s.view.now = 80.0  # nobody came for a minute
    assert arrival_rate(s.view, 0.0, 1e-9) == pytest.approx(0.05)


def test_all_at_once_is_a_burst_soon_after() -> None:
    s = make_scheduler()
    for i in range(100):
        s.add(Request(f"w{i}", 8, 8))
    s.view.now = 60.0
    assert arrival_rate(s.view, 5.0, 10.0) == pytest.approx(0.05)

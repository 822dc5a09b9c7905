"""``neo`` with relayed decodes: how many, when not, and that nothing breaks whatever it aims at."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Drive, Fixed, Pure, ToyCost, costs, decoding, make_scheduler, run_plan, toy_model

from neo.core.plan import StepPlan, SubBatch
from neo.core.record import Mode
from neo.core.request import FinishReason, Request, Tier
from neo.core.scheduler import Scheduler
from neo.core.validate import check
from neo.core.view import Limits, SystemView
from neo.policy import neo_relay
from neo.policy.estimate import StageTimes
from neo.policy.host_target import HostTarget, Load
from neo.policy.neo import Neo, NeoOptions
from neo.policy.registry import load_policy
from neo.policy.relay_target import Goal, RelayTarget
from neo.report.metrics import compute_metrics
from neo.sim.setup import System, SystemConfig, build_system, simulation
from neo.workload import apply_arrivals, synthetic

CPU, GPU = Tier.CPU, Tier.GPU


def machine(blocks: int, policy: str = "neo", hardware: str = "h200-16c", **options: str) -> System:
    return build_system(
        SystemConfig(
            hardware=hardware,
            policy=policy,
            policy_options=options,
            kv_gpu_blocks=blocks,
            kv_cpu_blocks=10_000,
            limits=Limits(max_batch_tokens=2304),
        )
    )


def metrics(system: System, output: int, rate: float | None = None, n: int = 120) -> dict[str, Any]:
    work = synthetic("around:1000:0.1", f"around:{output}:0.1", n=n, seed=0)
    if rate is not None:
        work = apply_arrivals(work, "poisson", rate=rate, seed=1)
    return compute_metrics(simulation(system, work).run())


# -- whatever it aims at ------------------------------------------------------------------------------------


class Fickle(Neo):
    """Aims at something else all the time: a goal, another one, two sub-batches. A function of the view."""

    def __init__(self, seed: int, budget: int) -> None:
        super().__init__(NeoOptions(token_budget=budget))
        self.seed = seed

    def _goal(self, view: SystemView) -> Goal | None:
        random = Random(self.seed + int(view.now * 8) // 5)
        if view.limits.relay_rows and random.random() < 0.7:
            return Goal(random.randint(0, 9), random.randint(0, 9))
        return Goal(0, 0) if view.relaying else None


@given(
    seed=st.integers(0, 2**32 - 1),
    gpu=st.integers(1, 14),
    cpu=st.integers(0, 24),
    layers=st.integers(1, 5),
    block=st.integers(1, 6),
    seqs=st.integers(1, 8),
    tokens=st.integers(1, 48),
    budget=st.integers(1, 48),
    rows=st.integers(0, 3),
    cost=costs,
)
@settings(max_examples=120)
def test_whatever_the_goals_everyone_is_served(
    seed, gpu, cpu, layers, block, seqs, tokens, budget, rows, cost
) -> None:
    """Every rule at every step, same view same plan, nobody starves or is preempted without end."""
    drive = Drive(
        make_scheduler(
            Pure(lambda: Fickle(seed, budget)),
            gpu=gpu,
            cpu=cpu,
            model=toy_model(layers),
            cost=cost,
            block_size=block,
            max_seqs=seqs,
            max_batch_tokens=tokens,
            relay_rows=rows,
        )
    )
    random = Random(seed)
    for _ in range(random.randint(1, 12)):
        for _ in range(random.randint(0, 4)):
            drive.step()
        drive.add(random.randint(1, 30), random.randint(1, 12))
        if random.random() < 0.1:
            drive.abort(random.choice(drive.submitted))
    drive.drain(12 * 42 * 12)
    drive.check_end()
    for r in drive.submitted:
        assert r.preemptions <= 12 * r.max_tokens
        if r.finish_reason is FinishReason.REJECTED:
            assert r.peak_kv_tokens > gpu * block
        assert rows or not r.relay_layers


def scene(options: dict[str, str], **sizes: Any) -> tuple[Scheduler, Neo]:
    scheduler = make_scheduler(Fixed(), **sizes)
    policy = load_policy("neo", options)
    assert isinstance(policy, Neo)
    return scheduler, policy


def begin(s: Scheduler, *requests: Request) -> None:
    """A step in which these begin a relayed token."""
    run_plan(s, StepPlan((SubBatch(relay_decode=requests),)))


@pytest.mark.parametrize("options", [{"relay": "false"}, {"prefill": "whole"}, {"eager": "true"}])
def test_tokens_that_were_begun_go_on_to_their_end_and_no_others_begin(options: dict[str, str]) -> None:
    s, policy = scene(options, gpu=4, cpu=40)
    decoding(s, "g", 12)
    a, b = (decoding(s, name, tier=CPU) for name in "ab")
    begin(s, a)
    for _ in range(s.view.model.layers):
        plan = policy.plan(s.view, s.cost)
        check(s.view, plan)
        assert [batch.relay_decode for batch in plan.batches] == [(a,)]
        begin(s, a)
    assert (s.view.relaying, a.generated, b.generated) == (0, 2, 1)
    plan = policy.plan(s.view, s.cost)
    assert not any(batch.relay_decode for batch in plan.batches)


def test_rows_of_relayed_decodes_are_left_room_by_prefill_and_swapping_in() -> None:
    """The budget is full of a prompt: what is within a token goes on beside it, and no more begin."""
    s, _ = scene({}, gpu=60, cpu=60, max_batch_tokens=10)
    decodes = [decoding(s, name, 2, tier=CPU) for name in "abcd"]
    decoding(s, "g")
    begin(s, *decodes[:3])
    s.add(Request("long", 50, 4))
    policy = Neo()
    policy._goal = lambda view: Goal(4, 4)  # type: ignore[method-assign]
    plan = policy.plan(s.view, s.cost)
    check(s.view, plan)
    (batch,) = plan.batches
    assert set(decodes[:3]) <= set(batch.relay_decode)
    assert batch.tokens <= 10
    moved = {m.request for m in plan.moves}
    assert moved <= {decodes[3]}
    assert moved.isdisjoint(batch.relay_decode)


@pytest.mark.parametrize(
    ("cpu", "patience", "still"), [(0.2, 10.0, True), (2000.0, 10.0, False), (0.2, 0.5, False)]
)
def test_beside_a_long_prompt_relayed_decodes_stand_still_if_the_cpu_can_do_more(
    cpu: float, patience: float, still: bool
) -> None:
    """Two on the host are within a token, six are not: a whole token of each, or a layer of those two.

    Not for longer than patience: those two have waited for theirs for a second.
    """
    s, _ = scene({}, gpu=700, cpu=900, max_batch_tokens=2500, max_seqs=16, cost=ToyCost(cpu=cpu))
    decoding(s, "g")
    hosted = [decoding(s, name, 2, tier=CPU) for name in "abcdefhi"]
    begin(s, *hosted[:2])
    s.add(Request("long", 2000, 4))
    s.view.now = hosted[0].last_token_s + 1.0
    policy = Neo(NeoOptions(swap_in_limit=0.01, patience_s=patience))  # room is for the prompt, but for a few
    policy._goal = lambda view: Goal(9, 2)  # type: ignore[method-assign]
    plan = policy.plan(s.view, s.cost)
    check(s.view, plan)
    whole = {r for b in plan.batches for r in b.cpu_decode}
    assert any(b.relay_decode for b in plan.batches) is not still
    assert whole == (set(hosted[2:]) - {m.request for m in plan.moves} if still else set())
    assert len(whole) >= 2 * still
    assert len(plan.batches[0].prefill) == 1
    assert s.view.relaying == 2


@pytest.mark.parametrize(("waited", "still"), [(9.0, True), (11.0, False)])
def test_whoever_has_waited_too_long_stands_still_no_more(waited: float, still: bool) -> None:
    """Two within a token go on once the older is out of patience, and nobody joins them beside the prompt."""
    s, _ = scene({}, gpu=700, cpu=900, max_batch_tokens=2500, max_seqs=16, cost=ToyCost(cpu=0.2))
    decoding(s, "g")
    hosted = [decoding(s, name, 2, tier=CPU) for name in "abcdefhi"]
    begin(s, *hosted[:2])
    s.add(Request("long", 2000, 4))
    last = hosted[0].last_token_s
    assert last is not None
    s.view.now = last + waited
    for r in hosted[2:]:
        r.last_token_s = s.view.now
    policy = Neo(NeoOptions(swap_in_limit=0.01, patience_s=10.0))
    policy._goal = lambda view: Goal(20, 8)  # type: ignore[method-assign]
    plan = policy.plan(s.view, s.cost)
    check(s.view, plan)
    relayed = [r for b in plan.batches for r in b.relay_decode]
    assert relayed == ([] if still else hosted[:2])
    assert len(plan.batches[0].prefill) == 1


@pytest.mark.parametrize("waited", [9.0, 11.0])
def test_the_oldest_between_two_tokens_begins_one_if_it_has_waited_too_long(waited: float) -> None:
    """As long as it would be skipped beside prompts, if it is too long to be hidden there."""
    s, _ = scene({}, gpu=700, cpu=900, max_batch_tokens=2500, max_seqs=16, cost=ToyCost(cpu=0.2))
    decoding(s, "g")
    first, *hosted = [decoding(s, name, 2, tier=CPU) for name in "abcdefhi"]
    begin(s, first)
    s.add(Request("long", 2000, 4))
    s.view.now = (hosted[0].last_token_s or 0.0) + waited
    first.last_token_s = s.view.now
    policy = Neo(NeoOptions(swap_in_limit=0.01, patience_s=10.0))
    policy._goal = lambda view: Goal(20, 8)  # type: ignore[method-assign]
    plan = policy.plan(s.view, s.cost)
    check(s.view, plan)
    moved = {m.request for m in plan.moves}
    oldest = next(r for r in hosted if r not in moved)
    assert (oldest in plan.batches[0].relay_decode) is (waited > 10.0)


@pytest.mark.parametrize("rate", [None, 40.0])
def test_as_long_as_prompts_come_nobody_waits_much_longer_than_patience(rate: float | None) -> None:
    """Nearly every step has prompts, for 40 s: those within a token once stood still for all of them."""
    work = synthetic("around:1000:0.1", "around:20:0.1", n=1500, seed=0)
    if rate is not None:
        work = apply_arrivals(work, "poisson", rate=rate, seed=1)
    record = simulation(machine(400), work).run()
    assert list(record.columns.mode).count(Mode.PIPELINED) > 500
    assert max(record.itl_values) < NeoOptions().patience_s + 3.0  # a token takes 33 steps of up to 60 ms


def test_others_on_the_host_get_tokens_beside_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What relayed decodes alone left of the CPU's time while prompts run serves more, and sooner."""

    def pipelined(found: dict[str, Any]) -> int:
        return int(found["decisions"]["pipelined"])

    both = metrics(machine(400), 50, n=250)
    monkeypatch.setattr(neo_relay, "_beside_prompts", lambda draft: None)
    alone = metrics(machine(400), 50, n=250)
    assert pipelined(both) > 3 * pipelined(alone)
    assert both["request_throughput"] > 1.05 * alone["request_throughput"]
    assert both["e2e_s"]["mean"] < alone["e2e_s"]["mean"]


def test_prompts_leave_room_for_those_beside_them() -> None:
    """Also where the budget of a step is no larger than that of its prompts."""

    def throughput(tokens: int) -> float:
        system = machine(400)
        limits = Limits(max_batch_tokens=tokens)
        system = replace(system, config=replace(system.config, limits=limits))
        return float(metrics(system, 20, n=300)["request_throughput"])

    assert throughput(NeoOptions().token_budget) > 0.97 * throughput(4096)


def test_relaying_once_begun_goes_on() -> None:
    """Beside prompts that come in nearly every step at first, it would be given up again and again."""
    found, gpu_only = metrics(machine(400), 200, n=150), metrics(machine(400, "gpu-only"), 200, n=150)
    assert found["decisions"]["relayed"] > 2000
    assert found["request_throughput"] > 1.35 * gpu_only["request_throughput"]


def test_no_rows_no_relay() -> None:
    system, limits = machine(200), Limits(max_batch_tokens=2304, relay_rows=0)
    system = replace(system, config=replace(system.config, limits=limits))
    found = metrics(system, 100, n=60)
    assert found["decisions"]["relayed"] == 0
    assert found["decisions"] == metrics(machine(200, relay="false"), 100, n=60)["decisions"]


# -- how many -----------------------------------------------------------------------------------------------


def target(system: System) -> RelayTarget:
    times = StageTimes(system.cost, system.model)
    return RelayTarget(times, HostTarget(times))


def load(system: System, output: int) -> Load:
    return Load(1000, output, system.gpu_blocks * 16, system.cpu_blocks * 16, 256, 2048)


def test_the_best_rate_keeps_the_cpu_busy_for_a_step() -> None:
    system = machine(800)
    relay, known = target(system), load(machine(800), 200)
    rates = [relay.rate(known, n)[0] for n in (0, 16, 66, 330)]
    assert rates[0] < rates[1] < rates[2] > rates[3], "too many, and the GPU waits for the CPU"
    loads = [load(machine(blocks), 200) for blocks in (200, 800)]
    gain = [relay.rate(known, 33)[0] / relay.rate(known, 0)[0] for known in loads]
    assert gain[0] > gain[1] > 1.0, "the fewer the GPU holds, the more a token of the host counts"


def test_beside_prompts_more_on_the_host_bring_more() -> None:
    system = machine(800)
    relay, known = target(system), load(system, 50)
    alone, share, none = relay.rate(known, 99)
    rate, prefill, extra = relay.rate(known, 99, 40)
    assert rate > 1.05 * alone
    assert (none, extra > 10) == (0, True)
    assert prefill > share, "what they bring shortens the steps without prompts"


def test_the_share_of_prefill_is_what_outputs_leave() -> None:
    relay, system = target(machine(800)), machine(800)
    shares = [relay.rate(load(system, output), 33)[1] for output in (10, 50, 400)]
    assert 1.0 > shares[0] > shares[1] > shares[2] > 0.0


def test_the_estimate_is_what_the_simulator_reaches() -> None:
    """More than twice as much: within 15 %, filling and draining the host included."""
    system = machine(200)
    relay, known = target(system), load(system, 200)
    estimate = max(relay.rate(known, n, 145 - n)[0] for n in range(33, 145)) / relay.rate(known, 0)[0]
    with_it = metrics(system, 200, n=700)["request_throughput"]
    without = metrics(machine(200, "gpu-only"), 200, n=700)["request_throughput"]
    assert with_it > 2.0 * without
    assert 0.85 < with_it / without / estimate < 1.05


@pytest.mark.parametrize(
    ("blocks", "output", "load"),
    [
        (800, 50, None),
        (1648, 100, None),
        (2816, 100, None),
        (200, 50, 0.8),
        (200, 50, 0.95),
        (800, 100, 0.95),
    ],
)
def test_relaying_never_costs(blocks: int, output: int, load: float | None) -> None:
    """Points at which more of it, or sooner, once did; an open loop at a share of what gpu-only serves."""
    gpu_only = machine(blocks, "gpu-only")
    n = blocks // 3 + 160
    base = metrics(gpu_only, output, n=n)
    rate = None if load is None else load * base["request_throughput"]
    base = base if rate is None else metrics(gpu_only, output, rate, n)
    found = metrics(machine(blocks), output, rate, n)
    assert found["request_throughput"] >= 0.99 * base["request_throughput"]
    name = "latency_per_output_token_s"
    assert found[name]["mean"] <= 1.02 * base[name]["mean"]


def test_where_little_fits_relayed_steps_serve_more_and_sooner() -> None:
    on, off = (metrics(machine(200, relay=relay), 100, n=200) for relay in ("true", "false"))
    gpu_only = metrics(machine(200, "gpu-only"), 100, n=200)
    assert on["decisions"]["relayed"] > 1000
    assert off["decisions"]["relayed"] == 0
    assert on["request_throughput"] > 1.2 * off["request_throughput"]
    assert on["e2e_s"]["mean"] < off["e2e_s"]["mean"] < 0.9 * gpu_only["e2e_s"]["mean"]
    assert on["preemptions"] == 0


def test_with_an_idle_host_of_no_strength_nothing_is_relayed() -> None:
    record = simulation(
        machine(800, hardware="g5.4xlarge"), synthetic("around:1000:0.1", "around:50:0.1", n=80, seed=0)
    ).run()
    assert Mode.RELAYED not in record.columns.mode

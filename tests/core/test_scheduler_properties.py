"""The Scheduler under random arrivals, aborts, limits, pools and policies: every invariant, at every step."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support import BUILT_IN, Chaos, Drive, Pure, costs, make_scheduler, toy_model

from neo.core.request import FinishReason, Tier


class AnySchedule(RuleBasedStateMachine):
    """Arrivals, aborts and steps in any order, aborts and arrivals inside a running step included."""

    drive: Drive
    chaos: bool

    @initialize(
        policy=st.sampled_from([*BUILT_IN, "chaos"]),
        seed=st.integers(0, 2**32 - 1),
        staging=st.integers(1, 2),
        gpu=st.integers(1, 14),
        cpu=st.integers(0, 24),
        layers=st.integers(1, 5),
        block=st.integers(1, 6),
        seqs=st.integers(1, 8),
        tokens=st.integers(1, 40),
        budget=st.integers(1, 40),
        cost=costs,
    )
    def build(self, policy, seed, staging, gpu, cpu, layers, block, seqs, tokens, budget, cost):
        self.chaos = policy == "chaos"
        chosen = (
            Chaos(seed, staging) if self.chaos else Pure(lambda: BUILT_IN[policy](token_budget=str(budget)))
        )
        self.drive = Drive(
            make_scheduler(
                chosen,
                gpu=gpu,
                cpu=cpu,
                model=toy_model(layers),
                cost=cost,
                block_size=block,
                max_seqs=seqs,
                max_batch_tokens=tokens,
            )
        )

    @property
    def running(self) -> bool:
        return self.drive.planned is not None

    @rule(prompt=st.integers(1, 30), output=st.integers(1, 12))
    def arrive(self, prompt: int, output: int) -> None:
        if len(self.drive.submitted) < 12:
            self.drive.add(prompt, output)

    @precondition(lambda self: self.drive.submitted)
    @rule(which=st.integers(0, 11), reason=st.sampled_from([FinishReason.ABORT, FinishReason.TIMEOUT]))
    def abort(self, which: int, reason: FinishReason) -> None:
        self.drive.abort(self.drive.submitted[which % len(self.drive.submitted)], reason)

    @precondition(lambda self: not self.running)
    @rule()
    def start(self) -> None:
        self.drive.start()

    @precondition(lambda self: not self.running)
    @rule(times=st.integers(1, 6))
    def whole_steps(self, times: int) -> None:
        for _ in range(times):
            self.drive.step()

    @precondition(lambda self: self.running)
    @rule(stop=st.booleans(), steps=st.integers(1, 20))
    def finish(self, stop: bool, steps: int) -> None:
        plan = self.drive.planned.plan
        steps = min(steps, self.drive.scheduler.max_steps(plan))
        decodes = [r for b in plan.batches for r in b.decodes]
        stopped = {decodes[0].id: FinishReason.STOP} if stop and decodes else {}
        self.drive.finish(steps, stopped)

    def teardown(self) -> None:
        if not hasattr(self, "drive"):
            return
        drive = self.drive
        if self.running:
            drive.finish()
        if self.chaos:
            for _ in range(60):
                drive.step()
            for r in drive.submitted:
                if not r.done:
                    drive.abort(r)
        else:
            drive.drain(BOUND)
        drive.check_end()


# 12 requests of at most 42 tokens; with a token a step, each recomputed as often as others end before it.
BOUND = 12 * 42 * 12

TestAnySchedule = AnySchedule.TestCase
TestAnySchedule.settings = settings(
    max_examples=150, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def loads(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(arrives at step, prompt, output) of up to a dozen requests."""
    one = st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(1, 14))
    return sorted(draw(st.lists(one, min_size=1, max_size=12)))


@pytest.mark.parametrize("name", BUILT_IN)
@given(
    load=loads(),
    gpu=st.integers(1, 14),
    cpu=st.integers(0, 24),
    layers=st.integers(1, 4),
    block=st.integers(1, 6),
    seqs=st.integers(1, 8),
    tokens=st.integers(1, 48),
    budget=st.integers(1, 48),
    cost=costs,
)
@settings(max_examples=60)
def test_built_in_policies_serve_everyone(
    name, load, gpu, cpu, layers, block, seqs, tokens, budget, cost
) -> None:
    """Nobody starves, nobody is preempted without end, and all blocks come back."""
    policy = Pure(lambda: BUILT_IN[name](token_budget=str(budget)))
    scheduler = make_scheduler(
        policy,
        gpu=gpu,
        cpu=cpu,
        model=toy_model(layers),
        cost=cost,
        block_size=block,
        max_seqs=seqs,
        max_batch_tokens=tokens,
    )
    drive = Drive(scheduler)
    for at, prompt, output in load:
        while drive.steps < at and drive.step():
            pass
        drive.add(prompt, output)
    drive.drain(BOUND)
    drive.check_end()
    for r in drive.submitted:
        assert r.finish_reason in (FinishReason.LENGTH, FinishReason.REJECTED)
        assert r.preemptions <= 12 * r.max_tokens
        gpu_pool, cpu_pool = (scheduler.view.pools[t] for t in Tier)
        room = min(cpu_pool.blocks, gpu_pool.staging_blocks) if "fastdecode" in name else gpu_pool.blocks
        fits = r.peak_kv_tokens <= room * block and not (name.endswith("whole") and r.prompt_tokens > tokens)
        if fits or not name.startswith("flexgen"):  # which also serves what the host alone can hold
            assert (r.finish_reason is FinishReason.LENGTH) is fits, r


@given(
    seed=st.integers(0, 2**32 - 1),
    load=loads(),
    gpu=st.integers(1, 14),
    cpu=st.integers(0, 24),
    layers=st.integers(1, 5),
    block=st.integers(1, 6),
    staging=st.integers(0, 2),
)
@settings(max_examples=120)
def test_whatever_check_accepts_keeps_the_accounts(seed, load, gpu, cpu, layers, block, staging) -> None:
    """A random policy with every kind of decision; nothing it gets through may break the accounting."""
    drive = Drive(
        make_scheduler(Chaos(seed, staging), gpu=gpu, cpu=cpu, model=toy_model(layers), block_size=block)
    )
    for _, prompt, output in load:
        drive.add(prompt, output)
        drive.step()
    for _ in range(80):
        drive.step()
    for r in drive.submitted:
        if not r.done:
            drive.abort(r)
    drive.check_end()

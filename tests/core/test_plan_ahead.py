"""Planning a step while the one before it runs: commit_step and finish_step."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BUILT_IN, Chaos, Drive, check_integrity, decoding, make_scheduler, start_plan

from neo.core.plan import StepPlan, SubBatch
from neo.core.request import FinishReason, Request, State
from neo.core.scheduler import Planned, Scheduler, StepResult


class Ahead:
    """Drives a scheduler with one step planned ahead; notes how many tokens each request had at its end."""

    def __init__(self, scheduler: Scheduler, seed: int, stop: float = 0.0, abort: float = 0.0) -> None:
        self.scheduler = scheduler
        self.random = Random(seed)
        self.stop = stop
        self.abort = abort
        self.now = 0.0
        self.tokens: dict[str, int] = {}
        self.stopped: dict[str, int] = {}
        self.plans: list[str] = []

    def yielding(self, plan: StepPlan) -> list[Request]:
        """Requests that get a token from a plan, asked for before it is committed."""
        done = [c.request for b in plan.batches for c in b.prefill if c.length == c.request.remaining_prefill]
        layers = self.scheduler.view.model.layers
        done += [r for b in plan.batches for r in b.relay_decode if r.relay_layers == layers]
        return done + [r for b in plan.batches for r in b.decodes]

    def run(self, most: int) -> None:
        scheduler = self.scheduler
        running: Planned | None = scheduler.plan_step(self.now)
        for step in range(most):
            if running is None:
                if step > most // 2:  # random decisions need not lead anywhere
                    for r in list(scheduler.view.requests.values()):
                        scheduler.abort(r.id, self.now)
                        self.stopped.setdefault(r.id, r.generated)
                if not scheduler.unfinished:
                    return
                running = scheduler.plan_step(self.now)
                continue
            yielding = [r for r in self.yielding(running.plan) if r.id not in self.stopped]
            scheduler.commit_step(running)
            self.now += 0.25
            for r in list(scheduler.view.requests.values()):
                if self.random.random() < self.abort and scheduler.abort(r.id, self.now):
                    self.stopped.setdefault(r.id, r.generated)
            following = scheduler.plan_step(self.now) if step < most // 2 else None
            within = sum(r.relay_layers > 0 for r in scheduler.view.requests.values())
            assert scheduler.view.relaying == within
            for pool in scheduler.view.pools.values():
                assert pool.used == sum(pool.holders().values()) <= pool.total
            self.now += 0.25
            ends: dict[str, FinishReason] = {}
            for r in yielding:
                self.tokens[r.id] = self.tokens.get(r.id, 0) + 1
                if self.random.random() < self.stop and r.id not in self.stopped:
                    ends[r.id] = FinishReason.STOP
                    self.stopped[r.id] = self.tokens[r.id]
            scheduler.finish_step(running, StepResult(self.now, stopped=ends))
            running = following
        raise AssertionError(f"{scheduler.unfinished} unfinished after {most} steps")

    def check_end(self, requests: list[Request]) -> None:
        for pool in self.scheduler.view.pools.values():
            assert (pool.used, pool.holders()) == (0, {})
        assert sorted(r.id for r in self.scheduler.ended) == sorted(r.id for r in requests)
        for r in requests:
            assert r.done
            if r.state is not State.REJECTED:
                assert r.generated == self.stopped.get(r.id, r.max_tokens)
                assert r.cpu_steps < max(1, r.generated), "of a step that was void nothing counts"
            assert r.finish_s is not None
            if r.last_token_s is not None and r.finish_reason is not FinishReason.ABORT:
                assert r.last_token_s == r.finish_s
        check_integrity(self.scheduler)


def some(scheduler: Scheduler, rnd: Random, count: int = 12) -> list[Request]:
    requests = [Request(f"r{i}", rnd.randint(1, 40), rnd.randint(1, 12)) for i in range(count)]
    for r in requests:
        scheduler.add(r)
    return requests


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 0.03]))
def test_whatever_is_planned_ahead_the_books_balance(seed: int, stop: float, abort: float) -> None:
    scheduler = make_scheduler(Chaos(seed, staging_layers=1), gpu=24, cpu=24)
    requests = some(scheduler, Random(seed))
    ahead = Ahead(scheduler, seed, stop, abort)
    ahead.run(400)
    ahead.check_end(requests)


@pytest.mark.parametrize("policy", ["gpu-only", "neo", "fastdecode"])
def test_without_surprises_the_plans_are_those_of_stepping(policy: str) -> None:
    ends = []
    # What neo expects to arrive depends on the clock, which the two drivers of this test let run differently.
    options = {"eager": "true"} if policy == "neo" else {}
    for ahead in (False, True):
        scheduler = make_scheduler(BUILT_IN[f"{policy}/chunked"](**options), gpu=24, cpu=40)
        requests = some(scheduler, Random(3))
        if ahead:
            Ahead(scheduler, 0).run(2000)
        else:
            drive = Drive(scheduler)
            drive.submitted = requests
            drive.drain(2000)
        ends.append([(r.id, r.generated, r.preemptions, r.cpu_steps) for r in requests])
        check_integrity(scheduler)
    assert ends[0] == ends[1]


def test_a_request_that_stopped_leaves_with_the_step_planned_ahead() -> None:
    scheduler = make_scheduler(gpu=30)
    a, b = decoding(scheduler, "a", max_tokens=9), decoding(scheduler, "b", max_tokens=9)
    both = StepPlan((SubBatch(gpu_decode=(a, b)),))
    first = start_plan(scheduler, both)
    had = a.generated
    scheduler.commit_step(first)
    assert scheduler.view.in_flight is both
    following = start_plan(scheduler, StepPlan((SubBatch(gpu_decode=(a, b)),)))
    scheduler.finish_step(first, StepResult(2.0, stopped={"a": FinishReason.STOP}))
    assert not a.done, "the step planned ahead holds its blocks"
    scheduler.commit_step(following)
    assert a.state is State.FINISHED
    assert scheduler.view.gpu_decodes == (b,)
    scheduler.finish_step(following, StepResult(3.0))
    assert (a.generated, a.finish_s, a.last_token_s, a.finish_reason) == (
        had + 1,
        2.0,
        2.0,
        FinishReason.STOP,
    )
    assert (b.generated, b.last_token_s) == (had + 2, 3.0)
    check_integrity(scheduler)


def test_only_one_step_is_planned_ahead() -> None:
    scheduler = make_scheduler(gpu=30)
    a = decoding(scheduler, "a", max_tokens=9)
    plan = StepPlan((SubBatch(gpu_decode=(a,)),))
    first = start_plan(scheduler, plan)
    scheduler.commit_step(first)
    second = start_plan(scheduler, StepPlan((SubBatch(gpu_decode=(a,)),)))
    with pytest.raises(AssertionError, match="still runs"):
        scheduler.commit_step(second)
    with pytest.raises(AssertionError, match="not running"):
        scheduler.finish_step(second, StepResult(1.0))

"""A request's life in the Scheduler, step by step, and what plans say about themselves."""

from __future__ import annotations

import pytest
from support import Fixed, check_integrity, decoding, make_scheduler, run_plan, snapshot, start_plan

from neo.core.errors import InputError
from neo.core.plan import IDLE, Evict, KVMove, PrefillChunk, Reject, StepPlan, SubBatch
from neo.core.request import FinishReason, Request, State, Tier
from neo.core.scheduler import StepResult
from neo.core.view import Limits


@pytest.mark.parametrize(
    ("prompt", "output", "name"), [(0, 4, "prompt_tokens"), (4, 0, "max_tokens"), (-3, 4, "-3")]
)
def test_lengths_below_one_are_refused(prompt: int, output: int, name: str) -> None:
    with pytest.raises(InputError, match=name):
        Request("x", prompt, output)


@pytest.mark.parametrize("name", ["block_size", "max_seqs", "max_batch_tokens"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        Limits(**{name: 0})


def test_from_the_queue_through_chunks_and_decodes_to_the_end() -> None:
    scheduler = make_scheduler(gpu=20)
    r = Request("r", 10, 3, arrival_s=0.0)
    scheduler.add(r)
    assert (r.state, r.known, r.remaining_prefill, r.peak_kv_tokens, r.sequence) == (
        State.WAITING,
        10,
        10,
        12,
        0,
    )
    assert list(scheduler.view.waiting) == [r]

    run_plan(scheduler, StepPlan((SubBatch((PrefillChunk(r, 0, 7),)),)), end_s=1.0)
    assert (r.state, r.computed, r.generated, r.tier, r.first_token_s) == (
        State.PREFILL,
        7,
        0,
        Tier.GPU,
        None,
    )
    assert list(scheduler.view.prefilling) == [r]
    assert not scheduler.view.waiting
    check_integrity(scheduler)

    run_plan(scheduler, StepPlan((SubBatch((PrefillChunk(r, 7, 3),)),)), end_s=2.0)
    assert (r.state, r.computed, r.generated, r.known) == (State.DECODE, 10, 1, 11)
    assert (r.first_token_s, r.last_token_s) == (2.0, 2.0)
    assert scheduler.view.gpu_decodes == (r,)
    check_integrity(scheduler)

    run_plan(scheduler, StepPlan((SubBatch(gpu_decode=(r,)),)), end_s=3.0)
    assert (r.state, r.computed, r.generated) == (State.DECODE, 11, 2)
    run_plan(scheduler, StepPlan((SubBatch(gpu_decode=(r,)),)), end_s=4.0)
    assert (r.state, r.computed, r.generated, r.finish_reason) == (State.FINISHED, 12, 3, FinishReason.LENGTH)
    assert (r.first_token_s, r.last_token_s, r.finish_s) == (2.0, 4.0, 4.0)
    assert r.computed == r.peak_kv_tokens
    assert scheduler.ended == [r]
    assert scheduler.unfinished == 0
    check_integrity(scheduler)


def test_one_token_is_done_with_its_prefill() -> None:
    scheduler = make_scheduler(gpu=20)
    r = Request("r", 10, 1)
    scheduler.add(r)
    run_plan(scheduler, StepPlan((SubBatch((PrefillChunk(r, 0, 10),)),)))
    assert (r.state, r.generated, r.computed) == (State.FINISHED, 1, r.peak_kv_tokens)
    check_integrity(scheduler)


def test_a_preempted_request_keeps_its_tokens_and_computes_them_again() -> None:
    scheduler = make_scheduler(gpu=30)
    old, r, waiting = decoding(scheduler, "old"), decoding(scheduler, "r"), Request("w", 4, 4)
    scheduler.add(waiting)
    run_plan(scheduler, StepPlan((SubBatch(gpu_decode=(old, r)),)), end_s=5.0)
    run_plan(scheduler, StepPlan((SubBatch(gpu_decode=(old,)),), evict=(Evict(r),)))
    assert (r.state, r.computed, r.generated, r.known, r.preemptions) == (State.WAITING, 0, 2, 10, 1)
    assert list(scheduler.view.waiting) == [r, waiting], "ahead of those that never ran"
    check_integrity(scheduler)
    run_plan(scheduler, StepPlan((SubBatch((PrefillChunk(r, 0, 10),)),)), end_s=9.0)
    assert (r.state, r.computed, r.generated) == (State.DECODE, 10, 3)
    assert (r.first_token_s, r.last_token_s) == (1.0, 9.0)
    check_integrity(scheduler)


def test_those_preempted_newest_first_wait_in_order_of_admission() -> None:
    scheduler = make_scheduler(gpu=30)
    a, b, c = (decoding(scheduler, name) for name in "abc")
    run_plan(scheduler, StepPlan((SubBatch(gpu_decode=(a,)),), evict=(Evict(c), Evict(b))))
    assert list(scheduler.view.waiting) == [b, c]


def test_stopped_early_by_the_engine() -> None:
    scheduler = make_scheduler(gpu=30)
    a, b = decoding(scheduler, "a"), decoding(scheduler, "b", max_tokens=2)
    stopped = {"a": FinishReason.STOP, "b": FinishReason.STOP, "nobody": FinishReason.STOP}
    run_plan(scheduler, StepPlan((SubBatch(gpu_decode=(a, b)),)), stopped=stopped)
    assert (a.state, a.finish_reason, a.generated) == (State.FINISHED, FinishReason.STOP, 2)
    assert (b.state, b.finish_reason) == (State.FINISHED, FinishReason.STOP), "its last token was a stop"
    check_integrity(scheduler)


def test_ids_are_unique_among_the_living() -> None:
    scheduler = make_scheduler(gpu=20)
    first = Request("x", 4, 1)
    scheduler.add(first)
    with pytest.raises(InputError, match="'x' is already in use"):
        scheduler.add(Request("x", 4, 1))
    run_plan(scheduler, StepPlan((SubBatch((PrefillChunk(first, 0, 4),)),)))
    scheduler.add(Request("x", 4, 1))
    with pytest.raises(InputError, match="'y' has been scheduled before"):
        scheduler.add(_ended("y"))


def _ended(name: str) -> Request:
    other = make_scheduler(gpu=20)
    request = Request(name, 4, 1)
    other.add(request)
    other.abort(name, 0.0)
    return request


def test_abort_at_rest_ends_at_once_wherever_the_request_is() -> None:
    scheduler = make_scheduler(Fixed(staging_layers=1), gpu=30)
    gpu, cpu = decoding(scheduler, "gpu"), decoding(scheduler, "cpu", tier=Tier.CPU)
    half, waiting = decoding(scheduler, "half", prompt=12, chunk=5), Request("w", 4, 4)
    scheduler.add(waiting)
    for r in (gpu, cpu, half, waiting):
        assert scheduler.abort(r.id, 7.0, FinishReason.TIMEOUT)
        assert (r.state, r.finish_reason, r.finish_s) == (State.ABORTED, FinishReason.TIMEOUT, 7.0)
        check_integrity(scheduler)
        assert not scheduler.abort(r.id, 8.0)
    assert not scheduler.abort("nobody", 0.0)
    assert scheduler.unfinished == 0


def test_abort_in_a_running_step_waits_for_its_end_but_not_in_the_queue() -> None:
    scheduler = make_scheduler(gpu=30)
    a, b, c, waiting = (*(decoding(scheduler, name) for name in "abc"), Request("w", 4, 4))
    scheduler.add(waiting)
    planned = start_plan(scheduler, StepPlan((SubBatch(gpu_decode=(a,)),), evict=(Evict(c),)))
    assert [scheduler.abort(x.id, 3.0) for x in (a, b, c, waiting)] == [True] * 4
    assert [x.state for x in (a, b, c, waiting)] == [State.DECODE, State.DECODE, State.ABORTED, State.ABORTED]
    assert not scheduler.abort("a", 3.5, FinishReason.TIMEOUT), "it is ending already"
    scheduler.finish_step(planned, StepResult(4.0))
    assert [x.finish_s for x in (a, b, c, waiting)] == [4.0, 4.0, 3.0, 3.0]
    assert [x.finish_reason for x in (a, b)] == [FinishReason.ABORT] * 2
    assert [x.generated for x in (a, b)] == [2, 1]
    check_integrity(scheduler)


def test_an_abort_that_comes_too_late() -> None:
    scheduler = make_scheduler(gpu=30)
    a = decoding(scheduler, "a", max_tokens=2)
    planned = start_plan(scheduler, StepPlan((SubBatch(gpu_decode=(a,)),)))
    scheduler.abort("a", 3.0)
    scheduler.finish_step(planned, StepResult(4.0))
    assert a.finish_reason is FinishReason.LENGTH
    assert scheduler.ended == [a]
    again = Request("a", 4, 4)
    scheduler.add(again)
    run_plan(scheduler, StepPlan((SubBatch((PrefillChunk(again, 0, 4),)),)))
    assert again.state is State.DECODE, "the abort concerned the old request of that name"
    assert scheduler.abort("a", 9.0)


def test_steps_begin_and_end_in_turn() -> None:
    scheduler = make_scheduler(gpu=30)
    a = decoding(scheduler, "a")
    planned = start_plan(scheduler, StepPlan((SubBatch(gpu_decode=(a,)),)))
    with pytest.raises(AssertionError, match="while a step is running"):
        scheduler.plan_step(1.0)
    assert scheduler.view.in_flight is planned.plan
    scheduler.finish_step(planned, StepResult(1.0))
    assert scheduler.view.in_flight is None
    with pytest.raises(AssertionError, match="not running"):
        scheduler.finish_step(planned, StepResult(2.0))


def test_rejections_take_effect_without_a_step_and_the_policy_is_asked_again() -> None:
    scheduler = make_scheduler(gpu=20)
    big, small = Request("big", 4000, 4), Request("small", 4, 4)
    scheduler.add(big)
    scheduler.add(small)
    scheduler.policy = Fixed(
        StepPlan(reject=(Reject(big, "4000 tokens, 80 fit"),)),
        StepPlan((SubBatch((PrefillChunk(small, 0, 4),)),)),
    )
    planned = scheduler.plan_step(2.0)
    assert planned is not None
    assert planned.plan.batches[0].prefill[0].request is small
    assert (big.state, big.finish_reason) == (State.REJECTED, FinishReason.REJECTED)
    assert (big.detail, big.finish_s) == ("4000 tokens, 80 fit", 2.0)


def test_nobody_there_or_nothing_to_do_is_none() -> None:
    scheduler = make_scheduler(Fixed(IDLE))
    assert scheduler.plan_step(0.0) is None
    scheduler.add(Request("a", 4, 4))
    before = snapshot(scheduler)
    assert scheduler.plan_step(0.0) is None
    assert snapshot(scheduler) == before
    error = scheduler.stalled()
    assert (error.rule, error.request_id) == ("progress", "a")


def test_what_a_plan_says_about_itself() -> None:
    a, b, c = (Request(name, 6, 4) for name in "abc")
    assert IDLE.idle
    assert StepPlan().idle
    for plan in (
        StepPlan((SubBatch(gpu_decode=(a,)),)),
        StepPlan(moves=(KVMove(a, Tier.CPU),)),
        StepPlan(evict=(Evict(a),)),
        StepPlan(reject=(Reject(a, "x"),)),
    ):
        assert not plan.idle
    batch = SubBatch((PrefillChunk(a, 0, 5),), (b,), (c,), ())
    assert (batch.tokens, batch.sequences, batch.decodes) == (7, 3, (b, c))
    assert SubBatch(stream_decode=(a, b)).tokens == 2
    with pytest.raises(AttributeError):
        batch.prefill = ()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        IDLE.why = "busy"  # type: ignore[misc]


def test_never_fits_says_why_with_numbers() -> None:
    view = make_scheduler(gpu=8, cpu=16).view
    assert view.never_fits(Request("a", 30, 3)) is None
    reason = view.never_fits(Request("b", 30, 4))
    assert reason is not None
    for number in ("9", "30", "4", "8", "32"):
        assert number in reason.replace(",", " ").replace("(", " ").split()
    assert view.never_fits(Request("b", 30, 4), (Tier.GPU, Tier.CPU)) is None
    assert "cpu" in (view.never_fits(Request("b", 60, 6), (Tier.GPU, Tier.CPU)) or "")


def test_growth_counts_whole_blocks_of_all_layers() -> None:
    scheduler = make_scheduler(gpu=20)
    view = scheduler.view
    r = Request("r", 10, 8)
    assert [view.growth(r, n) for n in (1, 4, 5, 8, 9)] == [4, 4, 8, 8, 12]
    scheduler.add(r)
    run_plan(scheduler, StepPlan((SubBatch((PrefillChunk(r, 0, 6),)),)))
    assert [view.growth(r, n) for n in (1, 2, 3, 6, 7)] == [0, 0, 4, 4, 8]
    assert view.running == (r,)


def test_repeating_runs_to_the_first_end_or_to_the_last_block() -> None:
    scheduler = make_scheduler(gpu=6)  # 24 tokens
    a, b = decoding(scheduler, "a", 5, 40), decoding(scheduler, "b", 5, 9)
    plan = StepPlan((SubBatch(gpu_decode=(a, b)),), repeat=1 << 40)
    planned = start_plan(scheduler, plan)
    most = scheduler.max_steps(plan)
    assert 1 <= most <= 7, "then b ends; 12 tokens each fill the pool"
    with pytest.raises(AssertionError, match=f"{most} steps finished, 1 were planned"):
        scheduler.finish_step(planned, StepResult(2.0, most))
    scheduler.extend_step(planned, most)
    with pytest.raises(AssertionError, match="extend_step"):
        scheduler.extend_step(planned, most)
    scheduler.finish_step(planned, StepResult(2.0, most))
    assert (a.generated, b.generated) == (1 + most, 1 + most)
    check_integrity(scheduler)
    assert scheduler.max_steps(StepPlan((SubBatch(gpu_decode=(a, b)),))) == 1
    assert scheduler.max_steps(StepPlan((SubBatch(gpu_decode=(a, b)),), repeat=1)) <= 2

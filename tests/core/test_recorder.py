"""The recorder: measured steps, planned ahead or not, leave the record that priced ones leave."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from support import make_scheduler

from neo.core.record import RunRecord, StepColumns
from neo.core.recorder import Recorder
from neo.core.request import FinishReason, Request
from neo.core.scheduler import Scheduler, StepResult
from neo.core.timing import busy_seconds, durations
from neo.policy.gpu_only import GpuOnly
from neo.policy.neo import Neo


def loaded(policy: type[Any]) -> tuple[Scheduler, Recorder, list[Request]]:
    scheduler = make_scheduler(policy(), gpu=14, cpu=20)
    requests = [Request(f"r{i}", 5 + 3 * i, 4 + i) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    record = RunRecord(requests=requests)
    return scheduler, Recorder(record, scheduler), requests


def priced(policy: type[Any]) -> RunRecord:
    scheduler, recorder, _ = loaded(policy)
    now = 0.0
    while (planned := scheduler.plan_step(now)) is not None:
        recorder.observe(planned, durations(planned.graph, scheduler.cost), now, [now + 0.125])
        now += 0.125
        scheduler.finish_step(planned, StepResult(now))
    return recorder.record


def measured(policy: type[Any], ahead: bool) -> RunRecord:
    scheduler, recorder, _ = loaded(policy)
    now, planned = 0.0, scheduler.plan_step(0.0)
    begun = recorder.begin(planned) if planned else None
    while planned is not None and begun is not None:
        later = later_begun = None
        if ahead:
            scheduler.commit_step(planned)
            later = scheduler.plan_step(now + 0.0625)
            later_begun = recorder.begin(later) if later else None
        seconds = durations(planned.graph, scheduler.cost)
        recorder.observe_measured(begun, busy_seconds(planned.graph.template, seconds), now, now + 0.125)
        now += 0.125
        scheduler.finish_step(planned, StepResult(now))
        if later is None:
            later = scheduler.plan_step(now)
            later_begun = recorder.begin(later) if later else None
        planned, begun = later, later_begun
    return recorder.record


def values(record: RunRecord, but: tuple[str, ...] = ()) -> Any:
    columns = {
        f.name: list(getattr(record.columns, f.name)) for f in fields(StepColumns) if f.name not in but
    }
    gaps = (list(record.itl_values), list(record.itl_counts))
    return columns, gaps, record.busy, record.bytes_h2d, record.bytes_d2h, record.preemptions


@pytest.mark.parametrize("policy", [GpuOnly, Neo])
@pytest.mark.parametrize("ahead", [False, True])
def test_measured_steps_are_recorded_as_priced_ones(policy: type[Any], ahead: bool) -> None:
    expected, found = priced(policy), measured(policy, ahead)
    assert len(found.columns.steps) > 5
    assert sum(found.itl_counts) > 10
    assert values(found) == values(expected)


def test_a_request_that_had_stopped_gets_no_gap_of_the_step_planned_ahead() -> None:
    scheduler, recorder, _ = loaded(GpuOnly)
    first = scheduler.plan_step(0.0)
    assert first is not None
    scheduler.finish_step(first, StepResult(1.0))
    second = scheduler.plan_step(1.0)
    assert second is not None
    decodes = [r for b in second.plan.batches for r in b.decodes]
    begun = recorder.begin(second)
    scheduler.commit_step(second)
    third = scheduler.plan_step(1.5)
    assert third is not None
    ahead = recorder.begin(third)
    stopping = decodes[0]
    assert any(stopping is r for b in third.plan.batches for r in b.decodes)
    recorder.observe_measured(begun, {}, 1.0, 2.0)
    before = sum(recorder.record.itl_counts)
    scheduler.finish_step(second, StepResult(2.0, stopped={stopping.id: FinishReason.STOP}))
    scheduler.commit_step(third)
    recorder.observe_measured(ahead, {}, 2.0, 3.0)
    scheduler.finish_step(third, StepResult(3.0))
    void = sum(r.last_token_s == 3.0 for b in third.plan.batches for r in b.decodes)
    assert sum(recorder.record.itl_counts) - before == void
    assert stopping.last_token_s == 2.0

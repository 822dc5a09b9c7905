"""Playing a workload to the engine: order, clients that leave, interruptions, prompts, the clock."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the engine needs torch")

from tiny_toml import TINY_TOML

from neo.core.errors import InputError, PlanError, PolicyError
from neo.core.plan import StepPlan
from neo.core.request import FinishReason, State
from neo.core.runlog import RunLog
from neo.policy.gpu_only import GpuOnly
from neo.runtime import replay as module
from neo.runtime.engine_config import EngineConfig
from neo.runtime.prompts import random_prompts, read_prompts
from neo.runtime.replay import Replay, ReplayOptions, wait_until, warm_up
from neo.runtime.setup import EngineParts
from neo.workload import TraceRequest, Workload, read_trace

ENDLESS = 3000  # tokens; minutes, if nobody gives up


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> EngineParts:
    path = tmp_path_factory.mktemp("model") / "tiny.toml"
    path.write_text(TINY_TOML)
    blocks = {"kv_gpu_blocks": 400, "kv_cpu_blocks": 100}
    return EngineParts(
        EngineConfig(
            str(path), load_format="dummy", hardware="g4dn.4xlarge", max_model_len=2 * ENDLESS, **blocks
        )
    )


def workload(*rows: TraceRequest | tuple[Any, ...]) -> Workload:
    return Workload("test", tuple(TraceRequest(*r) for r in rows), {"format": "jsonl"})


Make = Callable[..., Replay]


@pytest.fixture
def make(parts: EngineParts) -> Iterator[Make]:
    """Make a Replay of a workload, to be closed at the end of the test."""
    made = []

    def replay(load: Workload, policy: str = "gpu-only", *, policy_object: Any = None, **more: Any) -> Replay:
        engine = parts.engine(parts.system(policy=policy), slices_of=more.pop("slices_of", 0))
        if policy_object is not None:
            engine.scheduler.policy = policy_object
        made.append(Replay(engine, load, random_prompts(load, parts.spec.vocab), **more))
        return made[-1]

    yield replay
    for each in made:
        each.close()


def lines(text: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.getvalue().splitlines()]


def test_requests_enter_in_order_and_not_before_they_arrive(make: Make) -> None:
    load = workload(*((f"r{i}", 50.0 + i * 0.004, 3 + i, 4) for i in range(12)))
    text = io.StringIO()
    record = make(load, log=RunLog(text, {})).run()
    added = [r for r in lines(text) if r["type"] == "add"]
    assert [r["id"] for r in added] == [r.id for r in load.requests]
    assert all(r["t"] >= row.arrival_s for r, row in zip(added, load.requests, strict=True))
    assert [(r.arrival_s, r.generated) for r in record.requests] == [(r.arrival_s, 4) for r in load.requests]
    assert all(r.first_token_s is not None and r.first_token_s > r.arrival_s for r in record.requests)
    assert record.start_s == 50.0  # the clock starts with the first arrival: nobody waits 50 s for it
    assert record.end_s == max(r.finish_s or 0 for r in record.requests)


def test_a_pause_is_no_work(make: Make) -> None:
    """Between two requests far apart nothing is counted as planning."""
    record = make(workload(("a", 0.0, 5, 2), ("b", 0.25, 5, 2))).run()
    columns = record.columns
    second = [s for s in columns.start_s if s >= 0.25]
    assert len(second) == 2
    assert [s for s in columns.end_s if s > second[0]] == list(columns.end_s)[-2:]


def test_bubbles_of_a_measured_run_fill_its_time(make: Make) -> None:
    """What ran, by the record's own account, and what was waited for; slices only of the steps asked for."""
    load = workload(*((f"r{i}", 0.01 * (i // 4), 20, 6) for i in range(12)))
    replay = make(load, "fastdecode", slices_of=10**9, timeline_steps=2, bubbles=True)
    record = replay.run()
    assert record.bubbles is not None
    assert {s.step for s in record.slices} == {0, 1}
    span = max(record.end_s, list(record.columns.end_s)[-1]) - record.start_s
    for resource, parts in record.bubbles.items():
        assert parts["busy"] == pytest.approx(record.busy.get(resource, 0.0), rel=1e-6)
        assert sum(parts.values()) == pytest.approx(span, rel=1e-3)
        assert min(parts.values()) >= -1e-4
    assert record.bubbles["gpu"]["cpu_attention"] > 0
    assert record.bubbles["cpu"]["gpu"] > 0


def test_clients_that_give_up(make: Make) -> None:
    load = workload(
        ("gone", 0.0, 9, ENDLESS, 0, None, 0.0),
        ("impatient", 0.0, 9, ENDLESS, 0, 0.05, None),
        ("hangs-up", 0.0, 9, ENDLESS, 0, None, 0.06),
        ("first-of-both", 0.0, 9, ENDLESS, 0, 0.08, 9.0),
        ("served", 0.0, 9, 2, 0, 60.0, 60.0),
    )
    text = io.StringIO()
    record = make(load, log=RunLog(text, {})).run()
    reasons = [r.finish_reason for r in record.requests]
    timeout, abort = FinishReason.TIMEOUT, FinishReason.ABORT
    assert reasons == [abort, timeout, abort, timeout, FinishReason.LENGTH]
    assert record.requests[0].generated == 0
    assert 0 < record.requests[1].generated < ENDLESS
    ends = [(r["id"], r["reason"]) for r in lines(text) if r["type"] == "end"]
    assert ends == [("gone", abort), ("impatient", timeout), ("hangs-up", abort), ("first-of-both", timeout)]
    assert record.end_s < 60.0  # nobody waits for a time-out of somebody who has been served


def test_a_timeout_for_those_who_name_none(make: Make) -> None:
    load = workload(("own", 0.0, 5, 2, 0, 50.0), ("other", 0.0, 5, ENDLESS))
    record = make(load, options=ReplayOptions(timeout_s=0.05)).run()
    assert [r.finish_reason for r in record.requests] == [FinishReason.LENGTH, FinishReason.TIMEOUT]
    with pytest.raises(InputError, match="--timeout -1"):
        ReplayOptions(timeout_s=-1)
    with pytest.raises(InputError, match="temperature"):
        ReplayOptions(temperature=float("nan"))


def test_what_is_too_long_is_rejected_with_the_numbers(make: Make, parts: EngineParts) -> None:
    load = workload(("fits", 0.0, 5, 2), ("long", 0.0, parts.max_model_len, 1), ("b", 0.01, 5, 2))
    told: list[int] = []
    text = io.StringIO()
    replay = make(load, progress=told.append, log=RunLog(text, {}))
    record = replay.run()
    long = record.requests[1]
    assert (long.state, long.finish_reason) == (State.REJECTED, FinishReason.REJECTED)
    assert "max_model_len = 6000" in long.detail
    assert replay.too_long == 1
    assert told[-1] == 3
    assert {r["id"] for r in lines(text) if r["type"] == "add"} == {"fits", "b"}


def test_what_does_not_fit_in_the_kv_memory_is_rejected_by_the_policy(parts: EngineParts) -> None:
    load = workload(("big", 0.0, 100, 50), ("small", 0.0, 9, 5))
    engine = parts.engine(parts.system(kv_gpu_blocks=4, kv_cpu_blocks=4, policy="gpu-only"))
    record = Replay(engine, load, random_prompts(load, parts.spec.vocab)).run()
    engine.close()
    assert [r.finish_reason for r in record.requests] == [FinishReason.REJECTED, FinishReason.LENGTH]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_seed_same_tokens(make: Make, temperature: float) -> None:
    load = workload(*((str(i), 0.0, 1 + 7 * i, 12) for i in range(8)))
    found = []
    for _ in range(2):
        tokens: dict[str, list[int | None]] = {}
        make(
            load,
            options=ReplayOptions(temperature),
            observe=lambda o, into=tokens: into.setdefault(o.request_id, []).append(o.token),
        ).run()
        found.append(tokens)
    assert found[0] == found[1]
    assert all(len(tokens) == 12 for tokens in found[0].values())  # end tokens do not end anything
    assert len({tuple(tokens) for tokens in found[0].values()}) > 1


def test_an_interruption_leaves_every_request_in_the_record(make: Make) -> None:
    def interrupt(output: Any) -> None:
        if output.request_id == "b":
            raise KeyboardInterrupt

    load = workload(("a", 0.0, 5, 1), ("b", 0.0, 5, 90), ("c", 0.0, 9, 90), ("later", 30.0, 5, 5))
    replay = make(load, observe=interrupt)
    with pytest.raises(KeyboardInterrupt):
        replay.run()
    record = replay.record
    assert [r.id for r in record.requests] == ["a", "b", "c", "later"]
    assert [r.finish_reason for r in record.requests] == [FinishReason.LENGTH, None, None, None]
    assert 0.0 < record.end_s < 30.0


class Lazy:
    def plan(self, view: Any, cost: Any) -> StepPlan:
        return StepPlan()


class Writes(GpuOnly):
    def plan(self, view: Any, cost: Any) -> StepPlan:
        for r in view.gpu_decodes:
            r.arrival_s = -1.0
        return super().plan(view, cost)


class Patient(GpuOnly):
    """Idle at first."""

    def plan(self, view: Any, cost: Any) -> StepPlan:
        return super().plan(view, cost) if view.now > 0.03 else StepPlan()


def test_policies_that_stall_or_write(make: Make) -> None:
    load = workload(("a", 0.0, 5, 3), ("b", 0.05, 5, 3))
    with pytest.raises(PlanError, match="progress"):
        make(load, policy_object=Lazy()).run()
    with pytest.raises(PolicyError, match="changed request a"):
        make(load, policy_object=Writes()).run()
    record = make(load, policy_object=Patient()).run()  # idle with work, asked again at the next arrival
    assert all(r.finish_reason is FinishReason.LENGTH for r in record.requests)
    assert record.columns.start_s[0] >= 0.05


def test_slices_are_on_the_clock_of_the_run(make: Make) -> None:
    load = workload(("a", 1000.0, 40, 3), ("b", 1000.0, 40, 3))
    record = make(load, "fastdecode", slices_of=2).run()
    columns = record.columns
    assert {s.step for s in record.slices} == {0, 1}
    assert {"SCHEDULE", "EMBED", "PRE", "GPU_ATTN", "POST", "HEAD", "CPU_ATTN"} <= {
        s.name for s in record.slices
    }
    for s in record.slices:
        assert columns.start_s[s.step] - 1e-9 <= s.start_s <= s.end_s <= columns.end_s[s.step], s
    layers = {s.layer for s in record.slices if s.name == "PRE"}
    assert layers == {0, 1}


def test_warming_up_leaves_nothing(parts: EngineParts) -> None:
    system = parts.system(policy="neo")
    warm_up(parts, system)
    engine = parts.engine(system)
    assert engine.steps == 0
    assert engine.scheduler.unfinished == 0
    engine.check_integrity()
    engine.close()


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = 0.0, 0.0
        monkeypatch.setattr(module.time, "sleep", self.sleep)

    def clock(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += seconds


def test_waiting_sleeps_but_for_the_last_half_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = Clock(monkeypatch)
    wait_until(clock, 2.0)
    assert 2.0 <= clock.now < 2.0 + 1e-4
    assert 2.0 - 1e-3 < clock.slept < 2.0
    wait_until(clock, 1.0)
    assert clock.now < 2.001


# -- prompts ------------------------------------------------------------------------------------------------


def test_random_prompts_have_the_lengths_and_do_not_depend_on_how_many_there_are() -> None:
    load = workload(*((str(i), 0.0, 1 + 31 * i, 5) for i in range(9)))
    few = Workload("few", load.requests[:3], {})
    one, two, other = (
        random_prompts(load, 1000, 5),
        random_prompts(few, 1000, 5),
        random_prompts(load, 1000, 6),
    )
    assert [len(one[i]) for i in range(9)] == [r.prompt_tokens for r in load.requests]
    assert [one[i] for i in range(3)] == [two[i] for i in range(3)]
    assert one[8] != other[8]
    assert all(0 <= t < 1000 for t in one[8])
    assert type(one[8][0]) is int
    assert abs(np.mean(one[8]) - 499.5) < 80


def test_prompts_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"prompt_tokens": n, "output_tokens": 1, "prompt_token_ids": list(range(n))} for n in (3, 1, 7)]
    path.write_text("\n".join(map(json.dumps, rows)))
    load = read_trace(path, limit=2)
    prompts = read_prompts(path, load, 8)
    assert [prompts[i] for i in range(2)] == [[0, 1, 2], [0]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, r"t.jsonl:2: field prompt_token_ids: missing"),
        ([1], r"t.jsonl:2: field prompt_token_ids: 1 token ids, but prompt_tokens is 2"),
        ([1, 8], r"t.jsonl:2: field prompt_token_ids: 8 is no token of a vocabulary of 8"),
        ([1, -1], r"-1 is no token"),
        ([1, True], r"true is no token"),
        ("ab", r"expected a list of token ids"),
    ],
)
def test_wrong_prompts_of_a_trace(tmp_path: Path, ids: Any, message: str) -> None:
    path = tmp_path / "t.jsonl"
    row = {"prompt_tokens": 2, "output_tokens": 1}
    path.write_text(
        json.dumps(row | {"prompt_token_ids": [0, 1]}) + "\n" + json.dumps(row | {"prompt_token_ids": ids})
    )
    with pytest.raises(InputError, match=message):
        read_prompts(path, read_trace(path), 8)


def test_prompts_of_a_format_without_them(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n5,5\n")
    with pytest.raises(InputError, match=r"only traces in neo's own format .* this is vidur"):
        read_prompts(path, read_trace(path), 8)

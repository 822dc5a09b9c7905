"""A run log replayed: whoever wrote it, its decisions come out again, and what was changed is found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.core.errors import InputError
from neo.core.logreader import LogReader, RequestRow
from neo.core.record import Mode
from neo.core.replayed import Replay
from neo.core.request import FinishReason, Request
from neo.core.runlog import RunLog
from neo.core.scheduler import Planned, StepResult
from neo.core.timing import durations, step_seconds
from neo.core.view import Limits
from neo.sim.header import Substitutes, systems_of
from neo.sim.replay import Journal, replay_log
from neo.sim.rerun import clients_again, rerun
from neo.sim.setup import simulation
from neo.system.config import System, SystemConfig, build_system
from neo.workload import Workload, apply_arrivals, synthetic

CONFIG = SystemConfig(
    policy="neo",
    hardware="g5.16xlarge",
    model="llama-3.1-8b",
    limits=Limits(max_seqs=16, max_batch_tokens=256),
    kv_gpu_blocks=24,
    kv_cpu_blocks=60,
)


def workload(requests: int = 24, seed: int = 0) -> Workload:
    return apply_arrivals(
        synthetic("uniform:4:300", "uniform:1:60", requests, seed), "poisson", rate=4.0, seed=seed
    )


def simulated(path: Path, config: SystemConfig = CONFIG, timeout_s: float | None = None) -> Any:
    """The log of a simulation, and its record."""
    system = build_system(config)
    with path.open("w") as file:
        return simulation(system, workload(), log=RunLog(file, system.describe()), timeout_s=timeout_s).run()


def replayed(path: Path, **instead: Any) -> tuple[Replay, Journal]:
    reader = LogReader(path)
    decided, timed, _ = systems_of(reader.header, f"{path}:1", path.parent, Substitutes(**instead))
    return replay_log(reader, decided, timed.cost, {})


def edited(path: Path, change: Callable[[dict[str, Any]], bool]) -> int:
    """Apply ``change`` to the first line for which it returns True; that line's number."""
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        record = json.loads(line)
        if change(record):
            lines[i] = json.dumps(record)
            path.write_text("\n".join(lines) + "\n")
            return i + 1
    raise AssertionError("no line to change")


# -- logs of the simulator --------------------------------------------------------------------------------


# A link that hides something, and a GPU with room for little: pie streams.
STREAMING = replace(CONFIG, hardware="gh200", policy="pie", policy_options={"min_gain": "0"})


@pytest.mark.parametrize("policy", ["gpu-only", "neo", "fastdecode", "pie", "flexgen"])
@pytest.mark.parametrize("timeout_s", [None, 3.0])
def test_a_simulation_replays_without_any_error(tmp_path: Path, policy: str, timeout_s: float | None) -> None:
    path = tmp_path / "steps.jsonl"
    config = STREAMING if policy == "pie" else replace(CONFIG, policy=policy)
    record = simulated(path, config, timeout_s)
    if policy == "pie":
        assert '"ring":2' in path.read_text()
    replay, journal = replayed(path)
    assert replay.divergence is None
    assert replay.equal == replay.logged == len(record.columns.steps)
    assert replay.steps.predicted == replay.steps.measured  # to the last bit: the same clock
    for r in record.requests:
        again = journal.requests[r.id]
        assert (again.generated, again.finish_reason, again.finish_s) == (
            r.generated,
            r.finish_reason,
            r.finish_s,
        )
        assert (again.first_token_s, again.preemptions) == (r.first_token_s, r.preemptions)


def test_a_run_that_relays_replays_and_its_log_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    limits = Limits(max_batch_tokens=2304)
    config = replace(CONFIG, hardware="h200-16c", limits=limits)
    config = replace(config, kv_gpu_blocks=200, kv_cpu_blocks=10_000)
    system, work = build_system(config), synthetic("around:1000:0.1", "around:100:0.1", 100, seed=0)
    with path.open("w") as file:
        record = simulation(system, work, log=RunLog(file, system.describe())).run()
    assert list(record.columns.mode).count(Mode.RELAYED) > 300
    assert path.read_text().count('"relay_decode":{') > 300
    assert json.loads(path.read_text().splitlines()[0])["limits"]["relay_rows"] == limits.relay_rows
    replay, journal = replay_log(LogReader(path), system, system.cost, {})
    assert replay.divergence is None
    assert replay.equal == replay.logged == len(record.columns.steps)
    assert replay.steps.predicted == replay.steps.measured
    for r in record.requests:
        again = journal.requests[r.id]
        assert (again.finish_s, again.cpu_steps) == (r.finish_s, r.cpu_steps)
    # One less that begins a token is another decision.
    line = edited(path, lambda r: bool(r["type"] == "step" and _one_begins_less(r)))
    divergence = replay_log(LogReader(path), system, system.cost, {})[0].divergence
    assert divergence is not None
    assert (divergence.line, "relay_decode" in divergence.what) == (line, True)


def _one_begins_less(step: dict[str, Any]) -> bool:
    members = step["batches"][0].get("relay_decode", {})
    if "add" not in members:
        return False
    members["n"] -= 1
    members["add"].pop()
    return True


def test_a_ring_of_another_size_is_another_decision(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    simulated(path, STREAMING)
    line = edited(path, lambda r: r["type"] == "step" and r.get("ring") == 2 and not r.update(ring=3))
    divergence = replayed(path)[0].divergence
    assert divergence is not None
    assert (divergence.line, divergence.what) == (line, "ring: the log has 3 buffers, the policy 2")


def test_the_header_alone_rebuilds_a_machine_and_model_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    system = build_system(CONFIG)
    model = replace(system.model, name="mine", layers=7)
    own = build_system(CONFIG).cost.__class__(model, system.hardware)
    mine = System(replace(CONFIG, model="mine"), replace(system.hardware, name="box"), model, own, 24, 60)
    with path.open("w") as file:
        simulation(mine, workload(), log=RunLog(file, mine.describe())).run()
    assert replayed(path)[0].divergence is None
    edited(path, lambda r: r["type"] == "run" and bool(r.pop("model_spec")))
    with pytest.raises(InputError, match=r"steps\.jsonl:1: unknown model 'mine'"):
        replayed(path)


def test_the_requests_again_give_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    record = simulated(path, timeout_s=3.0)
    _, journal = replayed(path)
    rows = {
        r.id: RequestRow(
            i, r.id, r.arrival_s, r.prompt_tokens, r.generated, None, None, None, r.finish_reason
        )
        for i, r in enumerate(record.requests)
    }
    again = rerun(build_system(CONFIG), clients_again(journal, rows, path))
    for a, b in zip(again.requests, record.requests, strict=True):
        assert (a.id, a.generated, a.finish_s, a.finish_reason) == (
            b.id,
            b.generated,
            b.finish_s,
            b.finish_reason,
        )
    assert again.end_s == record.end_s


# -- logs of an engine ------------------------------------------------------------------------------------


class Engine:
    """Drives a scheduler as the engine does, on a clock that random numbers move; writes the same log."""

    def __init__(self, system: System, log: RunLog, rng: Random, ahead: bool) -> None:
        self.scheduler, self.log, self.rng, self.ahead = system.scheduler(), log, rng, ahead
        self.now = 100.0
        self.requests: list[Request] = []
        self.next: tuple[Planned, float, float] | None = None

    def tick(self) -> float:
        self.now += self.rng.expovariate(1e4)
        return self.now

    def add(self, prompt: int, output: int) -> None:
        request = Request(f"r{len(self.requests)}", prompt, output, self.tick())
        self.scheduler.add(request)
        self.log.add(request.arrival_s, request)
        self.requests.append(request)

    def abort(self) -> None:
        request, now = self.rng.choice(self.requests), self.tick()
        if self.scheduler.abort(request.id, now, FinishReason.ABORT):
            self.log.end(now, request.id, FinishReason.ABORT)

    def step(self) -> bool:
        running = self.next or self._plan(None)
        self.next = None
        if running is None:
            self._collect()
            return False
        planned, planned_s, start = running
        seconds = float(step_seconds(planned.graph.template, durations(planned.graph, self.scheduler.cost)))
        end = max(self.now, start) + seconds * self.rng.uniform(0.8, 1.3)
        if self.ahead and self.rng.random() < 0.8:
            self.scheduler.commit_step(planned)
            self.next = self._plan(end)
        if self.rng.random() < 0.2:
            self.abort()
        self.now = max(self.now, end)
        members = [r for b in planned.plan.batches for r in b.decodes]
        live = [r for r in members if r.id in self.scheduler.view.requests]
        stopped = {r.id: FinishReason.STOP for r in live if self.rng.random() < 0.02}
        self.scheduler.finish_step(planned, StepResult(self.now, stopped=stopped))
        ops = {"PRE:0": (1, seconds)}
        self.log.step(planned.plan, planned_s, self.now, start=start, stopped=stopped, ops=ops)
        self._collect()
        return True

    def _plan(self, start: float | None) -> tuple[Planned, float, float] | None:
        now = self.tick()
        planned = self.scheduler.plan_step(now)
        return None if planned is None else (planned, now, now if start is None else max(now, start))

    def _collect(self) -> None:
        for request in self.scheduler.ended:
            if request.finish_reason is FinishReason.REJECTED:
                self.log.end(request.finish_s or 0.0, request.id, FinishReason.REJECTED)
        self.scheduler.ended.clear()


def engine_run(path: Path, policy: str, seed: int, ahead: bool) -> Engine:
    rng = Random(seed)
    system = build_system(replace(CONFIG, policy=policy))
    with path.open("w") as file:
        engine = Engine(system, RunLog(file, system.describe()), rng, ahead)
        for _ in range(30):
            for _ in range(rng.choice((0, 0, 1, 3))):
                engine.add(rng.randint(1, 500), rng.randint(1, 30))  # some can never fit
            engine.step()
        for _ in range(4000):
            if not engine.step() and not engine.scheduler.unfinished:
                break
    assert not engine.scheduler.unfinished
    return engine


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(["gpu-only", "neo", "fastdecode"]),
    ahead=st.booleans(),
)
def test_an_engines_log_replays_whatever_happened_and_whenever(
    tmp_path_factory: pytest.TempPathFactory, seed: int, policy: str, ahead: bool
) -> None:
    path = tmp_path_factory.mktemp("run") / "steps.jsonl"
    engine = engine_run(path, policy, seed, ahead)
    replay, journal = replayed(path)
    assert replay.divergence is None
    assert replay.equal == replay.logged
    for r in engine.requests:
        again = journal.requests[r.id]
        assert (again.generated, again.finish_reason, again.finish_s) == (
            r.generated,
            r.finish_reason,
            r.finish_s,
        )
        assert again.last_token_s == r.last_token_s


def test_planned_ahead_steps_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    engine_run(path, "neo", 7, ahead=True)
    replay, _ = replayed(path)
    assert 0 < replay.planned_ahead < replay.equal
    engine_run(path, "neo", 7, ahead=False)
    assert replayed(path)[0].planned_ahead == 0


def test_operations_are_compared_where_they_were_measured(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    engine_run(path, "gpu-only", 3, ahead=False)
    replay, _ = replayed(path)
    assert list(replay.ops) == [("PRE", 0)]
    times = replay.ops["PRE", 0]
    assert len(times.measured) == replay.logged
    assert all(0 < p < m for p, m in zip(times.predicted, times.measured, strict=True)), "a part of the step"


# -- decisions that differ --------------------------------------------------------------------------------


def _longer_chunk(r: dict[str, Any]) -> bool:
    if r["type"] != "step" or r["t"] < 1.0 or not any("prefill" in b for b in r["batches"]):
        return False
    next(b for b in r["batches"] if "prefill" in b)["prefill"][0][2] -= 1
    return True


def _without_batch(r: dict[str, Any]) -> bool:
    return r["type"] == "step" and len(r["batches"]) == 2 and bool(r["batches"].pop())


def _evicting(r: dict[str, Any]) -> bool:
    return r["type"] == "step" and r["t"] > 1.0 and not r.update(evict=[["0", "recompute"]])


def _repeating(r: dict[str, Any]) -> bool:
    return r["type"] == "step" and r["t"] > 1.0 and not r.update(steps=5000)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_longer_chunk, r"sub-batch 0, prefill: the log has \S+ \d+ \d+ \wpu, the policy \S+ \d+ \d+ \wpu"),
        (_without_batch, "the log has 1 sub-batches, the policy plans 2"),
        (_evicting, "evict: the log has 0 recompute, the policy has no such entry"),
        (_repeating, r"the log runs the step 5000 times, the policy's plan holds for \d+"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "steps.jsonl"
    simulated(path)
    line = edited(path, change)
    replay, journal = replayed(path)
    assert replay.divergence is not None
    assert replay.divergence.line == line
    assert replay.divergence.step == replay.equal + 1 <= replay.logged
    assert re.search(words, replay.divergence.what)
    assert len(replay.steps.measured) == replay.equal
    assert len(journal.adds) == len(workload()), "what the log says of requests is read to its end"


def test_another_policy_diverges_in_words(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    simulated(path)
    replay, _ = replayed(path, policy="fastdecode")
    assert replay.divergence is not None
    assert replay.equal < replay.logged


def test_a_rejection_that_the_policy_does_not_make_diverges(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    engine = engine_run(path, "gpu-only", 3, ahead=False)
    assert any(r.finish_reason is FinishReason.REJECTED for r in engine.requests)
    edited(path, lambda r: r["type"] == "run" and not r.update(gpu_blocks=1000))
    replay, _ = replayed(path)
    assert replay.divergence is not None


# -- a log that cannot be right ---------------------------------------------------------------------------


def _set(kind: str, **values: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda r: r["type"] == kind and not r.update(**values)


def _set_role(role: str, value: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda r: r["type"] == "step" and not r["batches"][0].update({role: value})


def _end_early(r: dict[str, Any]) -> bool:
    return r["type"] == "step" and not r.update(end=r["t"] - 1)


def _headless(r: dict[str, Any]) -> bool:
    return r["type"] == "run" and bool(r["model_spec"].pop("heads"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_end_early, "the step ends at .*, before it starts"),
        (_set("add", prompt=0), "prompt: expected a whole number of at least 1"),
        (_set("add", t="soon"), "t: expected a number, got 'soon'"),
        (_set("step", batches=3), "batches: expected a list, got 3"),
        (_set("step", type="stop"), "unknown type of line 'stop'"),
        (_set("run", format=9), "a run log of format 9; this version"),
        (_set("run", type="x"), "not the header of a run log"),
        (_set("run", gpu_blocks="9"), "gpu_blocks: expected a whole number"),
        (_set("run", limits={"page": 1}), "limits: unknown field 'page'"),
        (_headless, "model_spec: heads is missing"),
        (_set("step", stopped={"zz": "stop"}), "request 'zz' was never added"),
        (_set("step", ops={"PRE": [1, 1]}), "ops: expected KIND:sub-batch"),
        (_set_role("gpu_decode", {"n": 77}), "sub-batch 0, gpu_decode: n is 77, its changes give 0"),
        (_set_role("cpu_decode", {"n": 1, "drop": ["x"]}), "request 'x' cannot leave or join here"),
    ],
)
def test_a_line_that_cannot_be_right_is_named(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "steps.jsonl"
    simulated(path)
    line = edited(path, change)
    with pytest.raises(InputError, match=message) as caught:
        replayed(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(caught.value)


def test_garbage_in_the_middle_is_an_error_and_a_cut_last_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    simulated(path)
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:9]) + '{"type":\n' + "".join(lines[9:]))
    with pytest.raises(InputError, match=r"steps\.jsonl:10: not JSON"):
        replayed(path)
    path.write_text("".join(lines[:9]) + lines[9][:15])
    reader = LogReader(path)
    list(reader)
    assert (reader.cut, reader.line) == (True, 10)
    for nothing in ("", "\n", "[]\n"):
        path.write_text(nothing)
        with pytest.raises(InputError, match=r"steps\.jsonl:1: "):
            LogReader(path)


def test_the_cost_model_of_the_decisions_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    simulated(path)
    edited(path, lambda r: r["type"] == "run" and not r.update(cost_model="profiled:gone.json"))
    with pytest.raises(InputError, match=r"cannot be had .*gone\.json.* --cost profiled:PATH"):
        replayed(path)
    reader = LogReader(path)
    decided, timed, notes = systems_of(reader.header, "x:1", tmp_path, Substitutes(cost_model="roofline"))
    assert decided.cost is timed.cost
    assert len(notes) == 1
    assert notes[0].startswith("decisions replayed with roofline")


def test_another_cost_model_changes_times_and_no_decision(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    simulated(path)
    slow = {"matmul_efficiency": "0.1"}
    replay, _ = replayed(path, cost_model="roofline", cost_options=slow)
    assert replay.divergence is None
    assert sum(replay.steps.predicted) > sum(replay.steps.measured)

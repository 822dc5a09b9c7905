"""Steps that an executor replays in one piece: what operations take, and how a table is held against them."""

from __future__ import annotations

from copy import copy
from inspect import signature
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")

import torch
from engine_builders import VOCAB, make_engine, tiny_model
from tiny_toml import TINY_TOML

from neo.cli.profile import _steps
from neo.core.graph import OpKind, StepGraph
from neo.core.pipeline import compile
from neo.core.plan import StepPlan, SubBatch
from neo.core.request import Tier
from neo.core.view import Limits
from neo.cost.table_schema import check_table
from neo.policy.registry import load_policy
from neo.runtime import cuda_timeline
from neo.runtime.cuda_executor import CudaExecutor
from neo.runtime.cuda_operations import Operations
from neo.runtime.engine_config import EngineConfig
from neo.runtime.executor import Replaying, Sample, StepTimes
from neo.runtime.measure import WHOLE, Bench
from neo.runtime.profile import Profiler
from neo.runtime.profile_samples import Samples
from neo.runtime.profile_steps import between
from neo.runtime.setup import EngineParts
from neo.runtime.step_inputs import StepInputs

LAYERS = 3
EVERY = tuple(range(1, 17))  # nothing is padded
OVERLAP = 0.25  # share of an operation that runs beside the one before it
LAUNCHED = 1000.0  # seconds of every operation of a step that is not replayed


def _attention(kv_tokens: int) -> float:
    """Fixed below as many tokens as there may be sequences: a table has cells that no step can fill."""
    return 5.0 + 0.5 * max(16, kv_tokens)


class Replays:
    """An executor around another that replays up to ``most`` GPU decodes, padded to one of ``sizes``."""

    def __init__(self, inner: Any, vocab: int, most: int, sizes: tuple[int, ...] = EVERY) -> None:
        self.inner, self.tables = inner, inner.tables
        self.vocab, self.most, self.sizes = vocab, most, sizes
        self.launched: list[StepPlan] = []
        self.left_out: list[frozenset[OpKind]] = []

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = self.inner.describe()
        return found

    def close(self) -> None:
        self.inner.close()

    def run(self, plan: StepPlan, graph: StepGraph, *rest: Any) -> StepTimes:
        self.launched.append(plan)
        times: StepTimes = self.inner.run(plan, graph, *rest)
        times.seconds = [LAUNCHED * count for count in graph.template.counts]
        return times

    def replays(self, plan: StepPlan, inputs: StepInputs) -> bool:
        (batch,) = plan.batches
        others = plan.moves or batch.prefill or batch.cpu_decode
        return not others and len(batch.gpu_decode) <= self.most

    def replay(
        self, graph: StepGraph, inputs: StepInputs, sample: Sample, without: frozenset[OpKind] = frozenset()
    ) -> float:
        self.left_out.append(without)
        works = dict(zip(graph.template.kinds, graph.works, strict=True))
        if OpKind.HEAD not in without:
            tokens = sample(torch.zeros(len(inputs.sampled), self.vocab), inputs.sampled)
            assert tokens is not None, "chosen on the device"
        rows = next(n for n in self.sizes if n >= works[OpKind.PRE].tokens)
        alone = {
            OpKind.EMBED: 1.0,
            OpKind.PRE: 2.0 + rows,
            OpKind.GPU_ATTN: _attention(works[OpKind.GPU_ATTN].kv_tokens),
            OpKind.POST: 8.0 + rows,
            OpKind.HEAD: 10.0 + rows,
        }
        per_layer = (OpKind.PRE, OpKind.GPU_ATTN, OpKind.POST)
        order = [OpKind.EMBED, *per_layer * LAYERS, OpKind.HEAD]
        kept = [alone[kind] for kind in order if kind not in without]
        return kept[0] + (1.0 - OVERLAP) * sum(kept[1:])


@pytest.fixture
def executor() -> Any:
    engine = make_engine(tiny_model(LAYERS), load_policy("gpu-only", {}), gpu=12)
    found = Replays(engine.executor, VOCAB, most=8)
    assert isinstance(found, Replaying)
    yield found
    found.close()


def bench_of(executor: Any, **options: Any) -> Bench:
    return Bench(executor, tiny_model(LAYERS).config.spec(), 8, **options)


# -- one step -----------------------------------------------------------------------------------------------


def test_operations_of_a_replayed_step_add_up_to_it(executor: Any) -> None:
    found = bench_of(executor, replayed=True, repeats=2).decode([15, 4], Tier.GPU)
    took = {name: values[0] for name, values in found.items()}
    assert took["PRE:0"] == pytest.approx(0.75 * (2 + 2))
    assert took["GPU_ATTN:0"] == pytest.approx(0.75 * _attention(19))
    assert took["POST:0"] == pytest.approx(0.75 * (8 + 2))
    assert took["HEAD:-1"] == pytest.approx(0.75 * (10 + 2))
    assert took["EMBED:-1"] == pytest.approx(1.0)
    layers = took["PRE:0"] + took["GPU_ATTN:0"] + took["POST:0"]
    assert took[WHOLE] == pytest.approx(took["EMBED:-1"] + LAYERS * layers + took["HEAD:-1"])
    assert all(len(values) == 2 for values in found.values())
    assert not executor.launched


def test_the_whole_step_comes_last_so_that_memory_is_as_it_should_be(executor: Any) -> None:
    bench_of(executor, replayed=True).decode([9, 4], Tier.GPU)
    sizes = [len(kinds) for kinds in executor.left_out]
    assert sizes == sorted(sizes, reverse=True)
    assert executor.left_out[-1] == frozenset()
    assert all(less < more for more, less in pairwise(executor.left_out))


def test_an_operation_that_takes_nothing_is_never_less_than_nothing(executor: Any) -> None:
    """Two measurements differ by noise."""
    executor.replay = lambda graph, inputs, sample, without=frozenset(): 5.0 + 0.1 * len(without)
    found = bench_of(executor, replayed=True).decode([3], Tier.GPU)
    assert min(seconds for values in found.values() for seconds in values) == 0.0


def test_other_steps_are_launched(executor: Any) -> None:
    bench = bench_of(executor, replayed=True)
    for found in (bench.prefill(0, 5), bench.decode([4], Tier.CPU), bench.decode([1] * 9, Tier.GPU)):
        assert WHOLE not in found
        assert found["PRE:0"] == [LAUNCHED]
    assert not executor.left_out
    assert len(executor.launched) == 3
    assert bench.whole([1] * 9) == []


def test_nothing_is_replayed_for_who_did_not_ask(executor: Any) -> None:
    assert bench_of(executor).decode([4], Tier.GPU)["PRE:0"] == [LAUNCHED]
    assert not executor.left_out


def test_a_whole_step_alone_is_one_replay(executor: Any) -> None:
    bench = bench_of(executor, replayed=True)
    assert bench.whole([9, 4]) == bench.decode([9, 4], Tier.GPU)[WHOLE]
    assert executor.left_out[0] == frozenset()
    assert not executor.tables.owners


class Launches:
    """What ``CudaExecutor`` launches operations with, by number of times; it notes which were measured."""

    def __init__(self) -> None:
        self.timeline: Any = object()
        self.launched: list[tuple[bool, frozenset[OpKind]]] = []

    def launch(self, template: Any, without: frozenset[OpKind] = frozenset()) -> None:
        self.launched.append((self.timeline is not None, without))


@pytest.mark.parametrize(("rows", "times"), [(512, 0), (513, 16), (2048, 4), (8192, 1), (9000, 1)])
def test_a_step_of_many_rows_runs_ahead_of_itself_unmeasured(rows: int, times: int) -> None:
    executor = object.__new__(CudaExecutor)
    executor._ops = ops = Launches()  # type: ignore[assignment]
    timeline = ops.timeline
    executor._exercise(None, rows)  # type: ignore[arg-type]
    assert ops.launched == [(False, frozenset({OpKind.HEAD}))] * times
    assert ops.timeline is timeline


# -- the table ----------------------------------------------------------------------------------------------


class Parts(EngineParts):
    """Engines whose executor replays."""

    sizes = EVERY

    def engine(self, system: Any, **options: Any) -> Any:
        engine = super().engine(system, **options)
        if options.get("timed"):
            engine.executor = Replays(engine.executor, self.spec.vocab, 16, self.sizes)
        return engine


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    path = tmp_path_factory.mktemp("model") / "tiny.toml"
    path.write_text(TINY_TOML.replace("layers = 2", f"layers = {LAYERS}"))
    limits = Limits(block_size=16, max_seqs=16, max_batch_tokens=32)
    return Parts(
        EngineConfig(
            str(path),
            load_format="dummy",
            hardware="g4dn.4xlarge",
            limits=limits,
            gpu_threads=1,
            cpu_threads=1,
        )
    )


def profile_of(parts: Parts) -> dict[str, Any]:
    system = parts.system(policy="gpu-only", kv_gpu_blocks=16, kv_cpu_blocks=0)
    document = Profiler(parts, system, quick=True).document("neo profile")
    check_table(document, "it")
    return document


def test_replayed_numbers_win_and_the_table_says_what_steps_it_adds_up_to(parts: Parts) -> None:
    document = profile_of(parts)
    pre = document["tables"]["pre"]
    by_rows = dict(zip(pre["axes"]["tokens"], pre["seconds"], strict=True))
    assert {n: by_rows[n] for n in (1, 4)} == {n: pytest.approx(0.75 * (2 + n)) for n in (1, 4)}
    assert by_rows[32] == LAUNCHED, "chunks are launched"
    steps = document["provenance"]["steps"]
    assert steps["shapes"] > 8, "also between the table's sizes"
    assert steps["median"] == pytest.approx(0.0, abs=1e-9)
    assert steps["worst"] == pytest.approx(0.0, abs=1e-9), "all costs here are linear"
    told = " ".join(_steps(steps).split())
    assert f"operations add up to {steps['shapes']} whole steps of decodes within 0.0% in the median" in told
    assert _steps(None) == ""


def test_rows_of_nobody_are_in_the_table(parts: Parts) -> None:
    """Graphs are padded: 2 and 3 rows take as long as 4."""
    padding = copy(parts)
    padding.sizes = (1, 4, 8, 16)
    document = profile_of(padding)
    pre = document["tables"]["pre"]
    by_rows = dict(zip(pre["axes"]["tokens"], pre["seconds"], strict=True))
    rows = {1: 1, 2: 4, 4: 4, 5: 8, 8: 8, 9: 16, 16: 16}
    assert {n: by_rows[n] for n in rows} == {n: pytest.approx(0.75 * (2 + m)) for n, m in rows.items()}
    assert by_rows[32] == LAUNCHED
    steps = document["provenance"]["steps"]
    assert steps["worst"] == pytest.approx(0.0, abs=1e-9), "held against 3 and 9 rows"


def test_what_interpolation_misses_is_told(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is linear between its sizes, and this attention is not."""
    monkeypatch.setitem(_attention.__globals__, "_attention", lambda kv_tokens: 5.0 + kv_tokens**2)
    steps = profile_of(parts)["provenance"]["steps"]
    assert steps["worst"] > 0.1
    assert steps["kv_tokens"] not in (1, 4, 16, 64, 256)
    assert steps["sequences"] in (3, 9)


def test_only_measured_sizes_are_padded() -> None:
    """Between 8 and 16 what was replayed ends at 12; what is launched is not padded."""
    samples = Samples()
    for n in (1, 2, 4, 6, 8, 12, 16):
        samples.add("pre", (n,), float(n), replayed=n <= 12)
    found = samples.curve("pre", "tokens", (1, 2, 4, 8, 16))
    assert found["axes"]["tokens"] == [1, 2, 3, 4, 5, 6, 8, 12, 16]
    assert found["seconds"] == [1.0, 2.0, 4.0, 4.0, 8.0, 8.0, 8.0, 12.0, 16.0]
    assert samples.curve("pre", "tokens")["axes"]["tokens"] == [1, 2, 4, 6, 8, 12, 16]


def test_samples_of_replayed_steps_count_alone_in_any_order() -> None:
    for order in (("launched", "replayed", "launched"), ("replayed", "launched", "launched")):
        samples = Samples()
        for kind in order:
            samples.add("pre", (4,), 1.0 if kind == "replayed" else 9.0, kind == "replayed")
        samples.add("pre", (8,), 9.0)
        assert (samples.at("pre", (4,)), samples.at("pre", (8,))) == (1.0, 9.0)


def test_sizes_between_those_of_an_axis() -> None:
    assert between((1, 4, 16, 20)) == (2, 8, 17)
    assert between((1, 2, 3)) == ()


# -- the clock ----------------------------------------------------------------------------------------------


class Clock:
    """A device and its host: seconds at which either has done what was asked so far."""

    def __init__(self, host: float, device: float) -> None:
        self.host_s, self.device_s = 0.0, 0.0
        self.cost = host, device  # of one launch
        self.held: list[float] = []

    def sleep(self, cycles: int) -> None:
        self.held.append(cycles)
        self.device_s = max(self.device_s, self.host_s) + cycles * 1e-9

    def launch(self) -> None:
        self.host_s += self.cost[0]
        self.device_s = max(self.device_s, self.host_s) + self.cost[1]

    def synchronize(self) -> None:
        self.host_s = self.device_s = max(self.host_s, self.device_s)


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.at = clock, 0.0

    def record(self, _stream: Any) -> None:
        self.at = max(self.clock.device_s, self.clock.host_s)

    def query(self) -> bool:
        return self.at <= self.clock.host_s

    def synchronize(self) -> None:
        self.clock.synchronize()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize(("host", "tries"), [(1e-3, 1), (5e-3, 2), (1.0, 3)])
def test_the_device_is_held_back_until_the_host_is_ahead(
    monkeypatch: pytest.MonkeyPatch, host: float, tries: int
) -> None:
    """What a step takes has no time of the host in it, unless the host is hopeless."""
    clock = Clock(host, 1e-4)
    monkeypatch.setattr(torch.cuda, "_sleep", clock.sleep)
    monkeypatch.setattr(cuda_timeline, "_event", lambda: Event(clock))
    stream: Any = clock
    found = cuda_timeline.seconds_each(stream, clock.launch)
    assert len(clock.held) == tries
    assert all(b == 2 * a for a, b in pairwise(clock.held))
    assert found == pytest.approx(1e-4) if host < 1.0 else found > 0.4


# -- what is captured ---------------------------------------------------------------------------------------


def test_the_executor_on_a_gpu_replays() -> None:
    """It has what the profiler asks for, where it cannot run, too."""
    for name in ("replay", "replays"):
        asked, has = (signature(getattr(one, name)) for one in (Replaying, CudaExecutor))
        assert has == asked
    assert isinstance(CudaExecutor.sizes, property)


def test_kinds_that_are_left_out_are_not_launched() -> None:
    engine = make_engine(tiny_model(LAYERS), load_policy("gpu-only", {}))
    bench = bench_of(engine.executor)
    request = bench.decoding(3, Tier.GPU)
    graph = compile(StepPlan((SubBatch(gpu_decode=(request,)),)), bench.model, 8)
    engine.close()
    launched: list[tuple[OpKind, int]] = []
    ops: Any = object.__new__(Operations)
    ops._issue = lambda step, layer, _copied: launched.append((step.kind, layer))
    ops.launch(graph.template, frozenset({OpKind.GPU_ATTN, OpKind.HEAD}))
    layers = [(kind, layer) for layer in range(LAYERS) for kind in (OpKind.PRE, OpKind.POST)]
    assert launched == [(OpKind.EMBED, -1), *layers]

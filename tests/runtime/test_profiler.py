"""``neo profile``: the table it makes is one that cost models take, and holds all that a run looks up."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the engine needs torch")

import torch
from engine_builders import add, prompt_of, watch
from tiny_toml import TINY_TOML

from neo import __version__
from neo.core.errors import InputError
from neo.core.graph import OpKind, Work
from neo.core.view import Limits
from neo.cost.loading import load_cost_model
from neo.cost.profiled import Profiled
from neo.cost.table_schema import AXES, check_table
from neo.runtime.engine_config import EngineConfig
from neo.runtime.profile import Profiler
from neo.runtime.profile_grid import Grid, corner, powers, to_corners, within
from neo.runtime.profile_samples import Samples
from neo.runtime.setup import EngineParts

LIMITS = Limits(block_size=16, max_seqs=24, max_batch_tokens=96)
BUDGETS = {
    "roomy": {"kv_gpu_blocks": 16, "kv_cpu_blocks": 80},
    "steps larger than the GPU's memory": {"kv_gpu_blocks": 6, "kv_cpu_blocks": 80},
}
BUDGET = BUDGETS["roomy"]
Document = dict[str, Any]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> EngineParts:
    path = tmp_path_factory.mktemp("model") / "tiny.toml"
    path.write_text(TINY_TOML)
    config = EngineConfig(
        str(path), load_format="dummy", hardware="g4dn.4xlarge", limits=LIMITS, gpu_threads=1, cpu_threads=1
    )
    return EngineParts(config)


@pytest.fixture(scope="module")
def told() -> list[tuple[str, float]]:
    return []


@pytest.fixture(scope="module")
def document(parts: EngineParts, told: list[tuple[str, float]]) -> Document:
    system = parts.system(**BUDGET)
    return Profiler(parts, system, quick=True, progress=lambda *a: told.append(a)).document("neo profile -x")


@pytest.fixture(scope="module")
def small(parts: EngineParts) -> Document:
    """Of the other budget."""
    (name,) = set(BUDGETS) - {"roomy"}
    return Profiler(parts, parts.system(**BUDGETS[name]), quick=True).document("c")


@pytest.fixture
def table(document: Document, tmp_path: Path) -> str:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(document))
    return f"profiled:{path}"


# -- the table ----------------------------------------------------------------------------------------------


def test_cost_models_take_the_table(parts: EngineParts, table: str) -> None:
    cost = load_cost_model(table, parts.spec, parts.hardware, {})
    described = cost.describe()
    assert described["warnings"] == []
    assert described["model"] == "tiny"


def test_every_operation_of_this_executor_has_a_price(document: Document) -> None:
    """Attention, dense work and copies take time; SEND and RECV, which move nothing here, take none."""
    assert set(document["tables"]) == set(AXES) - {"allreduce"}  # one device: nothing to sum over
    cost = Profiled.from_dict(document)
    work = Work(tokens=8, sequences=4, kv_tokens=64, bytes=4096, chunks=((16, 8),))
    prices = {kind: cost.seconds(kind, work) for kind in OpKind}
    nothing = {OpKind.SEND, OpKind.RECV, OpKind.ALLREDUCE}
    assert {kind for kind, seconds in prices.items() if not seconds} == nothing
    assert all(0 < seconds < 1 for kind, seconds in prices.items() if kind not in nothing)


def test_more_work_takes_longer(document: Document) -> None:
    """From one end of a table to the other: in between, a busy machine may disturb the order."""
    for name in ("pre", "post", "gpu_attn_prefill", "gpu_attn_decode", "cpu_attn", "swap_out", "swap_in"):
        seconds = document["tables"][name]["seconds"]
        first, last = (s if isinstance(s, float) else s[i] for s, i in ((seconds[0], 0), (seconds[-1], -1)))
        assert first < last, name


def test_the_table_says_where_it_comes_from(document: Document) -> None:
    about = document["provenance"]
    assert set(about["versions"]) == {"neo", "python", "torch", "kernels"}
    assert about["versions"]["neo"] == __version__
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["kernels"].split()[0] in ("native", "torch")
    assert about["command"] == "neo profile -x"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert about["repeats"] == 4
    assert 0 <= about["spread"] < 10
    assert (document["model"]["name"], document["model"]["layers"], document["tp"]) == ("tiny", 2, 1)
    assert document["dtype"] == "float32"
    contention = document["contention"]
    assert contention["copy_bandwidth"] > 0
    assert contention["source"].startswith("measured: CPU attention alone and beside copies")
    assert 0 < contention["cpu_share_beside_copy"] <= 1
    assert 0 < contention["copy_share_duplex"] <= 1


def test_the_page_names_what_the_table_says_of_itself(document: Document) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/profile.md").read_text(encoding="utf-8")
    section = page.partition("## Provenance\n")[2].partition("## ")[0]
    assert set(re.findall(r"`(\w+)`", section)) - {"cost_model"} == set(document["provenance"])
    measured = page.partition("| table | steps |\n")[2].partition("\n\n")[0]
    named = {name for row in measured.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(document["tables"])


def test_progress_goes_forward(document: Document, told: list[tuple[str, float]]) -> None:
    shares = [share for _, share in told]
    assert all(a <= b for a, b in pairwise(shares))
    assert shares[0] >= 0
    assert shares[-1] <= 1
    assert {"prefill", "sampling", "swaps", "scheduling"} <= {what for what, _ in told}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("policy", ["gpu-only", "neo", "fastdecode"])
def test_a_run_within_the_profiled_budgets_is_priced_without_extrapolation(
    parts: EngineParts, table: str, small: Document, policy: str, budget: str
) -> None:
    """What ran, and what the policy asked for before, in memory that is full most of the time."""
    if budget != "roomy":
        Path(table.partition(":")[2]).write_text(json.dumps(small))
    system = parts.system(policy=policy, cost_model=table, **BUDGETS[budget])
    engine = parts.engine(system)
    watched = watch(engine)
    rnd = Random(2)
    for i in range(40):
        add(engine, f"r{i}", prompt_of(rnd.randint(1, 40), i), rnd.randint(1, 24))
    while engine.has_work:
        engine.step()
    engine.close()
    fresh = load_cost_model(table, parts.spec, parts.hardware, {})
    for ran in watched.ran:
        for kind, work in zip(ran.graph.template.kinds, ran.graph.works, strict=True):
            fresh.seconds(kind, work)
    assert fresh.describe()["warnings"] == []
    asked = system.cost.describe()["warnings"]
    if policy == "neo":  # its picture of a steady state has all decodes beside a full budget of prompts
        ending = 6  # prompts of 16 to 20 tokens that end in such a step, with a row each
        beyond = {"sequences": ending, "tokens": ending + system.config.limits.max_seqs}
        for warning in asked:
            found = re.search(r", (\w+): \d+ .* above the grid's last value (\d+), up to (\d+)$", warning)
            assert found, warning
            assert int(found[3]) <= int(found[2]) + beyond[found[1]], warning
    else:
        assert asked == []


# -- budgets ------------------------------------------------------------------------------------------------


def test_without_a_host_tier_nothing_of_it_is_measured(parts: EngineParts) -> None:
    system = parts.system(policy="gpu-only", kv_gpu_blocks=4, kv_cpu_blocks=0)
    document = Profiler(parts, system, quick=True).document("c")
    assert set(document["tables"]) == {
        *("schedule", "embed", "pre", "post", "head", "gpu_attn_prefill", "gpu_attn_decode")
    }
    check_table(document, "it")


def test_the_least_that_can_be_profiled(parts: EngineParts) -> None:
    system = parts.system(policy="neo", kv_gpu_blocks=3, kv_cpu_blocks=1)
    check_table(Profiler(parts, system, quick=True).document("c"), "it")
    with pytest.raises(InputError, match="at least 2 GPU KV blocks of 16 tokens, not 1: give more"):
        Profiler(parts, parts.system(policy="neo", kv_gpu_blocks=1, kv_cpu_blocks=1))


@pytest.mark.parametrize("gpu", [32, 48, 160, 4096])
@pytest.mark.parametrize("cpu", [0, 16, 320, 65536])
@pytest.mark.parametrize("quick", [False, True])
def test_grids_ascend_to_what_budgets_allow(gpu: int, cpu: int, quick: bool) -> None:
    grid = Grid.for_budget(Limits(block_size=16, max_seqs=32, max_batch_tokens=512), gpu, cpu, quick)
    for name in Grid.__dataclass_fields__:
        values = getattr(grid, name)
        assert all(a < b for a, b in pairwise(values)), name
        if name not in ("beyond", "starts", "moved", "spilled", "streamed"):
            assert len(values) >= 2
    assert grid.gpu_kv[-1] == gpu
    assert grid.starts[-1] < gpu
    assert max((*grid.moved, *grid.spilled, *grid.streamed), default=0) <= max(0, min(gpu, cpu))
    if cpu:
        assert grid.cpu_kv[-1] == cpu
    assert grid.tokens[-1] <= 512
    assert all(grid.tokens[-1] < n <= min(512, 2 * gpu + 32) for n in grid.beyond)
    assert set(Grid.for_budget(Limits(16, 32, 512), gpu, cpu, True).starts) <= set(grid.starts)
    short = Grid.for_budget(Limits(16, 32, 512), gpu, cpu, quick, longest=100)
    assert max((*short.starts, *short.streamed)) < 100, "no request has a longer prefix"
    assert short.gpu_kv == grid.gpu_kv


def test_powers() -> None:
    assert powers(1, 64, 4) == (1, 4, 16, 64)
    assert powers(1, 60, 4) == (1, 4, 16, 60)
    assert powers(1, 1, 4) == (1, 2), "the table's format wants two"
    assert within(16, 100, 8) == (16, 100)
    assert within(16, 16, 8) == (16,)
    assert within(16, 15, 8) == within(0, 9, 8) == ()


def test_tables_go_on_to_the_corners_of_a_policys_cells() -> None:
    """As a look-up beyond the table would: with the last slope, never downwards."""
    entry = {
        "axes": {"sequences": [1, 3], "kv_tokens": [1, 4]},
        "seconds": [[1.0, 4.0], [2.0, 4.5]],
    }
    found = to_corners(entry)
    assert found["axes"] == {"sequences": [1, 3, 4], "kv_tokens": [0, 1, 4, 8]}
    assert found["seconds"] == [[1.0, 1.0, 4.0, 8.0], [2.0, 2.0, 4.5, 8.0], [2.5, 2.5, 4.75, 8.0]]
    assert [corner(n) for n in (1, 3, 4, 255, 256)] == [2, 4, 8, 256, 512]


# -- samples ------------------------------------------------------------------------------------------------


def test_tables_hold_means_without_the_least_and_the_largest() -> None:
    samples = Samples()
    for seconds in (2.0, 1.0, 2.0, 4.0, 4.0, 900.0):
        samples.add("post", (4,), seconds)
    for seconds in (2.0, 4.0):
        samples.add("post", (8,), seconds)
    assert samples.curve("post", "tokens")["seconds"] == [3.0, 3.0]
    samples = Samples()
    for seconds in (5.0, 1.0, 100.0):
        samples.add("pre", (4,), seconds)
    samples.add("pre", (1,), 2.0)
    assert samples.curve("pre", "tokens") == {"axes": {"tokens": [1, 4]}, "seconds": [2.0, 5.0]}
    assert samples.spread() == pytest.approx((52.5 - 3.0) / 5.0)


def test_a_size_that_could_not_be_measured_continues_its_neighbours() -> None:
    samples = Samples()
    for at, seconds in {(1, 0): 1.0, (1, 8): 3.0, (4, 0): 2.0}.items():
        samples.add("t", at, seconds)
    found = samples.surface("t", {"length": (1, 4), "start": (0, 8)})
    assert found["seconds"] == [[1.0, 3.0], [2.0, 4.0]]


def test_where_less_work_took_longer_the_two_meet_half_way() -> None:
    samples = Samples()
    for size, seconds in {1: 4.0, 2: 2.0, 4: 3.0, 8: 5.0}.items():
        samples.add("t", (size,), seconds)
    assert samples.curve("t", "bytes")["seconds"] == [3.0, 3.0, 3.5, 5.0]
    assert samples.raised == pytest.approx(1.0 / 3.0)  # from 2 to 3


@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=2, max_size=5))
def test_a_surface_never_falls_and_is_as_near_to_what_was_measured_as_any_that_does_not(
    rows: list[list[int]],
) -> None:
    samples = Samples()
    for x, row in enumerate(rows):
        for y, seconds in enumerate(row):
            samples.add("t", (x, y), float(seconds))
    axes = {"sequences": tuple(range(len(rows))), "kv_tokens": (0, 1, 2)}
    found = np.asarray(samples.surface("t", axes)["seconds"])
    assert (np.diff(found, axis=0) >= 0.0).all()
    assert (np.diff(found, axis=1) >= 0.0).all()
    measured = np.asarray(rows, dtype=float)
    falls = [
        less - more
        for (x, y), less in np.ndenumerate(measured)
        for (v, w), more in np.ndenumerate(measured)
        if v >= x and w >= y
    ]
    # Two entries that fall by d cannot both be nearer than d / 2 to any table that does not.
    assert np.abs(found - measured).max() == pytest.approx(max(falls) / 2.0)


def test_a_single_size_gets_a_second_point() -> None:
    samples = Samples()
    samples.add("stream", (64,), 3.0)
    assert samples.curve("stream", "bytes") == {"axes": {"bytes": [0, 64]}, "seconds": [0.0, 3.0]}

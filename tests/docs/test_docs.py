"""The documentation is true: its code runs, its tables are those of the code, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Drive, Pure, make_scheduler, toy_model

from neo.core.errors import PlanError
from neo.core.plan import Evict, KVMove, PrefillChunk, Reject, StepPlan, SubBatch
from neo.core.plugins import load_object
from neo.core.request import Request, Tier
from neo.core.scheduler import Scheduler, StepResult
from neo.core.validate import RULES, check
from neo.core.view import Limits
from neo.cost.loading import load_cost_model
from neo.cost.presets import load_hardware, load_model
from neo.policy.registry import policy_class, policy_names, policy_options

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TUTORIAL = (DOCS / "write-a-policy.md").read_text(encoding="utf-8")
FCFS = "docs/examples/fcfs.py:FCFS"
SMALL = ["--prompt-lengths", "uniform:20:900", "--output-lengths", "uniform:1:120", "--requests", "60"]
TIGHT = ["--rate", "4", "--kv-gpu-blocks", "80", "--kv-cpu-blocks", "400"]


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def containing(found: list[str], text: str) -> str:
    """The one block with ``text`` in it."""
    (block,) = [b for b in found if text in b]
    return block


def tables(page: str) -> list[list[list[str]]]:
    """Every table: rows of cells, the header first, without the rule below it."""
    runs = re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE)
    split = [[[c.strip() for c in row[1:-1].split(" | ")] for row in run.splitlines()] for run in runs]
    return [[rows[0], *rows[2:]] for rows in split]


def neo(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "neo", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def simulate(*arguments: str, cwd: Path = ROOT) -> list[dict[str, Any]]:
    done = neo("simulate", "--json", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def everybody_ended(summary: dict[str, Any], requests: int = 60) -> bool:
    counts = summary["requests"]
    return counts["submitted"] == requests == counts["completed"] + counts["rejected"]


# -- the tutorial -------------------------------------------------------------------------------------------


def test_every_python_block_of_the_tutorial_compiles() -> None:
    found = blocks(TUTORIAL, "python")
    assert len(found) == 3
    for block in found:
        compile(block, "docs/write-a-policy.md", "exec")


def test_the_fcfs_shown_is_the_fcfs_shipped() -> None:
    file = ROOT / FCFS.partition(":")[0]
    assert blocks(TUTORIAL, "python")[0].encode() == file.read_bytes()
    assert len(file.read_text().splitlines()) <= 36


@pytest.mark.parametrize("gpu_blocks", [80, 20])
def test_fcfs_serves_everybody_beside_the_built_in_policies(gpu_blocks: int) -> None:
    tight = ["--rate", "4", "--kv-gpu-blocks", str(gpu_blocks), "--kv-cpu-blocks", "400"]
    fcfs, gpu_only, offload = simulate("-p", FCFS, "-p", "gpu-only", "-p", "neo", *SMALL, *tight)
    assert everybody_ended(fcfs)
    assert everybody_ended(gpu_only)
    assert everybody_ended(offload)
    assert fcfs["requests"] == gpu_only["requests"]
    if gpu_blocks == 80:
        assert fcfs["requests"]["completed"] == 60
        assert fcfs["metrics"]["preemptions"] > 0
    else:
        assert fcfs["requests"]["rejected"] > 0


@given(
    load=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(1, 14), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    gpu=st.integers(1, 14),
    layers=st.integers(1, 4),
    block=st.integers(1, 6),
    seqs=st.integers(1, 8),
    tokens=st.integers(1, 40),
)
@settings(max_examples=100)
def test_fcfs_breaks_no_invariant(
    load: Any, gpu: int, layers: int, block: int, seqs: int, tokens: int
) -> None:
    policy = Pure(load_object(str(DOCS / "examples/fcfs.py") + ":FCFS", "policy"))
    limits = {"block_size": block, "max_seqs": seqs, "max_batch_tokens": tokens}
    drive = Drive(make_scheduler(policy, gpu=gpu, cpu=0, model=toy_model(layers), **limits))
    for at, prompt, output, gives_up in sorted(load):
        while drive.steps < at and drive.step():
            pass
        request = drive.add(prompt, output)
        if gives_up and prompt % 4 == 0:
            drive.abort(request)
    drive.drain(12 * 44 * 12)
    drive.check_end()


def test_the_debugging_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = containing(blocks(TUTORIAL, "python"), "SystemConfig")
    names: dict[str, Any] = {}
    exec(block.replace("docs/examples", str(DOCS / "examples")), names)
    assert all(r.done for r in names["record"].requests)
    assert names["record"].preemptions > 0
    assert capsys.readouterr().out


def test_the_options_example_keeps_steps_short(tmp_path: Path) -> None:
    (tmp_path / "paced.py").write_text(containing(blocks(TUTORIAL, "python"), "class Paced"))
    listing = neo("policies", "paced.py:Paced", cwd=tmp_path)
    assert "step_s" in listing.stdout
    lengths = ("--prompt-lengths", "azure-conv", "--output-lengths", "azure-conv", "--requests", "60")
    command = ("-p", "gpu-only", "-p", "paced.py:Paced", *lengths, "--rate", "1", "--kv-gpu-blocks", "600")
    plain, paced = simulate(*command, "--policy-opt", "step_s=0.1", cwd=tmp_path)
    assert everybody_ended(plain)
    assert everybody_ended(paced)
    assert paced["policy_options"] == {"step_s": "0.1"}
    assert paced["metrics"]["itl_s"]["p99"] < 0.1 < plain["metrics"]["itl_s"]["p99"]
    again = simulate(*command, "--policy-opt", "paced.py:Paced.step_s=0.1", cwd=tmp_path)
    assert again[1]["metrics"] == paced["metrics"]


def test_the_repeat_example_gives_the_same_numbers(tmp_path: Path) -> None:
    (diff,) = blocks(TUTORIAL, "diff")
    source = (DOCS / "examples/fcfs.py").read_text()
    gone = "".join(line[1:] for line in diff.splitlines(True) if line.startswith("-"))
    come = "".join(line[1:] for line in diff.splitlines(True) if line.startswith("+"))
    assert source.count(gone) == 1
    (tmp_path / "stepped.py").write_text(source)
    (tmp_path / "repeated.py").write_text(source.replace(gone, come))
    stepped, repeated = simulate(
        "-p", "stepped.py:FCFS", "-p", "repeated.py:FCFS", *SMALL, *TIGHT, "--seed", "3", cwd=tmp_path
    )
    assert stepped["metrics"] == repeated["metrics"]
    assert stepped["metrics"]["preemptions"] > 0


def test_a_policy_is_found_by_its_entry_point(tmp_path: Path) -> None:
    (entry,) = blocks(TUTORIAL, "toml")
    name, value = re.findall(r'^(\w+) = "(.+)"$', entry, re.MULTILINE)[0]
    package, _, module = value.partition(":")[0].partition(".")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    source = containing(blocks(TUTORIAL, "python"), "class Paced")
    (tmp_path / package / f"{module}.py").write_text(source)
    info = tmp_path / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[neo.policies]\n{name} = {value}\n")
    listing = neo("policies", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert listing.returncode == 0, listing.stderr
    assert name in listing.stdout


# -- the rules ----------------------------------------------------------------------------------------------


def test_the_rules_are_those_of_the_code() -> None:
    (rules,) = [t for t in tables(TUTORIAL) if t[0][0] == "rule"]
    assert {rule.strip("`"): text for rule, text in rules[1:]} == RULES


class Told:
    """Returns the plan it was told."""

    staging_layers = 1
    next = StepPlan()

    def plan(self, view: Any, cost: Any) -> StepPlan:
        return self.next


def broken_plans(scheduler: Scheduler, policy: Told) -> dict[str, StepPlan]:
    """For each rule a plan that breaks it; ``a`` decodes on the GPU, ``b`` on the CPU, ``p`` prefills."""
    sizes = {"a": 1000, "b": 500, "p": 1000, "w": 300, "x": 300, "big": 2000, "c": 10}
    a, b, p, w, x, big, c = (Request(name, tokens, 100) for name, tokens in sizes.items())
    for request in (a, b, p, w, big, c):
        scheduler.add(request)
    begin = (PrefillChunk(a, 0, 1000), PrefillChunk(b, 0, 500, Tier.CPU), PrefillChunk(p, 0, 512))
    begin += (PrefillChunk(c, 0, 10, Tier.CPU),)
    policy.next = StepPlan((SubBatch(begin),))
    planned = scheduler.plan_step(0.0)
    assert planned is not None
    scheduler.finish_step(planned, StepResult(1.0))
    b.preemptions = 1

    def one(*prefill: PrefillChunk, gpu: tuple[Request, ...] = (), cpu: tuple[Request, ...] = ()) -> StepPlan:
        return StepPlan((SubBatch(prefill, gpu, cpu),))

    step = SubBatch(gpu_decode=(a,))
    return {
        "batches": StepPlan((SubBatch(cpu_decode=(b,)), step)),
        "known": one(gpu=(x,)),
        "roles": one(gpu=(a, a)),
        "state": one(gpu=(a, w)),
        "chunk": one(PrefillChunk(p, 0, 488)),
        "residency": one(gpu=(a, b)),
        "token-budget": one(PrefillChunk(big, 0, 2000), PrefillChunk(w, 0, 300)),
        "seq-budget": one(
            PrefillChunk(p, 512, 1), PrefillChunk(w, 0, 1), PrefillChunk(big, 0, 1), gpu=(a,), cpu=(b,)
        ),
        "gpu-blocks": one(PrefillChunk(big, 0, 2000)),
        "cpu-blocks": one(PrefillChunk(big, 0, 2000, Tier.CPU)),
        "relay": StepPlan((SubBatch(cpu_decode=(b,), relay_decode=(c,)),)),
        "staging": one(PrefillChunk(w, 0, 300, Tier.CPU)),
        "moves": StepPlan((step,), moves=(KVMove(b, Tier.CPU),)),
        "evict": StepPlan((step,), evict=(Evict(w),)),
        "preemption-bound": StepPlan((step,), evict=(Evict(b),)),
        "reject": StepPlan((step,), reject=(Reject(p, "too long"),)),
        "progress": StepPlan(evict=(Evict(p),)),
        "repeat": StepPlan((SubBatch((PrefillChunk(p, 512, 100),)),), repeat=8),
    }


def test_the_messages_are_those_of_the_code() -> None:
    model, hardware = load_model("llama-3.1-8b"), load_hardware("g5.16xlarge")
    limits = Limits(max_seqs=4, max_batch_tokens=2048, max_preemptions=1)
    cost, policy = load_cost_model("roofline", model, hardware), Told()
    scheduler = Scheduler(policy, cost, model, hardware, limits, gpu_blocks=132, cpu_blocks=64)
    plans = broken_plans(scheduler, policy)
    assert list(plans) == list(RULES)
    gpu, messages = scheduler.view.pools[Tier.GPU], []
    for rule, plan in plans.items():
        if rule == "staging":
            gpu.staging_blocks = gpu.staging_layers = 0
        with pytest.raises(PlanError) as caught:
            check(scheduler.view, plan)
        assert caught.value.rule == rule
        messages.append(str(caught.value))
        gpu.staging_blocks, gpu.staging_layers = gpu.blocks, 1
    assert containing(blocks(TUTORIAL, "text"), "invalid plan").splitlines() == messages


# -- the other pages ----------------------------------------------------------------------------------------


def test_the_option_tables_are_those_of_the_code() -> None:
    page = (DOCS / "policies.md").read_text(encoding="utf-8")
    shown = [t[1:] for t in tables(page) if t[0] == ["option", "type", "default", "meaning"]]
    declared = [policy_options(policy_class(name)) for name in policy_names()]
    assert shown == [[[f"`{o.name}`", o.type, o.default, o.help] for o in options] for options in declared]


@pytest.mark.parametrize("page", ["policies.md", "simulator.md"])
def test_python_of_the_other_pages_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for block in blocks(text, "python"):
        exec(block, {})
    printed = capsys.readouterr().out
    assert printed
    for said in blocks(text, "text"):
        assert said in printed


def test_the_pictures_can_be_made_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = [sys.executable, str(DOCS / "images/make_images.py"), str(tmp_path)]
    subprocess.run(script, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["pipelined-step.png", "pipelined-step.svg"]
    for name in made:
        assert (DOCS / "images" / name).stat().st_size < 150_000


PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target == ROOT or ROOT in target.parents, f"{page.name}: {link} leaves the project"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_name_no_absolute_path(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(work|home|tmp|root)/", page.read_text(encoding="utf-8"))

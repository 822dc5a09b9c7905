"""What goes wrong is said in one line that names where; an engine that may hold wrong KV never goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")

import torch
from engine_builders import VOCAB, Collected, add, make_engine, prompt_of, run, tiny_model, watch
from support import ToyCost
from tiny_toml import TINY_TOML

from neo.core.errors import InputError, PlanError, PolicyError
from neo.core.plan import KVMove, PrefillChunk, StepPlan, SubBatch
from neo.core.request import FinishReason, Tier
from neo.core.view import Limits
from neo.policy.gpu_only import GpuOnly
from neo.policy.registry import load_policy
from neo.runtime import cpu_library, device, kv_memory
from neo.runtime.backend_torch import TorchJob
from neo.runtime.engine import Engine
from neo.runtime.engine_config import EngineConfig
from neo.runtime.errors import EngineError
from neo.runtime.setup import EngineParts

KINDS = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            not cpu_library.available(), reason="the CPU kernels are not built here (make kernels)"
        ),
    ),
    "torch",
]
AHEAD = pytest.mark.parametrize("ahead", [False, True])
LAYERS = 3


def busy(policy: str = "fastdecode", **more: Any) -> Engine:
    """An engine in the middle of its work: some requests decode, most prompts are done."""
    engine = make_engine(
        tiny_model(LAYERS), load_policy(policy, {}), gpu=30, cpu=60, cost=ToyCost(cpu=0.02), **more
    )
    for i in range(3):
        add(engine, f"r{i}", prompt_of(11 + i, i), 20)
    for _ in range(4):
        engine.step()
    return engine


def step_on(engine: Engine) -> None:
    for _ in range(50):
        engine.step()


def broken(engine: Engine, *parts: str) -> str:
    """Step until the engine breaks; it says ``parts``, and at every further step again."""
    with pytest.raises(EngineError) as told:
        step_on(engine)
    message = str(told.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    for _ in range(2):
        with pytest.raises(EngineError, match="the engine cannot go on: ") as again:
            engine.step()
        assert message in str(again.value)
    engine.close()
    engine.close()  # nothing hangs, and nobody is harmed by a second time
    return message


class Raises:
    """A backend whose ``which`` job raises in its worker's thread when it is the ``count``-th of its kind."""

    def __init__(self, inner: Any, which: str, count: int) -> None:
        self.inner, self.which, self.left = inner, which, count

    def __getattr__(self, name: str) -> Any:
        if name != self.which:
            return getattr(self.inner, name)
        return self.job

    def job(self, *arguments: Any) -> TorchJob:
        job: TorchJob = getattr(self.inner, self.which)(*arguments)
        self.left -= 1
        if self.left:
            return job

        def die() -> None:
            raise RuntimeError("the thread met its end")

        return TorchJob(job.kind, (*job.parts, die))


# -- kernels and their threads ------------------------------------------------------------------------------


@AHEAD
def test_a_kernel_that_dies_in_its_thread(ahead: bool) -> None:
    engine = busy(kind="torch", ahead=ahead)
    stub: Any = Raises(engine.executor.backend, "attention_job", LAYERS + 2)  # layer 1 of the step after next
    engine.executor.backend = stub
    broken(engine, "CPU_ATTN of layer 1, sub-batch", "attention job: the thread met its end")


def test_a_copy_that_dies_in_its_thread() -> None:
    engine = make_engine(tiny_model(LAYERS), Swaps(), gpu=30, cpu=30, kind="torch")
    add(engine, "a", prompt_of(20), 9)
    add(engine, "b", prompt_of(9), 9)
    stub: Any = Raises(engine.executor.backend, "copy_job", 3)
    engine.executor.backend = stub
    broken(engine, "SWAP_OUT of layer 2", "copy job: the thread met its end")


class Swaps(GpuOnly):
    """Sends the first of two decodes to the host."""

    def plan(self, view: Any, cost: Any) -> StepPlan:
        if len(view.gpu_decodes) == 2 and not view.prefilling:
            first, second = view.gpu_decodes
            return StepPlan((SubBatch(gpu_decode=(second,)),), (KVMove(first, Tier.CPU),))
        return super().plan(view, cost)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("policy", "tier", "message"),
    [
        ("fastdecode", "cpu", "CPU_ATTN of layer 1, sub-batch"),
        ("gpu-only", "gpu", "of layer 1, sub-batch 0,"),
    ],
)
def test_a_status_that_the_kernels_return(kind: str, policy: str, tier: str, message: str) -> None:
    """Block tables that point nowhere: the kernels look before they read, and say so."""
    engine = busy(policy, kind=kind)
    getattr(engine.executor.tables, tier).tables[1] = 1 << 20
    broken(engine, message, "1048576")


def test_an_operation_of_the_gpu_s_thread_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = busy()
    post, calls = engine.executor.model.post, []

    def out_of_memory(layer: int, *rest: Any) -> Any:
        calls.append(layer)
        if layer == 2 and len(calls) > LAYERS:
            raise MemoryError("no room for 7 GiB")
        return post(layer, *rest)

    monkeypatch.setattr(engine.executor.model, "post", out_of_memory)
    broken(engine, "POST of layer 2, sub-batch", "no room for 7 GiB")


@AHEAD
def test_a_bug_passes_through_and_the_engine_stays_down(ahead: bool) -> None:
    """It is no fault of the device: its traceback is worth more than one line. But nothing may go on."""
    engine = busy(ahead=ahead)

    def bug(plan: StepPlan) -> None:
        raise KeyError("never heard of")

    watch(engine, bug)
    with pytest.raises(KeyError, match="never heard of"):
        step_on(engine)
    with pytest.raises(EngineError, match=r"cannot go on: step \d+ failed: KeyError: 'never heard of'"):
        engine.step()
    engine.close()


# -- what a request may ask for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e38},
        {"min_tokens": 3, "stop_token_ids": tuple(range(VOCAB))},
    ],
)
def test_no_request_can_take_the_engine_down(params: dict[str, Any]) -> None:
    """What would leave no finite logit is refused when it comes: its step is others' step too."""
    engine = make_engine(tiny_model(), load_policy("gpu-only", {}), gpu=40)
    add(engine, "well-behaved", prompt_of(9), 6)
    with pytest.raises(InputError):
        add(engine, "hostile", list(range(VOCAB)), 6, **params)
    found = run(engine)
    assert found.reasons == {"well-behaved": FinishReason.LENGTH}
    engine.close()


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_extremes_that_are_taken_leave_logits_finite(penalty: float) -> None:
    engine = make_engine(tiny_model(), load_policy("gpu-only", {}), gpu=40)
    bias = dict.fromkeys(range(0, VOCAB, 2), 100.0) | dict.fromkeys(range(1, VOCAB, 2), -100.0)
    for name, sign in (("a", 2.0), ("b", -2.0)):
        more: dict[str, Any] = {"presence_penalty": sign, "frequency_penalty": sign, "logit_bias": bias}
        add(engine, name, list(range(VOCAB)), 6, repetition_penalty=penalty, temperature=1e-4, **more)
    assert set(run(engine).reasons.values()) == {FinishReason.LENGTH}
    engine.close()


# -- policies -----------------------------------------------------------------------------------------------


class Moody(GpuOnly):
    """Asked for the n-th time, does something else."""

    def __init__(self, when: int, instead: Callable[[Any], Any]) -> None:
        super().__init__()
        self.left, self.instead = when, instead

    def plan(self, view: Any, cost: Any) -> StepPlan:
        self.left -= 1
        if not self.left:
            found: StepPlan = self.instead(view)
            return found
        return super().plan(view, cost)


def raises(view: Any) -> StepPlan:
    raise ZeroDivisionError("lunch")


def nowhere(view: Any) -> StepPlan:
    return StepPlan((SubBatch(cpu_decode=view.gpu_decodes),))


def too_much(view: Any) -> StepPlan:
    (first, *_) = view.waiting or view.gpu_decodes
    return StepPlan((SubBatch((PrefillChunk(first, 0, 10_000),)),))


@AHEAD
@pytest.mark.parametrize(
    ("instead", "error", "message"),
    [
        (raises, PolicyError, "policy Moody raised ZeroDivisionError at test_engine_faults.py:[0-9]+: lunch"),
        (nowhere, PlanError, "invalid plan, rule"),
        (too_much, PlanError, "invalid plan, rule"),
        (lambda view: "a plan", PolicyError, "returned str, not a StepPlan"),
        (lambda view: StepPlan(("a",)), PolicyError, "malformed plan"),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize("when", [1, 4])
def test_a_policys_error_leaves_the_engine_usable(
    ahead: bool, instead: Any, error: type[Exception], message: str, when: int
) -> None:
    """Nothing of the bad plan was applied: asked again, the same tokens come out as without it."""

    def serve(policy: Any) -> tuple[Collected, list[str]]:
        engine = make_engine(tiny_model(), policy, gpu=30, ahead=ahead)
        for i in range(3):
            add(engine, f"r{i}", prompt_of(6 + i, i), 8)
        found, errors = Collected(), []
        while engine.has_work:
            try:
                found.take(engine.step())
            except error as told:
                errors.append(str(told))
        engine.check_integrity()
        engine.close()
        return found, errors

    expected, none = serve(GpuOnly())
    found, errors = serve(Moody(when, instead))
    assert none == []
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert found.tokens == expected.tokens
    assert found.reasons == expected.reasons


# -- memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def preset(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_TOML)
    return str(path)


def parts_of(model: str, **more: Any) -> EngineParts:
    fields: dict[str, Any] = {"load_format": "dummy", "hardware": "g4dn.4xlarge", "policy": "gpu-only"}
    return EngineParts(EngineConfig(model, **{**fields, **more}))


def test_kv_memory_that_does_not_fit_is_refused_with_the_numbers(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tier would fit, both do not; nothing has been reserved when it is said."""
    parts = parts_of(preset, kv_gpu_blocks=3000, kv_cpu_blocks=3000, limits=Limits(block_size=16))
    block = 16 * parts.spec.kv_bytes_per_token
    reserved: list[int] = []
    monkeypatch.setattr(device, "available_bytes", lambda: 5000 * block)
    monkeypatch.setattr(kv_memory.mmap, "mmap", lambda _fd, size: reserved.append(size))
    with pytest.raises(InputError) as told:
        parts.engine(parts.system())
    for number in ("(3000 blocks)", f"{6000 * block} bytes", f"{5000 * block} bytes", "give fewer blocks"):
        assert number in str(told.value)
    assert reserved == []


def test_staging_buffers_count(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`neo` takes its staging layer out of the GPU's blocks: the whole is what was asked for, not more."""
    parts = parts_of(preset, kv_gpu_blocks=90, kv_cpu_blocks=10, policy="neo")
    block = 16 * parts.spec.kv_bytes_per_token
    monkeypatch.setattr(device, "available_bytes", lambda: 100 * block)
    engine = parts.engine(parts.system())
    reserved = engine.executor.describe()["kv_bytes"]
    engine.close()
    assert 89 * block < reserved["gpu"] <= 90 * block
    assert reserved["cpu"] == 10 * block
    monkeypatch.setattr(device, "available_bytes", lambda: 100 * block - block // 2)
    monkeypatch.setattr(kv_memory, "available_bytes", lambda: 100 * block - block // 2)
    with pytest.raises(InputError, match="give fewer blocks"):
        parts.engine(parts.system())


@pytest.mark.parametrize("tier", ["gpu", "cpu"])
def test_a_budget_that_no_machine_has(preset: str, tier: str) -> None:
    parts = parts_of(preset, **{f"kv_{tier}_bytes": 1 << 60})
    with pytest.raises(InputError, match=r"GiB .* are available"):
        parts.engine(parts.system())


def test_a_closed_engine_has_given_its_memory_back(preset: str) -> None:
    parts = parts_of(preset, kv_gpu_blocks=50, kv_cpu_blocks=50)
    engine = parts.engine(parts.system())
    executor: Any = engine.executor
    assert executor.gpu.nbytes > 0
    engine.close()
    assert (executor.gpu.nbytes, executor.cpu.nbytes) == (0, 0)
    assert executor.describe()["kv_bytes"]["gpu"] > 0, "reports of a closed engine are those of the open one"


# -- checkpoints: the ways in which files can be wrong are in test_model_loading ----------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="its files are made with transformers")
    from model_builders import save_tiny

    return save_tiny(tmp_path_factory.mktemp("checkpoint"), "llama")


def damaged(folder: Path, into: Path, damage: str) -> Path:
    """A copy of a checkpoint with one thing wrong."""
    from safetensors.torch import load_file, save_file

    into.mkdir()
    for path in folder.iterdir():
        (into / path.name).write_bytes(path.read_bytes())
    weights, config = into / "model.safetensors", into / "config.json"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = torch.zeros(3, 5)
    if damage in ("missing", "shape"):
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-64])
    elif damage == "architecture":
        text = config.read_text()
        config.write_text(text.replace('"llama"', '"mamba"').replace("LlamaForCausalLM", "MambaForCausalLM"))
    elif damage == "pickle":
        weights.rename(into / "pytorch_model.bin")
    return into


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("missing", ["model.safetensors", "model.layers.1.mlp.up_proj.weight", "is missing"]),
        ("shape", ["model.safetensors", "model.layers.1.mlp.up_proj.weight", "[3, 5]"]),
        ("truncated", ["model.safetensors", "cut off or damaged"]),
        ("architecture", ["config.json", "mamba"]),
        ("pickle", ["pytorch_model.bin", "does not unpickle"]),
    ],
)
def test_a_bad_checkpoint_never_becomes_an_engine(
    folder: Path, tmp_path: Path, damage: str, named: list[str]
) -> None:
    bad = damaged(folder, tmp_path / "bad", damage)
    with pytest.raises(InputError) as told:
        parts_of(str(bad), load_format="auto")
    message = str(told.value)
    assert "\n" not in message
    assert [part for part in (str(bad), *named) if part not in message] == []

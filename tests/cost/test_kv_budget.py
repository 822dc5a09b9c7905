import json
from dataclasses import replace

import pytest
from cost_works import MACHINE, MODEL

from neo.core.errors import InputError
from neo.core.view import Limits
from neo.cost.memory import activation_bytes, kv_budget
from neo.cost.presets import load_hardware, load_model

LIMITS = Limits(block_size=16, max_seqs=100, max_batch_tokens=1000)


def test_by_hand() -> None:
    # a row: 2 bytes * (2 * 1000 + 1400 + 2 * 2000); logits: 100 * 5000 * 4
    assert activation_bytes(MODEL, LIMITS) == 1000 * 2 * 7400 + 2_000_000
    gpu, cpu, why = kv_budget(MODEL, MACHINE, LIMITS, 0.5, 0.25)
    weights = 2 * (4 * (1_400_000 + 7_000_000) + 2 * 5000 * 1000)
    block = 16 * 4 * 800
    assert gpu == (8_000_000_000 - weights - 16_800_000) // block
    assert cpu == 16_000_000_000 // block
    assert why["weight_bytes_per_gpu"] == weights
    assert why["gpu_kv_tokens"] == gpu * 16
    assert json.dumps(why)


def test_ranks_add_their_memory() -> None:
    one, _, _ = kv_budget(MODEL, MACHINE, LIMITS)
    two, _, why = kv_budget(replace(MODEL, tp=2), MACHINE, LIMITS)
    assert two > 2 * one
    assert why["weight_bytes_per_gpu"] == MODEL.weight_bytes // 2


@pytest.mark.parametrize(
    ("machine", "model", "limits", "published"),
    [
        ("g5.4xlarge", "llama-3.1-8b", Limits(16, 1024, 20_480), 1650),
        ("g4dn.4xlarge", "llama-2-7b", Limits(16, 512, 832), 54),
    ],
)
def test_in_the_neighbourhood_of_the_test_beds_of_neo(
    machine: str, model: str, limits: Limits, published: int
) -> None:
    blocks, _, _ = kv_budget(load_model(model), load_hardware(machine), limits)
    assert blocks == pytest.approx(published, rel=0.25)


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    with pytest.raises(InputError, match=r"does not fit .* 131\.41 weights .* leaves -61\.63 GiB") as caught:
        kv_budget(load_model("llama-3.1-70b"), load_hardware("h100"), Limits())
    assert "\n" not in str(caught.value)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="gpu_memory_utilization must be 0 to 1"):
        kv_budget(MODEL, MACHINE, LIMITS, 1.1)
    with pytest.raises(InputError, match="cpu_memory_fraction must be 0 to 1"):
        kv_budget(MODEL, MACHINE, LIMITS, 0.9, -0.1)
    with pytest.raises(InputError, match="tensor parallelism 2 needs more"):
        kv_budget(replace(MODEL, tp=2), replace(MACHINE, gpu_count=1), LIMITS)

"""The whole Azure traces through the simulator: every request ends once, tokens add up, no block leaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from neo.core.request import FinishReason, State
from neo.sim.setup import SystemConfig, build_system, simulation
from neo.workload import read_trace

CASES = [
    ("conv", "gpu-only", "h100", "llama-3.1-8b"),
    ("conv", "neo", "g5.16xlarge", "llama-3.1-8b"),
    ("conv", "gpu-only", "g5.4xlarge", "llama-3.1-8b"),
    ("code", "gpu-only", "a100", "llama-2-7b"),
    ("code", "neo", "a100", "llama-2-7b"),
    ("code", "neo", "g5.8xlarge", "llama-3.1-8b"),
    ("code", "neo", "2xh100", "llama-3.1-70b"),
]


@pytest.mark.traces
@pytest.mark.parametrize(("trace", "policy", "hardware", "model"), CASES)
def test_whole_trace(traces_dir: Path, trace: str, policy: str, hardware: str, model: str) -> None:
    workload = read_trace(traces_dir / f"AzureLLMInferenceTrace_{trace}.csv")
    sim = simulation(build_system(SystemConfig(policy=policy, hardware=hardware, model=model)), workload)
    record = sim.run()
    assert len(record.requests) == len(workload)
    for request, row in zip(record.requests, workload.requests, strict=True):
        assert request.state is State.FINISHED, (request.id, request.detail)
        assert request.finish_reason is FinishReason.LENGTH
        assert request.generated == row.output_tokens
        assert row.arrival_s <= request.first_token_s <= request.last_token_s == request.finish_s
    # Every token after a request's first has exactly one gap before it.
    assert sum(record.itl_counts) == sum(r.output_tokens - 1 for r in workload.requests)
    for pool in sim.scheduler.view.pools.values():
        assert pool.used == 0
        assert not pool.holders()

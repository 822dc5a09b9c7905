"""The first 2,000 requests of the real traces, under pressure: every request ends once, nothing leaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from neo.core.request import FinishReason, State
from neo.sim.setup import SystemConfig, build_system, simulation
from neo.workload.readers import read_trace

CASES = [
    ("conv", "g5.4xlarge", "llama-3.1-8b"),
    ("conv", "a100", "llama-2-13b"),
    ("code", "g5.16xlarge", "llama-3.1-8b"),
    ("code", "h100", "llama-3.1-8b"),
]


@pytest.mark.traces
@pytest.mark.parametrize("policy", ["gpu-only", "neo"])
@pytest.mark.parametrize(("trace", "hardware", "model"), CASES)
def test_each_request_ends_once_and_tokens_add_up(
    traces_dir: Path, trace: str, hardware: str, model: str, policy: str
) -> None:
    workload = read_trace(traces_dir / f"AzureLLMInferenceTrace_{trace}.csv", limit=2000)
    system = build_system(SystemConfig(policy=policy, hardware=hardware, model=model))
    ended: list[int] = []
    run = simulation(system, workload, progress=ended.append)
    record = run.run()
    assert len(record.requests) == len(workload) == 2000
    assert ended[-1] == 2000
    assert ended == sorted(ended)
    for request, row in zip(record.requests, workload.requests, strict=True):
        assert (request.id, request.max_tokens) == (row.id, row.output_tokens)
        assert (request.state, request.finish_reason) == (State.FINISHED, FinishReason.LENGTH)
        assert request.generated == row.output_tokens
        assert request.computed == row.prompt_tokens + row.output_tokens - 1
    # Every token but a request's first has one gap before it.
    assert sum(record.itl_counts) == sum(row.output_tokens - 1 for row in workload.requests)
    columns = record.columns
    on_gpu = zip(columns.steps, columns.gpu_decodes, columns.stream_decodes, strict=True)
    decoded = sum(n * (resident + streamed) for n, resident, streamed in on_gpu)
    decoded += sum(request.cpu_steps for request in record.requests)  # of relayed steps, those with a token
    resumed = sum(request.preemptions for request in record.requests)  # a token out of a second prefill
    tokens = sum(row.output_tokens for row in workload.requests)
    assert tokens - len(workload) - resumed <= decoded <= tokens - len(workload)
    for tier, pool in run.scheduler.view.pools.items():
        assert (pool.used, pool.holders()) == (0, {})
        use = columns.kv_gpu if tier == "gpu" else columns.kv_cpu
        assert max(use) <= pool.total

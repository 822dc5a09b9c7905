"""Synthetic runs for the report tests: a toy engine, nothing of neo's simulator."""

from __future__ import annotations

import heapq

import numpy as np

from neo.core.record import Mode, RunRecord, Slice
from neo.core.request import FinishReason, Request, State, Tier
from neo.report.files import RunMeta

LAYERS = 32
BLOCK = 16


def make_request(
    index: int, arrival: float = 0.0, prompt: int = 10, tokens: int = 3, **fields: object
) -> Request:
    """A request that finished after ``tokens`` tokens: first token after 0.5 s, then one per 0.1 s."""
    request = Request(id=f"r{index}", prompt_tokens=prompt, max_tokens=max(tokens, 1), arrival_s=arrival)
    request.generated = tokens
    request.state = State.FINISHED
    request.first_token_s = arrival + 0.5
    request.last_token_s = arrival + 0.5 + 0.1 * (tokens - 1)
    request.finish_s = request.last_token_s
    request.finish_reason = FinishReason.LENGTH
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def add_row(record: RunRecord, start: float, end: float, **values: float) -> None:
    """Append one row of steps; what is not named is 0 (``steps``: 1)."""
    columns = record.columns
    row = {"start_s": start, "end_s": end, "steps": 1} | values
    for name in type(columns).__slots__:
        column = getattr(columns, name)
        value = row.get(name, 0)
        column.append(float(value) if column.typecode == "d" else int(value))


def synthetic_run(n: int = 400, seed: int = 0, offload: bool = True, rate: float = 2.0) -> RunRecord:
    """A toy continuous-batching run with a memory limit; with ``offload``, some decodes live on the CPU."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, n))
    prompts = np.clip(rng.lognormal(6.3, 0.9, n), 8, 6000).astype(int)
    outputs = np.clip(rng.lognormal(5.0, 0.7, n), 1, 1200).astype(int)
    record = RunRecord(kv_capacity={Tier.GPU: 600 * LAYERS, Tier.CPU: 3000 * LAYERS})
    requests = [
        Request(id=f"r{i}", prompt_tokens=int(p), max_tokens=int(o), arrival_s=float(a))
        for i, (a, p, o) in enumerate(zip(arrivals, prompts, outputs, strict=True))
    ]
    record.requests = requests
    _run(record, requests, offload)
    record.start_s = requests[0].arrival_s
    record.end_s = max(r.finish_s or 0.0 for r in requests)
    return record


def _blocks(request: Request) -> int:
    return -(-request.peak_kv_tokens // BLOCK) * LAYERS


def _run(record: RunRecord, requests: list[Request], offload: bool) -> None:
    now, used, waiting = requests[0].arrival_s, {"gpu": 0, "cpu": 0}, list(reversed(requests))
    running: dict[str, list[tuple[int, int, Request]]] = {"gpu": [], "cpu": []}
    total_steps = 0
    while waiting or running["gpu"] or running["cpu"]:
        prefill = 0
        if waiting and not (running["gpu"] or running["cpu"]):
            now = max(now, waiting[-1].arrival_s)
        while waiting and waiting[-1].arrival_s <= now and prefill < 2048:
            need = _blocks(waiting[-1])
            tiers = ("gpu", "cpu") if offload else ("gpu",)
            tier = next((t for t in tiers if used[t] + need <= record.kv_capacity[t]), None)
            if tier is None or (tier == "cpu" and len(running["cpu"]) >= 60):
                break
            request = waiting.pop()
            prefill += request.prompt_tokens
            used[tier] += need
            request.scheduled_s = now
            heapq.heappush(running[tier], (total_steps + request.max_tokens, len(waiting), request))
        gpu, cpu = len(running["gpu"]), len(running["cpu"])
        steps = 1 if prefill else _jump(running, waiting, now, total_steps)
        seconds = 0.018 + 2.2e-4 * prefill + 1.5e-4 * gpu + (4e-4 * cpu if cpu else 0)
        end = now + steps * seconds
        mode = Mode.PIPELINED if cpu > 8 else Mode.CPU_SEQUENTIAL if cpu else Mode.GPU_ONLY
        add_row(
            record, now, end, steps=steps, mode=mode, prefill_tokens=prefill, gpu_decodes=gpu,
            cpu_decodes=cpu,
            waiting=sum(r.arrival_s <= now for r in waiting), kv_gpu=used["gpu"], kv_cpu=used["cpu"],
            busy_gpu=steps * seconds * (0.93 if cpu <= 8 else 0.85), busy_cpu=steps * 6e-4 * cpu,
            busy_h2d=steps * 6e-5 * cpu, busy_d2h=steps * (8e-5 * cpu + 2e-5 * prefill * (cpu > 0)),
        )  # fmt: skip
        total_steps += steps
        record.itl_values.append(seconds)
        record.itl_counts.append(steps * (gpu + cpu))
        record.bytes_d2h += steps * cpu * LAYERS * 12288
        record.bytes_h2d += steps * cpu * LAYERS * 8192
        _finish(running, used, now, end, seconds, total_steps)
        now = end


def _jump(running: dict[str, list], waiting: list[Request], now: float, total: int) -> int:
    """Steps until the next completion, at most 40."""
    return max(1, min(40, *(heap[0][0] - total for heap in running.values() if heap), 40))


def _finish(running: dict, used: dict, now: float, end: float, seconds: float, total: int) -> None:
    for tier, heap in running.items():
        for _, _, request in heap:
            if request.first_token_s is None:
                request.first_token_s = now + seconds
        while heap and heap[0][0] <= total:
            request = heapq.heappop(heap)[2]
            used[tier] -= _blocks(request)
            request.generated = request.max_tokens
            request.last_token_s = request.finish_s = end
            request.state, request.finish_reason = State.FINISHED, FinishReason.LENGTH
            request.cpu_steps = request.generated - 1 if tier == "cpu" else 0


def meta(policy: str = "neo", **fields: object) -> RunMeta:
    values = {
        "kind": "simulated",
        "policy": policy,
        "model": "llama-3.1-8b",
        "hardware": "g5.16xlarge",
        "workload": {"name": "synthetic", "rate": 2.0},
        "seed": 0,
        "limits": {"block_size": BLOCK, "max_seqs": 256},
        "layers": LAYERS,
    }
    return RunMeta(**(values | fields))  # type: ignore[arg-type]


def pipelined_slices(steps: int = 2, layers: int = 4) -> list[Slice]:
    """The operations of NEO's two sub-batches, roughly timed; no overlap within a resource."""
    slices: list[Slice] = []
    free = dict.fromkeys(("host", "gpu", "cpu", "h2d", "d2h"), 0.0)

    def run(
        step: int, resource: str, name: str, layer: int | None, batch: int, after: float, length: float
    ) -> float:
        start = max(free[resource], after)
        free[resource] = start + length
        slices.append(Slice(step, resource, name, layer, batch, start, start + length))
        return start + length

    done = 0.0
    for step in range(steps):
        planned = run(step, "host", "SCHEDULE", None, 0, done, 3e-4)
        embed = run(step, "gpu", "EMBED", None, 0, planned, 5e-5)
        pre = [run(step, "gpu", "PRE", 0, b, embed, 1.2e-4) for b in (0, 1)]
        for layer in range(layers):
            sent = run(step, "d2h", "SEND", layer, 1, pre[1], 8e-5)
            attended = run(step, "cpu", "CPU_ATTN", layer, 1, sent, 7e-4)
            gpu = run(step, "gpu", "GPU_ATTN", layer, 0, pre[0], 2e-4)
            run(step, "d2h", "SWAP_OUT", layer, 0, pre[0], 2e-4)
            post = run(step, "gpu", "POST", layer, 0, gpu, 3.6e-4)
            back = run(step, "h2d", "RECV", layer, 1, attended, 6e-5)
            if layer + 1 < layers:
                pre[0] = run(step, "gpu", "PRE", layer + 1, 0, post, 1.5e-4)
            post = run(step, "gpu", "POST", layer, 1, back, 3e-4)
            if layer + 1 < layers:
                pre[1] = run(step, "gpu", "PRE", layer + 1, 1, post, 1.2e-4)
        done = run(step, "gpu", "HEAD", None, 0, post, 2e-4)
    return slices

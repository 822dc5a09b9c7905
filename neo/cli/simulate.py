"""``neo simulate``: run a workload through one or several policies in the simulator."""

from __future__ import annotations

import sys
from dataclasses import replace

from neo.cli import options as opt
from neo.cli.flags import key_values, options_by_policy, size_of, workload_of
from neo.cli.runner import Output, SimulatedRun, run_all
from neo.core.errors import InputError
from neo.core.view import Limits
from neo.report.files import portable_command
from neo.report.metrics import SLO
from neo.sim.setup import SystemConfig, build_system


def simulate(
    trace: opt.Trace = None,
    format: opt.Format = None,
    prompt_lengths: opt.PromptLengths = None,
    output_lengths: opt.OutputLengths = None,
    requests: opt.Requests = None,
    limit: opt.Limit = None,
    arrivals: opt.Arrivals = None,
    rate: opt.Rate = None,
    speedup: opt.Speedup = None,
    cv: opt.Cv = None,
    seed: opt.Seed = 0,
    timeout: opt.Timeout = None,
    policy: opt.Policy = None,
    policy_opt: opt.PolicyOpt = None,
    hardware: opt.Hardware = "g5.16xlarge",
    model: opt.Model = "llama-3.1-8b",
    tp: opt.Tp = None,
    dtype: opt.Dtype = None,
    cost: opt.Cost = "auto",
    cost_opt: opt.CostOpt = None,
    kv_gpu_blocks: opt.KvGpuBlocks = None,
    kv_cpu_blocks: opt.KvCpuBlocks = None,
    kv_gpu_bytes: opt.KvGpuBytes = None,
    kv_cpu_bytes: opt.KvCpuBytes = None,
    gpu_memory_utilization: opt.GpuMemoryUtilization = None,
    block_size: opt.BlockSize = 16,
    max_seqs: opt.MaxSeqs = 1024,
    max_batch_tokens: opt.MaxBatchTokens = 8192,
    level: opt.Level = opt.Detail.step,
    out: opt.Out = None,
    plots: opt.Plots = True,
    timeline: opt.Timeline = 0,
    bubbles: opt.Bubbles = False,
    slo: opt.Slo = None,
    drop_first: opt.DropFirst = 0.0,
    repeat: opt.Repeat = True,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Simulate a workload under a scheduling policy; with several --policy, compare them."""
    if timeline and out is None:
        raise InputError("--timeline needs --out DIR to write timeline.json into")
    workload = workload_of(
        trace, format, limit, prompt_lengths, output_lengths, requests, arrivals, rate, speedup, cv, seed
    )
    limits = Limits(block_size=block_size, max_seqs=max_seqs, max_batch_tokens=max_batch_tokens)
    config = SystemConfig(
        hardware=hardware,
        model=model,
        cost_model=cost,
        cost_options=key_values(cost_opt, "--cost-opt"),
        limits=limits,
        tp=tp,
        dtype=dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_gpu_blocks=kv_gpu_blocks,
        kv_cpu_blocks=kv_cpu_blocks,
        kv_gpu_bytes=size_of(kv_gpu_bytes, "--kv-gpu-bytes"),
        kv_cpu_bytes=size_of(kv_cpu_bytes, "--kv-cpu-bytes"),
    )
    names = policy or ["neo"]
    options = options_by_policy(names, key_values(policy_opt, "--policy-opt"))
    output = Output(
        out,
        plots,
        SLO.parse(slo) if slo is not None else None,
        drop_first,
        tuple(portable_command(sys.argv[1:])),
        timeline,
    )
    systems = [build_system(replace(config, policy=n, policy_options=options[n])) for n in names]
    run_level = "op" if timeline or level is opt.Detail.op else "step"
    runs = [SimulatedRun(s, workload, seed, run_level, timeline, repeat, timeout, bubbles) for s in systems]
    run_all(runs, output, quiet, as_json)

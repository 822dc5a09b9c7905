"""``neo simulate``: run a workload through one or several policies in the simulator."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from neo.cli import options as opt
from neo.cli.runner import Output, Runner, try_plot
from neo.core.errors import InputError, NeoError
from neo.core.plugins import close_matches
from neo.core.view import Limits
from neo.policy.registry import policy_class, policy_options
from neo.report.files import RunResult, portable_command
from neo.report.metrics import SLO
from neo.report.tables import comparison_table, result_table
from neo.sim.setup import SystemConfig, build_system
from neo.workload import Workload, apply_arrivals, read_trace, synthetic


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
    cost: opt.Cost = "roofline",
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
    slo: opt.Slo = None,
    drop_first: opt.DropFirst = 0.0,
    repeat: opt.Repeat = True,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Simulate a workload under a scheduling policy; with several --policy, compare them."""
    if timeline and out is None:
        raise InputError("--timeline needs --out DIR to write timeline.json into")
    workload = _workload(
        trace, format, limit, prompt_lengths, output_lengths, requests, arrivals, rate, speedup, cv, seed
    )
    limits = Limits(block_size=block_size, max_seqs=max_seqs, max_batch_tokens=max_batch_tokens)
    config = SystemConfig(
        hardware=hardware,
        model=model,
        cost_model=cost,
        cost_options=_pairs(cost_opt, "--cost-opt"),
        limits=limits,
        tp=tp,
        dtype=dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_gpu_blocks=kv_gpu_blocks,
        kv_cpu_blocks=kv_cpu_blocks,
        kv_gpu_bytes=_size(kv_gpu_bytes, "--kv-gpu-bytes"),
        kv_cpu_bytes=_size(kv_cpu_bytes, "--kv-cpu-bytes"),
    )
    names = policy or ["neo"]
    options = _policy_options(names, _pairs(policy_opt, "--policy-opt"))
    output = Output(
        out,
        plots,
        SLO.parse(slo) if slo is not None else None,
        drop_first,
        tuple(portable_command(sys.argv[1:])),
    )
    systems = [build_system(replace(config, policy=n, policy_options=options[n])) for n in names]
    run_level = "op" if timeline or level is opt.Detail.op else "step"
    results: list[RunResult] = []
    for i, system in enumerate(systems):
        where = out if out is None or len(systems) == 1 else out / _folder(names, i)
        runner = Runner(
            system, workload, seed, replace(output, directory=where), run_level, timeline, repeat, timeout
        )
        try:
            results.append(runner.run(show_progress=not quiet and not as_json))
        except (NeoError, KeyboardInterrupt):
            if results:  # what the policies before this one gave is not lost
                _show(results, replace(output, plots=False), as_json)
            raise
    _show(results, output, as_json)


def _workload(
    trace: Path | None,
    format: str | None,
    limit: int | None,
    prompts: str | None,
    outputs: str | None,
    requests: int | None,
    arrivals: str | None,
    rate: float | None,
    speedup: float | None,
    cv: float | None,
    seed: int,
) -> Workload:
    if trace is not None and (prompts or outputs):
        raise InputError("give either --trace or --prompt-lengths and --output-lengths, not both")
    if trace is not None:
        if requests is not None:
            raise InputError("--requests is for synthetic lengths; of a trace, --limit takes the first N")
        workload = read_trace(trace, format, limit)
    elif prompts and outputs:
        if limit is not None:
            raise InputError("--limit is for traces; --requests says how many synthetic ones there are")
        workload = synthetic(prompts, outputs, requests or 1000, seed)
    else:
        raise InputError(
            "no workload: give --trace FILE, or --prompt-lengths and --output-lengths (try azure-code)"
        )
    if arrivals is None:
        if workload.has_arrivals:
            if rate is None and speedup is None and cv is None:
                return workload
            arrivals = "gamma" if cv is not None else "recorded"
        else:
            if speedup is not None:
                raise InputError("--speedup plays recorded arrivals faster, but these requests have no times")
            arrivals = "gamma" if cv is not None else "poisson" if rate is not None else "all-at-once"
    return apply_arrivals(workload, str(arrivals), rate=rate, speedup=speedup, cv=cv, seed=seed)


def _pairs(given: Sequence[str] | None, flag: str) -> dict[str, str]:
    pairs = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{flag} {text}: expected key=value")
        pairs[key.strip()] = value.strip()
    return pairs


def _policy_options(names: Sequence[str], given: dict[str, str]) -> dict[str, dict[str, str]]:
    """Which option goes to which policy: a plain key to every policy that has it, NAME.key to one."""
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    known = {name: {o.name for o in policy_options(policy_class(name))} for name in names}
    for key, value in given.items():
        prefix, dot, plain = key.rpartition(".")
        if dot and prefix in found:
            found[prefix][plain] = value
            continue
        takers = [name for name in names if key in known[name]]
        if not takers:
            everything = sorted({option for options in known.values() for option in options})
            close = close_matches(key, everything) or "."
            whose = f"policy '{names[0]}'" if len(names) == 1 else "none of the policies"
            have = ", ".join(everything) or "none"
            raise InputError(f"--policy-opt {key}: no such option in {whose}{close} Options: {have}")
        for name in takers:
            found[name][key] = value
    return found


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i)?)?b?\s*", re.IGNORECASE)


def _size(text: str | None, flag: str) -> int | None:
    """Bytes of '3.5GB', '4GiB', '1000000'."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InputError(f"{flag} {text}: expected a size such as 3.5GB or 4GiB")
    number, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _folder(names: Sequence[str], index: int) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", names[index].rpartition("/")[2])
    return name if names.count(names[index]) == 1 else f"{name}-{index + 1}"


def _show(results: list[RunResult], output: Output, as_json: bool) -> None:
    summaries = [r.summary for r in results]
    if as_json:
        for summary in summaries:
            print(json.dumps(summary))
        return
    from rich.console import Console

    console = Console()
    console.print(result_table(summaries[0]) if len(summaries) == 1 else comparison_table(summaries))
    for warning in dict.fromkeys(w for s in summaries for w in s.get("warnings", ())):
        print(f"warning: {warning}", file=sys.stderr)
    if output.directory is not None:
        if len(results) > 1 and output.plots:
            from neo.report.plots import plot_comparison

            try_plot(lambda: plot_comparison(results, output.directory or "."))
        console.print(f"Results in {output.directory}", highlight=False)

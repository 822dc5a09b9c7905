"""``neo simulate``: run a workload through one or several policies in the simulator."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from neo.core.errors import InputError, NeoError
from neo.core.runlog import RunLog
from neo.core.view import Limits
from neo.policy.registry import policy_class, policy_options
from neo.report.files import RunMeta, RunResult, portable_command, run_result, write_run
from neo.report.metrics import SLO
from neo.report.tables import comparison_table, result_table
from neo.sim.driver import Simulation
from neo.sim.setup import System, SystemConfig, build_system, simulation
from neo.workload import ARRIVALS, Workload, apply_arrivals, read_trace, synthetic


class Levels(StrEnum):
    """Levels of detail of the simulator."""

    step = "step"
    op = "op"


Arrivals = StrEnum("Arrivals", {name: name for name in ARRIVALS})  # type: ignore[misc]

_WORKLOAD, _SYSTEM, _BUDGET, _OUTPUT = "Workload", "System", "Budgets", "Run and output"


def _opt(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


@dataclass(frozen=True, slots=True)
class Output:
    """What to leave behind of each run."""

    directory: Path | None
    plots: bool
    slo: SLO | None
    drop_first: float
    command: tuple[str, ...]


def simulate(
    trace: Annotated[
        Path | None,
        _opt(_WORKLOAD, "--trace", help="Trace file: Azure or Vidur CSV, Mooncake or neo JSONL, NEO JSON."),
    ] = None,
    format: Annotated[
        str | None, _opt(_WORKLOAD, "--format", help="The trace's format, instead of recognising it.")
    ] = None,
    prompt_lengths: Annotated[
        str | None,
        _opt(
            _WORKLOAD,
            "--prompt-lengths",
            help="Synthetic prompts: fixed:N, uniform:LO:HI, around:MEAN:0.1, lognormal:MEAN:SD, azure-code.",
        ),
    ] = None,
    output_lengths: Annotated[
        str | None, _opt(_WORKLOAD, "--output-lengths", help="Synthetic outputs, same forms.")
    ] = None,
    requests: Annotated[
        int, _opt(_WORKLOAD, "--requests", help="Number of synthetic requests.", min=1)
    ] = 1000,
    limit: Annotated[
        int | None, _opt(_WORKLOAD, "--limit", help="Only the first N requests of the trace.", min=1)
    ] = None,
    arrivals: Annotated[
        Arrivals | None,
        _opt(
            _WORKLOAD,
            "--arrivals",
            help="Arrivals [default: as recorded; without times: poisson with --rate, else all at once].",
        ),
    ] = None,
    rate: Annotated[float | None, _opt(_WORKLOAD, "--rate", help="Mean requests/s.")] = None,
    speedup: Annotated[
        float | None, _opt(_WORKLOAD, "--speedup", help="Play recorded arrivals this much faster.")
    ] = None,
    cv: Annotated[
        float | None, _opt(_WORKLOAD, "--cv", help="Coefficient of variation of gamma arrivals.")
    ] = None,
    seed: Annotated[int, _opt(_WORKLOAD, "--seed", help="Seed of everything random.", min=0)] = 0,
    timeout: Annotated[
        float | None, _opt(_WORKLOAD, "--timeout", help="Clients give up after this many seconds.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        _opt(
            _SYSTEM,
            "--policy",
            "-p",
            help="Policy name or path/to/file.py:Class; several are compared. [default: neo]",
        ),
    ] = None,
    policy_opt: Annotated[
        list[str] | None,
        _opt(
            _SYSTEM,
            "--policy-opt",
            help="key=value for the policies that have it, NAME.key=value for one. Repeatable.",
        ),
    ] = None,
    hardware: Annotated[
        str, _opt(_SYSTEM, "--hardware", help="Preset (see 'neo hardware') or TOML file.")
    ] = "g5.16xlarge",
    model: Annotated[
        str,
        _opt(_SYSTEM, "--model", help="Preset (see 'neo models'), TOML file, or Hugging Face config.json."),
    ] = "llama-3.1-8b",
    tp: Annotated[
        int | None,
        _opt(_SYSTEM, "--tp", help="Tensor-parallel degree [default: all GPUs of the machine].", min=1),
    ] = None,
    dtype: Annotated[
        str | None, _opt(_SYSTEM, "--dtype", help="Data type of weights and KV, instead of the model's.")
    ] = None,
    cost: Annotated[
        str,
        _opt(_SYSTEM, "--cost", help="Cost model: roofline, profiled:TABLE.json, or path/to/file.py:Class."),
    ] = "roofline",
    cost_opt: Annotated[
        list[str] | None, _opt(_SYSTEM, "--cost-opt", help="key=value of the cost model. Repeatable.")
    ] = None,
    kv_gpu_blocks: Annotated[
        int | None,
        _opt(
            _BUDGET, "--kv-gpu-blocks", help="GPU KV blocks [default: what the GPU's memory leaves].", min=1
        ),
    ] = None,
    kv_cpu_blocks: Annotated[
        int | None,
        _opt(_BUDGET, "--kv-cpu-blocks", help="Host KV blocks [default: a share of host memory].", min=0),
    ] = None,
    kv_gpu_bytes: Annotated[
        str | None, _opt(_BUDGET, "--kv-gpu-bytes", help="GPU KV memory, as 3.5GB or 4GiB.")
    ] = None,
    kv_cpu_bytes: Annotated[
        str | None, _opt(_BUDGET, "--kv-cpu-bytes", help="Host KV memory, as 120GB.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        _opt(_BUDGET, "--gpu-memory-utilization", help="Share of GPU memory to use.", min=0.0, max=1.0),
    ] = None,
    block_size: Annotated[int, _opt(_BUDGET, "--block-size", help="Tokens in a KV block.", min=1)] = 16,
    max_seqs: Annotated[
        int, _opt(_BUDGET, "--max-seqs", "--max-num-seqs", help="Requests in a step.", min=1)
    ] = 1024,
    max_batch_tokens: Annotated[
        int,
        _opt(
            _BUDGET,
            "--max-batch-tokens",
            "--max-num-batched-tokens",
            help="Tokens in a step; memory for their activations is set aside.",
            min=1,
        ),
    ] = 8192,
    level: Annotated[
        Levels, _opt(_OUTPUT, "--level", help="step: a step is one event; op: every operation is one.")
    ] = Levels.step,
    out: Annotated[
        Path | None,
        _opt(_OUTPUT, "--out", "-o", help="Directory for summary.json, requests.csv, steps.jsonl and plots."),
    ] = None,
    plots: Annotated[bool, _opt(_OUTPUT, "--plots/--no-plots", help="Draw plots into --out.")] = True,
    timeline: Annotated[
        int,
        _opt(
            _OUTPUT,
            "--timeline",
            help="Write timeline.json (Perfetto) of the first N steps into --out; implies --level op.",
            min=0,
        ),
    ] = 0,
    slo: Annotated[
        str | None, _opt(_OUTPUT, "--slo", help="Count goodput under limits, as ttft=2,tpot=0.1 (seconds).")
    ] = None,
    drop_first: Annotated[
        float,
        _opt(
            _OUTPUT,
            "--drop-first",
            help="Share of requests, by arrival, left out of latency figures.",
            min=0.0,
            max=0.99,
        ),
    ] = 0.0,
    repeat: Annotated[
        bool,
        _opt(
            _OUTPUT,
            "--repeat/--no-repeat",
            help="Advance several equal steps at once (same numbers, faster).",
        ),
    ] = True,
    as_json: Annotated[
        bool, _opt(_OUTPUT, "--json", help="Print summaries as JSON lines instead of tables.")
    ] = False,
    quiet: Annotated[bool, _opt(_OUTPUT, "--quiet", "-q", help="No progress bar.")] = False,
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
        out, plots, SLO.parse(slo) if slo else None, drop_first, tuple(portable_command(sys.argv[1:]))
    )
    systems = [build_system(replace(config, policy=n, policy_options=options[n])) for n in names]
    run_level = "op" if timeline or level is Levels.op else "step"
    results: list[RunResult] = []
    for i, system in enumerate(systems):
        where = out if out is None or len(systems) == 1 else out / _folder(names, i)
        runner = _Runner(
            system, workload, seed, replace(output, directory=where), run_level, timeline, repeat, timeout
        )
        results.append(runner.run(show_progress=not quiet and not as_json))
    _show(results, output, as_json)


class _Runner:
    """One run, from its first request to its files."""

    def __init__(
        self,
        system: System,
        workload: Workload,
        seed: int,
        output: Output,
        level: Any,
        timeline: int,
        repeat: bool,
        timeout_s: float | None,
    ) -> None:
        self.system = system
        self.workload = workload
        self.seed = seed
        self.output = output
        self.level = level
        self.timeline = timeline
        self.repeat = repeat
        self.timeout_s = timeout_s

    def run(self, show_progress: bool) -> RunResult:
        """Simulate and write; an interrupted run leaves what it had."""
        started = time.perf_counter()
        with ExitStack() as stack:
            sim = simulation(
                self.system,
                self.workload,
                level=self.level,
                log=self._log(stack),
                timeline_steps=self.timeline,
                repeat=self.repeat,
                timeout_s=self.timeout_s,
                progress=_progress(stack, self.system.config.policy, len(self.workload))
                if show_progress
                else None,
            )
            try:
                sim.run()
            except (NeoError, KeyboardInterrupt) as error:
                sim.record.interrupted = " ".join(str(error).split()) or "interrupted"
                self._finish(sim, time.perf_counter() - started)
                raise
        return self._finish(sim, time.perf_counter() - started)

    def _log(self, stack: ExitStack) -> RunLog | None:
        directory = self.output.directory
        if directory is None:
            return None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(
                (directory / "steps.jsonl").open("w", encoding="utf-8", buffering=1 << 20)
            )
        except OSError as error:
            raise InputError(f"cannot write into --out {directory}: {error.strerror}") from error
        return RunLog(file, self.system.describe())

    def _finish(self, sim: Simulation, wall_time_s: float) -> RunResult:
        meta, output, record = self._meta(wall_time_s), self.output, sim.record
        if output.directory is not None:
            write_run(output.directory, record, meta, output.slo, output.drop_first)
            if self.timeline:
                from neo.report.timeline import write_timeline

                write_timeline(record.slices, output.directory / "timeline.json")
            if output.plots and record.columns.steps:
                _plot(lambda: _plot_run(record, meta, output.directory))
        return run_result(record, meta, output.slo, output.drop_first)

    def _meta(self, wall_time_s: float) -> RunMeta:
        system, config = self.system, self.system.config
        described = system.cost.describe()
        return RunMeta(
            kind="simulated",
            policy=config.policy,
            policy_options=dict(config.policy_options),
            model=system.model.name,
            hardware=system.hardware.name,
            workload={"name": self.workload.name, **self.workload.source},
            seed=self.seed,
            cost_model=described,
            limits=system.describe()["limits"],
            layers=system.model.layers,
            tensor_parallel=system.model.tp,
            warnings=described.get("warnings", ()),
            command=self.output.command,
            wall_time_s=wall_time_s,
        )


def _workload(
    trace: Path | None,
    format: str | None,
    limit: int | None,
    prompts: str | None,
    outputs: str | None,
    requests: int,
    arrivals: Any,
    rate: float | None,
    speedup: float | None,
    cv: float | None,
    seed: int,
) -> Workload:
    if trace is not None and (prompts or outputs):
        raise InputError("give either --trace or --prompt-lengths and --output-lengths, not both")
    if trace is not None:
        workload = read_trace(trace, format, limit)
    elif prompts and outputs:
        workload = synthetic(prompts, outputs, requests, seed)
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
        takers = [name for name in names if key in known[name]] or list(names)
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


def _progress(stack: ExitStack, label: str, total: int) -> Any:
    """A callback that moves a progress bar; None where nobody watches."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=5,
    )
    stack.enter_context(bar)
    task = bar.add_task(label, total=total)
    return lambda ended: bar.update(task, completed=ended)


def _plot(draw: Any) -> None:
    """Draw, or say why not: plots are no reason to lose a run."""
    try:
        draw()
    except InputError as error:
        print(f"no plots: {error}", file=sys.stderr)


def _plot_run(record: Any, meta: RunMeta, directory: Any) -> None:
    from neo.report.plots import plot_run

    plot_run(record, meta, directory)


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

            _plot(lambda: plot_comparison(results, output.directory or "."))
        console.print(f"Results in {output.directory}", highlight=False)

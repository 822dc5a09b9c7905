"""``neo compare``: many simulated points beside each other, as one study."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from neo.cli import options as opt
from neo.cli.flags import folder_of, key_values, options_by_policy
from neo.cli.runner import try_plot
from neo.cli.study import LATENCY, Settings, load_study, read_study_file
from neo.cli.study_run import StudyResult, progress_bar, run_study
from neo.cli.study_tables import PLOTS, Results, draw, tables, write_tables
from neo.core.errors import InputError
from neo.report.files import atomic, portable_command

_PANEL = "Study"
_OWN = ("results.csv", "sustained.csv", "published.csv", "command.txt")
_PICTURES = tuple(f"{name}.{ending}" for name in (*PLOTS, "bubbles") for ending in ("svg", "png"))

StudyPath = Annotated[
    Path | None, typer.Argument(help="A study file (TOML); flags replace what its [settings] say.")
]
Vary = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        help="FLAG=VALUE,VALUE,...: an axis, e.g. rate=1,2,4 or kv-gpu-blocks=400,1600. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
Limit_ = Annotated[
    float | None,
    typer.Option(
        "--sustained",
        help="Find each policy's highest rate with --metric within this.",
        rich_help_panel=_PANEL,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option("--metric", help=f"Column that curves show and --sustained limits (default: {LATENCY}).",
                 rich_help_panel=_PANEL),
]  # fmt: skip
Gain = Annotated[
    str | None,
    typer.Option("--gain", help="Column whose ratio to the first policy is the gain (default: "
                 "total_token_throughput).", rich_help_panel=_PANEL),
]  # fmt: skip
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", help="Of the sustained rate, as a share (default: 0.01).", min=1e-6, max=0.5,
                 rich_help_panel=_PANEL),
]  # fmt: skip
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", help="Processes (default: one a core).", min=1, rich_help_panel=_PANEL),
]
Traces = Annotated[
    Path | None,
    typer.Option("--traces", help="Folder of traces that a study names (default: $NEO_TRACES).",
                 rich_help_panel=_PANEL),
]  # fmt: skip
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Forget what --out holds of an earlier run.", rich_help_panel=_PANEL),
]


def compare(
    context: typer.Context,
    study: StudyPath = None,
    vary: Vary = None,
    sustained: Limit_ = None,
    metric: Metric = None,
    gain: Gain = None,
    tolerance: Tolerance = None,
    jobs: Jobs = None,
    traces: Traces = None,
    fresh: Fresh = False,
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
    slo: opt.Slo = None,
    drop_first: opt.DropFirst = 0.0,
    bubbles: opt.Bubbles = False,
    out: opt.Out = None,
    plots: opt.Plots = True,
    quiet: opt.Quiet = False,
) -> None:
    """Run policies over rates, lengths, budgets or machines as one study; resume it if it was interrupted."""
    data: dict[str, Any] = read_study_file(study) if study is not None else {"title": "Comparison"}
    given = _given(context)
    _put_policies(data, given, policy, policy_opt)
    if given:
        data["settings"] = {**data.get("settings", {}), **given}
    if vary:
        data["vary"] = {**data.get("vary", {}), **_axes(vary)}
    data |= {name: value for name, value in (("metric", metric), ("gain", gain)) if value is not None}
    if sustained is not None or tolerance is not None:
        asked: dict[str, Any] = dict(data.get("sustained", {}))
        asked |= {"limit": sustained} if sustained is not None else {}
        asked |= {"tolerance": tolerance} if tolerance is not None else {}
        data["sustained"] = asked
    if metric is not None and "sustained" in data:
        data["sustained"]["metric"] = metric
    where = str(study) if study is not None else "neo compare"
    loaded = load_study(data, traces=traces, where=where, home=study.parent if study is not None else None)
    if out is not None:
        _clear(out, fresh)
    try:
        with ExitStack() as stack:
            bar = None if quiet else progress_bar(stack, loaded.file.title)
            result = run_study(loaded, out, jobs, bar)
    except KeyboardInterrupt:
        if out is not None:
            print(f"interrupted; what is done is kept in {out}: the same command goes on", file=sys.stderr)
        raise
    _show(result, out, plots)


def _given(context: typer.Context) -> dict[str, Any]:
    """The flags of ``neo simulate`` that stand on the command line, by name."""
    found = {}
    for name in Settings.model_fields:
        if name in ("policy", "policy_opt") or name not in context.params:
            continue
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            value = context.params[name]
            if name == "cost_opt":
                value = key_values(value, "--cost-opt")
            found[name] = str(value) if isinstance(value, Path) or name == "arrivals" else value
    return found


def _put_policies(
    data: dict[str, Any], given: dict[str, Any], policy: list[str] | None, policy_opt: list[str] | None
) -> None:
    """--policy makes the systems; --policy-opt without it goes to those of the file that have the option."""
    options = key_values(policy_opt, "--policy-opt")
    if policy or "system" not in data:
        names = policy or ["gpu-only", "neo"]
        by_name = options_by_policy(names, options)
        data["system"] = [
            {"label": folder_of(names, i), "policy": name, "policy_opt": by_name[name]}
            for i, name in enumerate(names)
        ]
    elif options:
        names = list(dict.fromkeys(str(s.get("policy", "neo")) for s in data["system"]))
        by_name = options_by_policy(names, options)
        for system in data["system"]:
            own = system.pop("policy-opt", {}) | system.get("policy_opt", {})
            system["policy_opt"] = {**own, **by_name[str(system.get("policy", "neo"))]}


def _axes(vary: list[str]) -> dict[str, list[Any]]:
    """``rate=1,2`` as an axis; numbers are read as such."""
    axes = {}
    for name, text in key_values(vary, "--vary").items():
        values = [v.strip() for v in text.split(",")]
        if "" in values:
            raise InputError(f"--vary {name}={text}: expected FLAG=VALUE,VALUE,...")
        axes[name] = [_number(v) for v in values]
    return axes


def _number(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _clear(out: Path, fresh: bool) -> None:
    """Nothing of an earlier run may stand beside this one, but for its points."""
    try:
        for name in (*_OWN, *_PICTURES, *(("points.jsonl",) if fresh else ())):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into --out {out}: {error.strerror or error}") from None


def _show(result: StudyResult, out: Path | None, plots: bool) -> None:
    from rich.console import Console

    console = Console()
    results = Results.of(result)
    for table in tables(results):
        console.print(table)
    if out is None:
        return
    write_tables(results, out)
    with atomic(out / "command.txt") as temporary:
        temporary.write_text("neo " + shlex.join(portable_command(sys.argv[1:])) + "\n", encoding="utf-8")
    if plots:
        try_plot(lambda: draw(results, out))
    console.print(f"Results in {out}", highlight=False)

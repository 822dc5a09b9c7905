"""The options of ``neo simulate``, as annotated types: name, help text and range of each."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from neo.workload import ARRIVALS

WORKLOAD, SYSTEM, BUDGET, OUTPUT = "Workload", "System", "Budgets", "Run and output"


class Detail(StrEnum):
    """Levels of detail of the simulator."""

    step = "step"
    op = "op"


Process = StrEnum("Process", {name: name for name in ARRIVALS})  # type: ignore[misc]


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Trace = Annotated[
    Path | None,
    _option(WORKLOAD, "--trace", help="Trace file: Azure or Vidur CSV, Mooncake or neo JSONL, NEO JSON."),
]
Format = Annotated[
    str | None,
    _option(
        WORKLOAD, "--format", help="The trace's format, instead of recognising it; or path/to/file.py:reader."
    ),
]
PromptLengths = Annotated[
    str | None,
    _option(
        WORKLOAD,
        "--prompt-lengths",
        help="Prompts: fixed:N, uniform:LO:HI, around:MEAN:0.1, lognormal:MEAN:SIGMA, azure-conv.",
    ),
]
OutputLengths = Annotated[
    str | None, _option(WORKLOAD, "--output-lengths", help="Synthetic outputs, same forms.")
]
Requests = Annotated[
    int | None,
    _option(WORKLOAD, "--requests", help="Number of synthetic requests (default: 1000).", min=1),
]
Limit = Annotated[
    int | None, _option(WORKLOAD, "--limit", help="Only the first N requests of the trace.", min=1)
]
Arrivals = Annotated[
    Process | None,
    _option(
        WORKLOAD,
        "--arrivals",
        help="Arrivals (default: as recorded; without times: poisson with --rate, else all at once).",
    ),
]
Rate = Annotated[float | None, _option(WORKLOAD, "--rate", help="Mean requests/s.")]
Speedup = Annotated[
    float | None, _option(WORKLOAD, "--speedup", help="Play recorded arrivals this much faster.")
]
Cv = Annotated[float | None, _option(WORKLOAD, "--cv", help="Coefficient of variation of gamma arrivals.")]
Seed = Annotated[int, _option(WORKLOAD, "--seed", help="Seed of everything random.", min=0)]
Timeout = Annotated[
    float | None, _option(WORKLOAD, "--timeout", help="Clients give up after this many seconds.")
]
Policy = Annotated[
    list[str] | None,
    _option(
        SYSTEM,
        "--policy",
        "-p",
        help="Policy name or path/to/file.py:Class; several are compared. (default: neo)",
    ),
]
PolicyOpt = Annotated[
    list[str] | None,
    _option(
        SYSTEM,
        "--policy-opt",
        help="key=value for the policies that have it, NAME.key=value for one. Repeatable.",
    ),
]
Hardware = Annotated[str, _option(SYSTEM, "--hardware", help="Preset (see 'neo hardware') or TOML file.")]
Model = Annotated[
    str, _option(SYSTEM, "--model", help="Preset (see 'neo models'), TOML file, or Hugging Face config.json.")
]
Tp = Annotated[
    int | None,
    _option(SYSTEM, "--tp", help="Tensor-parallel degree (default: all GPUs of the machine).", min=1),
]
Dtype = Annotated[
    str | None, _option(SYSTEM, "--dtype", help="Data type of weights and KV, instead of the model's.")
]
Cost = Annotated[
    str,
    _option(
        SYSTEM,
        "--cost",
        help="Cost model: roofline, profiled:TABLE.json, path/to/file.py:Class; auto: the table measured on "
        "this hardware preset, else roofline. calibrated: before one: corrected by measured steps.",
    ),
]
CostOpt = Annotated[
    list[str] | None, _option(SYSTEM, "--cost-opt", help="key=value of the cost model. Repeatable.")
]
KvGpuBlocks = Annotated[
    int | None,
    _option(BUDGET, "--kv-gpu-blocks", help="GPU KV blocks (default: what the GPU's memory leaves).", min=1),
]
KvCpuBlocks = Annotated[
    int | None,
    _option(BUDGET, "--kv-cpu-blocks", help="Host KV blocks (default: a share of host memory).", min=0),
]
KvGpuBytes = Annotated[str | None, _option(BUDGET, "--kv-gpu-bytes", help="GPU KV memory, as 3.5GB or 4GiB.")]
KvCpuBytes = Annotated[str | None, _option(BUDGET, "--kv-cpu-bytes", help="Host KV memory, as 120GB.")]
GpuMemoryUtilization = Annotated[
    float | None,
    _option(BUDGET, "--gpu-memory-utilization", help="Share of GPU memory to use.", min=0.0, max=1.0),
]
BlockSize = Annotated[int, _option(BUDGET, "--block-size", help="Tokens in a KV block.", min=1)]
MaxSeqs = Annotated[int, _option(BUDGET, "--max-seqs", "--max-num-seqs", help="Requests in a step.", min=1)]
MaxBatchTokens = Annotated[
    int,
    _option(
        BUDGET,
        "--max-batch-tokens",
        "--max-num-batched-tokens",
        help="Tokens in a step; memory for their activations is set aside.",
        min=1,
    ),
]
Level = Annotated[
    Detail, _option(OUTPUT, "--level", help="step: a step is one event; op: every operation is one.")
]
Out = Annotated[
    Path | None,
    _option(OUTPUT, "--out", "-o", help="Directory for summary.json, requests.csv, steps.jsonl and plots."),
]
Plots = Annotated[bool, _option(OUTPUT, "--plots/--no-plots", help="Draw plots into --out.")]
Timeline = Annotated[
    int,
    _option(
        OUTPUT,
        "--timeline",
        help="Write timeline.json (Perfetto) of the first N steps into --out; implies --level op.",
        min=0,
    ),
]
Bubbles = Annotated[
    bool,
    _option(
        OUTPUT,
        "--bubbles",
        help="Report what GPU, CPU and links waited for (the run takes 2 to 3 times as long).",
    ),
]
Slo = Annotated[
    str | None, _option(OUTPUT, "--slo", help="Count goodput under limits, as ttft=2,tpot=0.1 (seconds).")
]
DropFirst = Annotated[
    float,
    _option(
        OUTPUT,
        "--drop-first",
        help="Share of requests, by arrival, left out of latency figures.",
        min=0.0,
        max=0.99,
    ),
]
Repeat = Annotated[
    bool,
    _option(
        OUTPUT, "--repeat/--no-repeat", help="Advance several equal steps at once (same numbers, faster)."
    ),
]
AsJson = Annotated[bool, _option(OUTPUT, "--json", help="Print summaries as JSON lines instead of tables.")]
Quiet = Annotated[bool, _option(OUTPUT, "--quiet", "-q", help="No progress bar.")]

"""``neo profile``: measure this machine's operations into a cost table."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neo.cli import engine_options as eng
from neo.cli import options as opt
from neo.cli.flags import key_values
from neo.core.errors import InputError
from neo.core.view import Limits
from neo.report.files import atomic, portable_command

if TYPE_CHECKING:
    from neo.runtime.profile import Progress

TABLE_FILE = "cost.json"
HARDWARE_FILE = "hardware.toml"

Quick = Annotated[
    bool, typer.Option("--quick", help="A coarser grid and fewer repeats.", rich_help_panel=opt.OUTPUT)
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="Directory for cost.json and hardware.toml.", rich_help_panel=opt.OUTPUT
    ),
]
Planning = Annotated[
    str,
    typer.Option(
        "--policy", "-p", help="Whose planning time SCHEDULE is measured with.", rich_help_panel=opt.SYSTEM
    ),
]


def profile(
    model: eng.Model = eng.DEFAULT_MODEL,
    load_format: eng.LoadWeights = None,
    dtype: eng.Dtype = None,
    max_model_len: eng.MaxModelLen = None,
    device: eng.Device = eng.Devices.auto,
    gpu_memory: eng.GpuMemory = None,
    gpu_threads: eng.GpuThreads = None,
    cpu_threads: eng.CpuThreads = None,
    cpu_cores: eng.CpuCores = None,
    backend: eng.Backend = eng.Kernels.auto,
    ahead: eng.Ahead = False,
    policy: Planning = "neo",
    policy_opt: opt.PolicyOpt = None,
    kv_gpu_blocks: eng.KvGpuBlocks = None,
    kv_cpu_blocks: eng.KvCpuBlocks = None,
    kv_gpu_bytes: opt.KvGpuBytes = None,
    kv_cpu_bytes: opt.KvCpuBytes = None,
    block_size: opt.BlockSize = 16,
    max_seqs: opt.MaxSeqs = 256,
    max_batch_tokens: opt.MaxBatchTokens = 2048,
    seed: opt.Seed = 0,
    out: Out = Path("profile"),
    quick: Quick = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure every operation kind of the engine here; budgets bound what is measured.

    The table is for --cost profiled:DIR/cost.json, the machine for --hardware DIR/hardware.toml, of
    'neo simulate' as of 'neo bench'.
    """
    config = eng.engine_config(
        model=model,
        load_format=load_format,
        dtype=dtype,
        max_model_len=max_model_len,
        device=device,
        gpu_memory=gpu_memory,
        gpu_threads=gpu_threads,
        cpu_threads=cpu_threads,
        cpu_cores=cpu_cores,
        backend=backend,
        ahead=ahead,
        hardware="this",
        cost="roofline",
        cost_opt=None,
        kv_gpu_blocks=kv_gpu_blocks,
        kv_cpu_blocks=kv_cpu_blocks,
        kv_gpu_bytes=kv_gpu_bytes,
        kv_cpu_bytes=kv_cpu_bytes,
        limits=Limits(block_size=block_size, max_seqs=max_seqs, max_batch_tokens=max_batch_tokens),
        seed=seed,
    )
    from neo.cost.table_schema import check_table
    from neo.runtime.machine import hardware_toml
    from neo.runtime.profile import Profiler
    from neo.runtime.setup import EngineParts

    config = replace(config, policy=policy, policy_options=key_values(policy_opt, "--policy-opt"))
    parts = EngineParts(config)
    with ExitStack() as stack:
        progress = _progress(stack) if not quiet else None
        command = " ".join(["neo", *portable_command(sys.argv[1:])])
        profiler = Profiler(parts, parts.system(), quick, progress)
        try:
            out.mkdir(parents=True, exist_ok=True)  # now, not when a minute's work is to be written
        except OSError as error:
            raise InputError(f"cannot write into --out {out}: {error.strerror}") from error
        try:
            document = profiler.document(command)
        except BaseException as error:
            with suppress(OSError):  # it holds an earlier profile
                out.rmdir()
            if isinstance(error, KeyboardInterrupt):
                print("interrupted: nothing is written", file=sys.stderr)
            raise
    check_table(document, TABLE_FILE)
    with atomic(out / TABLE_FILE) as path:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    with atomic(out / HARDWARE_FILE) as path:
        path.write_text(hardware_toml(parts.hardware), encoding="utf-8")
    _show(document)
    print(f"{out / TABLE_FILE}: for --cost profiled:{out / TABLE_FILE} --hardware {out / HARDWARE_FILE}")


def _progress(stack: ExitStack) -> Progress | None:
    """A bar; None where nobody watches."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    stack.enter_context(bar)
    task = bar.add_task("profile", total=1.0)
    return lambda what, share: bar.update(task, description=what, completed=share)


def _show(document: dict[str, Any]) -> None:
    """Each table's ends."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    about = document["provenance"]
    table = Table(
        "operation",
        "from",
        "to",
        box=box.SIMPLE_HEAD,
        title=f"{document['model']['name']} on {about['gpu']}",
        caption=f"{about['repeats']} repeats, spread {about['spread']:.1%} (interquartile range / median)"
        + _steps(about["steps"]),
    )
    for name, entry in sorted(document["tables"].items()):
        first, last = entry["seconds"][0], entry["seconds"][-1]
        ends = [(s[i] if isinstance(s, list) else s) for s, i in ((first, 0), (last, -1))]
        sizes = [", ".join(f"{axis} {v[i]:,}" for axis, v in entry["axes"].items()) for i in (0, -1)]
        table.add_row(name, *(f"{1e6 * s:,.0f} us ({size})" for s, size in zip(ends, sizes, strict=True)))
    Console().print(table)


def _steps(check: dict[str, Any] | None) -> str:
    """What operations add up to beside whole steps, where those were measured."""
    if check is None:
        return ""
    worst = f"{check['worst']:+.1%} (sequences {check['sequences']:,}, KV tokens {check['kv_tokens']:,})"
    return (
        f"\noperations add up to {check['shapes']} whole steps of decodes within {check['median']:.1%} "
        f"in the median, {worst} at worst"
    )

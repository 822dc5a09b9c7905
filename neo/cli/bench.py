"""``neo bench``: run a workload on the engine in this process, or with ``--url`` on a server.

Either leaves what ``neo simulate`` leaves.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neo.cli import engine_options as eng
from neo.cli import options as opt
from neo.cli.bench_url import Client, run_url
from neo.cli.flags import KEY_VARIABLE, key_values, options_by_policy, workload_of
from neo.cli.runner import OpenLog, Output, Progress, Run, run_all
from neo.core.errors import InputError
from neo.core.view import Limits
from neo.report.files import portable_command
from neo.report.metrics import SLO
from neo.workload import Workload

if TYPE_CHECKING:
    from neo.runtime.engine import Engine
    from neo.runtime.engine_config import EngineConfig
    from neo.runtime.prompts import Prompts
    from neo.runtime.replay import Replay, ReplayOptions
    from neo.runtime.setup import EngineParts
    from neo.system.config import System


class TokenIds(StrEnum):
    """Where prompts come from."""

    random = "random"
    trace = "trace"


TokenIdsOpt = Annotated[
    TokenIds,
    typer.Option(
        "--token-ids",
        help="Prompts: random, or the prompt_token_ids of a trace in neo's own format.",
        rich_help_panel=opt.WORKLOAD,
    ),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", help="Of sampling; 0 is greedy.", min=0.0, rich_help_panel=opt.WORKLOAD),
]
Warmup = Annotated[
    bool,
    typer.Option(
        "--warmup/--no-warmup",
        help="First run a few steps that are not measured.",
        rich_help_panel=opt.OUTPUT,
    ),
]
Timeline = Annotated[
    int,
    typer.Option(
        "--timeline",
        help="Write timeline.json (Perfetto) of the first N steps into --out.",
        min=0,
        rich_help_panel=opt.OUTPUT,
    ),
]

Bubbles = Annotated[
    bool,
    typer.Option(
        "--bubbles",
        help="Report what GPU, CPU and links waited for; every operation is noted.",
        rich_help_panel=opt.OUTPUT,
    ),
]


SERVER = "A server instead of the engine"


class Endpoint(StrEnum):
    """Which of a server's interfaces is used."""

    completions = "completions"
    chat = "chat"


Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="Send the workload to this OpenAI-compatible server, as http://127.0.0.1:8000.",
        rich_help_panel=SERVER,
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        help="With --url: N clients, each sending when its answer has ended (default: by arrival).",
        min=1,
        rich_help_panel=SERVER,
    ),
]
EndpointOpt = Annotated[
    Endpoint,
    typer.Option(
        "--endpoint",
        help="With --url: completions sends token ids, chat sends text.",
        rich_help_panel=SERVER,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", help="With --url: the server's key.", envvar=KEY_VARIABLE, rich_help_panel=SERVER
    ),
]
_ANY_TOKEN = 2**31
_SERVER_ONLY = ("concurrency", "endpoint", "api_key")
_ENGINE_PANELS = (eng.ENGINE, opt.SYSTEM, opt.BUDGET)


def bench(
    ctx: typer.Context,
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
    token_ids: TokenIdsOpt = TokenIds.random,
    temperature: Temperature = 0.0,
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
    policy: opt.Policy = None,
    policy_opt: opt.PolicyOpt = None,
    hardware: eng.Hardware = "this",
    cost: opt.Cost = "auto",
    cost_opt: opt.CostOpt = None,
    kv_gpu_blocks: eng.KvGpuBlocks = None,
    kv_cpu_blocks: eng.KvCpuBlocks = None,
    kv_gpu_bytes: opt.KvGpuBytes = None,
    kv_cpu_bytes: opt.KvCpuBytes = None,
    block_size: opt.BlockSize = 16,
    max_seqs: opt.MaxSeqs = 1024,
    max_batch_tokens: opt.MaxBatchTokens = 8192,
    warmup: Warmup = True,
    out: opt.Out = None,
    plots: opt.Plots = True,
    timeline: Timeline = 0,
    bubbles: Bubbles = False,
    slo: opt.Slo = None,
    drop_first: opt.DropFirst = 0.0,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    url: Url = None,
    concurrency: Concurrency = None,
    endpoint: EndpointOpt = Endpoint.completions,
    api_key: ApiKey = None,
) -> None:
    """Run a workload on the engine, in real time; with several --policy, one after the other.

    With --url, send it to a server instead.
    """
    _check_flags(ctx, url)
    if timeline and out is None:
        raise InputError("--timeline needs --out DIR to write timeline.json into")
    if token_ids is TokenIds.trace and trace is None:
        raise InputError("--token-ids trace needs --trace FILE with prompt_token_ids")
    workload = workload_of(
        trace, format, limit, prompt_lengths, output_lengths, requests, arrivals, rate, speedup, cv, seed
    )
    output = Output(
        out,
        plots,
        SLO.parse(slo) if slo is not None else None,
        drop_first,
        tuple(portable_command(sys.argv[1:])),
        timeline,
    )
    if url is not None:
        client = Client(
            url,
            model if _given(ctx, "model") else None,
            endpoint.value,
            api_key,
            concurrency,
            temperature,
            timeout,
            seed,
            _given_prompts(trace, workload, endpoint) if token_ids is TokenIds.trace else None,
        )
        if not run_url(workload, client, output, quiet, as_json):
            raise typer.Exit(1)
        return
    names = policy or ["neo"]
    options = options_by_policy(names, key_values(policy_opt, "--policy-opt"))
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
        hardware=hardware,
        cost=cost,
        cost_opt=cost_opt,
        kv_gpu_blocks=kv_gpu_blocks,
        kv_cpu_blocks=kv_cpu_blocks,
        kv_gpu_bytes=kv_gpu_bytes,
        kv_cpu_bytes=kv_cpu_bytes,
        limits=Limits(block_size=block_size, max_seqs=max_seqs, max_batch_tokens=max_batch_tokens),
        seed=seed,
    )
    from neo.runtime.replay import ReplayOptions

    replayed = ReplayOptions(temperature, timeout)
    parts = _load(config, workload)
    systems = [parts.system(policy=n, policy_options=options[n]) for n in names]
    how = Measured(
        parts,
        _prompts(token_ids, trace, workload, parts, seed),
        token_ids,
        replayed,
        warmup,
        timeline,
        bubbles,
    )
    run_all([MeasuredRun(s, workload, seed, how) for s in systems], output, quiet, as_json)


def _given(ctx: typer.Context, name: str) -> bool:
    """Whether a flag is on the command line: not its default, nor from the environment."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_flags(ctx: typer.Context, url: str | None) -> None:
    """Refuse flags of the engine where a server is asked, and the other way round."""
    for parameter in ctx.command.params:
        name = str(parameter.name)
        panel = getattr(parameter, "rich_help_panel", None)
        if not _given(ctx, name):
            continue
        if url is None and name in _SERVER_ONLY:
            raise InputError(f"{parameter.opts[0]} needs --url")
        of_engine = (panel in _ENGINE_PANELS and name != "model") or name in ("warmup", "timeline")
        if url is not None and of_engine:
            raise InputError(f"{parameter.opts[0]} is not for --url: the server has its own")


def _given_prompts(trace: Path | None, workload: Workload, endpoint: Endpoint) -> Prompts:
    """The token ids of a trace; whether the server's vocabulary has them, the server knows."""
    from neo.runtime.prompts import read_prompts

    if endpoint is Endpoint.chat:
        raise InputError("--token-ids trace: --endpoint chat sends text; use --endpoint completions")
    assert trace is not None
    return read_prompts(trace, workload, _ANY_TOKEN)


def _load(config: EngineConfig, workload: Workload) -> EngineParts:
    """The model. Random weights take positions of any number: as many as the longest request has."""
    from neo.runtime.setup import EngineParts

    parts = EngineParts(config)
    longest = max(r.prompt_tokens + r.output_tokens for r in workload.requests)
    if config.max_model_len is None and config.load_format == "dummy" and longest > parts.max_model_len:
        parts.config = replace(config, max_model_len=longest)
    return parts


def _prompts(
    token_ids: TokenIds, trace: Path | None, workload: Workload, parts: EngineParts, seed: int
) -> Prompts:
    from neo.runtime.prompts import random_prompts, read_prompts

    vocab = parts.spec.vocab
    if token_ids is TokenIds.trace and trace is not None:
        return read_prompts(trace, workload, vocab)
    return random_prompts(workload, vocab, seed)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the runs of one ``neo bench`` share."""

    parts: EngineParts
    prompts: Prompts
    token_ids: TokenIds
    options: ReplayOptions
    warmup: bool
    timeline: int
    bubbles: bool


class MeasuredRun(Run["Replay"]):
    """A run on a fresh engine."""

    def __init__(self, system: System, workload: Workload, seed: int, how: Measured) -> None:
        super().__init__(system, workload, seed)
        self.how = how

    def prepare(self, stack: ExitStack, log: OpenLog, progress: Progress | None) -> Replay:
        """Warm up; make the engine, whose KV memory is reserved here."""
        from neo.runtime.replay import Replay, warm_up
        from neo.runtime.warm import prepare_engine

        how = self.how
        if how.warmup:
            warm_up(how.parts, self.system)
        slices = sys.maxsize if how.bubbles else how.timeline
        engine = how.parts.engine(self.system, slices_of=slices)
        stack.callback(engine.close)
        if how.warmup and not slices:  # of the engine's own steps, which these would count among
            prepare_engine(engine, how.parts.spec)
        if note := _note(engine):
            print(f"note: {note}", file=sys.stderr)
        header = {
            **self.system.describe(),
            "engine": engine.executor.describe(),
            "max_model_len": engine.options.max_model_len,
            "zero": 0,
        }
        replay = Replay(
            engine,
            self.workload,
            how.prompts,
            how.options,
            log(header),
            progress,
            timeline_steps=how.timeline,
            bubbles=how.bubbles,
        )
        stack.callback(replay.close)
        return replay

    def about(self, driver: Replay) -> dict[str, Any]:
        """Measured, on which engine, and what to know of it."""
        how, engine = self.how, driver.engine
        return {
            "kind": "measured",
            "engine": {
                **engine.executor.describe(),
                "load_format": how.parts.config.load_format,
                "max_model_len": engine.options.max_model_len,
                "ahead": engine.options.ahead,
                "warmup": how.warmup,
                "token_ids": how.token_ids.value,
                "temperature": how.options.temperature,
            },
            "warnings": self._warnings(driver),
        }

    def _warnings(self, driver: Replay) -> list[str]:
        from neo.runtime.engine_config import THIS_MACHINE

        config = self.how.parts.config
        found = [str(w) for w in self.system.cost.describe().get("warnings", ())]
        if note := _note(driver.engine):
            found.append(note)
        if config.hardware == THIS_MACHINE and self.system.config.cost_model.endswith("roofline"):
            found.append(
                "policies planned with rough rates of this machine, measured in a moment; "
                "'neo profile' makes a table for --cost profiled:TABLE.json"
            )
        if driver.too_long:
            found.append(
                f"{driver.too_long} requests rejected: longer than --max-model-len "
                f"{driver.engine.options.max_model_len}"
            )
        return found


def _note(engine: Engine) -> str:
    """What the engine's backend has to say of itself, if anything."""
    return str(getattr(getattr(engine.executor, "backend", None), "note", ""))

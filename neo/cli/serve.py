"""``neo serve``: an OpenAI-compatible server; without ``--model``, of a tiny model that comes with neo."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neo.cli import engine_options as eng
from neo.cli import options as opt
from neo.cli.flags import KEY_VARIABLE, key_values, options_by_policy, size_of
from neo.cli.runner import keep_cost_table, open_results
from neo.core.errors import InputError
from neo.core.view import Limits

if TYPE_CHECKING:
    from neo.core.record import RunRecord
    from neo.system.config import System

_NETWORK, _LOGS = "Network and limits", "Logs and records"
_NEEDED = ("torch", "transformers", "tokenizers", "fastapi", "uvicorn", "msgspec", "prometheus_client")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TINY_BLOCKS = 4096  # of 16 tokens and 12 KiB each: 64 K tokens of the tiny model in 48 MiB on either tier


class LogFormat(StrEnum):
    """How requests are logged."""

    text = "text"
    json = "json"
    none = "none"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Model = Annotated[
    str | None,
    _option(opt.SYSTEM, "--model", help="Hugging Face folder (default: a tiny model that comes with neo)."),
]
TokenizerFolder = Annotated[
    Path | None, _option(opt.SYSTEM, "--tokenizer", help="Folder of the tokenizer (default: the model's).")
]
Served = Annotated[
    list[str] | None,
    _option(opt.SYSTEM, "--served-model-name", help="Name of the model in requests. Repeatable."),
]
Policy = Annotated[str, _option(opt.SYSTEM, "--policy", "-p", help="Policy name or path/to/file.py:Class.")]
Seed = Annotated[int, _option(opt.SYSTEM, "--seed", help="Seed of requests that bring none.", min=0)]
MaxSeqs = Annotated[
    int, _option(opt.BUDGET, "--max-num-seqs", "--max-seqs", help="Requests in a step.", min=1)
]
MaxTokens = Annotated[
    int,
    _option(opt.BUDGET, "--max-num-batched-tokens", "--max-batch-tokens", help="Tokens in a step.", min=1),
]
Host = Annotated[str, _option(_NETWORK, "--host", help="Address to listen on.")]
Port = Annotated[int, _option(_NETWORK, "--port", help="Port; 0: any free one.", min=0, max=65535)]
MaxQueued = Annotated[
    int, _option(_NETWORK, "--max-queued-requests", help="More get 503 and Retry-After.", min=0)
]
Timeout = Annotated[
    float | None,
    _option(_NETWORK, "--request-timeout", help="Seconds after which a request is ended.", min=0.001),
]
Grace = Annotated[
    float, _option(_NETWORK, "--grace", help="Seconds that requests have to end after SIGTERM.", min=0.0)
]
Linger = Annotated[
    float,
    _option(_NETWORK, "--linger", help="Seconds of answering 503 once the engine is gone.", min=0.0),
]
Buffer = Annotated[
    int, _option(_NETWORK, "--stream-buffer", help="Tokens that may wait for a slow client.", min=1)
]
MaxBody = Annotated[str, _option(_NETWORK, "--max-body-size", help="Largest body, as 8MiB.")]
ApiKey = Annotated[
    list[str] | None,
    _option(_NETWORK, "--api-key", help=f"Ask for this key. Repeatable; also from ${KEY_VARIABLE}."),
]
Cors = Annotated[
    list[str] | None, _option(_NETWORK, "--cors-origin", help="Let pages of this origin in. Repeatable.")
]
Format = Annotated[LogFormat, _option(_LOGS, "--log-format", help="Of the line that each request gets.")]
LogPrompts = Annotated[bool, _option(_LOGS, "--log-prompts", help="Put prompts into these lines.")]
Record = Annotated[
    Path | None, _option(_LOGS, "--record", help="Write the run into this directory, for 'neo validate'.")
]


def serve(
    model: Model = None,
    load_format: eng.LoadWeights = None,
    tokenizer: TokenizerFolder = None,
    served_model_name: Served = None,
    dtype: eng.Dtype = None,
    policy: Policy = "neo",
    policy_opt: opt.PolicyOpt = None,
    hardware: eng.Hardware = "this",
    cost: opt.Cost = "auto",
    cost_opt: opt.CostOpt = None,
    backend: eng.Backend = eng.Kernels.auto,
    device: eng.Device = eng.Devices.auto,
    gpu_memory: eng.GpuMemory = None,
    gpu_threads: eng.GpuThreads = None,
    cpu_threads: eng.CpuThreads = None,
    cpu_cores: eng.CpuCores = None,
    ahead: eng.Ahead = False,
    seed: Seed = 0,
    kv_gpu_blocks: eng.KvGpuBlocks = None,
    kv_cpu_blocks: eng.KvCpuBlocks = None,
    kv_gpu_bytes: opt.KvGpuBytes = None,
    kv_cpu_bytes: opt.KvCpuBytes = None,
    block_size: opt.BlockSize = 16,
    max_num_seqs: MaxSeqs = 256,
    max_num_batched_tokens: MaxTokens = 8192,
    max_model_len: eng.MaxModelLen = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_queued_requests: MaxQueued = 1024,
    request_timeout: Timeout = None,
    grace: Grace = 30.0,
    linger: Linger = 5.0,
    stream_buffer: Buffer = 1024,
    max_body_size: MaxBody = "8MiB",
    api_key: ApiKey = None,
    cors_origin: Cors = None,
    log_format: Format = LogFormat.text,
    log_prompts: LogPrompts = False,
    record: Record = None,
) -> None:
    """Serve a model as OpenAI's HTTP interface has it. Without --model: a tiny one that comes with neo."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"neo serve needs {missing[0]}: pip install 'neo-serve[serve]'")
    from neo.runtime.server.spawn import spawn

    with spawn() as child:  # it loads its libraries while this process loads its own
        from neo.runtime.server.launch import Launch
        from neo.runtime.server.limits import ServerLimits
        from neo.runtime.server.run import ServeConfig, run_server

        if model is None and kv_gpu_blocks is None and kv_gpu_bytes is None:
            kv_gpu_blocks = _TINY_BLOCKS
        if model is None and kv_cpu_blocks is None and kv_cpu_bytes is None:
            kv_cpu_blocks = _TINY_BLOCKS
        if model is None and load_format is eng.LoadFormat.dummy:
            raise InputError("--load-format dummy needs --model: a preset's name, or a config.json")
        path, folder, names = _model(model, tokenizer, served_model_name)
        config = eng.engine_config(
            model=path,
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
            limits=Limits(
                block_size=block_size, max_seqs=max_num_seqs, max_batch_tokens=max_num_batched_tokens
            ),
            seed=seed,
        )
        options = options_by_policy([policy], key_values(policy_opt, "--policy-opt"))[policy]
        config = replace(config, policy=policy, policy_options=options)
        keys = tuple(api_key or ()) or tuple(filter(None, [os.environ.get(KEY_VARIABLE)]))
        if not all(key.strip() for key in keys):
            raise InputError("--api-key: an empty key keeps nobody out; leave it away to serve everybody")
        limits = ServerLimits(
            max_queued=max_queued_requests,
            max_body_bytes=size_of(max_body_size, "--max-body-size") or 0,
            request_timeout_s=request_timeout,
            stream_buffer=stream_buffer,
            grace_s=grace,
            linger_s=linger,
        )
        if host not in _LOOPBACK and not keys:
            print(
                f"warning: {host} may be reached from other machines, and no --api-key is set",
                file=sys.stderr,
            )
        if record is not None:
            open_results(record, "--record")
            keep_cost_table(cost, record)
        launch = Launch(config, record_dir=record, write_results=write_results)
        code = run_server(
            ServeConfig(
                child,
                launch,
                folder,
                names,
                host,
                port,
                keys,
                tuple(cors_origin or ()),
                limits,
                log_format.value,
                log_prompts,
                lambda address: _announce(address, names[0], bool(keys)),
            )
        )
    raise typer.Exit(code)


def _model(
    model: str | None, tokenizer: Path | None, served: list[str] | None
) -> tuple[str, Path, tuple[str, ...]]:
    """What to load, where its tokenizer is, and its names."""
    from neo.runtime import tiny

    if model is None:
        return str(tiny.FOLDER), tokenizer or tiny.FOLDER, tuple(served or [tiny.NAME])
    path = Path(model).expanduser()
    if tokenizer is None:  # a preset has none: bytes do, where weights are random anyway
        own = path if path.is_dir() else path.parent
        tokenizer = own if path.is_dir() or (own / "tokenizer.json").is_file() else tiny.FOLDER
    names = served or list(dict.fromkeys([model, path.name]))
    return model, tokenizer, tuple(names)


def _announce(address: str, model: str, locked: bool) -> None:
    """Tell where the server is, and a line to try; a key is never printed, the shell must have it."""
    lines = ["curl", "-s", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json"]
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if locked else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is a KV cache?"}}]}}'
    print(f"neo serves {model} at {address}")
    needs = f", with the key in the shell's variable (export {KEY_VARIABLE}=...)" if locked else ""
    print(f"Try{needs}: {shlex.join(lines)}{key} -d {shlex.quote(body)}", flush=True)


def write_results(folder: Path, record: RunRecord, system: System, engine: dict[str, Any]) -> None:
    """Write ``summary.json`` and ``requests.csv`` beside the run log, as ``neo validate`` reads them.

    Called in the engine's process; ``engine`` is its executor's description.
    """
    from neo.report.files import RunMeta, write_run

    started = [r.arrival_s for r in record.requests]
    ended = [r.finish_s for r in record.requests if r.finish_s is not None]
    record.start_s, record.end_s = min(started, default=0.0), max(ended, default=0.0)
    described = system.cost.describe()
    write_run(
        folder,
        record,
        RunMeta(
            kind="measured",
            policy=system.config.policy,
            policy_options=dict(system.config.policy_options),
            model=system.model.name,
            hardware=system.hardware.name,
            workload={"name": "served"},
            cost_model=described,
            limits=system.describe()["limits"],
            layers=system.model.layers,
            tensor_parallel=system.model.tp,
            engine=engine,
            warnings=described.get("warnings", ()),
            command=("serve",),
            wall_time_s=record.end_s - record.start_s,
        ),
    )

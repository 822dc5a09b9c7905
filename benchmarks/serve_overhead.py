"""What the server costs: tokens per second over HTTP, latency it adds to a token, what it takes of a step.

usage: python benchmarks/serve_overhead.py [--streams 1 64 512] [--tokens 400] [--repeats 5]

A model that costs nothing stands behind the real server, in its own process; the streams are real sockets.

- *Tokens per second*: the engine runs as fast as it can; every stream asks for ``--tokens`` tokens, counted
  from the first to the last that any client reads.
- *Latency*: every step ends on a grid of time that engine and clients share, so that a client knows how old a
  token is when it reads it. Beside it the age at which the engine gives it out, in this process and without a
  server.
- *The engine's step*: from step to step at 64 streams, with a server and without one; for a model that costs
  nothing, and for one that keeps its core busy for 10 ms. In processor time of the engine's process, which
  others on the machine hardly disturb, and on the wall clock. Several steps may share a message, so what is
  taken is the mean of 32 steps in a row. Streams begin one after the other, also alone: not all need their
  next block of KV memory in the same step then, which takes some 2 % longer. Runs take turns: alone, alone
  while another process keeps the other cores busy (on many machines that alone slows a core down), and with a
  server. Of all means the lowest tenth and the median are shown, of each run's medians the middle one: others
  on the machine only add.

Engine, HTTP process and clients want a core each. The engine's has one of its own; on a machine of two the
others share the second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from null_engine import build, config_for

from neo.runtime.sampling_params import SamplingParams

HERE = Path(__file__).resolve().parent
PROMPT = "0123456789abcdef"
CHUNK = b'"text_completion"'  # once in every chunk
GRIDS = {1: 0.02, 64: 0.05, 512: 0.4}  # seconds: a step's tokens must have arrived before the next step's
SLOW_STREAMS = 64
CORE = min(os.sched_getaffinity(0)) if len(os.sched_getaffinity(0)) > 1 else None  # the engine's own
WARM = 5  # steps, or tokens of a stream, that are not counted
BLOCK = 32  # steps in a row whose mean is taken
STEP_TOKENS = {0.0: 5000, 0.01: 200}  # of a stream, by the model's seconds: streams begin one after the other
Times = list[float]


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """The address of a running one."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", "import null_engine; null_engine.main()", *arguments]
    command += [] if CORE is None else ["--core", str(CORE)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


async def stream(address: str, tokens: int) -> Times:
    """When each token of a stream was read. Reads bytes only: parsing would measure this program."""
    parts = urlsplit(address)
    body = json.dumps(
        {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    times: Times = []
    seen = b""
    while b"[DONE]" not in seen:
        data = await reader.read(1 << 16)
        if not data:
            raise SystemExit(f"a stream broke off: {seen!r}")
        now = time.perf_counter()
        seen = seen[1 - len(CHUNK) :] + data  # less than a mark is counted with what comes behind it
        times += [now] * seen.count(CHUNK)
    writer.close()
    assert len(times) == tokens, len(times)
    return times


async def streams(address: str, count: int, tokens: int) -> list[Times]:
    return await asyncio.gather(*(stream(address, tokens) for _ in range(count)))


def in_process(count: int, tokens: int, together: bool = True, **pace: float) -> tuple[Times, Any]:
    """Without a server: when each token of steps with all sequences was given out; the executor.

    Not ``together``: a step lies between two arrivals, as behind a server, so that not all sequences need
    their next block in the same step. A step then takes some 2 % longer.
    """
    cores = os.sched_getaffinity(0)
    engine, _ = build(config_for(count, tokens + len(PROMPT)), None, None, CORE, **pace)
    engine.brief = True  # as behind a server: no object per token that nobody reads
    for i in range(count):
        params = SamplingParams(tokens, 0.0, ignore_eos=True)
        engine.add(str(i), list(PROMPT.encode()), params)
        if not together:
            engine.step()
    out: Times = []
    while engine.has_work:
        outputs = engine.step()
        if count == (len(outputs) if engine.plain is None else len(engine.plain[0])):
            out.append(time.perf_counter())
    os.sched_setaffinity(0, cores)
    return out[WARM:], engine.executor


def periods(
    begins: Sequence[float], processor: Sequence[float], tokens: Sequence[int], count: int
) -> tuple[Times, Times]:
    """Seconds of a step, as means of BLOCK in a row with a token for everyone: processor, wall clock."""
    full = [i for i in range(len(begins)) if tokens[i] == count][WARM:]
    blocks = [(a, b) for a, b in zip(full[::BLOCK], full[BLOCK::BLOCK], strict=False) if b - a == BLOCK]
    if not blocks:
        raise SystemExit("the streams were too short: never enough steps in a row with all of them")
    return (
        [(processor[b] - processor[a]) / BLOCK for a, b in blocks],
        [(begins[b] - begins[a]) / BLOCK for a, b in blocks],
    )


def quantiles(values: Times) -> str:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"{1e3 * statistics.median(ordered):.2f} ms, P99 {1e3 * p99:.2f} ms"


def throughput(count: int, tokens: int) -> str:
    with server("--sequences", str(count), "--tokens", str(tokens + 64)) as address:
        asyncio.run(streams(address, count, WARM))
        every = asyncio.run(streams(address, count, tokens))
    seconds = max(t[-1] for t in every) - min(t[0] for t in every)
    return f"{count * tokens / seconds:,.0f} tokens/s"


def latency(count: int, tokens: int) -> str:
    grid = GRIDS.get(count, 0.4)
    tokens = min(tokens, max(20, int(8.0 / grid)))
    with server("--sequences", str(count), "--tokens", str(tokens + 64), "--grid", str(grid)) as address:
        every = asyncio.run(streams(address, count, tokens))
    alone, _ = in_process(count, tokens, grid_s=grid)
    served = [t % grid for times in every for t in times[WARM:]]
    without = [t % grid for t in alone]
    return f"a token is {quantiles(served)} old; without a server {quantiles(without)}"


def slowdown(busy_s: float, repeats: int) -> str:
    """Alone, alone on a busy machine and with a server, in turns."""
    kinds: dict[str, list[tuple[Times, Times]]] = {"alone": [], "beside others": [], "served": []}
    for _ in range(repeats):
        kinds["alone"].append(steps_alone(busy_s))
        with busy_cores():
            kinds["beside others"].append(steps_alone(busy_s))
        kinds["served"].append(steps_served(busy_s))
    lines = []
    for name, which in (("processor", 0), ("wall clock", 1)):
        for what, of in (("median of medians", middle), ("lowest tenth", tenth)):
            found = {kind: of([run[which] for run in runs]) for kind, runs in kinds.items()}
            alone = found.pop("alone")
            more = ", ".join(f"{1e3 * v:.4f} ms {k} ({v / alone - 1:+.1%})" for k, v in found.items())
            lines.append(f"  {name}, {what}: {1e3 * alone:.4f} ms alone, {more}")
    return "\n".join(lines)


def middle(runs: list[Times]) -> float:
    return statistics.median([statistics.median(run) for run in runs])


def tenth(runs: list[Times]) -> float:
    return statistics.quantiles([t for run in runs for t in run], n=10)[0]


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keeps the cores busy that are not the engine's."""
    code = "import json\ndata = [{'a': i, 'b': [str(i)] * 9} for i in range(999)]\n"
    code += "while True: json.loads(json.dumps(data))"
    found = [subprocess.Popen([sys.executable, "-c", code]) for _ in os.sched_getaffinity(0)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for process in found:
            process.kill()
            process.wait()


def steps_alone(busy_s: float) -> tuple[Times, Times]:
    _, executor = in_process(SLOW_STREAMS, STEP_TOKENS[busy_s], together=False, busy_s=busy_s)
    return periods(executor.begins, executor.processor, executor.tokens, SLOW_STREAMS)


def steps_served(busy_s: float) -> tuple[Times, Times]:
    tokens = STEP_TOKENS[busy_s]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        arguments = ("--sequences", str(SLOW_STREAMS), "--tokens", str(tokens + 64), "--busy", str(busy_s))
        with server(*arguments, "--trace", str(trace)) as address:
            asyncio.run(streams(address, SLOW_STREAMS, tokens))
        return periods(*json.loads(trace.read_text()), SLOW_STREAMS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5, help="of the measurement of the engine's step")
    args = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores")
    if CORE is not None:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {CORE})
    for count in args.streams:
        print(f"{count} streams: {throughput(count, args.tokens)}; {latency(count, args.tokens)}", flush=True)
    for busy_s in STEP_TOKENS:
        found = slowdown(busy_s, args.repeats)
        print(f"step at {SLOW_STREAMS} streams, model of {1e3 * busy_s:g} ms:\n{found}", flush=True)


if __name__ == "__main__":
    main()

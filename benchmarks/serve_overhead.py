"""What the server costs: tokens per second over HTTP, latency it adds to a token, what it takes of a step.

usage: python benchmarks/serve_overhead.py [--streams 1 64 512] [--tokens 400] [--models 0 10] [--rounds 50]

A model that costs nothing stands behind the real server, in its own process; the streams are real sockets.

- *Tokens per second*: the engine runs as fast as it can; every stream asks for ``--tokens`` tokens, counted
  from the first to the last that any client reads. Beside it the HTTP process's own time for a token.
- *Latency*: every step ends on a grid of time that engine and clients share, so that a client knows how old a
  token is when it reads it. Beside it the age at which the engine gives it out, in this process and without a
  server.
- *The engine's step*: from step to step at 64 streams, with a server and without one; for a model that costs
  nothing, and for one that keeps its core busy for 10 ms. A machine may change its speed from one second to
  the next by far more than a server takes. So the engines are there at once, on one core, and take turns of
  0.4 s: all others stand, with their servers and clients (SIGSTOP), and what a step takes in a turn is held
  against the turn of the engine alone in the same round. A third engine, without a server too, runs while
  other processes keep the other cores busy: on many machines that alone slows a core down. In processor time
  of the engine's process and on the wall clock, on which an engine waits that is faster than HTTP: the median
  over the rounds, with the error of a median (1.25 standard errors, from the quartiles).
  Streams begin one after the other, also alone: not all need their next block of KV memory in the same step
  then, which takes some 2 % longer.

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
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
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
TURN_S, SETTLE_S = 0.4, 0.05  # of an engine, and what of it is not counted
FEWEST = 8  # steps of a turn that counts: an engine that is faster than HTTP may wait for all of one
ALONE, BUSY, SERVED = "alone", "beside others", "served"
Times = list[float]
Turn = tuple[float, float]  # of an engine: begin and end


@contextmanager
def null_engine(*arguments: str) -> Iterator[tuple[str, int]]:
    """A running one; yields the address of its server, if it has one, and the process's number."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", "import null_engine; null_engine.main()", *arguments]
    command += [] if CORE is None else ["--core", str(CORE)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


async def stream(address: str, tokens: int, begun: asyncio.Event | None = None) -> Times:
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
        if begun is not None:
            begun.set()
    writer.close()
    assert len(times) == tokens, len(times)
    return times


async def streams(address: str, count: int, tokens: int) -> list[Times]:
    return await asyncio.gather(*(stream(address, tokens) for _ in range(count)))


def in_process(count: int, tokens: int, grid_s: float) -> Times:
    """Without a server: when each token of steps with all sequences was given out."""
    cores = os.sched_getaffinity(0)
    engine, _ = build(config_for(count, tokens + len(PROMPT)), None, None, CORE, grid_s=grid_s)
    engine.brief = True  # as behind a server: no object per token that nobody reads
    for i in range(count):
        engine.add(str(i), list(PROMPT.encode()), SamplingParams(tokens, 0.0, ignore_eos=True))
    out: Times = []
    while engine.has_work:
        outputs = engine.step()
        if count == (len(outputs) if engine.plain is None else len(engine.plain[0])):
            out.append(time.perf_counter())
    os.sched_setaffinity(0, cores)
    return out[WARM:]


def quantiles(values: Times) -> str:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"{1e3 * statistics.median(ordered):.2f} ms, P99 {1e3 * p99:.2f} ms"


def throughput(count: int, tokens: int) -> str:
    with null_engine("--sequences", str(count), "--tokens", str(tokens + 64)) as (address, pid):
        asyncio.run(streams(address, count, WARM))
        before = processor_s(pid)
        every = asyncio.run(streams(address, count, tokens))
        busy = processor_s(pid) - before
    seconds = max(t[-1] for t in every) - min(t[0] for t in every)
    return f"{count * tokens / seconds:,.0f} tokens/s, {1e6 * busy / (count * tokens):.1f} us each over HTTP"


def processor_s(pid: int) -> float:
    """Processor time that a process has taken, by /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def latency(count: int, tokens: int) -> str:
    grid = GRIDS.get(count, 0.4)
    tokens = min(tokens, max(20, int(8.0 / grid)))
    with null_engine("--sequences", str(count), "--tokens", str(tokens + 64), "--grid", str(grid)) as (
        address,
        _,
    ):
        every = asyncio.run(streams(address, count, tokens))
    alone = in_process(count, tokens, grid)
    served = [t % grid for times in every for t in times[WARM:]]
    without = [t % grid for t in alone]
    return f"a token is {quantiles(served)} old; without a server {quantiles(without)}"


def slowdown(busy_s: float, rounds: int) -> str:
    """Three engines take turns: what a step takes, and how much more than alone in the same round."""
    room = int(2 * rounds * TURN_S / max(busy_s, 1e-4))  # tokens of a stream: more than there is time for
    turns: dict[str, list[Turn]] = {ALONE: [], BUSY: [], SERVED: []}
    pids: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        traces = {kind: Path(folder) / kind for kind in turns}
        for kind, trace in traces.items():
            arguments = ["--sequences", str(SLOW_STREAMS), "--tokens", str(room), "--busy", str(busy_s)]
            arguments += ["--trace", str(trace)] + ["--alone"] * (kind != SERVED)
            address, process = stack.enter_context(null_engine(*arguments))
            pids[kind] = [process]
            if kind == SERVED:
                pids[kind] += stack.enter_context(clients(address, SLOW_STREAMS, room - len(PROMPT)))
                pids[kind].append(int(trace.with_suffix(".pid").read_text()))
            if kind == BUSY:
                pids[kind] += stack.enter_context(busy_cores())
            stack.callback(send, pids[kind], signal.SIGCONT)  # before it ends
            send(pids[kind], signal.SIGSTOP)
        for i in range(rounds):
            for kind in list(turns)[:: -1 if i % 2 else 1]:
                send(pids[kind], signal.SIGCONT)
                begin = time.perf_counter()
                time.sleep(TURN_S)
                turns[kind].append((begin + SETTLE_S, time.perf_counter()))
                send(pids[kind], signal.SIGSTOP)
        stack.pop_all().close()
        steps = {kind: periods(json.loads(traces[kind].read_text()), turns[kind]) for kind in turns}
    alone = steps[ALONE]
    lines = []
    for which, clock in enumerate(("processor", "wall clock")):
        shown = [f"{1e3 * statistics.median([step[which] for step in alone if step]):.4f} ms alone"]
        for kind in (BUSY, SERVED):
            pairs = [(a, b) for a, b in zip(steps[kind], alone, strict=True) if a and b]
            ratios = [a[which] / b[which] for a, b in pairs]
            if len(ratios) < 2:
                raise SystemExit(f"{kind}: fewer than two turns had {FEWEST} steps: the machine is too slow")
            low, mid, high = statistics.quantiles(ratios, n=4)
            error = 1.25 * (high - low) / 1.35 / len(ratios) ** 0.5
            shown.append(f"{kind} {mid - 1:+.1%} (+-{error:.1%})")
        lines.append(f"  {clock}: {', '.join(shown)}")
    return "\n".join(lines)


def send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def periods(trace: tuple[Times, Times, list[int]], turns: list[Turn]) -> list[tuple[float, float] | None]:
    """Seconds of a step in each turn: processor time, wall clock; None for a turn that was spent waiting."""
    begins, processor, tokens = trace
    found: list[tuple[float, float] | None] = []
    for begin, end in turns:
        first, last = bisect_left(begins, begin), bisect_left(begins, end) - 1
        count = last - first
        if count < FEWEST:
            found.append(None)
            continue
        if set(tokens[first:last]) != {SLOW_STREAMS}:
            raise SystemExit("not every stream was there in every step: the machine is too slow for this")
        found.append(((processor[last] - processor[first]) / count, (begins[last] - begins[first]) / count))
    return found


@contextmanager
def clients(address: str, count: int, tokens: int) -> Iterator[list[int]]:
    """Streams that are read, by a process of their own, its number; entered when each has brought a token."""
    code = (
        f"import asyncio, serve_overhead; asyncio.run(serve_overhead.read_on({address!r}, {count}, {tokens}))"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=HERE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline(), "the streams did not begin"
        yield [process.pid]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def read_on(address: str, count: int, tokens: int) -> None:
    """Read streams until killed; a line on stdout when all have begun."""
    begun = [asyncio.Event() for _ in range(count)]
    reading = [asyncio.ensure_future(stream(address, tokens, event)) for event in begun]
    for event in begun:
        await event.wait()
    print(flush=True)
    await asyncio.gather(*reading)


@contextmanager
def busy_cores() -> Iterator[list[int]]:
    """Processes that keep the cores busy that are not the engine's."""
    code = "import json\ndata = [{'a': i, 'b': [str(i)] * 9} for i in range(999)]\n"
    code += "while True: json.loads(json.dumps(data))"
    others = os.sched_getaffinity(0) if CORE is not None else ()
    found = [subprocess.Popen([sys.executable, "-c", code]) for _ in others]
    try:
        yield [process.pid for process in found]
    finally:
        for process in found:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 64, 512])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument(
        "--models", type=float, nargs="*", default=[0, 10], metavar="MS",
        help="milliseconds that the model takes where the engine's step is measured",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=50, help="of the measurement of the engine's step")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nobody is left behind, or left standing
    print(f"{len(os.sched_getaffinity(0))} cores")
    if CORE is not None:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {CORE})
    for count in args.streams:
        print(f"{count} streams: {throughput(count, args.tokens)}; {latency(count, args.tokens)}", flush=True)
    for busy_ms in args.models:
        found = slowdown(1e-3 * busy_ms, args.rounds)
        print(f"step at {SLOW_STREAMS} streams, model of {busy_ms:g} ms:\n{found}", flush=True)


if __name__ == "__main__":
    main()

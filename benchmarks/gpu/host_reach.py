"""How much of what the host's bandwidth allows can be reached by two sub-batches and relayed decodes.

    python benchmarks/gpu/host_reach.py --hardware h200-16c

For every budget of GPU memory and length of output: requests/s with the GPU alone, in a steady state; by
which factor the bandwidth bound raises that (the host reads KV for all of the time, and costs the GPU
nothing); and by which the best mixture of steps does that the cost table allows, of those looked at: two
sub-batches beside prompts, relayed decodes beside decodes and beside prompts. Those relay the same number of
rows a layer, at most 4, 7 or 16 (``--rows``), and each row stands for L + 1 requests on the host; those in
the second sub-batch come on top. Filling and draining the host is left out, and copies cost nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from bandwidth_bound import PROMPT, best_gain
from scipy.optimize import linprog  # type: ignore[import-untyped]

from neo.core.errors import InputError
from neo.core.graph import OpKind, Work
from neo.core.view import Limits
from neo.policy.estimate import StageTimes
from neo.sim.setup import SystemConfig, build_system

CHUNKS = (500, 1000, 1500, 2000)
MOST, FIRST = 100, 20  # decodes of the host in sub-batch 1 and sub-batch 0, at most


@dataclass(frozen=True)
class Step:
    """A step of a steady state."""

    seconds: float
    prompts: float
    tokens: int


@dataclass(frozen=True)
class Costs:
    """What a step takes by its stages."""

    times: StageTimes

    def cpu(self, count: int, kv: int, relayed: bool) -> float:
        """Seconds of a layer's attention on the host."""
        if not count:
            return 0.0
        model = self.times.model
        if relayed:
            work = Work(count, count, kv, layers=model.layers)
            return float(self.times.cost.seconds(OpKind.CPU_ATTN, work))
        return self.times.cpu_stage(count, kv)

    def pipelined(self, resident: int, chunk: int, kv: int, first: int, second: int) -> Step:
        """Prompts and everybody on the GPU in sub-batch 0, decodes of the host in both."""
        times, layers = self.times, self.times.model.layers
        attention = times.gpu_attention(prompts_of(chunk), resident, resident * kv)
        layer = max(times.linear(resident + chunk + first), self.cpu(second, second * kv, False))
        layer += max(times.linear(second) + attention, self.cpu(first, first * kv, False))
        return self._step(layers * layer, chunk, resident + first + second)

    def sequential(self, resident: int, chunk: int, kv: int, rows: int) -> Step:
        """Everybody on the GPU, prompts or none, and so many relayed rows a layer."""
        times, layers = self.times, self.times.model.layers
        layer = times.linear(resident + chunk + rows)
        layer += times.gpu_attention(prompts_of(chunk), resident, resident * kv)
        step = self._step(layers * layer, chunk, resident + rows)
        return replace(step, seconds=max(step.seconds, layers * self.cpu(rows, rows * kv, True)))

    def _step(self, seconds: float, chunk: int, rows: int) -> Step:
        ended = rows + -(-chunk // PROMPT)
        return Step(seconds + self.times.around(chunk + rows, ended, ended), chunk / PROMPT, rows)


def prompts_of(chunk: int) -> tuple[tuple[int, int], ...]:
    """Whole prompts, and a part from the middle of one: (start, length)."""
    whole, rest = divmod(chunk, PROMPT)
    return ((0, PROMPT),) * whole + (((PROMPT - rest) // 2, rest),) * bool(rest)


def best(costs: Costs, kv_tokens: int, output: int, most: int) -> list[float]:
    """Requests/s of the mixture that ends most, by relayed rows a layer, from 0 to ``most``."""
    kv = PROMPT + output // 2
    resident = max(1, kv_tokens // kv)
    others = [
        costs.pipelined(resident, chunk, kv, first, second)
        for chunk in CHUNKS
        for second in range(1, MOST + 1)
        for first in range(FIRST + 1)
    ]
    found = []
    for rows in range(most + 1):
        steps = [costs.sequential(resident, chunk, kv, r) for chunk in (0, *CHUNKS) for r in {0, rows}]
        found.append(fastest([*steps, *others], output))
    return found


def fastest(steps: Sequence[Step], output: int) -> float:
    """Requests/s of the best mixture of these that makes as many tokens as its prompts need."""
    prompts, tokens, seconds = (
        np.array(column) for column in zip(*[(s.prompts, s.tokens, s.seconds) for s in steps], strict=True)
    )
    found = linprog(-prompts, A_ub=[output * prompts - tokens], b_ub=[0.0], A_eq=[seconds], b_eq=[1.0])
    return -float(found.fun)


def alone(costs: Costs, kv_tokens: int, output: int) -> float:
    """Requests/s without the host."""
    kv = PROMPT + output // 2
    resident = max(1, kv_tokens // kv)
    return fastest([costs.sequential(resident, chunk, kv, 0) for chunk in (0, *CHUNKS)], output)


def lines(args: argparse.Namespace) -> Iterator[str]:
    """The table."""
    config = SystemConfig("neo", args.hardware, args.model, limits=Limits(max_batch_tokens=2304))
    system = build_system(config)
    names = ("alone, req/s", "bound", *[f"rows <= {rows}" for rows in args.rows])
    yield f"{'KV tokens':>9} {'out':>4} " + " ".join(f"{name:>13}" for name in names)
    costs = Costs(StageTimes(system.cost, system.model))
    products, read = system.hardware.gpu_flops, system.hardware.cpu_bandwidth
    for tokens in args.budgets:
        for output in args.outputs:
            base = alone(costs, tokens, output)
            most = best_gain(system.model, output, base, products, read)
            cells = [f"{base:13.2f}", f"{most:13.3f}"]
            rates = best(costs, tokens, output, max(args.rows))
            for rows in args.rows:
                ratio = max(rates[: rows + 1]) / base
                gain = f"{(ratio - 1.0) / (most - 1.0):4.0%}" if most > 1.0 else "   -"
                cells.append(f"{ratio:.3f} ({gain})".rjust(13))
            yield f"{tokens:9} {output:4} " + " ".join(cells)


def number(least: int, text: str) -> int:
    """A number that is at least so much."""
    if text.isdecimal() and int(text) >= least:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least {least}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hardware", default="h200-16c")
    parser.add_argument("--model", default="llama-3.1-8b")
    tokens, rows = partial(number, 1), partial(number, 0)
    parser.add_argument("--budgets", type=tokens, nargs="+", default=[3200, 6400, 12800, 26368, 45056])
    parser.add_argument("--outputs", type=tokens, nargs="+", default=[50, 200, 400])
    parser.add_argument("--rows", type=rows, nargs="+", default=[4, 7, 16], help="relayed, of a layer")
    try:
        for line in lines(parser.parse_args()):
            print(line, flush=True)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

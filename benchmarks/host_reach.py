"""How much of what the host's bandwidth allows can be reached by two sub-batches and relayed decodes.

    python benchmarks/host_reach.py --hardware h200-16c

For every budget of GPU memory and length of output: requests/s with the GPU alone, in a steady state; by
which factor the bandwidth bound raises that (the host reads KV for all of the time, and costs the GPU
nothing); and by which the best mixture of steps does that the cost table allows, the host's memory being
endless and never to be filled: two sub-batches beside prompts, relayed decodes beside decodes. Then the same
with a part of what is in the way taken away: attention on the CPU as fast as plain reading; the second
sub-batch's pass over the weights for nothing; both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog  # type: ignore[import-untyped]

from neo.core.graph import OpKind, Work
from neo.core.view import Limits
from neo.policy.estimate import StageTimes
from neo.sim.setup import SystemConfig, build_system

PROMPT = 1000  # tokens
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
    """What a step takes by its stages, or would if something cost nothing."""

    times: StageTimes
    read: float  # bytes/s of plain reading by the host
    plain: bool  # CPU attention as fast as that
    free: bool  # the second sub-batch's products for nothing

    def cpu(self, count: int, kv: int, relayed: bool) -> float:
        """Seconds of a layer's attention on the host."""
        if not count:
            return 0.0
        model = self.times.model
        if self.plain:
            return kv * model.kv_bytes_per_token_layer / self.read
        if relayed:
            work = Work(count, count, kv, layers=model.layers)
            return float(self.times.cost.seconds(OpKind.CPU_ATTN, work))
        return self.times.cpu_stage(count, kv)

    def beside_prompts(self, resident: int, chunk: int, kv: int, first: int, second: int) -> Step:
        """Prompts and everybody on the GPU in sub-batch 0, decodes of the host in both."""
        times, layers = self.times, self.times.model.layers
        attention = times.gpu_attention(((PROMPT // 2, chunk),), resident, resident * kv)
        other = 0.0 if self.free else times.linear(second)
        layer = max(times.linear(resident + chunk + first), self.cpu(second, second * kv, False))
        layer += max(other + attention, self.cpu(first, first * kv, False))
        rows = resident + first + second
        ended = rows + chunk // PROMPT + 1
        seconds = layers * layer + times.around(chunk + rows, ended, ended)
        return Step(seconds, chunk / PROMPT, rows)

    def decodes(self, resident: int, kv: int, rows: int) -> Step:
        """Decodes on the GPU, and so many relayed ones a layer."""
        times, layers = self.times, self.times.model.layers
        layer = times.linear(resident + rows) + times.gpu_attention((), resident, resident * kv)
        seconds = layers * layer + times.around(resident + rows, resident + rows, resident + rows)
        return Step(max(seconds, layers * self.cpu(rows, rows * kv, True)), 0.0, resident + rows)


def best(costs: Costs, kv_tokens: int, output: int, host: bool) -> float:
    """Requests/s of the mixture that ends most: as many tokens as the requests need whose prompts it has."""
    kv = PROMPT + output // 2
    resident = max(1, kv_tokens // kv)
    steps = [costs.decodes(resident, kv, rows) for rows in range(17 if host else 1)]
    steps += [
        costs.beside_prompts(resident, chunk, kv, first, second)
        for chunk in CHUNKS
        for second in range(MOST + 1 if host else 1)
        for first in range(FIRST + 1 if second else 1)
    ]
    prompts, tokens, seconds = (
        np.array(column) for column in zip(*[(s.prompts, s.tokens, s.seconds) for s in steps], strict=True)
    )
    found = linprog(-prompts, A_eq=np.stack([seconds, tokens - output * prompts]), b_eq=[1.0, 0.0])
    return -float(found.fun)


def bound(times: StageTimes, products: float, read: float, output: int, rate: float) -> float:
    """The bandwidth bound, as ``benchmarks/gpu/study.py`` has it."""
    prompt_s = PROMPT * 2.0 * times.model.params / products
    decode_s = max(0.0, 1.0 / rate - prompt_s)
    read_s = output * (PROMPT + output / 2) * times.model.kv_bytes_per_token / read
    share = min(1.0, (prompt_s + decode_s) / (decode_s + read_s))
    return (prompt_s + decode_s) / (prompt_s + (1.0 - share) * decode_s)


def lines(args: argparse.Namespace) -> Iterator[str]:
    """The table."""
    names = ("alone, req/s", "bound", "reached", "CPU as plain reading", "second pass free", "both")
    yield f"{'KV tokens':>9} {'out':>4} " + " ".join(f"{name:>{max(13, len(name))}}" for name in names)
    config = SystemConfig("neo", args.hardware, args.model, limits=Limits(max_batch_tokens=2304))
    system = build_system(config)
    times = StageTimes(system.cost, system.model)
    products, read = system.hardware.gpu_flops, system.hardware.cpu_bandwidth
    for tokens in args.budgets:
        for output in args.outputs:
            alone = best(Costs(times, read, False, False), tokens, output, host=False)
            most = bound(times, products, read, output, alone)
            cells = [f"{alone:13.2f}", f"{most:13.3f}"]
            for plain, free, name in zip((0, 1, 0, 1), (0, 0, 1, 1), names[2:], strict=True):
                ratio = best(Costs(times, read, bool(plain), bool(free)), tokens, output, True) / alone
                share = f"{ratio:.3f} ({(ratio - 1.0) / (most - 1.0):4.0%})"
                cells.append(f"{share:>{max(13, len(name))}}")
            yield f"{tokens:9} {output:4} " + " ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hardware", default="h200-16c")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--budgets", type=int, nargs="+", default=[3200, 6400, 12800, 26368, 45056])
    parser.add_argument("--outputs", type=int, nargs="+", default=[50, 200, 400])
    for line in lines(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()

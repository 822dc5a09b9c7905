"""A decode step with relayed CPU decodes beside it: how much longer it gets, and what that brings.

    python benchmarks/gpu/relay.py

For numbers of decodes on the GPU and of requests on the host (spread evenly over the layers): the median
step, the CPU's attention in it, and the tokens per second over those of the GPU's decodes alone. Steps are
queued behind each other, as an engine with --ahead does; KV is reserved, not computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from neo.core.graph import OpKind
from neo.core.pipeline import compile
from neo.core.plan import StepPlan, SubBatch
from neo.core.request import Request, Tier
from neo.core.view import Limits
from neo.runtime.engine_config import EngineConfig
from neo.runtime.measure import Bench
from neo.runtime.setup import EngineParts
from neo.runtime.step_inputs import prepare


class Steps:
    """Queued steps on an executor, with relayed requests that go from layer to layer."""

    def __init__(self, executor: Any, bench: Bench) -> None:
        self.executor, self.bench = executor, bench

    def run(self, on_gpu: tuple[Request, ...], hosted: list[Request], count: int) -> tuple[float, float]:
        """Median seconds of a step, and of CPU attention in it."""
        layers = self.bench.model.layers
        each = -(-len(hosted) // (layers + 1))
        idle = list(hosted)
        waiting: Any = None
        seconds, attention = [], []
        last = time.perf_counter()
        for i in range(count):
            begin = [idle.pop() for _ in range(min(each, len(idle)))]
            members = tuple(begin + [r for r in hosted if r.relay_layers])
            plan = StepPlan((SubBatch(gpu_decode=on_gpu, relay_decode=members),))
            graph = compile(plan, self.bench.model, self.bench.block_size)
            tables = self.executor.tables
            copies = tables.begin(plan)
            inputs = prepare(plan, tables, self.bench._known)
            started = self.executor.start(plan, graph, inputs, copies, lambda logits, _: logits.argmax(-1))
            for r in members:
                r.relay_layers += 1
                if r.relay_layers > layers:
                    r.relay_layers = 0
                    idle.insert(0, r)
            if waiting is not None:
                times, before = waiting[0](), waiting[1]
                now = time.perf_counter()
                if i > count // 2:
                    seconds.append(now - last)
                    of = [s for s, k in zip(times.seconds, before, strict=True) if k is OpKind.CPU_ATTN]
                    attention.append(sum(of))
                last = now
            waiting = (started, graph.template.kinds)
        waiting[0]()
        return statistics.median(seconds), statistics.median(attention)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hardware", default="h200-16c")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gpu", type=int, nargs="+", default=[2, 24])
    parser.add_argument("--hosted", type=int, nargs="+", default=[0, 33, 66, 99, 132, 165])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    each = args.tokens // 16 + 2
    parts = EngineParts(
        EngineConfig(
            args.model,
            load_format="dummy",
            dtype=args.dtype,
            device=args.device,
            hardware=args.hardware,
            limits=Limits(max_batch_tokens=512, max_seqs=64),
            kv_gpu_blocks=each * max(args.gpu) + 50,
            kv_cpu_blocks=each * max(args.hosted) + 50,
            max_model_len=args.tokens + 100,
            cpu_threads=args.threads,
            ahead=True,
        )
    )
    executor: Any = parts.engine(parts.system(policy="gpu-only")).executor
    bench = Bench(executor, parts.spec, 16)
    steps, rows = Steps(executor, bench), []
    stages = parts.spec.layers + 1
    hosts = [bench.decoding(args.tokens, Tier.CPU) for _ in range(max(args.hosted))]
    for gpu in args.gpu:
        members = tuple([bench.decoding(args.tokens, Tier.GPU) for _ in range(gpu)])
        alone = 0.0
        for count in args.hosted:
            if alone and not count:
                continue
            step, cpu = steps.run(members, hosts[:count], args.steps)
            for r in hosts:
                r.relay_layers = 0
            alone = alone or step
            gain = (gpu + count / stages) / step / (gpu / alone)
            rows.append({"gpu": gpu, "hosted": count, "step_s": step, "cpu_s": cpu, "gain": gain})
            print(
                f"{gpu:3d} on the GPU, {count:3d} on the host: step {step * 1e3:6.2f} ms "
                f"({step / alone:.3f}), CPU {cpu * 1e3:5.2f} ms, tokens/s x{gain:.3f}",
                flush=True,
            )
        torch.cuda.synchronize() if args.device == "cuda" else None
        for r in members:
            executor.tables.release(r.id)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""A measured cost table held against whole decode steps, on the machine that it was measured on.

    python benchmarks/gpu/profile_check.py --table P/cost.json

Prints, for steps of so many decodes with so many KV tokens each (give or take a tenth, as no table has it):
what the whole step takes as it is replayed; what the table's operations add up to, and how far that is off;
likewise the operations as events around them tell it in a step that is launched one by one; and the parts of
the replayed step. Medians, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neo.core.request import Tier
from neo.core.view import Limits
from neo.cost.profiled import Profiled
from neo.runtime.engine_config import EngineConfig
from neo.runtime.measure import WHOLE, Bench, Measured
from neo.runtime.profile_steps import step_seconds
from neo.runtime.setup import EngineParts

PER_LAYER = ("PRE:0", "GPU_ATTN:0", "POST:0")
ONCE = ("EMBED:-1", "HEAD:-1")


def lengths_of(sequences: int, tokens: int) -> list[int]:
    """KV tokens of each: from a tenth less to a tenth more."""
    spread = tokens // 10
    return [max(1, tokens - spread + 2 * spread * i // max(1, sequences - 1)) for i in range(sequences)]


def middle(found: Measured, layers: int) -> dict[str, float]:
    """Microseconds of every operation in all layers."""
    counts = dict.fromkeys(PER_LAYER, layers) | dict.fromkeys((*ONCE, WHOLE), 1)
    return {n: 1e6 * counts[n] * statistics.median(s) for n, s in found.items() if n in counts}


def rows_of(args: argparse.Namespace, parts: EngineParts) -> Iterator[dict[str, Any]]:
    """Every shape's figures."""
    cost = Profiled.load(args.table, parts.spec)
    engine = parts.engine(parts.system(), timed=True)
    try:
        replayed, launched = (
            Bench(engine.executor, parts.spec, parts.config.limits.block_size, args.repeats, replayed=way)
            for way in (True, False)
        )
        for tokens in args.tokens:
            for sequences in args.sequences:
                lengths = lengths_of(sequences, tokens)
                whole = middle(replayed.decode(lengths, Tier.GPU), parts.spec.layers)
                if WHOLE not in whole:
                    print(f"{sequences} decodes are not replayed")
                    continue
                events = middle(launched.decode(lengths, Tier.GPU), parts.spec.layers)
                table = 1e6 * step_seconds(cost, parts.spec.layers, sequences, sum(lengths))
                step = whole.pop(WHOLE)
                yield {
                    "sequences": sequences,
                    "kv_tokens": sum(lengths),
                    "step_us": step,
                    "table_us": table,
                    "table_error": table / step - 1.0,
                    "events_us": sum(events.values()),
                    "events_error": sum(events.values()) / step - 1.0,
                    "parts_us": whole,
                    "events_parts_us": events,
                }
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True, help="cost.json, of this machine")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 3, 8, 24, 48, 64, 100, 200, 300, 500])
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 600], help="KV tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    args = parser.parse_args()
    most, longest = max(args.sequences), max(args.tokens) * 2
    config = EngineConfig(
        args.model,
        load_format="dummy",
        dtype=args.dtype,
        device=args.device,
        policy="gpu-only",
        limits=Limits(max_batch_tokens=max(2048, most), max_seqs=most),
        kv_gpu_blocks=most * (-(-max(args.tokens) * 11 // 160) + 1) + 16,
        kv_cpu_blocks=0,
        max_model_len=longest,
        ahead=True,
    )
    print(f"{'decodes':>8}{'KV tokens':>10}{'step':>9}{'table':>17}{'events':>17}  parts of the step")
    rows = []
    for row in rows_of(args, EngineParts(config)):
        rows.append(row)
        parts = "  ".join(f"{name.partition(':')[0]} {us:.0f}" for name, us in row["parts_us"].items())
        print(
            f"{row['sequences']:8}{row['kv_tokens']:10}{row['step_us']:9.0f}"
            f"{row['table_us']:9.0f}{row['table_error']:+8.1%}"
            f"{row['events_us']:9.0f}{row['events_error']:+8.1%}  {parts}",
            flush=True,
        )
    for name in ("table_error", "events_error") if rows else ():
        errors = [row[name] for row in rows]
        middle_, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
        print(f"{name.partition('_')[0]}: {middle_:.1%} off in the median, {worst:+.1%} at worst")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Decode steps in several variants, in turn, each in processes of its own: `step.py` again and again.

    python benchmarks/gpu/step_ab.py --repeats 3 "before: NEO_CUDA_FOLD=0" "now:" "wide: --search 2"

A variant is a name, a colon, and settings: VARIABLE=VALUE for the environment, all else arguments of
`step.py`. Prints the steps of each process, and of each variant the median step and the median of step /
floor; where a machine slows down meanwhile, all variants do. Ends with 1 if a process fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEP = Path(__file__).with_name("step.py")


def run(settings: list[str], more: list[str]) -> tuple[dict[str, float], str]:
    """What a process of `step.py` measured, and printed."""
    plain = [s for s in settings if "=" not in s or s.startswith("-")]
    environment = dict(s.split("=", 1) for s in settings if s not in plain)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        command = [sys.executable, str(STEP), *more, *plain, "--out", str(out)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
            sys.exit(1)
        return json.loads(out.read_text()), done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sequences", default="64")
    parser.add_argument("--tokens", default="1000")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    variants = {name.strip(): rest.split() for name, _, rest in (v.partition(":") for v in args.variants)}
    more = ["--sequences", args.sequences, "--tokens", args.tokens]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for repeat in range(args.repeats):
        for name, settings in variants.items():
            result, said = run(settings, more)
            found[name].append(result)
            print(f"{name:14} step {result['step']:6.0f} us, graph {result['graph alone']:6.0f}", end="")
            print(f", step / floor {result['step'] / result['floor']:.3f}", flush=True)
            if not repeat:
                print("".join(line + "\n" for line in said.splitlines() if line.startswith("  ")), end="")
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(found, indent=1) + "\n")
    print("medians")
    for name, results in found.items():
        steps, graphs = ([r[key] for r in results] for key in ("step", "graph alone"))
        ratio = statistics.median(r["step"] / r["floor"] for r in results)
        print(
            f"{name:14} step {statistics.median(steps):6.0f} us ({min(steps):.0f} to {max(steps):.0f}), "
            f"graph {statistics.median(graphs):6.0f}, step / floor {ratio:.3f}"
        )


if __name__ == "__main__":
    main()

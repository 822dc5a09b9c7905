"""How fast the simulator is: whole processes, imports, run log and reports included, plots excluded.

    python benchmarks/simulator_speed.py [--traces DIR] [--repeats N]

Runs ``neo simulate`` on the Azure conversation trace (where that is absent, on a synthetic load of the same
shape and rate) and prints wall time, peak memory and simulated seconds per second of wall time; then what
advancing several steps at once gains over stepping, on the same requests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

TRACE = "AzureLLMInferenceTrace_conv.csv"
SYNTHETIC = [
    "--prompt-lengths",
    "azure-conv",
    "--output-lengths",
    "azure-conv",
    "--requests",
    "19366",
    "--rate",
    "5.53",
]
CASES = [
    ("gpu-only", "h100", []),
    ("gpu-only", "a100", []),
    ("neo", "h100", []),
    ("gpu-only", "g5.16xlarge", []),
    ("neo", "g5.16xlarge", []),
    ("gpu-only", "h100", ["--limit", "2000"]),
    ("gpu-only", "h100", ["--limit", "2000", "--no-repeat"]),
]


def run(arguments: list[str]) -> tuple[float, int, dict]:
    """Wall seconds, peak resident KB and summary of one ``neo simulate`` process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "neo",
            "simulate",
            *arguments,
            "--no-plots",
            "--quiet",
            "--out",
            folder,
        ]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"failed with {process.returncode}: {' '.join(command)}")
        return wall, usage.ru_maxrss, json.loads((Path(folder) / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("NEO_TRACES", Path(__file__).resolve().parents[2] / "shared" / "traces")
    parser.add_argument("--traces", type=Path, default=default, help="folder of the traces")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case; the median is printed")
    options = parser.parse_args()
    trace = options.traces / TRACE
    workload = ["--trace", str(trace)] if trace.is_file() else SYNTHETIC
    table = Table(
        title=f"neo simulate, llama-3.1-8b, {trace.name if trace.is_file() else 'synthetic azure-conv'}"
    )
    for name in (
        "policy",
        "hardware",
        "options",
        "wall (s)",
        "range",
        "peak MB",
        "steps",
        "steps/s",
        "simulated s per s",
    ):
        table.add_column(name, justify="left" if name in ("policy", "hardware", "options") else "right")
    medians = []
    for policy, hardware, more in CASES:
        if "--trace" not in workload:
            more = ["--requests" if m == "--limit" else m for m in more]
        runs = sorted(
            (
                run([*workload, "--policy", policy, "--hardware", hardware, *more])
                for _ in range(options.repeats)
            ),
            key=lambda r: r[0],
        )
        wall, peak, summary = runs[len(runs) // 2]
        medians.append(wall)
        steps = summary["metrics"]["steps"]
        table.add_row(
            policy,
            hardware,
            " ".join(more),
            f"{wall:.2f}",
            f"{runs[0][0]:.2f}-{runs[-1][0]:.2f}",
            f"{peak / 1024:.0f}",
            f"{steps:,}",
            f"{steps / wall:,.0f}",
            f"{summary['metrics']['duration_s'] / wall:,.0f}",
        )
    console = Console(width=130)
    console.print(table)
    console.print(
        f"advancing several steps at once: {medians[-1] / medians[-2]:.1f} times faster than stepping"
    )


if __name__ == "__main__":
    main()

#!/bin/sh
# benchmarks/fidelity.sh on a host with many cores, and on two of them: benchmarks/fidelity_host.sh OUT [REPEATS]
set -eu
out=$1
repeats=${2:-2}
here=$(dirname "$0")
BUDGETS="--max-seqs 128 --max-batch-tokens 1024 --kv-gpu-blocks 200 --kv-cpu-blocks 2000" \
    WORKLOAD="--prompt-lengths around:300:0.3 --output-lengths around:80:0.3 --requests 200" \
    "$here/fidelity.sh" "$out/all" "$repeats" stories110m 4
BUDGETS="--max-seqs 64 --max-batch-tokens 512 --kv-gpu-blocks 100 --kv-cpu-blocks 1600" \
    NEO="taskset -c 0,1 ${NEO:-.venv/bin/neo}" "$here/fidelity.sh" "$out/two" "$repeats" stories15m 4

#!/bin/sh
# How far the simulator is from the engine on this machine: profile, run, validate.
#
# usage: benchmarks/fidelity.sh OUT [REPEATS] [MODEL] [RATE]    (environment: NEO, MODEL_FLAGS, WORKLOAD, BUDGETS)
#
# REPEATS times: profiles the machine, runs the same workload on the engine with gpu-only and neo, and holds both runs
# against the simulator fed with that profile. Nothing else should run meanwhile.
set -eu
out=$1
repeats=${2:-3}
model=${3:-stories15m}
rate=${4:-6}
neo=${NEO:-.venv/bin/neo}
budgets=${BUDGETS:-"--max-seqs 64 --max-batch-tokens 512 --kv-gpu-blocks 400 --kv-cpu-blocks 1600"}
workload=${WORKLOAD:-"--prompt-lengths around:200:0.3 --output-lengths around:60:0.3 --requests 240"}

runs=
for i in $(seq "$repeats"); do
    # shellcheck disable=SC2086
    $neo profile --model "$model" ${MODEL_FLAGS:-} $budgets --out "$out/profile-$i" --quiet >&2
    # shellcheck disable=SC2086
    $neo bench --model "$model" ${MODEL_FLAGS:-} $budgets $workload --rate "$rate" --seed "$i" -p gpu-only -p neo \
        --hardware "$out/profile-$i/hardware.toml" --cost "profiled:$out/profile-$i/cost.json" \
        --out "$out/run-$i" --no-plots --quiet >&2
    runs="$runs $out/run-$i/gpu-only $out/run-$i/neo"
done
# shellcheck disable=SC2086
$neo validate $runs --out "$out/validation"

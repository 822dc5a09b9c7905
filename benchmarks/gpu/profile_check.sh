#!/bin/sh
# 'neo profile' on this machine's GPU, then its table held against steps and runs: whole decode steps as they are
# replayed, beside what the table's operations add up to; and short runs of 'neo bench', priced with the table.
# Within nine minutes for Llama-3.1-8B.
#
# usage: benchmarks/gpu/profile_check.sh [OUT, default out/gpu/profile] [parts, default "profile steps runs"]
# MODEL: default llama-3.1-8b. DEVICE: default cuda. PROFILE: more flags for 'neo profile'. STEPS: for profile_check.py.
# NEO: the command, default "python3 -m neo". NEO_CUDA_LIBRARY, NEO_CPU_LIBRARY: libraries that are built already.
set -u
cd "$(dirname "$0")/../.."
out=${1:-out/gpu/profile}
parts=${2:-profile steps runs}
neo=${NEO:-python3 -m neo}
device=${DEVICE:-cuda}
name=${MODEL:-llama-3.1-8b}
PYTHONPATH=$(pwd):${PYTHONPATH:-}
export PYTHONPATH PYTHONUNBUFFERED=1
model="--model $name --dtype bfloat16 --load-format dummy --device $device --ahead --max-model-len 4096"
status=0
mkdir -p "$out"

profile() {
    then=$(date +%s)
    # shellcheck disable=SC2086
    timeout 420 $neo profile $model --max-seqs 512 --max-batch-tokens 8192 --kv-gpu-blocks 20000 \
        --kv-cpu-blocks 2560 --policy gpu-only --quiet ${PROFILE:-} --out "$out" >"$out/profile.log" 2>&1 || status=1
    tail -n 28 "$out/profile.log"
    echo "profile: $(($(date +%s) - then)) s"
}

steps() {
    # shellcheck disable=SC2086
    timeout 180 python3 benchmarks/gpu/profile_check.py --table "$out/cost.json" --model "$name" --device "$device" \
        --out "$out/steps.json" ${STEPS:-} 2>&1 || status=1
}

run() { # OUTPUT TOKENS, REQUESTS: little memory, so that requests come and go and most steps only decode
    # shellcheck disable=SC2086
    timeout 120 $neo bench $model --hardware "$out/hardware.toml" --cost "profiled:$out/cost.json" --max-batch-tokens 2048 \
        --prompt-lengths around:1000:0.1 --output-lengths "around:$1:0.1" --requests "$2" --kv-gpu-blocks 1648 \
        --kv-cpu-blocks 0 -p gpu-only --no-plots --quiet --out "$out/run-$1" >"$out/run-$1.log" 2>&1 ||
        { status=1 && tail -n 12 "$out/run-$1.log"; }
    for summary in "$out/run-$1/summary.json" "$out/run-$1"/*/summary.json; do
        [ -f "$summary" ] && $neo validate "$(dirname "$summary")" --no-plots
    done
}

for part in $parts; do
    case $part in
    profile) profile ;;
    steps) steps ;;
    runs) run 200 112 && run 400 70 ;;
    esac
done
exit $status

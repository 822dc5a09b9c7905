#!/bin/sh
# The engine on this machine's GPU with the shape of Llama-3.1-8B and random weights: steps that decode, gpu-only with
# ample memory, neo beside gpu-only with little. Results in subfolders of OUT, as 'neo bench' writes them.
#
# usage: benchmarks/gpu/engine.sh [OUT, default out/gpu] [parts, default "decode ample tight"]
# NEO: the command, default "python3 -m neo". NEO_CUDA_LIBRARY, NEO_CPU_LIBRARY: libraries that are built already.
set -u
cd "$(dirname "$0")/../.."
out=${1:-out/gpu}
parts=${2:-decode ample tight}
neo=${NEO:-python3 -m neo}
model="--model llama-3.1-8b --dtype bfloat16 --device cuda --hardware h200-16c --max-model-len 4096"
quiet="--no-plots --quiet --ahead"

lengths() { echo "--prompt-lengths around:$1:0.1 --output-lengths around:$2:0.1"; }

run() { # NAME SECONDS options of neo bench
    name=$1 limit=$2
    shift 2
    # shellcheck disable=SC2086
    timeout "$limit" $neo bench $model $quiet --out "$out/$name" "$@" >"$out/$name.log" 2>&1 || tail -n 12 "$out/$name.log"
}

mkdir -p "$out"
for part in $parts; do
    case $part in
    decode)
        run decode-64x1k 100 --requests 64 --prompt-lengths fixed:1000 --output-lengths fixed:200 \
            --kv-gpu-blocks 8000 --kv-cpu-blocks 0 --max-batch-tokens 8192 -p gpu-only
        ;;
    ample)
        # shellcheck disable=SC2046
        run ample-1000-200 200 --requests "${REQUESTS:-1000}" $(lengths 1000 200) --kv-gpu-blocks 56174 --kv-cpu-blocks 0 \
            --max-batch-tokens 8192 -p gpu-only --policy-opt token_budget=8192
        ;;
    tight)
        # shellcheck disable=SC2046
        run tight-1000-200 300 --requests "${REQUESTS:-300}" $(lengths 1000 200) --kv-gpu-blocks 800 --kv-cpu-bytes 24GiB \
            --max-batch-tokens 8192 -p gpu-only -p neo
        ;;
    esac
done
for summary in "$out"/*/summary.json "$out"/*/*/summary.json; do
    [ -f "$summary" ] && python3 - "$summary" <<'P'
import json, sys
s = json.load(open(sys.argv[1]))
m = s["metrics"]
print(f"{sys.argv[1].split('/')[-3] + '/' + sys.argv[1].split('/')[-2]:40} {s['policy']:10} {m['request_throughput']:7.2f} req/s  "
      f"TTFT {m['ttft_s']['mean']:.3f} s  TPOT {m['tpot_s']['mean'] * 1e3:.2f} ms  {m['steps']} steps, {m['steps_pipelined']} pipelined")
P
done

#!/bin/sh
# The engine on this machine's GPU against transformers: every policy, random plans, with and without graphs.
#
# usage: benchmarks/gpu/check.sh [folder for results, default out/gpu] [pytest options]
# NEO_CUDA_LIBRARY, NEO_CPU_LIBRARY: libraries that are built already.
set -u
cd "$(dirname "$0")/../.."
out=${1:-out/gpu}
[ $# -eq 0 ] || shift
mkdir -p "$out"
PYTHONPATH=$(pwd):${PYTHONPATH:-} timeout 300 python3 -m pytest -q -p no:cacheprovider -o filterwarnings=default \
    tests/runtime/test_cuda_exactness.py "$@" >"$out/check.log" 2>&1
status=$?
grep -E "^(FAILED|ERROR|E  )" "$out/check.log" | head -n 40
tail -n 1 "$out/check.log"
exit $status

#!/bin/sh
# 'neo serve' on this machine's GPU: the server's tests of load, faults and tokens, then clients that stream from a
# large model with random weights. Within five minutes; the tables are what this prints.
#
# usage: benchmarks/gpu/serve.sh [OUT, default out/gpu/serve] [parts, default "tests load"]
# DEVICE: default cuda. MODEL: of the load, default llama-3.1-8b. CLIENTS: default "16 64 256". SERVE: more flags for it.
# NEO: the command, default "python3 -m neo". NEO_CUDA_LIBRARY, NEO_CPU_LIBRARY: libraries that are built already.
set -u
cd "$(dirname "$0")/../.."
out=${1:-out/gpu/serve}
parts=${2:-tests load}
neo=${NEO:-python3 -m neo}
device=${DEVICE:-cuda}
model=${MODEL:-llama-3.1-8b}
mkdir -p "$out"
PYTHONPATH=$(pwd):${PYTHONPATH:-}
export PYTHONPATH PYTHONUNBUFFERED=1
ulimit -n "$(ulimit -Hn)" 2>/dev/null # 2000 clients are 2000 open files
status=0

run_tests() {
    NEO_TEST_DEVICE=$device timeout 180 python3 -m pytest -q -p no:cacheprovider -o filterwarnings=default \
        -o junit_family=xunit1 --junitxml="$out/serve.xml" \
        tests/server/test_server_limits.py::test_the_server_says_what_serves tests/server/test_server_faults.py \
        tests/server/test_openai_client.py::test_tokens_equal_those_of_the_engine_in_process_under_concurrency \
        "tests/server/test_serve_operation.py::test_a_recorded_run_validates_without_divergence" \
        >"$out/serve.log" 2>&1 || status=1
    grep -E "^(FAILED|ERROR|E  )" "$out/serve.log" | head -n 30
    tail -n 1 "$out/serve.log"
    [ -f "$out/serve.xml" ] && python3 - "$out/serve.xml" <<'P'
import sys, xml.etree.ElementTree as tree
for case in tree.parse(sys.argv[1]).iter("testcase"):
    bad = [k.tag for k in case if k.tag in ("failure", "error", "skipped")]
    said = ", ".join(f"{p.get('name')} {p.get('value')}" for p in case.iter("property"))
    print(f"{(bad or ['passed'])[0]:8} {float(case.get('time')):6.1f} s  {case.get('name').removeprefix('test_')}  {said}")
P
}

run_load() {
    port=${PORT:-8123}
    # shellcheck disable=SC2086
    $neo serve --model "$model" --load-format dummy --device "$device" --port "$port" --policy "${POLICY:-neo}" --ahead \
        --max-model-len 2048 --log-format none ${SERVE:---kv-cpu-bytes 4GiB} >"$out/server.log" 2>&1 &
    server=$!
    waited=0
    until grep -q "^neo serves" "$out/server.log" || ! kill -0 $server 2>/dev/null || [ $waited -ge 60 ]; do
        sleep 1
        waited=$((waited + 1))
    done
    echo "the server answers after $waited s"
    for clients in ${CLIENTS:-16 64 256}; do
        timeout 20 $neo bench --url "http://127.0.0.1:$port" --concurrency "$clients" --requests $((2 * clients)) \
            --prompt-lengths "${PROMPTS:-around:500:0.1}" --output-lengths "${OUTPUTS:-around:100:0.1}" --quiet --no-plots \
            --out "$out/load-$clients" >"$out/load-$clients.log" 2>&1 || { status=1; tail -n 3 "$out/load-$clients.log"; }
    done
    python3 -c "import urllib.request as u; print(u.urlopen('http://127.0.0.1:$port/metrics').read().decode())" >"$out/metrics.txt"
    kill -TERM $server 2>/dev/null
    wait $server || { status=1; tail -n 5 "$out/server.log"; }
    python3 - "$out" ${CLIENTS:-16 64 256} <<'P'
import json, pathlib, re, sys
out = pathlib.Path(sys.argv[1])
page = (out / "metrics.txt").read_text()
print("\n".join(re.findall(r"^neo:(?:engine_info|step_time_(?:predicted_)?seconds_(?:sum|count)|steps_total)\S.*", page, re.M)))
print("clients   requests/s   output tokens/s   TTFT mean, P99 (s)   TPOT mean, P99 (ms)   completed")
for clients in sys.argv[2:]:
    path = out / f"load-{clients}" / "summary.json"
    if path.exists():
        s = json.loads(path.read_text())
        m = s["metrics"]
        ttft, tpot = m["ttft_s"], m["tpot_s"]
        print(f"{clients:>7} {m['request_throughput']:12.2f} {m['output_token_throughput']:17.0f} {ttft['mean']:12.3f} {ttft['p99']:7.3f} "
              f"{tpot['mean'] * 1e3:13.2f} {tpot['p99'] * 1e3:7.2f} {s['requests']['completed']:11} of {s['requests']['submitted']}")
P
}

for part in $parts; do
    case $part in
    tests) run_tests ;;
    load) run_load ;;
    esac
done
exit $status

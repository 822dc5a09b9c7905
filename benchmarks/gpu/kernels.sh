#!/bin/sh
# Builds the CUDA kernels for this machine's GPU, tests them, looks for bad memory accesses, and measures them; within
# six minutes. Needs nvcc, python3 with torch, numpy and pytest; CMake where there is one.
#
# usage: benchmarks/gpu/kernels.sh [folder for results, default out/gpu]
# NEO_CUDA_LIBRARY, NEO_CPU_LIBRARY: libraries that are built already. SKIP: words of "tests sanitizer measure".
set -u

cd "$(dirname "$0")/../.."
root=$(pwd)
out=${1:-out/gpu}
skip=${SKIP:-}
mkdir -p "$out"
export PYTHONPATH="$root:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
status=0

wanted() { case " $skip " in *" $1 "*) return 1 ;; esac; }
seconds() { date +%s; }
began=$(seconds)

if [ -z "${NEO_CUDA_LIBRARY:-}" ]; then
    built=$root/build/gpu
    mkdir -p "$built"
    if command -v cmake >/dev/null && cmake -S kernels -B "$built" -DNEO_CPU=OFF -DNEO_CUDA_EMULATED=OFF \
        -DCMAKE_CUDA_ARCHITECTURES=native >"$built/.log" 2>&1 &&
        cmake --build "$built" --parallel >>"$built/.log" 2>&1; then
        echo "built with CMake"
    elif nvcc -arch=native -O3 -std=c++17 --shared --cudart=static --threads 0 -Xcompiler -fPIC,-fvisibility=hidden \
        -I kernels/cuda/ptx -o "$built/libneo_cuda.so" kernels/cuda/*.cu kernels/cuda/*.cpp >>"$built/.log" 2>&1; then
        echo "built with nvcc alone"
    else
        tail -n 40 "$built/.log"
        exit 1
    fi
    export NEO_CUDA_LIBRARY="$built/libneo_cuda.so"
fi
echo "build: $(($(seconds) - began)) s"

if wanted tests; then
    then=$(seconds)
    timeout 120 python3 -m pytest -q -p no:cacheprovider tests/kernels/test_cuda_attention.py \
        tests/kernels/test_cuda_rows.py tests/kernels/test_cuda_handover.py tests/kernels/test_cuda_library.py \
        tests/kernels/test_cuda_linear.py tests/kernels/test_cuda_overlap.py tests/kernels/test_cuda_relay.py \
        tests/kernels/test_cuda_relay_steps.py -k "not emulated" \
        >"$out/tests.log" 2>&1 || status=1
    grep -E "^(FAILED|ERROR|E  )" "$out/tests.log" | head -n 25
    tail -n 1 "$out/tests.log"
    echo "tests: $(($(seconds) - then)) s"
fi

if wanted sanitizer && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        then=$(seconds)
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 50 compute-sanitizer --tool $tool --error-exitcode 9 \
            python3 benchmarks/gpu/kernels.py --once >"$out/$tool.log" 2>&1 || status=1
        grep -E "Error|Invalid|hazard|SUMMARY|Traceback" "$out/$tool.log" | head -n 6
        echo "$tool: $(($(seconds) - then)) s"
    done
fi

if wanted measure; then
    then=$(seconds)
    timeout 150 python3 benchmarks/gpu/kernels.py --out "$out/kernels.json" || status=1
    timeout 90 python3 benchmarks/gpu/linear.py --out "$out/linear.json" || status=1
    echo "measure: $(($(seconds) - then)) s"
fi
echo "all: $(($(seconds) - began)) s, status $status"
exit $status

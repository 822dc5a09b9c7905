#!/bin/sh
# Builds the kernels into build/kernels of the source tree, getting ISPC and CMake where they are missing. The CUDA
# kernels are built where nvcc is found (a GPU is not needed), for every GPU from Turing to Hopper unless told otherwise.
#
# usage: kernels/build.sh [CMake options]
#   -DCMAKE_CUDA_ARCHITECTURES=native   for this machine's GPU alone: a fifth of the time
#   -DNEO_CUDA=OFF                      without them; -DNEO_CUDA_EMULATED=OFF without their stand-in for tests
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
out=$root/build/kernels

if ! command -v "${CXX:-c++}" >/dev/null 2>&1; then
    echo "build: no C++ compiler. Install one (Debian, Ubuntu: apt-get install g++), or set CXX." >&2
    exit 1
fi

cmake=$(command -v cmake || true)
for python in "$root/.venv/bin/python" "$(command -v python3 || true)"; do
    [ -n "$cmake" ] || [ ! -x "$python" ] || cmake=$("$python" -c 'import cmake, os; print(os.path.join(cmake.CMAKE_BIN_DIR, "cmake"))' 2>/dev/null || true)
done
if [ -z "$cmake" ]; then
    echo "build: no cmake; getting PyPI's into $root/build/cmake" >&2
    python3 -m venv "$root/build/cmake"
    "$root/build/cmake/bin/python" -m pip install --quiet 'cmake>=3.19'
    cmake=$root/build/cmake/bin/cmake
fi

ispc=$(sh "$root/kernels/get_ispc.sh")
# Makefiles unless Ninja is there; another generator or compiler than last time means starting afresh.
if command -v ninja >/dev/null 2>&1; then generator=Ninja; else generator='Unix Makefiles'; fi
mkdir -p "$root/build"
stamp="$cmake $generator $ispc $root"
[ "$(cat "$out/.configured" 2>/dev/null || true)" = "$stamp" ] || rm -rf "$out"
"$cmake" -S "$root/kernels" -B "$out" -G "$generator" -DCMAKE_ISPC_COMPILER="$ispc" "$@" >"$root/build/.configure.log" 2>&1 || {
    cat "$root/build/.configure.log" >&2
    exit 1
}
echo "$stamp" >"$out/.configured"
"$cmake" --build "$out" --parallel 2 --target neo_cpu
echo "built $out/libneo_cpu.so" >&2

# What follows may fail and leave the CPU kernels usable.
has() { "$cmake" --build "$out" --target help | grep -q "$1\([ :]\|\$\)"; }
for library in neo_cuda_emulated neo_cuda; do
    if ! has "$library"; then
        [ "$library" != neo_cuda ] || echo "build: no CUDA compiler (nvcc): CUDA kernels are not built" >&2
    elif "$cmake" --build "$out" --parallel 2 --target "$library" >"$root/build/.$library.log" 2>&1; then
        echo "built $out/lib$library.so" >&2
    else
        tail -n 20 "$root/build/.$library.log" >&2
        echo "build: lib$library.so could not be built; all of it in $root/build/.$library.log" >&2
    fi
done

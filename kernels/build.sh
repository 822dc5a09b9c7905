#!/bin/sh
# Builds the kernels into build/kernels of the source tree, getting ISPC and CMake where they are missing.
#
# usage: kernels/build.sh [CMake options]
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
"$cmake" --build "$out" --parallel
echo "built $out/libneo_cpu.so" >&2

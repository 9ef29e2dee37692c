#!/bin/sh
# Cross-compiles the kernels for AArch64 (NEON through vector extensions) and runs their cases under qemu-user.
# Needs g++-aarch64-linux-gnu and qemu-user.
set -eu
root=$(cd "$(dirname "$0")/../../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cxx=${CXX_AARCH64:-aarch64-linux-gnu-g++}
find "$root/csrc/cpu" -name '*.cpp' ! -name '*_avx*' | while read -r source; do
    echo "$cxx -std=c++17 -O3 -ffp-contract=fast -I$root/csrc -c $source -o $work/$(basename "$source" .cpp).o"
done | xargs -P "${JOBS:-2}" -I{} sh -c "{}"
for driver in "$root"/tests/kernels/sanitizers/*.cpp; do
    program="$work/$(basename "$driver" .cpp)"
    "$cxx" -std=c++17 -O2 -static -I"$root/csrc" "$driver" "$work"/*.o -o "$program" -pthread
    echo "== aarch64: $(basename "$driver")"
    "${QEMU_AARCH64:-qemu-aarch64}" "$program"
done

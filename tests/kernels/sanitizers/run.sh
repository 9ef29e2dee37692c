#!/bin/sh
# Builds the kernels with AddressSanitizer + UndefinedBehaviorSanitizer, then with ThreadSanitizer, and runs their
# cases. Usage: run.sh [address,undefined] [thread]; CXX and JOBS are taken from the environment.
set -eu
root=$(cd "$(dirname "$0")/../../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cxx=${CXX:-g++}
[ $# -gt 0 ] || set -- address,undefined thread
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl"

flags_of() {
    case "$(uname -m):$1" in
        x86_64:*_avx2.cpp) echo "$avx2" ;;
        x86_64:*_avx512.cpp) echo "$avx512" ;;
        x86_64:*_avx512_vnni.cpp) echo "$avx512 -mavx512vnni" ;;
        x86_64:*_avx512_bf16.cpp) echo "$avx512 -mavx512vnni -mavx512bf16" ;;
        *_avx*.cpp) echo skip ;;
        *) echo "" ;;
    esac
}

for sanitizer in "$@"; do
    build="$work/$sanitizer"
    mkdir -p "$build"
    for source in "$root"/csrc/cpu/*.cpp; do
        flags=$(flags_of "$source")
        [ "$flags" = skip ] && continue
        # shellcheck disable=SC2086
        echo "$cxx -std=c++17 -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=$sanitizer $flags" \
            "-I$root/csrc -c $source -o $build/$(basename "$source" .cpp).o"
    done | xargs -P "${JOBS:-2}" -I{} sh -c "{}"
    for driver in "$root"/tests/kernels/sanitizers/*.cpp; do
        program="$build/$(basename "$driver" .cpp)"
        "$cxx" -std=c++17 -O1 -g -fsanitize="$sanitizer" -fno-sanitize-recover=all -I"$root/csrc" "$driver" "$build"/*.o \
            -o "$program" -pthread
        echo "== $sanitizer: $(basename "$driver")"
        "$program"
    done
done

#!/bin/sh
# Builds the extension itself with AddressSanitizer + UndefinedBehaviorSanitizer and runs the kernels' tests on it in a
# short form, in the Python that PYTHON names (by default python) and that has fct's dependencies. Leaks are not
# looked for: the interpreter keeps what it likes. ThreadSanitizer drives the kernels from C++ (run.sh): under it every
# library that Python loads without instrumentation (numpy's and torch's thread pools) is reported.
set -eu
root=$(cd "$(dirname "$0")/../../.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cxx=${CXX:-g++}
"$python" -m pip install -q -c "$root/constraints.txt" --no-deps --target "$work/site" \
    -C cmake.define.FCT_SANITIZE=address,undefined -C cmake.define.FCT_CUDA=off -C cmake.build-type=None \
    -C cmake.define.CMAKE_CXX_FLAGS='-O1 -g1' \
    -C build-dir="$work/build" "$root"
cat >"$work/site/sitecustomize.py" <<'EOF'
import sys

# An editable install's finder would come before PYTHONPATH.
sys.meta_path = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
EOF
cp -r "$root/tests" "$root/pyproject.toml" "$work/" # beside no src, so that the built package is the one imported
cd "$work"
export LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$work/site" PYTHONDONTWRITEBYTECODE=1
"$python" - "$work" <<'EOF'
import ctypes, sys

import fct
from fct import _C

assert fct.__file__.startswith(sys.argv[1]) and _C.__file__.startswith(sys.argv[1]), (fct.__file__, _C.__file__)
assert hasattr(ctypes.CDLL(_C.__file__), "__asan_init"), "the extension was built without the sanitizer"
EOF
"$python" -m pytest -q -x -p no:cacheprovider tests/kernels/test_topk_cpu.py \
    tests/kernels/test_transform_cpu.py \
    -k "not two_to_the_31 and not ctrl_c and not forked"

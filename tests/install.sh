#!/usr/bin/env bash
# The machines of docs/build.md's first table: what `pip install .` gives there and what `fct info` says of it. Run it in
# an environment where fct (not editable) and its test packages are installed; an argument names a folder for what it makes.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=${1:-$(mktemp -d)}

says() { # TEXT COMMAND...: the command's output holds TEXT
    local text=$1 output
    shift
    output=$("$@" 2>&1) || true
    tr -s '[:space:]' ' ' <<<"$output" | grep -qF "$text" || { printf 'expected "%s" of: %s, got:\n%s\n' "$text" "$*" "$output" >&2; return 1; }
    printf 'ok: %s: "%s"\n' "$*" "$text"
}

cuda_backend() { # what this environment's fct says of its CUDA kernels
    python -c 'import fct; info = fct.build_info(); print(info["cuda_build"] or "built", *info["backends"]["cuda"]["why_not"])'
}

if command -v nvcc >/dev/null && ! python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    printf '\n--- nvcc, no GPU: the kernels are built, the import works, the driver is missed\n'
    says "built no CUDA driver on this machine" cuda_backend
    printf '\n--- nvcc that can not compile for what was asked\n'
    says "Unsupported gpu architecture 'compute_10'" env FCT_CUDA=on CUDAARCHS=10 python -m pip wheel --no-deps -w "$scratch/old" .
fi

# No nvcc, whatever this machine has: CMake overlooks its folders, in a build folder that remembers none.
hidden=$(type -ap nvcc | xargs -r dirname | paste -sd ';')
without_nvcc=(-C build-dir="$scratch/build" -C cmake.define.CMAKE_IGNORE_PATH="$hidden")
unset CUDACXX CUDA_PATH CUDAARCHS

printf '\n--- no nvcc, and a CUDA build was demanded\n'
says "FCT_CUDA=on, but no CUDA compiler (nvcc) was found" env FCT_CUDA=on python -m pip wheel "${without_nvcc[@]}" --no-deps -w "$scratch/demanded" .
[ -z "$(find "$scratch/demanded" -name '*.whl' 2>/dev/null)" ]

printf '\n--- no nvcc: a wheel that works outside the checkout, no build tools, no sources beside it\n'
python -m pip wheel -q "${without_nvcc[@]}" --no-deps -c constraints.txt -w "$scratch/dist" .
ls -l "$scratch/dist"
python -m pip install -q --no-deps --target "$scratch/site" "$scratch"/dist/*.whl
checkout=$PWD
export PYTHONPATH=$scratch/site
cd /
python - "$scratch/site" <<'EOF'
import sys

import numpy as np

import fct

assert fct.__file__.startswith(sys.argv[1]), fct.__file__
h = fct.Transformation.random(16, 8, 32, inner=64)
rows = fct.transform_batch(np.ones((5, 16), np.float32), np.ones((5, 8), np.float32), h)
assert rows.shape == (5, 32) and np.isfinite(rows).all()
EOF
says "no CUDA compiler (nvcc) was found at build time" cuda_backend
python -m fct info

printf '\n--- the base install alone, in a new environment: everything that a worker does, and no torch\n'
cd "$checkout"
unset PYTHONPATH
"${PYTHON:-python3}" -m venv "$scratch/base"
"$scratch/base/bin/pip" install -q -c constraints.txt "$scratch"/dist/*.whl
"$scratch/base/bin/pip" uninstall -q -y pip setuptools
megabytes=$(du -sm "$scratch/base" | cut -f1)
[ "$megabytes" -le 350 ] || { echo "the base install takes $megabytes MB, expected at most 350" >&2; exit 1; }
echo "ok: the base install takes $megabytes MB"
"$scratch/base/bin/python" tests/cli/worker.py "$scratch/base/bin/fct" "$scratch/worker"
export PYTHONPATH=$scratch/site

printf '\n--- a GPU, no nvcc: the same wheel on the stand-in device, through Triton\n'
cd "$checkout"
python -m pytest -q -p no:cacheprovider tests/ops/test_gpu_path.py -k "public_call or streaming"

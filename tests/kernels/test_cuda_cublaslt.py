"""The large-batch path: our side of cuBLASLt against a stand-in on the CPU, and against the real headers."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cuda_support as support
import pytest

pytestmark = support.needs_cxx

RUN = """
import sys; sys.path.insert(0, sys.argv[1])
import cuda_support as support, numpy as np, torch, fct
import fct.ops.cuda as cuda
from fct import ref
from fct.arrays import Rows
from fct.ops.torch import TorchTransform
cuda._blaslt_paths = lambda: [sys.argv[2]]
runtime = support.EmulatedRuntime()
backend = cuda.CudaTransform(runtime)
assert backend.large_why_not() == "", backend.large_why_not()
rng = np.random.default_rng(0)
rows = lambda x: Rows(torch.from_numpy(x), "float32", None, "cpu", "torch")
for n, normalise in ((257, False), (4100, True)):
    h = fct.Transformation.random(5, 4, 6, inner=9, normalise=normalise)
    old, side = (rng.standard_normal((n, d), dtype=np.float32) for d in (5, 4))
    out = torch.full((n, 6), float("nan"))
    backend.run(backend.pack(h, "bf16", "cpu"), rows(old), rows(side), rows(out.numpy()), threads=1)
    plain = torch.empty(n, 6)
    TorchTransform().run(TorchTransform().pack(h, "bf16", "cpu"), rows(old), rows(side), rows(plain.numpy()), threads=1)
    want = ref.transform(old, side, h)
    error, allowed = np.abs(out.numpy() - want), np.abs(plain.numpy() - want)
    assert error.mean() <= 1.2 * allowed.mean(), (n, error.mean(), allowed.mean())
    assert error.max() <= 2 * allowed.max(), (n, error.max(), allowed.max())
print("right")
"""


def test_large_batches_through_a_stand_in() -> None:
    def make(path: Path, _: Path) -> None:
        support.run(
            [
                str(support.CXX),
                "-std=c++17",
                "-O2",
                "-shared",
                "-fPIC",
                str(support.SIMT / "fake_cublaslt.cpp"),
                "-o",
                str(path),
            ]
        )

    library = support._built("libfake_cublaslt.so", (), make)
    support.module()
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr


def _header(name: str) -> str:
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for found in Path(root).rglob(name):
            return found.read_text()
    pytest.skip(f"no {name} here")


@pytest.mark.parametrize(
    "name, value, header",
    [
        ("CUBLASLT_MATMUL_DESC_TRANSA", 3, "cublasLt.h"),
        ("CUBLASLT_MATMUL_DESC_EPILOGUE", 7, "cublasLt.h"),
        ("CUBLASLT_MATMUL_DESC_BIAS_POINTER", 8, "cublasLt.h"),
        ("CUBLASLT_EPILOGUE_BIAS", 4, "cublasLt.h"),
        ("CUBLASLT_EPILOGUE_RELU", 2, "cublasLt.h"),
        ("CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES", 1, "cublasLt.h"),
        ("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES", 7, "cublasLt.h"),
        ("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES", 8, "cublasLt.h"),
        ("CUBLAS_COMPUTE_32F", 68, "cublas_api.h"),
        ("CUBLAS_OP_T", 1, "cublas_api.h"),
        ("CUDA_R_16BF", 14, "library_types.h"),
        ("CUDA_R_32F", 0, "library_types.h"),
    ],
)
def test_declared_constants_are_the_headers(name: str, value: int, header: str) -> None:
    found = re.search(rf"\b{name}\s*=\s*(\d+)", _header(header))
    assert found is not None
    assert int(found[1]) == value

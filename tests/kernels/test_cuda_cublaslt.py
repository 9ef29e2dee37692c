"""The large-batch path: our side of cuBLASLt against a stand-in on the CPU, and against the real headers."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import cuda_support as support
import pytest

import fct
from fct.ops.device.state import chunk_rows

pytestmark = support.needs_cxx

RUN = """
import sys; sys.path.insert(0, sys.argv[1])
import cuda_support as support, numpy as np, torch, fct
from fct.ops.transform import cuda_backend as cuda
from fct import ref
from fct.rows import Rows
from fct.ops.numerics import quantise
from fct.ops.numerics.rounding import SIGMAS, deviation
from fct.ops.proof import far_off
cuda._blaslt_paths = lambda: [sys.argv[2]]

class Counted:  # how many rows each call takes
    def __init__(self, lib):
        self.lib, self.rows = lib, []
    def __getattr__(self, name):
        return getattr(self.lib, name)
    def CudaNetwork(self, **how):
        network = self.lib.CudaNetwork(**how)
        class Large:
            def large(_, old, *rest):
                self.rows.append(old[2])
                return network.large(old, *rest)
        return Large()

runtime = support.EmulatedRuntime()
runtime.lib = Counted(runtime.lib)
backend = cuda.CudaTransform(runtime)
assert backend.large_why_not() == "", backend.large_why_not()
rng = np.random.default_rng(0)
rows = lambda x: Rows(torch.from_numpy(x), "float32", None, "cpu", "torch")
def of_rows(packed):  # every weight on rows that are read in parts, as (d_out, 3, part)
    found = [packed.chains[branch][0].weight for branch in ("old", "side")]
    if packed.skip_at is not None:
        widths = [weight.shape[1] for weight in (found if packed.uses_side else found[:1])]
        found += packed.chains["mixer"][-1].weight[:, packed.skip_at :].split(widths, 1)
    return [weight.unflatten(1, (3, -1)) for weight in found]

def run(h, n, split):
    spread = [rng.standard_normal((n, d), dtype=np.float32) for d in (h.d_old, h.d_side)]
    spread[1] = spread[1] if h.uses_side_info else spread[0]
    for far in (False, True) if split else (False,):
        moved, old, side = far_off(h, *spread) if far else (h, *spread)
        packed = backend.pack(moved, "bf16", "cpu")
        assert packed.split == split == quantise.exact_first(h)
        # nothing, then the rows' and the weights' low parts of one layer that reads rows
        spoilt = [(i, part) for i in range(len(of_rows(packed))) for part in (1, 2)] if far and n < 999 else []
        for layer, part in ((-1, 0), *spoilt):
            packed = backend.pack(moved, "bf16", "cpu")
            if part:
                of_rows(packed)[layer][:, part] = 0
            runtime.lib.rows.clear()
            out = torch.full((n, h.d_new), float("nan"))
            backend.run(packed, rows(old), rows(side), rows(out.numpy()), threads=1)
            assert sum(runtime.lib.rows) == n, runtime.lib.rows
            assert max(runtime.lib.rows) == min(n, packed.chunk), runtime.lib.rows
            off = deviation(out.numpy(), ref.transform(old, side, moved), old, side, moved, "bf16", "cuda")
            assert off > SIGMAS if part else off < 6, (h, n, far, layer, part, off)
    return packed.chunk

quantise.EXACT_SHARE = 0.08

def made(*dims, length=1.0, **how):
    return fct.Transformation.random(*dims, **how).with_(length=length)

# small first layers (read without rounding the rows), large ones
assert run(made(6, 4, 6, inner=40, normalise=True), 4100, True) < 4100
run(made(6, 4, 6, inner=40), 257, True)
run(made(6, 4, 6, inner=9), 257, False)
# narrow ones, of odd widths, with a skip and a length, without side-information, without a mixing block
narrow = dict(branch=17, blocks=1, skip=True)
run(made(7, 3, 5, inner=33, **narrow), 257, False)
run(made(9, 9, 5, inner=11, branch=5, blocks=0, skip=True, side_info=False), 259, False)
quantise.EXACT_SHARE = 0.7
run(made(7, 3, 5, inner=65, normalise=True, length=0.9, **narrow), 257, True)
run(made(9, 9, 6, inner=65, branch=31, blocks=1, skip=True, side_info=False), 257, True)
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


def test_chunk_follows_the_device() -> None:
    """Operands of every layer inside 60 % of L2, tiles of the widest in whole waves, the same rows as Triton's."""
    from fct.ops.transform.cuda_backend import CudaTransform
    from fct.ops.transform.triton_weights import PackedLayer, PackedTransform

    class Runtime(support.EmulatedRuntime):
        place: ClassVar[dict[str, int]] = {}

        def properties(self, index: int) -> dict[str, Any]:
            return {**super().properties(index), **self.place}

    runtime = Runtime()
    h = fct.Transformation.random(128, 128, 128, inner=2048)

    def chunk(**place: int) -> int:
        Runtime.place = place
        return CudaTransform(runtime).pack(h, "bf16", "cpu").chunk

    weights = 2 * 2048 * 2048
    assert "l2_bytes" in support.EmulatedRuntime().properties(0)
    for l2, processors, want in ((40 << 20, 108, 1664), (50 << 20, 132, 2048)):
        rows = chunk(l2_bytes=l2, multiprocessors=processors)
        assert rows == want  # docs/gpu.md
        assert rows * 2 * 2 * 2048 + weights <= 0.6 * l2
        tiles = rows // 128 * 8
        assert tiles / (-(-tiles // processors) * processors) > 0.95
        layer = [PackedLayer(None, None, None, None, None, x.d_in, x.d_out, x.relu) for x in h.mixer]  # type: ignore[arg-type]  # sizes alone count
        footprints = PackedTransform((), (), tuple(layer), "bf16", 0.0, None).footprints  # type: ignore[arg-type]  # sizes alone count
        assert rows == chunk_rows(footprints, 2048, l2_bytes=l2, processors=processors)
    assert chunk(l2_bytes=4 << 20, multiprocessors=10) == 512  # more than the small kernel takes


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
        ("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES", 5, "cublasLt.h"),
        ("CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES", 6, "cublasLt.h"),
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

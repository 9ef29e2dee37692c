"""What nvcc emits, run by the PTX interpreter: the same launches on the same memory must give the emulator's answer.

The interpreter executes the inline assembly that the emulator replaces, so a wrong wrapper is found only here.
"""

from __future__ import annotations

import ctypes
from typing import Any

import cuda_support as support
import numpy as np
import pytest
import torch

import fct
from fct import ref
from fct.ops.search.cuda_search import CudaSearch
from fct.ops.transform.cuda_backend import CudaTransform
from fct.rows import Rows

pytestmark = support.needs_nvcc


def rows(x: Any) -> Rows:
    return Rows(torch.from_numpy(x), "float32", None, "cpu", "torch")


def search(texts: list[str] | None, metric: str, kind: str, nq: int, n: int, d: int, k: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(5)
    q, g = rng.standard_normal((nq, d), dtype=np.float32), rng.standard_normal((n, d), dtype=np.float32)
    engine = CudaSearch(support.EmulatedRuntime())
    if texts is None:
        return *engine.search(rows(q), engine.prepare(rows(g), metric, kind), k), {}
    with support.interpreted(texts) as issued:
        return *engine.search(rows(q), engine.prepare(rows(g), metric, kind), k), issued


# the scan for few queries, the wide one, the one in less shared memory
CASES = [("l2", "bf16", 2, 70, 20, 3), ("cosine", "int8", 17, 70, 20, 2), ("ip", "int8", 17, 40, 130, 2)]


# One scan for each architecture; the others with the slow tests, at five seconds each.
@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        pytest.param(case, architecture, marks=[] if i == j else [pytest.mark.slow])
        for i, case in enumerate(CASES)
        for j, architecture in enumerate(["90a", "80"])
    ],
)
def test_topk(case: tuple[Any, ...], architecture: str) -> None:
    distances, indices, issued = search([support.ptx("topk", architecture)], *case)
    want_distances, want_indices, _ = search(None, *case)
    assert (indices == want_indices).all()
    torch.testing.assert_close(distances, want_distances, rtol=3e-7, atol=0)
    assert min(issued[op] for op in ("mma", "ldmatrix", "cp")) > 0


class Counting:
    """The bindings, and how many queries their last search left to the exact way."""

    def __init__(self, lib: Any) -> None:
        self.lib = lib

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lib, name)

    def cuda_search(self, *where: int, **args: Any) -> None:
        self.lib.cuda_search(*where, **args)
        at = args["scratch"] + self.lib.cuda_search_size(**args)["failed_at"]
        self.failed = ctypes.c_uint32.from_address(at).value


@pytest.mark.parametrize("partner", [3, 2])
@pytest.mark.slow  # minutes in the emulator
def test_a_quads_lists_are_merged(partner: int) -> None:
    """Sixteen near rows in each of four lists, seven of them one thread's: all are kept, but by a wrong merge."""
    edits = {"topk_scan.cuh": [("keep_half(keys, 3, lane < 2)", f"keep_half(keys, {partner}, lane < 2)")]}
    rng = np.random.default_rng(5)
    row = np.arange(300)
    near = (row < 256) & (row % 64 // 8 * 2 + row % 2 < np.array([7, 7, 2, 0])[row % 8 // 2])
    g = rng.standard_normal((300, 20), dtype=np.float32) * 1e-2 + np.where(near, 1, 9).astype(np.float32)[:, None]
    q = np.ones((17, 20), np.float32)
    runtime = support.EmulatedRuntime()
    runtime.lib = counting = Counting(runtime.lib)
    engine = CudaSearch(runtime)
    prepared = engine.prepare(rows(g), "l2", "bf16")
    with support.interpreted([support.ptx("topk", "80", edits if partner != 3 else None)]):
        _, indices = engine.search(rows(q), prepared, 4)
    assert (indices.numpy() == ref.topk(q, g, 4)[1]).all()
    assert counting.failed == (0 if partner == 3 else 17)


def transform(texts: list[str], n: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    h = fct.Transformation.random(9, 7, 10, inner=20, normalise=True, skip=True).with_(length=0.75)
    old, side = rng.standard_normal((n, 9), dtype=np.float32), rng.standard_normal((n, 7), dtype=np.float32)
    out = torch.full((n, 10), float("nan"))
    backend = CudaTransform(support.EmulatedRuntime())
    packed = backend.pack(h, "bf16", "cpu")
    with support.interpreted(texts):
        backend.run(packed, rows(old), rows(side), rows(out.numpy()), threads=1)
    return out.numpy(), ref.transform(old, side, h)


@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("n", [2, 18])
def test_transform(n: int, architecture: str) -> None:
    got, want = transform([support.ptx("transform", architecture)], n)
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


WRAPPER_BUGS = {
    "mma operands": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}",
                     "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%6,%5,%7}, {%8,%9}"),
    "wait count": ('asm volatile("cp.async.wait_group %0;\\n" ::"n"(kPending)',
                   'asm volatile("cp.async.wait_group %0;\\n" ::"n"(kPending + 1)'),
    "pack order": ('"=r"(r) : "f"(hi), "f"(lo)', '"=r"(r) : "f"(lo), "f"(hi)'),
    "ldmatrix outputs": ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}",
                         "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%1,%0,%2,%3}"),
    "acquire of another word": ("ld.acquire.gpu.global.u32 %0, [%1];", "ld.acquire.gpu.global.u32 %0, [%1+4];"),
}  # fmt: skip


@pytest.mark.parametrize("bug", WRAPPER_BUGS)
def test_a_wrong_wrapper_is_found(bug: str) -> None:
    text = support.ptx("transform", "80", {"gpu_api.h": [WRAPPER_BUGS[bug]]})
    try:
        got, want = transform([text], 2)
    except NotImplementedError:  # an instruction that the interpreter does not know finds no bug
        raise
    except RuntimeError:
        return
    assert not np.abs(got - want).max() < 0.02 * np.abs(want).max()

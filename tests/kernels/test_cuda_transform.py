"""CUDA's transformation, its whole Python path, on the emulator: random schedules, odd shapes, the proof's bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_support as support
import numpy as np
import pytest
import torch
from cuda_support import rows

import fct
from fct import ref
from fct.ops import proof
from fct.ops.numerics import quantise
from fct.ops.numerics.rounding import deviation
from fct.ops.transform import cuda_backend
from fct.ops.transform.cuda_backend import CudaTransform
from fct.rows import Rows
from tools.gpu_roofline import SMALL_H, Layers, paper

pytestmark = support.needs_cxx


@pytest.fixture(scope="module")
def runtime() -> support.EmulatedRuntime:
    return support.EmulatedRuntime()


@pytest.fixture
def schedule(runtime: support.EmulatedRuntime) -> Callable[[int, int], None]:
    return lambda sched, seed=1: runtime.lib.schedule(sched, seed, 2)  # type: ignore[misc]


def run_transform(
    runtime: Any, h: Any, rng: Any, n: int, dtype: str = "float32", out_dtype: str = "float32"
) -> tuple[Any, Any]:
    backend = CudaTransform(runtime)
    old = rows(rng.standard_normal((n, h.d_old), dtype=np.float32), dtype)
    side = rows(rng.standard_normal((n, h.d_side), dtype=np.float32), dtype) if h.uses_side_info else old
    guard = torch.full((n + 2, h.d_new + 3), 777.0).to(getattr(torch, out_dtype))
    out = Rows(guard[1 : n + 1, : h.d_new], out_dtype, None, "cpu", "torch")
    out.values.fill_(float("nan"))
    backend.run(backend.pack(h, "bf16", "cpu"), old, side, out, threads=1)
    assert torch.isfinite(out.values).all()
    untouched = torch.cat([guard[0], guard[-1], guard[:, h.d_new :].flatten()])
    assert (untouched == untouched[0]).all()
    want = ref.transform(old.float32().numpy(), side.float32().numpy(), h)
    return out.values.float().numpy(), want


@pytest.mark.parametrize("sched", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 15, 17, 33, 65])
def test_transform_small(runtime: Any, schedule: Any, rng: Any, n: int, sched: int) -> None:
    schedule(sched, n)
    for normalise in (False, True):
        h = fct.Transformation.random(13, 7, 19, inner=70, normalise=normalise)
        got, want = run_transform(runtime, h, rng, n)
        scale = np.abs(want).max()
        assert np.abs(got - want).max() < 0.02 * scale


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_transform_dtypes_and_no_side_information(runtime: Any, rng: Any, dtype: str) -> None:
    h = fct.Transformation.random(9, 9, 10, inner=20, side_info=False)
    got, want = run_transform(runtime, h, rng, 3, dtype, dtype)
    assert np.abs(got - want).max() < 0.03 * np.abs(want).max()


def test_transform_of_more_rows_than_a_launch_takes(runtime: Any, rng: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(CudaTransform, "large_why_not", lambda _: "no cuBLASLt")
    h = fct.Transformation.random(5, 4, 6, inner=8)
    got, want = run_transform(runtime, h, rng, 259)
    assert np.abs(got - want).max() < 0.03 * np.abs(want).max()


# One block in each branch, one in the mixer or none, widths of whole units and odd, with and without side-information.
NARROW: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "128": ((128, 64, 128), {"inner": 512, "branch": 128, "blocks": 1}),
    "64": ((64, 64, 64), {"inner": 128, "branch": 64, "blocks": 1}),
    "odd": ((65, 33, 67), {"inner": 129, "branch": 63, "blocks": 1}),
    "no mixing block": ((7, 3, 5), {"inner": 9, "branch": 17, "blocks": 0}),
    "no side-information": ((50, 50, 70), {"inner": 65, "branch": 40, "blocks": 1, "side_info": False}),
    "one": ((1, 1, 2), {"inner": 1, "branch": 1, "blocks": 1}),
}


@pytest.mark.parametrize("share", [0.08, 0.99])  # of the work that may read the rows in two parts
@pytest.mark.parametrize("shape", NARROW)
def test_narrow_shapes_with_a_skip_and_a_length(
    runtime: Any, schedule: Any, monkeypatch: Any, shape: str, share: float
) -> None:
    """By the self-proof's own rows, near and far, and inside its bound."""
    monkeypatch.setattr(quantise, "EXACT_SHARE", share)
    monkeypatch.setattr(proof, "ROWS", (1, 3) if shape == "128" else (1, 17, 67))
    dims, how = NARROW[shape]
    backend = CudaTransform(runtime)
    for length in (None, 0.87):
        h = fct.Transformation.random(*dims, skip=True, normalise=length is not None, **how)
        h = h.with_(length=length or 1.0)
        cases = list(proof.transform_cases(h))
        assert {case.far for case in cases} == ({False, True} if share == 0.99 else {False})
        for i, case in enumerate(cases):
            schedule(i % 4, 7)
            out = torch.full((len(case.old), h.d_new), float("nan"))
            packed = backend.pack(case.h, "bf16", "cpu")
            assert packed.split == (share == 0.99)
            backend.run(packed, rows(case.old), rows(case.side), rows(out.numpy()), threads=1)
            want = ref.transform(case.old, case.side, case.h)
            off = deviation(out.numpy(), want, case.old, case.side, case.h, "bf16", "cuda")
            assert off < 6, (str(case), off)


def test_every_h_that_the_doctor_examines_by(runtime: Any, schedule: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(proof, "ROWS", (1, 17))
    backend = CudaTransform(runtime)
    for i, h in enumerate(proof.odd_transformations()):
        assert backend.why_not(h, "bf16", "cuda:0") == []
        for case in proof.transform_cases(h, "bf16"):
            schedule(i % 4, 5)
            out = torch.full((len(case.old), h.d_new), float("nan"))
            weights = backend.pack(case.h, "bf16", "cpu")
            backend.run(weights, rows(case.old), rows(case.side), rows(out.numpy()), threads=1)
            assert case.error(out.numpy(), "bf16", "cuda")[0] == "", str(case)


def test_no_more_blocks_than_have_something_to_do(runtime: Any, rng: Any) -> None:
    """A narrow h on a large device: the widest layer's units, or a warp for each row that goes in."""
    backend = CudaTransform(support.EmulatedRuntime(multiprocessors=132))
    small: dict[str, Any] = {"inner": 512, "branch": 128}
    narrow: dict[str, Any] = {"inner": 16, "branch": 16}
    grids: list[int] = []
    runtime.lib.intercept(lambda name, grid, *rest: grids.append(grid[0]))
    try:
        for how, n in ((small, 1), (small, 256), ({"inner": 2048}, 1), (narrow, 61)):
            h = fct.Transformation.random(128, 64, 128, blocks=1, **how)
            old, side, out = (rows(np.zeros((n, d), np.float32)) for d in (128, 64, 128))
            backend.run(backend.pack(h, "bf16", "cpu"), old, side, out, threads=1)
    finally:
        runtime.lib.intercept(None)
    assert grids == [32, 128, 128, 31]


def test_the_rows_of_a_skip_lie_behind_what_the_last_layer_reads(runtime: Any, monkeypatch: Any) -> None:
    """Converted once, read there by the branches and by the last layer; every buffer as aligned as vectors ask for."""
    monkeypatch.setattr(quantise, "EXACT_SHARE", 0.08)  # or the rows have three parts each
    backend = CudaTransform(runtime)
    for d_side, alone in ((33, False), (65, True)):
        h = fct.Transformation.random(65, d_side, 67, inner=129, branch=63, blocks=1, skip=True, side_info=not alone)
        packed = backend.pack(h, "bf16", "cpu")
        assert packed.skip_at == 192  # 129 in whole units
        buffers = backend._buffers(packed, 256)
        first, last = buffers["mixer.1"].data_ptr(), packed.chains["mixer"][-1]
        assert last.depth == (192 + 128 if alone else 192 + 128 + 64)
        assert buffers["old"].data_ptr() == first + 2 * 192
        assert buffers["side"].data_ptr() == first + 2 * (192 if alone else 192 + 128)
        assert buffers["old"].stride(0) == buffers["side"].stride(0) == last.depth
        plan = cuda_backend._plan(packed, buffers, bias_bf16=True)
        assert [layer["y_pitch"] * (4 if layer["last"] else 2) % 16 for layer in plan] == [0] * 4
        assert [layer["y"] % 16 for layer in plan] == [layer["x"] % 16 for layer in plan] == [0] * 4


@pytest.mark.parametrize("h, model", [
    (fct.Transformation.random(128, 128, 128, inner=2048), paper()),
    (fct.Transformation.random(128, 64, 128, inner=512, branch=128, blocks=1, skip=True), SMALL_H),
], ids=["paper", "small"])  # fmt: skip
def test_the_rooflines_layers_are_the_packed_ones(runtime: Any, h: Any, model: Layers) -> None:
    packed = CudaTransform(runtime).pack(h, "bf16", "cpu")
    found = sorted((layer.depth, layer.d_out) for chain in packed.chains.values() for layer in chain)
    assert found == sorted(layer[1:] for layer in model.layers)
    assert 2 * sum(k * n for k, _, n in model.layers) == h.flop_per_row
    assert model.ends == h.d_old + h.d_side + h.d_new


@pytest.mark.parametrize("multiprocessors, l2", [(108, 40 << 20), (132, 50 << 20), (58, 48 << 20), (128, 72 << 20)])
def test_chunks_of_a_small_h_fill_the_device(multiprocessors: int, l2: int) -> None:
    """With what the skip keeps until the end, operands lie in 60 % of L2; the widest layer's tiles are whole waves."""
    runtime = support.EmulatedRuntime(multiprocessors=multiprocessors, l2_bytes=l2)
    chunks = {}
    for skip in (False, True):
        h = fct.Transformation.random(128, 64, 128, inner=512, branch=128, blocks=1, skip=skip)
        packed = CudaTransform(runtime).pack(h, "bf16", "cpu")
        kept = 2 * 3 * (128 + 64) if skip else 0
        rows_ = chunks[skip] = packed.chunk
        assert rows_ * (2 * 256 + 2 * 512 + kept) + 2 * 256 * 512 <= 0.6 * l2
        tiles = rows_ // 128 * 2
        assert tiles / (-(-tiles // multiprocessors) * multiprocessors) > 0.95
        assert 2 * rows_ * h.flop_per_row / 2 > 1e9, "a launch is worth its while"
    assert chunks[True] < chunks[False]


def test_transform_into_scaled_int8(runtime: Any, rng: Any) -> None:
    h = fct.Transformation.random(5, 4, 6, inner=8, normalise=True)
    old, side = (rng.standard_normal((4, d), dtype=np.float32) for d in (5, 4))
    values = torch.zeros(4, 6, dtype=torch.int8)
    out = Rows(values, "int8", torch.full((1, 1), 1 / 127), "cpu", "torch")
    backend = CudaTransform(runtime)
    backend.run(backend.pack(h, "bf16", "cpu"), rows(old), rows(side), out, threads=1)
    assert np.abs(values.numpy() / 127 - ref.transform(old, side, h)).max() < 0.02


def test_two_streams_share_no_activations(runtime: Any) -> None:
    backend = CudaTransform(runtime)
    packed = backend.pack(fct.Transformation.random(5, 4, 6, inner=8), "bf16", "cpu")
    one, other = (backend._scratch(packed, 256, stream) for stream in (1, 2))
    assert not {t.data_ptr() for t in one.buffers.values()} & {t.data_ptr() for t in other.buffers.values()}
    assert backend._scratch(packed, 256, 1) is one


def test_no_bank_conflicts(runtime: Any, rng: Any) -> None:
    with support.no_bank_conflicts(runtime, least=20):
        run_transform(runtime, fct.Transformation.random(12, 7, 20, inner=33, skip=True), rng, 5)


def test_zero_rows_launch_nothing(runtime: Any) -> None:
    with support.nothing_launched(runtime):
        backend = CudaTransform(runtime)
        empty = [rows(np.zeros((0, d), np.float32)) for d in (5, 4, 6)]
        backend.run(backend.pack(fct.Transformation.random(5, 4, 6, inner=8), "bf16", "cpu"), *empty, threads=1)

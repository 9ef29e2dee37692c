"""Every transformation kernel, dtype and odd shape, run by Triton's interpreter on guarded, poisoned buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, plain

import fct
from fct import ref
from fct.artifact.transformation import Layer, Transformation
from fct.errors import BackendError, DeviceLostError
from fct.fit.precision_choice import calibrate
from fct.ops import proof
from fct.ops.device import state as device_module
from fct.ops.transform import triton_backend as backend
from fct.ref import chain

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
# Share of the output's root mean square that a precision may cost on random layers: rounding steps of the operands.
COST = {"fp32": 2e-6, "fp16": 3e-3, "bf16": 2.5e-2, "int8": 8e-2, "fp8": 1.8e-1}


def calibrated(h: Transformation, old: Any, side: Any) -> Transformation:
    x = np.concatenate([chain(old, h.old), chain(side, h.side)], axis=1)
    ranges = {}
    for i, layer in enumerate(h.mixer):
        ranges[f"mixer.{i}"] = np.stack([x.min(0), x.max(0)]).astype(np.float32)
        x = chain(x, [layer])
    return h.with_(calibration=ranges)


def run(
    monkeypatch: pytest.MonkeyPatch,
    device: FakeDevice,
    h: Transformation,
    precision: str,
    old: Any,
    side: Any,
    **how: Any,
) -> Any:
    """What the kernels make of the rows; ``out`` and ``chunk`` may be given."""
    monkeypatch.setattr(backend, "device_of", lambda name: device)
    packed = backend.TritonTransform().pack(h, precision, "cuda:0")
    rows = old if isinstance(old, fct.rows.Rows) else device.rows(old)
    side_rows = side if isinstance(side, fct.rows.Rows) else device.rows(side)
    out = how.get("out") or device.out(rows.n, h.d_new)
    backend.run_chunks(packed, rows, side_rows, out, chunk=how.get("chunk"))
    device.drain()
    device.check_guards()
    return plain(out.values)


def error_of(got: Any, want: Any) -> float:
    return float(np.abs(got.float().numpy() - want).max() / np.sqrt((want**2).mean()))


@pytest.mark.grid(3)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])  # 16-byte copies; TMA descriptors
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [1, 130])
def test_paper_shape(monkeypatch: pytest.MonkeyPatch, rng: Any, target: str, precision: str, n: int) -> None:
    if (target, precision) == ("sm_80", "fp8"):
        assert "sm_89" in backend._target_lacks("fp8", "sm_80")[0]
        return
    h = Transformation.random(19, 33, 21, inner=65)
    old, side = rng.standard_normal((n, 19), dtype=np.float32), rng.standard_normal((n, 33), dtype=np.float32)
    sample = rng.standard_normal((256, 52), dtype=np.float32)
    h = calibrated(h, np.concatenate([old, sample[:, :19]]), np.concatenate([side, sample[:, 19:]]))
    device = FakeDevice(target)
    got = run(monkeypatch, device, h, precision, old, side)
    assert device.launches == ["branches", "linear", "linear", "final"]
    assert error_of(got, ref.transform(old, side, h)) < COST[precision] * 4  # the largest of many, not the mean


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_odd_plan(monkeypatch: pytest.MonkeyPatch, rng: Any, target: str, precision: str) -> None:
    """The proof's own h and rows: skips, lengths, branches of one layer, each as far off as rounding explains."""
    if (target, precision) == ("sm_80", "fp8"):
        return
    monkeypatch.setattr(proof, "ROWS", (35,))
    seen: set[str] = set()
    for h in proof.odd_transformations():
        old, side = (rng.standard_normal((256, d), dtype=np.float32) for d in (h.d_old, h.d_side))
        h = calibrate(h, old, side if h.uses_side_info else None)
        for case in proof.transform_cases(h, precision):
            device = FakeDevice(target)
            got = run(monkeypatch, device, case.h, precision, case.old, case.side).float().numpy()
            assert case.error(got, precision, "triton")[0] == "", str(case)
            seen |= set(device.launches)
            if case.h.normalise:
                np.testing.assert_allclose(np.linalg.norm(got, axis=1), case.h.length, rtol=1e-5)
    assert seen == {"branches", "first_layers", "ingest", "linear", "final"}


def test_a_small_plan_is_three_launches(monkeypatch: pytest.MonkeyPatch, rng: Any) -> None:
    h = Transformation.random(19, 33, 21, inner=65, branch=30, blocks=1, skip=True, normalise=True).with_(length=0.87)
    old, side = rng.standard_normal((70, 19), dtype=np.float32), rng.standard_normal((70, 33), dtype=np.float32)
    device = FakeDevice()
    run(monkeypatch, device, calibrated(h, old, side), "int8", old, side)
    assert device.launches == ["first_layers", "linear", "final"]


@pytest.mark.parametrize(
    "wrong",
    [
        "no skip", "skip of old rows alone", "skip without its bias", "length 1", "sides swapped",
        "a branch without its relu",
    ],
)  # fmt: skip
def test_what_a_small_plan_may_get_wrong_is_seen(monkeypatch: pytest.MonkeyPatch, rng: Any, wrong: str) -> None:
    h = Transformation.random(17, 17, 24, inner=40, branch=24, blocks=1, skip=True, normalise=True).with_(length=0.87)
    h = calibrate(h, *rng.standard_normal((2, 256, 17), dtype=np.float32))
    assert h.skip is not None
    half = h.skip.weight * (np.arange(34) < 17)
    other = {
        "no skip": h.with_(skip=None, calibration={k: v for k, v in h.calibration.items() if k != "skip"}),
        "skip of old rows alone": h.with_(skip=Layer(half, h.skip.bias, False)),
        "skip without its bias": h.with_(skip=Layer(h.skip.weight, 0 * h.skip.bias, False)),
        "length 1": h.with_(length=1.0),
        "sides swapped": h.with_(old=h.side, side=h.old),
        "a branch without its relu": h.with_(side=(Layer(h.side[0].weight, h.side[0].bias, False),)),
    }[wrong]
    monkeypatch.setattr(proof, "ROWS", (67,))
    near = next(proof.transform_cases(h, "int8"))
    # 8 bits of a range that begins at 0 cut off what a ReLU does
    for precision in ("fp32",) if "relu" in wrong else ("fp32", "int8"):
        right, off = (
            near.error(run(monkeypatch, FakeDevice(), x, precision, near.old, near.side).numpy(), precision, "triton")
            for x in (h, other)
        )
        assert right[0] == ""
        assert "standard deviations of what rounding explains" in off[0]


@pytest.mark.parametrize("d_new", [12, 300])  # 300: three column tiles of the skip, and ``normalise`` runs
def test_gallery_dtypes_of_a_skip(monkeypatch: pytest.MonkeyPatch, rng: Any, d_new: int) -> None:
    """int8 rows with a scale a dimension beside float16 ones, 140 wide: more than one tile's depth."""
    h = Transformation.random(9, 140, d_new, inner=16, branch=24, blocks=1, skip=True, normalise=True).with_(length=0.9)
    n, device = 37, FakeDevice()
    old = torch.from_numpy((rng.standard_normal((n, 9)) * 40).round().astype(np.int8))
    scale = (0.01 + 0.02 * rng.random((1, 9))).astype(np.float32)
    side = torch.from_numpy(rng.standard_normal((n, 140), dtype=np.float32)).half()
    rows = device.rows(old, scale, pitch=12), device.rows(side, pitch=143)
    got = run(monkeypatch, device, h, "fp32", *rows, chunk=32)
    assert ("normalise" in device.launches) == (d_new == 300)
    assert error_of(got, ref.transform(old.double().numpy() * scale, side.double().numpy(), h)) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("mode", ["one", "row", "dim"])
def test_gallery_dtypes(monkeypatch: pytest.MonkeyPatch, rng: Any, dtype: str, mode: str) -> None:
    h = Transformation.random(9, 140, 7, inner=16)  # 140 > one tile's depth
    n, device = 37, FakeDevice()
    scale_of = {"one": (1, 1), "row": (n, 1), "dim": (1, -1)}[mode]

    def gallery(d: int) -> tuple[Any, Any]:
        x = torch.from_numpy(rng.standard_normal((n, d), dtype=np.float32))
        if dtype != "int8":
            x = x.to(getattr(torch, dtype))
            return device.rows(x, pitch=d + 3), x.double().numpy()
        shape = tuple(d if s == -1 else s for s in scale_of)
        scale = (0.01 + 0.02 * rng.random(shape)).astype(np.float32)
        x = (x * 40).round().to(torch.int8)
        return device.rows(x, scale, pitch=d + 3), x.double().numpy() * scale

    (old, old64), (side, side64) = gallery(9), gallery(140)
    got = run(monkeypatch, device, h, "fp32", old, side)
    assert error_of(got, ref.transform(old64, side64, h)) < 1e-5


@pytest.mark.grid(5)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("d_new", [5, 129, 300])  # 300: wider than a tile, so ``normalise`` runs
@pytest.mark.parametrize("normalise", [True, False])
def test_destinations(monkeypatch: pytest.MonkeyPatch, rng: Any, dtype: str, d_new: int, normalise: bool) -> None:
    h = Transformation.random(6, 6, d_new, inner=24, normalise=normalise)
    old, side = rng.standard_normal((2, 35, 6), dtype=np.float32)
    device = FakeDevice()
    got = run(monkeypatch, device, h, "fp32", old, side, out=device.out(35, d_new, dtype))
    assert ("normalise" in device.launches) == (normalise and d_new == 300)
    step = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    assert error_of(got, ref.transform(old, side, h)) < step


@pytest.mark.parametrize("shape", [(1, 1), (35, 1), (1, 12)])
def test_int8_destination(monkeypatch: pytest.MonkeyPatch, rng: Any, shape: tuple[int, int]) -> None:
    h = Transformation.random(6, 6, 12, inner=24, normalise=True)
    old, side = rng.standard_normal((2, 35, 6), dtype=np.float32)
    scale = (0.004 + 0.004 * rng.random(shape)).astype(np.float32)
    device = FakeDevice()
    got = run(monkeypatch, device, h, "fp32", old, side, out=device.out(35, 12, "int8", scale))
    want = np.clip(np.rint(ref.transform(old, side, h) / scale), -127, 127)
    assert np.abs(got.numpy() - want).max() <= 1
    assert (got.numpy() == want).mean() > 0.99  # a float32 sum may fall on the other side of a half


def test_any_layer_plan(monkeypatch: pytest.MonkeyPatch, rng: Any) -> None:
    """One layer here, three there, no ReLU in places, a mixer of one layer."""

    def layer(a: int, b: int, relu: bool = True) -> Layer:
        return Layer(rng.standard_normal((b, a)) / np.sqrt(a), rng.standard_normal(b), relu)

    h = Transformation.random(10, 7, 12)
    h = h.with_(
        old=(layer(10, 33, False),),
        side=(layer(7, 17), layer(17, 5, False), layer(5, 30)),
        mixer=(layer(63, 12, False),),
    )
    old, side = rng.standard_normal((70, 10), dtype=np.float32), rng.standard_normal((70, 7), dtype=np.float32)
    device = FakeDevice()
    for precision in ("fp32", "int8"):
        got = run(monkeypatch, device, calibrated(h, old, side), precision, old, side)
        assert error_of(got, ref.transform(old, side, h)) < COST[precision] * 4
    assert device.launches[:6] == ["first_layers", "ingest", "linear", "linear", "linear", "final"]


def test_integers_are_exact(monkeypatch: pytest.MonkeyPatch, rng: Any) -> None:
    def layer(a: int, b: int, relu: bool) -> Layer:
        return Layer(rng.integers(-1, 2, (b, a)), rng.integers(-2, 3, b), relu)

    h = Transformation.random(4, 4, 6, inner=8)
    h = h.with_(old=(layer(4, 8, True), layer(8, 12, True)), side=(layer(4, 8, True), layer(8, 12, True)),
                mixer=(layer(24, 8, True), layer(8, 6, False)))  # fmt: skip
    old, side = rng.integers(-1, 2, (2, 65, 4)).astype(np.float32)
    for precision in ("fp32", "fp16"):
        got = run(monkeypatch, FakeDevice(), h, precision, old, side)
        np.testing.assert_array_equal(got.numpy(), ref.transform(old, side, h))


def test_chunks_and_graph(monkeypatch: pytest.MonkeyPatch, rng: Any) -> None:
    """Row offsets come from device memory; the second chunk is recorded and replayed, the ragged last one is not."""
    h = Transformation.random(5, 5, 8, inner=16)
    old, side = rng.standard_normal((2, 5 * 128 + 3, 5), dtype=np.float32)
    device = FakeDevice()
    got = run(monkeypatch, device, h, "fp32", old, side, chunk=128)
    assert device.captured == 1
    assert device.launches.count("final") == 3  # the first, the recorded, the ragged
    assert error_of(got, ref.transform(old, side, h)) < 1e-5


def test_out_of_memory_halves_the_chunk(monkeypatch: pytest.MonkeyPatch, rng: Any) -> None:
    h = Transformation.random(5, 5, 8, inner=64)
    old, side = rng.standard_normal((2, 600, 5), dtype=np.float32)
    device = FakeDevice(memory=160 * 64 * 4)
    got = run(monkeypatch, device, h, "fp32", old, side)
    assert device.largest <= device.memory
    assert error_of(got, ref.transform(old, side, h)) < 1e-5
    device = FakeDevice()
    monkeypatch.setattr(device, "release", lambda: setattr(device, "memory", 100))
    original = device.empty

    def scarce(shape: Any, dtype: str) -> Any:
        if len(shape) == 2 and shape[0] in (600, 300, 150, 128):
            device.memory = 10
        return original(shape, dtype)

    monkeypatch.setattr(device, "empty", scarce)
    rows = device.rows(old[:590]), device.rows(side[:590])
    packed = backend.TritonTransform()
    monkeypatch.setattr(backend, "device_of", lambda name: device)
    weights = packed.pack(h, "fp32", "cuda:0")
    out = device.out(590, 8)
    device.memory = 1000
    with pytest.raises(BackendError, match=r"cuda:0 \(fake sm_90\): out of memory even with chunks of 128 rows"):
        backend.run_chunks(weights, *rows, out)


def test_illegal_access_is_no_success(monkeypatch: pytest.MonkeyPatch, rng: Any) -> None:
    h = Transformation.random(5, 5, 8, inner=16)
    old, side = rng.standard_normal((2, 300, 5), dtype=np.float32)
    device = FakeDevice()
    monkeypatch.setattr(device_module, "_lost", set())

    def die(*_: Any, **__: Any) -> None:
        device.die()

    monkeypatch.setattr(device, "launch", die)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        run(monkeypatch, device, h, "fp32", old, side)
    assert "failed earlier" in device_module.why_no_gpu("cuda:0")[0]


def test_a_compiler_error_names_kernel_shape_and_device(monkeypatch: pytest.MonkeyPatch, rng: Any) -> None:
    device = FakeDevice()

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("out of resource: shared memory")

    monkeypatch.setattr(device, "launch", refuse)
    x = rng.standard_normal((3, 5), dtype=np.float32)
    with pytest.raises(
        BackendError, match=r"branches: the launch over 3 rows, grid \(1, 2\).*fake sm_90.*out of resource"
    ):
        run(monkeypatch, device, Transformation.random(5, 5, 8, inner=16), "fp32", x, x)


def test_chunk_keeps_activations_in_l2_and_waves_full() -> None:
    h100 = {"processors": 132, "l2_bytes": 50 << 20}
    middle = (4096, 4096, 2048 * 4096)
    rows = device_module.chunk_rows([(1024, 4096, 1024 * 2048), middle, (4096, 512, 4096 * 128)], 2048, **h100)
    assert rows * 8192 + middle[2] <= 0.6 * h100["l2_bytes"]
    tiles = rows // 128 * 8
    assert tiles / (-(-tiles // 132) * 132) > 0.9
    # weights larger than L2 are streamed; the rows' operands still stay
    assert 128 <= device_module.chunk_rows([(8192, 8192, 1 << 30)], 4096, **h100) <= 0.3 * h100["l2_bytes"] / 16384


def test_chunk_follows_the_tile_and_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "device_of", lambda name: FakeDevice("sm_89", processors=58, l2_bytes=48 << 20))
    h = Transformation.random(16, 16, 24, inner=160)
    packed = backend.TritonTransform().pack(h, "bf16", "cuda:0")
    assert packed.footprints == [(256, 384, 160 * 256), (384, 384, 160 * 384), (384, 96, 24 * 384)]
    assert backend._chunk_of(packed) % 128 == 0
    # the skip's output (24 x 4 bytes) waits beside each layer; rows that two launches read are to be there still
    skip = Transformation.random(16, 16, 24, inner=160, blocks=1, skip=True)
    mixer = [(256 + 96, 384, 160 * 256), (384 + 96, 96, 24 * 384)]
    assert backend.TritonTransform().pack(skip, "bf16", "cuda:0").footprints == [*mixer, (4 * 32, 96 + 256, 0)]
    small = Transformation.random(16, 16, 24, inner=160, branch=48, blocks=1, skip=True)
    assert backend.TritonTransform().pack(small, "bf16", "cuda:0").footprints == mixer


def test_why_not_here() -> None:
    h = Transformation.random(4, 4, 4, inner=4)
    assert backend.TritonTransform().why_not(h, "fp32", "cpu") == ["runs on cuda only, got cpu"]
    reasons = backend.TritonTransform().why_not(h, "int8", "cuda:0")
    assert any("needs calibrated activation ranges" in r for r in reasons)
    small = Transformation.random(4, 4, 4, inner=4, branch=4, blocks=1, skip=True, normalise=True).with_(length=0.9)
    plain = Transformation.random(4, 4, 4, inner=4, normalise=True)
    assert backend.TritonTransform().why_not(small, "fp32", "cuda:0") == backend.TritonTransform().why_not(
        plain, "fp32", "cuda:0"
    )

"""On a GPU too, the layers that read the rows cost no retrieval: they multiply high and low parts, and prove it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_support as support
import numpy as np
import pytest
import triton
import triton.language as tl
from fake_device import FakeDevice, plain

import fct
from fct import ref
from fct.artifact.transformation import Layer, Transformation
from fct.fit.precision_choice import calibrate
from fct.fit.recipes import FitConfig
from fct.kernels import transform_kernels as kernels
from fct.ops import proof as selfproof
from fct.ops.numerics.quantise import exact_first
from fct.ops.transform import triton_backend as backend
from fct.ops.transform import triton_weights
from fct.ops.transform.cuda_backend import CudaTransform

PRECISIONS = ("fp16", "bf16", "int8", "fp8")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeDevice]:
    device = FakeDevice(seed=7)
    device.install(monkeypatch, tmp_path)
    monkeypatch.setattr(selfproof, "ROWS", (3, 17))
    with device.torch():
        yield device


@triton.jit
def forgetful_split(x, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's own language
    high = kernels._cast(x, tl.bfloat16, UPCAST)
    return high, (x * 0).to(tl.bfloat16)


def calibrated(h: Transformation, rng: Any) -> Transformation:
    return calibrate(h, *(rng.standard_normal((512, d), dtype=np.float32) for d in (h.d_old, h.d_side)))


def three_deep(h: Transformation, rng: Any) -> Transformation:
    """A plan that ``branches`` does not cover: the first layers are ``ingest`` and a ``linear`` of three parts."""
    d = h.old[-1].d_out
    more = Layer(rng.standard_normal((d, d), dtype=np.float32) / np.sqrt(d), np.zeros(d, np.float32))
    return h.with_(old=(*h.old, more))


class ForgetsWeights(backend.TritonTransform):
    """Kernels that round the first layers' weights."""

    def pack(self, h: Transformation, precision: str, device: str) -> Any:
        packed = super().pack(h, precision, device)
        for layer in (packed.old[0], packed.side[0], *packed.skip):
            plain(layer.weight)[:, 2 * layer.part :] = 0
        return packed


class ForgetsTheSkipsWeights(backend.TritonTransform):
    """Kernels that round the skip's weights alone."""

    def pack(self, h: Transformation, precision: str, device: str) -> Any:
        packed = super().pack(h, precision, device)
        for layer in packed.skip:
            plain(layer.weight)[:, 2 * layer.part :] = 0
        return packed


@pytest.mark.parametrize(
    ("precision", "plan"),
    [
        pytest.param(p, plan, marks=[] if plan == "fused" or (p, plan) == ("bf16", "small") else [pytest.mark.slow])
        for p in PRECISIONS
        for plan in ("fused", "by layers", "small")
    ]
    + [pytest.param("bf16", "130 wide", marks=pytest.mark.slow)],
)
def test_triton_proves_it(fake: FakeDevice, rng: Any, monkeypatch: Any, precision: str, plan: str) -> None:
    # 130: more than one tile's depth
    shape: dict[str, Any] = {"branch": 24, "blocks": 1, "skip": True} if plan == "small" else {}
    h = Transformation.random(24, *((130, 60) if plan == "130 wide" else (17, 40)), inner=72, seed=1, **shape)
    h = calibrated(three_deep(h, rng) if plan == "by layers" else h, rng)
    monkeypatch.setattr("fct.ops.numerics.quantise.EXACT_SHARE", 0.5)
    assert selfproof._run(backend.TritonTransform(), h, precision, "cuda:0") == ""
    assert ("ingest" in fake.launches) == (plan == "by layers")
    fake.check_guards()
    refused = "rows.*: off by" if precision == "fp16" else "far away.*: off by"  # fp16 sees it near by too
    assert re.search(refused, selfproof._run(ForgetsWeights(), h, precision, "cuda:0"))
    if plan == "small":
        assert "first_layers" in fake.launches
        assert re.search(refused, selfproof._run(ForgetsTheSkipsWeights(), h, precision, "cuda:0"))
    monkeypatch.setattr(kernels, "_split", forgetful_split)
    assert re.search(refused, selfproof._run(backend.TritonTransform(), h, precision, "cuda:0"))


def cuda_weights_on_rows(packed: Any) -> dict[str, Any]:
    """Name -> (d_out, 3, part) of every weight that multiplies the rows' high and low parts."""
    found = {branch: plain(packed.chains[branch][0].weight) for branch in ("old", "side")}
    if packed.skip_at is not None:
        halves = ("old", "side") if packed.uses_side else ("old",)
        of_skip = plain(packed.chains["mixer"][-1].weight)[:, packed.skip_at :]
        parts = of_skip.split([found[half].shape[1] for half in halves], 1)
        found |= {f"skip of {half}": part for half, part in zip(halves, parts, strict=True)}
    return {name: weight.unflatten(1, (3, -1)) for name, weight in found.items()}


@support.needs_cxx
@pytest.mark.parametrize("kind", ["plain", "skip", "skip without side-information"])
def test_cuda_proves_it(fake: FakeDevice, rng: Any, monkeypatch: Any, kind: str) -> None:
    monkeypatch.setattr(CudaTransform, "large_why_not", lambda _: "no cuBLASLt")
    how: dict[str, Any] = {"inner": 160, "normalise": True, "seed": 1, "skip": kind != "plain"}
    if "without" in kind:
        h = Transformation.random(24, 24, 30, **how, side_info=False)
    else:
        h = Transformation.random(24, 40, 30, **how)
    h = h.with_(length=0.9)
    monkeypatch.setattr("fct.ops.numerics.quantise.EXACT_SHARE", 0.2)
    assert exact_first(h)
    assert selfproof._run(CudaTransform(support.EmulatedRuntime()), h, "bf16", "cuda:0") == ""

    class Forgets(CudaTransform):
        name_of, part = "old", 1  # 1: what the rows' low parts are multiplied by; 2: the weights' low parts

        def pack(self, h: Transformation, precision: str, device: str) -> Any:
            packed = super().pack(h, precision, device)
            cuda_weights_on_rows(packed)[self.name_of][:, self.part] = 0
            return packed

    names = cuda_weights_on_rows(CudaTransform(support.EmulatedRuntime()).pack(h, "bf16", "cuda:0"))
    assert len(names) == {"plain": 2, "skip": 4}.get(kind, 3)
    monkeypatch.setattr(selfproof, "ROWS", (3,))
    for Forgets.name_of in names:
        for Forgets.part in (1, 2):
            said = selfproof._run(Forgets(support.EmulatedRuntime()), h, "bf16", "cuda:0")
            assert re.search("far away.*: off by", said), (Forgets.name_of, Forgets.part)


@support.needs_cxx
@pytest.mark.parametrize("wrong", ["skip", "skip's bias", "halves swapped", "length", "unit length", "activations"])
def test_a_wrong_skip_or_length_is_refused(fake: FakeDevice, rng: Any, monkeypatch: Any, wrong: str) -> None:
    """Rows near by tell: nothing of it is as small as a rounding."""
    monkeypatch.setattr(selfproof, "ROWS", (3,))
    h = Transformation.random(64, 64, 30, inner=80, branch=70, blocks=1, normalise=True, skip=True, seed=1)
    h = h.with_(length=0.97)
    assert h.skip is not None

    class Wrong(CudaTransform):
        def pack(self, h: Transformation, precision: str, device: str) -> Any:
            assert h.skip is not None
            if wrong == "skip's bias":
                return super().pack(h.with_(skip=Layer(h.skip.weight, 0 * h.skip.bias, False)), precision, device)
            if "length" in wrong:
                return super().pack(h.with_(length=1.0, normalise=wrong == "length"), precision, device)
            packed = super().pack(h, precision, device)
            weight = plain(packed.chains["mixer"][-1].weight)
            if wrong == "halves swapped":
                weight[:, packed.skip_at :] = weight[:, packed.skip_at :].roll(3 * 64, 1)
            else:
                weight[:, slice(packed.skip_at, None) if wrong == "skip" else slice(packed.skip_at)] = 0
            return packed

    assert selfproof._run(CudaTransform(support.EmulatedRuntime()), h, "bf16", "cuda:0") == ""
    said = selfproof._run(Wrong(support.EmulatedRuntime()), h.with_(), "bf16", "cuda:0")  # packed anew
    assert re.search("standard deviations of what rounding explains", said)


def test_a_large_first_layer_is_rounded(fake: FakeDevice, rng: Any) -> None:
    """Above half of the work, as on the CPU, and the bound of what rounding may cost knows; with 8-bit mixers never,
    where a CPU reads rows as int16, and the proof sees a kernel that does."""
    for shape in ({}, {"branch": 16, "blocks": 1, "skip": True}):
        h = calibrated(Transformation.random(40, 40, 8, inner=8, **shape), rng)  # type: ignore[arg-type]
        assert not exact_first(h)
        assert not backend.TritonTransform().pack(h, "bf16", "cuda:0").exact
        for precision in PRECISIONS:
            assert selfproof._run(backend.TritonTransform(), h, precision, "cuda:0") == ""
        for precision in ("int8", "fp8"):
            assert backend.TritonTransform().pack(h, precision, "cuda:0").exact
            assert re.search("far away.*: off by", selfproof._run(ForgetsWeights(), h, precision, "cuda:0"))
    h = Transformation.random(40, 40, 8, inner=8)
    assert not CudaTransform(support.EmulatedRuntime()).pack(h, "bf16", "cuda:0").split


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_integers_are_exact(fake: FakeDevice, rng: Any, precision: str) -> None:
    """Whole numbers that only two parts hold: the old rows' are 4096 + r, the side weights' 257; what is left is r."""

    def layer(a: int, b: int, relu: bool = True) -> Layer:
        return Layer(rng.integers(-1, 2, (b, a)), rng.integers(-2, 3, b), relu)

    first, second = np.zeros((8, 6)), np.zeros((8, 6))
    for channel in range(8):
        first[channel, rng.permutation(6)[:2]] = 1, -1
        second[channel, [channel % 3, 3 + channel % 3]] = 257, -256
    h = Transformation.random(6, 6, 6, inner=64)
    h = h.with_(old=(Layer(first, np.zeros(8)), layer(8, 24)), side=(Layer(second, np.zeros(8)), layer(8, 24)),
                mixer=(layer(48, 40), Layer(np.eye(5, 40), np.zeros(5)), layer(5, 6, False)))  # fmt: skip
    assert exact_first(h)
    r = rng.integers(0, 3, (65, 3))
    side = np.concatenate([r, r], axis=1).astype(np.float32)
    old = 4096 + rng.integers(-1, 2, (65, 6)).astype(np.float32)
    want = ref.transform(old, side, h)
    assert len(np.unique(want)) > 9
    weights, out = backend.TritonTransform().pack(h, precision, "cuda:0"), fake.out(65, 6)
    backend.run_chunks(weights, fake.rows(old), fake.rows(side), out)
    np.testing.assert_array_equal(fake.download(out.values), want)


def test_as_much_of_the_retrieval_as_the_cpu_keeps(fake: FakeDevice, rng: Any, monkeypatch: Any) -> None:
    """Embeddings in a narrow cone, those of one class close together, and h that spreads them: what "auto" relies on.

    Of each query's ten nearest in fp32, the GPU kernels keep 99 % of what the CPU's of the same precision keep, whose
    effect is measured at fit time; kernels that round the rows do not.
    """
    n, held, dims = 1500, 300, (24, 16, 24)
    labels = rng.integers(0, 8, n)
    within = rng.standard_normal((n, 6), dtype=np.float32)

    def space(d: int, spread: float, cone: float) -> Any:
        maps, centres = rng.standard_normal((6, d)) / np.sqrt(6), rng.standard_normal((8, d))
        return (cone * rng.standard_normal(d) + centres[labels] + spread * np.tanh(within @ maps)).astype(np.float32)

    old, side, new = (space(d, s, c) for d, s, c in zip(dims, (0.05, 0.05, 1), (3, 3, 0), strict=True))
    fit = slice(0, n - held)
    config = FitConfig(inner=128, epochs=12, batch_size=128, lr=8e-3, warmup_epochs=1.0, standardise=True)
    h = fct.fit_transformation(old[fit], side[fit], new[fit], config=config, progress=False)
    assert exact_first(h)
    old, side, queries = (x[n - held :].copy() for x in (old, side, new))

    def nearest(rows: Any) -> Any:
        return fct.topk(queries, rows, 10, metric=h.new_space.metric).indices

    def on_gpu(precision: str) -> Any:
        weights, out = backend.TritonTransform().pack(h, precision, "cuda:0"), fake.out(held, h.d_new)
        backend.run_chunks(weights, fake.rows(old), fake.rows(side), out)
        return nearest(fake.download(out.values))

    whole = nearest(fct.transform_batch(old, side, h, precision="fp32", backend="cpu"))

    def kept(found: Any) -> float:
        return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(whole, found, strict=True)]))

    for precision in ("bf16", "int8"):
        on_cpu = kept(nearest(fct.transform_batch(old, side, h, precision=precision, backend="cpu")))
        assert on_cpu > 0.9
        exact = kept(on_gpu(precision))
        with monkeypatch.context() as rounding:
            rounding.setattr(triton_weights, "exact_first_on_gpu", lambda h, precision: False)
            rounded = kept(on_gpu(precision))
        assert exact >= 0.99 * on_cpu
        assert rounded < 0.99 * on_cpu

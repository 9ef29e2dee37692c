"""The variance of rounding: what the backends really lose lies inside, and one wrong element outside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_device import FakeDevice

from fct import ref
from fct.artifact.transformation import Transformation
from fct.fit.precision_choice import calibrate
from fct.ops.numerics.rounding import SIGMAS, deviation
from fct.ops.proof import _sample
from fct.ops.transform import triton_backend as backend
from fct.ops.transform.cpu_backend import CpuTransform
from fct.ops.transform.torch_backend import TorchTransform
from fct.ops.weights import packed
from fct.rows import Rows

CASES = [("triton", p) for p in ("fp32", "fp16", "bf16", "int8", "fp8")]
CASES += [("cpu", p) for p in ("fp32", "bf16", "int8")] + [("torch", "fp32"), ("torch", "bf16")]


@pytest.mark.parametrize(("name", "precision"), CASES)
@pytest.mark.parametrize("normalise", [False, True])
def test_calibrated(monkeypatch: pytest.MonkeyPatch, rng: Any, name: str, precision: str, normalise: bool) -> None:
    """The largest of 4,690 errors: about 3.5 standard deviations where rounding dominates, never 8."""
    device = FakeDevice()
    monkeypatch.setattr(backend, "device_of", lambda name: device)
    h = Transformation.random(24, 17, 70, inner=72, normalise=normalise, seed=1)
    h = calibrate(h, *(rng.standard_normal((512, d), dtype=np.float32) for d in (24, 17)))
    n = 67
    old, side = (_sample(rng, h, f"{branch}.0", n, d) for branch, d in (("old", 24), ("side", 17)))
    want = ref.transform(old, side, h)
    if name == "triton":
        rows, out = [device.rows(x) for x in (old, side)], device.out(n, 70)
        backend.run_chunks(backend.TritonTransform().pack(h, precision, "cuda:0"), rows[0], rows[1], out)
        got = device.download(out.values)
    else:
        chosen = CpuTransform() if name == "cpu" else TorchTransform()
        got = np.empty((n, 70), np.float32)
        views = [Rows(x, "float32", None, "cpu", "numpy") for x in (old, side, got)]
        chosen.run(packed(chosen, h, precision, "cpu"), *views, threads=1)
    off = deviation(got, want, old, side, h, precision, name)
    assert off < 6
    if precision != "fp32":  # whose unit covers three TF32 products
        assert off > 2, "the variance is too large to see anything"
    typical = float(np.sqrt((want**2).mean()))
    for wrong in (typical, np.nan):
        spoilt = got.copy()
        spoilt[-1, -1] = want[-1, -1] + wrong
        assert not deviation(spoilt, want, old, side, h, precision, name) <= SIGMAS
    shifted = np.roll(got, 1, axis=0)
    assert deviation(shifted, want, old, side, h, precision, name) > SIGMAS


def test_values_outside_the_calibrated_range_count_as_clipped(rng: Any) -> None:
    from fct.ops.numerics.rounding import rounding_variance

    h = calibrate(Transformation.random(6, 6, 6, inner=16), *rng.standard_normal((2, 512, 6), dtype=np.float32))
    x = rng.standard_normal((5, 6), dtype=np.float32)
    for name in ("triton", "cpu"):
        inside, outside = (rounding_variance(k * x, k * x, h, "int8", name).mean() for k in (1, 10))
        assert outside > 50 * inside

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fct
from fct import ref

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("side_info", "normalise"), [(True, False), (True, True), (False, True)])
def test_onnx_equals_reference(
    tmp_path: Path, rng: np.random.Generator, side_info: bool, normalise: bool, small: bool
) -> None:
    d_side = 5 if side_info else 9
    if small:  # one block a branch, one in the mixer, a skip, and outputs a little shorter than 1
        h = fct.Transformation.random(
            9, d_side, 7, inner=19, side_info=side_info, normalise=normalise, branch=6, blocks=1, skip=True
        )
        h = h.with_(length=0.95 if normalise else 1.0)
    else:
        h = fct.Transformation.random(9, d_side, 7, inner=19, side_info=side_info, normalise=normalise)
    session = onnxruntime.InferenceSession(str(h.to_onnx(tmp_path / "h.onnx")), providers=["CPUExecutionProvider"])
    for n in (1, 13):
        old = rng.standard_normal((n, 9), dtype=np.float32)
        side = rng.standard_normal((n, 5), dtype=np.float32) if side_info else None
        (got,) = session.run(None, {"old": old} | ({"side_info": side} if side_info else {}))
        np.testing.assert_allclose(got, ref.transform(old, side, h), rtol=1e-4, atol=1e-5)

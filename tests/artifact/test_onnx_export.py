from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fct
from fct import ref

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(("side_info", "normalise"), [(True, False), (True, True), (False, True)])
def test_onnx_equals_reference(tmp_path: Path, rng: np.random.Generator, side_info: bool, normalise: bool) -> None:
    h = fct.Transformation.random(9, 5 if side_info else 9, 7, inner=19, side_info=side_info, normalise=normalise)
    session = onnxruntime.InferenceSession(str(h.to_onnx(tmp_path / "h.onnx")), providers=["CPUExecutionProvider"])
    for n in (1, 13):
        old = rng.standard_normal((n, 9), dtype=np.float32)
        side = rng.standard_normal((n, 5), dtype=np.float32) if side_info else None
        (got,) = session.run(None, {"old": old} | ({"side_info": side} if side_info else {}))
        np.testing.assert_allclose(got, ref.transform(old, side, h), rtol=1e-4, atol=1e-5)

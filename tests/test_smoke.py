"""What must hold before anything else: lean import, the API's names, one transformation end to end."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

import fct
from fct import ref


def test_import_is_lean() -> None:
    code = (
        "import sys, fct; print([m for m in ('torch', 'triton', 'pyarrow', 'ray', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_loads() -> None:
    for name in fct.__all__:
        assert getattr(fct, name) is not None


def test_transform_equals_reference(rng: np.random.Generator) -> None:
    h = fct.Transformation.random(12, 7, 20, inner=33)
    old = rng.standard_normal((50, 12), dtype=np.float32)
    side = rng.standard_normal((50, 7), dtype=np.float32)
    got = fct.transform_batch(old, side, h, precision="fp32")
    np.testing.assert_allclose(got, ref.transform(old, side, h), rtol=1e-4, atol=1e-4)

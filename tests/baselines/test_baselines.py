from __future__ import annotations

import numpy as np
import pytest

import fct
from fct.baselines import fit_procrustes, fit_residual, fit_ridge


def test_procrustes_finds_a_rotation(rng: np.random.Generator) -> None:
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    old = rng.standard_normal((80, 6)).astype(np.float32)
    new = (old @ rotation.T + 2).astype(np.float32)
    h = fit_procrustes(old, new)
    np.testing.assert_allclose(fct.transform_batch(old, None, h, precision="fp32"), new, atol=1e-4)
    # It may rotate, not scale: twice the length stays out of reach.
    far = fct.transform_batch(old, None, fit_procrustes(old, 2 * new), precision="fp32")
    assert np.abs(far - 2 * new).max() > 0.1


def test_ridge_finds_any_affine_map(rng: np.random.Generator) -> None:
    old = rng.standard_normal((100, 5)).astype(np.float32)
    new = (old @ rng.standard_normal((5, 8)) + 1).astype(np.float32)
    got = fct.transform_batch(old, None, fit_ridge(old, new, strength=0), precision="fp32")
    np.testing.assert_allclose(got, new, atol=1e-4)
    with pytest.raises(ValueError, match="strength: expected a number of at least 0, got -1"):
        fit_ridge(old, new, strength=-1)


@pytest.mark.slow
def test_residual_goes_past_ridge_where_the_map_bends(rng: np.random.Generator) -> None:
    old = rng.standard_normal((2000, 6)).astype(np.float32)
    new = np.abs(old) + 0.5 * old
    errors = {}
    for name, h in {
        "ridge": fit_ridge(old, new),
        "residual": fit_residual(old, new, hidden=64, epochs=80, progress=False),
    }.items():
        errors[name] = ((fct.transform_batch(old, None, h, precision="fp32") - new) ** 2).mean()
    assert errors["residual"] < 0.2 * errors["ridge"]

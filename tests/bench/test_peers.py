"""The peers that users would run instead compute h, each as exactly as its precision allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fct
from fct import ref
from fct.bench.peers import transform_peers

MOST = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.06}


@pytest.mark.parametrize("side_info", [True, False])
def test_peers_compute_h(rng: np.random.Generator, tmp_path: Path, side_info: bool) -> None:
    d_side = 9 if side_info else 20
    h = fct.Transformation.random(20, d_side, 24, branch=32, blocks=1, inner=64, skip=True, side_info=side_info)
    old = rng.standard_normal((64, 20), dtype=np.float32)
    side = rng.standard_normal((64, 9), dtype=np.float32) if side_info else old
    want = ref.transform(old, side if side_info else None, h)
    seen = set()
    for (name, precision), make in transform_peers(h, old, side, 1, tmp_path).items():
        try:
            call = make()
        except ImportError:
            continue
        off = float(np.sqrt(np.mean((np.asarray(call(), np.float64) - want) ** 2) / np.mean(want**2)))
        assert off < MOST[precision], (name, precision, off)
        assert precision != "int8" or off > 1e-4, f"{name} is not quantised"
        seen.add(name)
    assert {"reference code", "torch folded"} <= seen

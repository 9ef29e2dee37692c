"""The examples run as they stand, and the upgrade that they end with is one worth making."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fct

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_store_today_and_upgrade_later(tmp_path: Path) -> None:
    out = run(str(EXAMPLES / "store_side_information.py"), "--out", "gallery", "--images", "600", cwd=tmp_path)
    assert "64 bytes a row" in out
    assert (tmp_path / "gallery/side.safetensors").is_file(), "by which tomorrow's pairs are read"
    out = run(str(EXAMPLES / "upgrade.py"), "--gallery", "gallery", "--pairs", "1500", cwd=tmp_path)
    assert "600 rows mapped" in out
    gallery = tmp_path / "gallery"
    h = fct.Transformation.load(gallery / "h.safetensors")
    old, side, new = (np.load(gallery / f"{name}.npy") for name in ("old", "side", "new"))
    assert h.d_side == 128
    assert new.shape == (600, 48)
    np.testing.assert_allclose(new, fct.transform_batch(old, side, h), rtol=1e-5, atol=1e-5)

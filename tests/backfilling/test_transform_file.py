"""fct transform: one file to one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.feather as feather

import fct
from fct.backfilling.single import transform_file


def test_a_feather_file_is_written_as_feather_reads_it(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((20, 8), dtype=np.float32)
    np.save(tmp_path / "old.npy", rows)
    h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
    assert transform_file(tmp_path / "old.npy", tmp_path / "new.feather", h, old_model="random-old") == 20
    found = np.array(feather.read_table(tmp_path / "new.feather")["vector"].to_pylist(), np.float32)
    assert np.allclose(found, fct.transform_batch(rows, None, h, precision="fp32"), atol=0.05)

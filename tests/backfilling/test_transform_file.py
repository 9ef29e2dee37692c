"""fct transform: one file to one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling.single import transform_file
from fct.gallery import open_source


def test_a_feather_file_is_written_as_feather_reads_it(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((20, 8), dtype=np.float32)
    np.save(tmp_path / "old.npy", rows)
    h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
    assert transform_file(tmp_path / "old.npy", tmp_path / "new.feather", h, old_model="random-old") == 20
    found = np.array(feather.read_table(tmp_path / "new.feather")["vector"].to_pylist(), np.float32)
    assert np.allclose(found, fct.transform_batch(rows, None, h, precision="fp32"), atol=0.05)


def test_a_lance_dataset_is_written_whole_and_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lance = pytest.importorskip("lance")
    rows = np.random.default_rng(0).standard_normal((20, 8), dtype=np.float32)
    table = pa.table({"id": range(20), "old": pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 8)})
    pq.write_table(table, tmp_path / "old.parquet")
    out = tmp_path / "new.lance"
    how: dict[str, Any] = {"old_model": "random-old", "precision": "fp32"}
    for seed in (0, 1):
        h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False, seed=seed)
        assert transform_file(tmp_path / "old.parquet", out, h, overwrite=bool(seed), **how) == 20
        found = lance.dataset(str(out)).to_table()
        assert found["id"].to_pylist() == list(range(20))
        assert np.array_equal(
            np.array(found["old"].to_pylist(), np.float32), fct.transform_batch(rows, None, h, precision="fp32")
        )
        assert open_source(out).space == h.new_space
    with pytest.raises(FileExistsError, match=r"out: .*new\.lance exists; choose another place or pass --overwrite"):
        transform_file(tmp_path / "old.parquet", out, h, **how)
    monkeypatch.setattr("fct.gallery.lance_dataset.LanceDestination.finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        transform_file(tmp_path / "old.parquet", out, h, overwrite=True, **how)
    assert lance.dataset(str(out)).to_table().equals(found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.lance", "old.parquet"]

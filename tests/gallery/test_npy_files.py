"""Every way in which numpy and ClickHouse write a matrix of floats: header versions, order, byte order, width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import load_vectors, open_source


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", ">f2", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_matrix_is_read_as_numpy_reads_it(
    version: tuple[int, int], dtype: str, order: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    values = np.asarray(rng.standard_normal((31, 5)), dtype=dtype, order=order)
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, values, version=version)
    want = values.astype(np.float16 if dtype.endswith("2") else np.float32)
    np.testing.assert_array_equal(load_vectors(tmp_path / "a.npy"), want)
    source = open_source(tmp_path / "a.npy")
    (piece,) = source.pieces()
    batches = list(source.read(piece, 4, 20, 7))
    assert [b.num_rows for b in batches] == [7, 7, 6]
    got = np.concatenate([np.array(b.column(0).to_pylist()) for b in batches])
    np.testing.assert_array_equal(got, values[4:24].astype(got.dtype))


def test_a_fortran_ordered_gallery_of_float64_is_mapped(tmp_path: Path, rng: np.random.Generator) -> None:
    values = np.asfortranarray(rng.standard_normal((300, 16)))
    values[7, 3] = 1e300
    np.save(tmp_path / "a.npy", values)
    h = fct.Transformation.random(16, 16, 8, inner=32, side_info=False)
    notes = fct.plan_backfill(
        tmp_path / "a.npy", tmp_path / "new", h, old_model="random-old", measure_seconds=0.01
    ).notes
    assert notes == ("source: float64 rows are rounded to float32",)
    report = fct.backfill(
        tmp_path / "a.npy", tmp_path / "new", h, old_model="random-old", progress=False, precision="fp32"
    )
    assert (report.rows_out, report.rejects) == (299, 1)
    assert "beyond float32's range" in next((tmp_path / "new/_fct/rejects").iterdir()).read_text()
    want = fct.transform_batch(np.delete(values, 7, 0).astype(np.float32), None, h, precision="fp32")
    np.testing.assert_array_equal(np.load(next((tmp_path / "new").glob("*.npy"))), want)


def test_float64_lists_are_decoded_in_smaller_batches(tmp_path: Path, rng: np.random.Generator) -> None:
    """Beside the vectors or in their place: side-information of float64 is said and decoded like old vectors of it."""
    h = fct.Transformation.random(16, 8, 8, inner=32)
    rows = {}
    for old, side in (("f4", "f4"), ("f8", "f4"), ("f4", "f8")):
        columns = {
            "old": rng.standard_normal((300, 16)).astype(old),
            "side": rng.standard_normal((300, 8)).astype(side),
        }
        where = tmp_path / f"{old}{side}.parquet"
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), where)
        plan = fct.plan_backfill(
            where, tmp_path / "new", h, vector_column="old", side_column="side", old_model="random-old",
            measure_seconds=0.01,
        )  # fmt: skip
        assert plan.job is not None
        assert ("source: float64 rows are rounded to float32" in plan.notes) == ("f8" in (old, side))
        rows[old, side] = plan.job.batch_rows
    assert rows["f8", "f4"] == rows["f4", "f8"] == rows["f4", "f4"] // 4

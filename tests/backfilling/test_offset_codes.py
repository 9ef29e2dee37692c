"""8-bit codes with an offset: a number, one for each dimension, one for each row; sentence-transformers' ranges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import load_vectors, vector_array

D, N = 16, 400
KNOWN: dict[str, Any] = {"old_model": "random-old"}
QUICK: dict[str, Any] = {**KNOWN, "progress": False, "precision": "fp32"}
Array = np.ndarray[Any, Any]


@pytest.fixture
def h() -> fct.Transformation:
    return fct.Transformation.random(D, D, 8, inner=32, side_info=False)


def codes_column(codes: Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])


@pytest.mark.parametrize("dtype", ["i1", "u1"])
@pytest.mark.parametrize("form", ["number", "array", "file", "row"])
def test_codes_are_mapped_as_scaled_int8_is(
    dtype: str, form: str, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    codes = rng.integers(*((0, 256) if dtype == "u1" else (-128, 128)), (N, D)).astype(dtype)
    scale: Any = {"number": 0.03, "row": rng.uniform(0.01, 0.1, N)}.get(form, rng.uniform(0.01, 0.1, D))
    offset: Any = {"number": -1.25, "row": rng.normal(size=N)}.get(form, rng.normal(size=D))
    columns = {"id": pa.array(range(N)), "old": codes_column(codes)}
    given: dict[str, Any] = {"scale": scale, "offset": offset}
    if form == "file":
        np.save(tmp_path / "scale.npy", scale)
        np.save(tmp_path / "offset.npy", offset)
        given = {"scale": str(tmp_path / "scale.npy"), "offset": tmp_path / "offset.npy"}
    if form == "row":
        columns |= {"step": pa.array(scale), "low": pa.array(offset, pa.float32())}
        given = {"scale": "step", "offset": "low"}
    pq.write_table(pa.table(columns), tmp_path / "old.parquet", row_group_size=150)
    report = fct.backfill(tmp_path / "old.parquet", tmp_path / "new", h, **given, **QUICK, batch_rows=64)
    assert (report.rows_out, report.rejects) == (N, 0)
    each = (lambda x: x) if form in ("number", "row") else (lambda x: x.reshape(1, D))
    want = fct.transform_batch(fct.ScaledInt8(codes, each(scale), each(offset)), None, h, precision="fp32")
    np.testing.assert_allclose(
        load_vectors(tmp_path / "new"), want, rtol=1e-5, atol=2e-5
    )  # it folds 128 into the offset
    rows = [np.asarray(x, np.float32).reshape(-1, 1) if form == "row" else np.float32(x) for x in (scale, offset)]
    exact = fct.transform_batch(codes.astype(np.float32) * rows[0] + rows[1], None, h, precision="fp32")
    np.testing.assert_array_equal(load_vectors(tmp_path / "new"), exact)
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "old.parquet").ok
    again = fct.backfill(tmp_path / "old.parquet", tmp_path / "new", h, **given, **QUICK, batch_rows=64)
    assert again.shards_done == 0
    with pytest.raises(fct.BackfillError, match=r"holds another backfill, .*offset"):
        fct.backfill(tmp_path / "old.parquet", tmp_path / "new", h, **{**given, "offset": 7.0}, **QUICK)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_the_ranges_of_sentence_transformers(
    dtype: str, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    values = rng.standard_normal((N, D)).astype(np.float32) + np.linspace(-2, 2, D, dtype=np.float32)
    ranges = np.stack([values.min(axis=0), values.max(axis=0)])
    step = (ranges[1] - ranges[0]) / 255
    counted = (values - ranges[0]) / step  # as quantize_embeddings has it
    codes = (counted if dtype == "uint8" else counted - 128).astype(dtype)
    np.save(tmp_path / "codes.npy", codes)
    np.save(tmp_path / "ranges.npy", ranges)
    given: dict[str, Any] = {"code_ranges": tmp_path / "ranges.npy"}
    fct.backfill(tmp_path / "codes.npy", tmp_path / "new", h, format="npy", **given, **QUICK)
    true = fct.transform_batch(values, None, h, precision="fp32")
    bare = fct.transform_batch(codes.astype(np.float32), None, h, precision="fp32")
    got = load_vectors(tmp_path / "new")
    assert np.linalg.norm(got - true) < 0.03 * np.linalg.norm(true) < np.linalg.norm(bare - true)
    with pytest.raises(ValueError, match="code_ranges: expected it alone"):
        fct.backfill(tmp_path / "codes.npy", tmp_path / "b", h, scale=2.0, **given, **QUICK)
    np.save(tmp_path / "floats.npy", values)
    with pytest.raises(ValueError, match="code_ranges: expected a gallery of int8 or uint8 codes, got fixed_size_list"):
        fct.backfill(tmp_path / "floats.npy", tmp_path / "b", h, **given, **QUICK)


def test_a_row_without_a_scale_is_rejected(h: fct.Transformation, tmp_path: Path, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 256, (6, D)).astype("u1")
    table = {"old": codes_column(codes), "step": pa.array([0.1, None, 0.0, -1.0, np.inf, 0.2])}
    pq.write_table(pa.table(table), tmp_path / "old.parquet")
    report = fct.backfill(tmp_path / "old.parquet", tmp_path / "new", h, scale="step", offset=1, **QUICK)
    assert (report.rows_out, report.rejects) == (2, 4)
    rejects = [
        json.loads(line) for file in (tmp_path / "new/_fct/rejects").iterdir() for line in file.read_text().splitlines()
    ]
    assert [r["row"] for r in rejects] == [1, 2, 3, 4]
    assert rejects[1]["reason"] == "old: scale (step): expected a positive finite number, got 0.0"
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "old.parquet").ok


def test_codes_that_are_taken_as_they_are_are_said(
    h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    np.save(tmp_path / "old.npy", rng.integers(0, 256, (50, D)).astype("u1"))

    def notes(**given: Any) -> str:
        return " ".join(
            fct.plan_backfill(tmp_path / "old.npy", tmp_path / "new", h, measure_seconds=0.01, **KNOWN, **given).notes
        )

    assert "8-bit codes are taken as they are" in notes()
    assert "8-bit" not in notes(offset=-3.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"offset": np.inf}, "offset: expected a finite number"),
        ({"offset": np.zeros(3)}, "offset: expected 16 numbers, one for each dimension, got 3"),
        ({"scale": np.zeros(16)}, "scale: expected positive finite numbers, one for each dimension"),
        ({"scale": "step"}, "scale: expected a number, an .npy file .*or a column of the gallery .*, got 'step'"),
        ({"scale": "name"}, "scale: expected a column of numbers, 'name' is string"),
        ({"scale": "/nowhere/a.npy"}, "scale: expected an .npy file, found none at /nowhere/a.npy"),
        ({"code_ranges": np.zeros((3, D))}, r"code_ranges: expected the lowest .*\(2, d\)"),
        ({"code_ranges": np.zeros((2, D))}, "code_ranges: expected a highest value above the lowest, dimension 0"),
    ],
)
def test_what_no_codes_can_have_is_refused(
    given: dict[str, Any], message: str, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    codes = codes_column(rng.integers(0, 256, (5, D)).astype("u1"))
    pq.write_table(pa.table({"old": codes, "name": ["a"] * 5}), tmp_path / "old.parquet")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fct.plan_backfill(tmp_path / "old.parquet", tmp_path / "new", h, **KNOWN, **given)


def test_an_arrow_mapper_knows_the_offset(h: fct.Transformation, rng: np.random.Generator) -> None:
    codes = rng.integers(-128, 128, (20, D)).astype("i1")
    scale, offset = rng.uniform(0.1, 1, D), rng.normal(size=D)
    batch = pa.record_batch({"old": codes_column(codes)})
    mapper = h.arrow_mapper(vector="old", out="new", scale=scale, offset=offset, precision="fp32")
    values = codes.astype(np.float32) * scale.astype(np.float32) + offset.astype(np.float32)
    want = vector_array(fct.transform_batch(values, None, h, precision="fp32"))
    assert mapper(batch).column("new").equals(want)
    with pytest.raises(ValueError, match="offset: expected a number or 16 of them"):
        h.arrow_mapper(vector="old", offset=np.zeros(3))

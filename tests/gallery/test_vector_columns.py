"""Vectors as people's tools spell them: float64, tensors, views, dictionaries; each read to the bit, bad rows named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import vector_array, vector_block
from fct.gallery.vectors import vector_dim, vector_type

ROWS = [[1.0, 2.0], [3.0, 4.0], None, [5.0, 6.0]]


def packed(rows: list[Any]) -> list[bytes | None]:
    return [None if r is None else np.array(r, "<f4").tobytes() for r in rows]


def halves(rows: list[Any]) -> list[Any]:
    """Each value as the two upper bytes of its float32: bfloat16."""
    return [None if r is None else [np.array(v, "<f4").tobytes()[2:] for v in r] for r in rows]


SPELLINGS = {
    "float64 list": pa.array(ROWS, pa.list_(pa.float64())),
    "float64 large_list": pa.array(ROWS, pa.large_list(pa.float64())),
    "float64 fixed": pa.array(ROWS, pa.list_(pa.float64(), 2)),
    "list_view": pa.array(ROWS, pa.list_view(pa.float32())),
    "large_list_view": pa.array(ROWS, pa.large_list_view(pa.float64())),
    "binary_view": pa.array(packed(ROWS), pa.binary_view()),
    "dictionary": pa.DictionaryArray.from_arrays(
        pa.array([1, 0, None, 2], pa.int8()), pa.array([ROWS[1], ROWS[0], ROWS[3]], pa.list_(pa.float32()))
    ),
    "Array2D": pa.array([None if r is None else [r] for r in ROWS], pa.list_(pa.list_(pa.float32()))),
    "bfloat16": pa.array(halves(ROWS), pa.list_(pa.binary())),
    "bfloat16 fixed": pa.array(halves(ROWS), pa.list_(pa.binary(2))),
    "daft tensor": pa.array(
        [None if r is None else {"data": r, "shape": [2]} for r in ROWS],
        pa.struct([("data", pa.large_list(pa.float32())), ("shape", pa.large_list(pa.uint64()))]),
    ),
    "fixed_shape_tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), (1, 2)), pa.array(ROWS, pa.list_(pa.float32(), 2))
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_block(spelling: str) -> None:
    column = SPELLINGS[spelling]
    assert vector_type(column.type) in ("list", "fixed_size_list", "binary", "tensor")
    assert vector_dim(column) == 2
    for start, want, at in ((0, [[1, 2], [3, 4], [5, 6]], [0, 1, 3]), (1, [[3, 4], [5, 6]], [0, 2])):
        block = vector_block(column[start:], 2)
        assert block.values.dtype == np.float32
        np.testing.assert_array_equal(block.values, want)
        assert block.rows is not None
        assert block.rows.tolist() == at
        assert block.bad == {2 - start: "null"}
    assert vector_block(column[3:], 2).rows is None


def test_float64_is_rounded_once_and_what_float32_cannot_hold_is_rejected(rng: np.random.Generator) -> None:
    values = rng.standard_normal((40_000, 3)) * 10.0 ** rng.integers(-40, 38, (40_000, 3))
    values[5, 1], values[39_999, 2], values[7, 0], values[8, 0] = 1e39, -1e300, np.inf, np.nan
    block = vector_block(pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 3), 3)
    assert block.bad == dict.fromkeys((5, 39_999), "beyond float32's range")
    assert block.rows is not None
    np.testing.assert_array_equal(block.values, np.delete(values, [5, 39_999], axis=0).astype(np.float32))


def test_what_is_more_than_one_vector_is_named() -> None:
    nested = pa.array([[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]], []], pa.list_(pa.list_(pa.float32())))
    assert vector_block(nested, 2).bad == {
        1: "expected one list in a row, got 2", 2: "expected one list in a row, got 0"
    }  # fmt: skip
    kind = pa.struct([("data", pa.list_(pa.float32())), ("shape", pa.list_(pa.uint64()))])
    shaped = pa.array([{"data": [1, 2], "shape": [1, 2]}, {"data": [1, 2, 3, 4], "shape": [2, 2]}], kind)
    assert vector_block(shaped, 2).bad == {1: "expected a tensor that is one vector, got shape (2, 2) of 4 values"}
    assert vector_type(pa.fixed_shape_tensor(pa.float32(), (2, 2))) is None


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("spelling", ["float64 list", "fixed_shape_tensor", "list_view", "Array2D", "daft tensor"])
def test_such_a_gallery_is_mapped(spelling: str, suffix: str, tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((60, 16), dtype=np.float32)
    columns = {
        "float64 list": lambda: pa.array(values.tolist(), pa.list_(pa.float64())),
        "fixed_shape_tensor": lambda: vector_array(values, "tensor"),
        "list_view": lambda: pa.array(values.tolist(), pa.list_view(pa.float32())),
        "Array2D": lambda: pa.array([[v] for v in values.tolist()], pa.list_(pa.list_(pa.float32()))),
        "daft tensor": lambda: pa.array(
            [{"data": v, "shape": [16]} for v in values.tolist()], SPELLINGS["daft tensor"].type
        ),
    }
    (tmp_path / "old").mkdir()
    table, file = pa.table({"id": range(60), "embedding": columns[spelling]()}), tmp_path / f"old/a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
    h = fct.Transformation.random(16, 16, 8, inner=32, side_info=False)
    report = fct.backfill(
        tmp_path / "old", tmp_path / "new", h, old_model="random-old", progress=False, precision="fp32"
    )
    assert (report.rows_out, report.rejects) == (60, 0)
    (new,) = (tmp_path / "new").glob(f"*{suffix}")
    got = pq.read_table(new) if suffix == ".parquet" else pa.ipc.open_file(new).read_all()
    assert got["id"].to_pylist() == list(range(60))
    if spelling == "fixed_shape_tensor":  # Ray and Arrow hand such a column on as one 2-D array
        assert got["embedding"].type == pa.fixed_shape_tensor(pa.float32(), (8,))
    want = fct.transform_batch(values, None, h, precision="fp32")
    np.testing.assert_array_equal(vector_block(got["embedding"].combine_chunks(), 8).values, want)
    assert fct.verify_gallery(tmp_path / "new").ok

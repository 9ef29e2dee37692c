"""One loader for whatever a user names as vectors or labels: what backfill takes is evaluated as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fct.gallery import load_labels, load_vectors, split_column, vector_array

TEXT = ["shoe", "shirt", "bag", "coat", "hat"]


@pytest.fixture
def values(rng: np.random.Generator) -> Any:
    return rng.standard_normal((50, 6), dtype=np.float32)


def write(folder: Path, values: Any, form: str, suffix: str) -> str:
    """The vectors in two files; what a user would type to name them."""
    folder.mkdir()
    for i, part in enumerate((values[:20], values[20:])):
        file = folder / f"part-{i}{suffix}"
        if suffix == ".npy":
            np.save(file, part)
            continue
        kinds = {"list": pa.list_(pa.float32()), "large_list": pa.large_list(pa.float32())}
        column = pa.array(part.tolist(), kinds[form]) if form in kinds else vector_array(part, form)
        table = pa.table({"id": range(len(part)), "my_vec": column})
        if suffix == ".parquet":
            pq.write_table(table, file)
        else:
            with pa.ipc.new_file(file, table.schema) as out:
                out.write_table(table)
    return str(folder) if suffix == ".npy" else f"{folder}:my_vec"


@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        ("", ".npy"), ("list", ".parquet"), ("large_list", ".parquet"), ("fixed_size_list", ".parquet"),
        ("binary", ".parquet"), ("list", ".arrow"), ("fixed_size_list", ".arrow"),
    ],
)  # fmt: skip
def test_a_folder_of_shards_is_one_array(form: str, suffix: str, tmp_path: Path, values: Any) -> None:
    where = write(tmp_path / "g", values, form, suffix)
    np.testing.assert_array_equal(load_vectors(where), values)
    column = where.partition(":")[2]
    np.testing.assert_array_equal(load_vectors(f"{tmp_path}/g/*{suffix}" + (f":{column}" if column else "")), values)
    np.testing.assert_array_equal(load_vectors(tmp_path / "g", column=column or None), values)


def test_one_matrix_on_disk_is_mapped_and_half_stays_half(tmp_path: Path, values: Any) -> None:
    np.save(tmp_path / "a.npy", values.astype(np.float16))
    got = load_vectors(tmp_path / "a.npy")
    assert isinstance(got, np.memmap)
    assert got.dtype == np.float16


@pytest.mark.parametrize(
    "spelling",
    [
        pa.array(TEXT), pa.array(TEXT, pa.large_string()), pa.array(TEXT, pa.string_view()),
        pa.array(TEXT).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int8()), pa.array(TEXT, pa.large_string())),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_every_spelling_of_a_text_label_is_that_label(spelling: pa.Array, suffix: str, tmp_path: Path) -> None:
    table, file = pa.table({"label": spelling}), tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
    assert load_labels(f"{file}:label").tolist() == TEXT


def test_labels_that_are_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([3, 2**63], pa.uint64()), "b": [True, False]}), tmp_path / "a.parquet")
    assert load_labels(f"{tmp_path}/a.parquet:a").tolist() == [3, 2**63]
    assert load_labels(tmp_path / "a.parquet", column="b").tolist() == [1, 0]
    np.save(tmp_path / "y.npy", np.array([5, 6, 5], np.int32))
    assert load_labels(tmp_path / "y.npy").tolist() == [5, 6, 5]
    np.save(tmp_path / "t.npy", np.array(TEXT))
    assert load_labels(tmp_path / "t.npy").tolist() == TEXT


def test_what_cannot_be_meant_is_refused_under_the_options_name(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    rows = pa.array([[1.0, 2], None, [3.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"v": rows, "w": rows, "y": [0.5, 1.0, 2.0], "z": [1, None, 2]}), file)
    with pytest.raises(ValueError, match=r"--queries: row 1 of .*a.parquet is no vector: null \(and 1 more\)"):
        load_vectors(f"{file}:v", name="--queries")
    with pytest.raises(
        ValueError, match="--queries: expected the name of a column, since several could be meant: v, w"
    ):
        load_vectors(file, name="--queries")
    with pytest.raises(ValueError, match=r"--query-labels: expected a column of .* got none; write FILE_OR_F"):
        load_labels(file, name="--query-labels")
    with pytest.raises(ValueError, match="--query-labels: expected integer or string labels, got double in 'y' of"):
        load_labels(f"{file}:y", name="--query-labels")
    with pytest.raises(ValueError, match="--query-labels: expected no missing values, got 1 in 'z'"):
        load_labels(f"{file}:z", name="--query-labels")
    with pytest.raises(FileNotFoundError, match=r"--gallery: expected a gallery, found nothing at .*b.parquet"):
        load_vectors(tmp_path / "b.parquet:v", name="--gallery")


def test_a_name_that_is_there_is_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert split_column(f"{tmp_path}/a:b") == (f"{tmp_path}/a:b", None)
    assert split_column(f"{tmp_path}/c:b") == (f"{tmp_path}/c", "b")
    assert split_column("s3://bucket/g/*.parquet:v") == ("s3://bucket/g/*.parquet", "v")
    assert split_column("s3://bucket/g") == ("s3://bucket/g", None)

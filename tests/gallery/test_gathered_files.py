"""A pattern, a folder or links may gather files that are no rows by themselves: of tables, caches, unfinished work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError, SpaceMismatchError
from fct.gallery import open_source, tag_space, vector_array

N, D = 6, 4


def table(first: int = 0) -> pa.Table:
    return pa.table({"id": np.arange(first, first + N), "embedding": vector_array(np.ones((N, D), np.float32))})


def put(file: Path, first: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".arrow":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table().schema) as writer:
            writer.write_table(table(first))
    else:
        pq.write_table(table(first), file)
    return file


def delta(folder: Path) -> None:
    put(folder / "lang=de/0.parquet")
    (folder / "_delta_log").mkdir()


def iceberg(folder: Path) -> None:
    put(folder / "data/0.parquet")
    (folder / "metadata").mkdir()
    (folder / "metadata/v1.metadata.json").write_text("{}")


def hudi(folder: Path) -> None:
    put(folder / "lang=de/0.parquet")
    (folder / ".hoodie").mkdir()


def paimon(folder: Path) -> None:
    put(folder / "bucket-0/0.parquet")
    for name in ("snapshot", "manifest", "schema"):
        (folder / name).mkdir()
    (folder / "schema/schema-0").write_text("{}")


def saved(folder: Path) -> None:
    put(folder / "data-00000-of-00001.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")


TABLES = {
    "a Delta table": delta, "an Iceberg table": iceberg, "a Hudi table": hudi, "a Paimon table": paimon,
    "a saved dataset": saved,
}  # fmt: skip


@pytest.mark.parametrize("what", TABLES)
def test_a_pattern_that_leads_into_tables_is_refused(tmp_path: Path, what: str) -> None:
    for name in ("a", "b"):
        TABLES[what](tmp_path / "lake" / name)
    ending = "arrow" if what == "a saved dataset" else "parquet"
    for pattern in (f"{tmp_path}/lake/**/*.{ending}", f"{tmp_path}/*/a/**/*.{ending}"):
        with pytest.raises(FctError, match=f"means files of {what}, .*name it itself: .*lake/a"):
            open_source(pattern)


@pytest.mark.parametrize("what", [w for w in TABLES if w != "a saved dataset"])
def test_links_into_a_table_are_refused(tmp_path: Path, what: str) -> None:
    TABLES[what](tmp_path / "t")
    inside = next((tmp_path / "t").rglob("*.parquet"))
    (tmp_path / "folder").symlink_to(inside.parent)
    (tmp_path / "file.parquet").symlink_to(inside)
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.parquet").symlink_to(inside)
    put(tmp_path / "files/b.parquet")
    for name in ("folder", "file.parquet", "files", "f*/*.parquet"):
        with pytest.raises(FctError, match=f"lies in {what}, .*name the table itself: {tmp_path}/t"):
            open_source(tmp_path / name)


def test_links_to_files_that_are_rows_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "x/a.parquet")
    (tmp_path / "g").mkdir()
    (tmp_path / "g/b.parquet").symlink_to(tmp_path / "x/a.parquet")
    assert sum(p.rows for p in open_source(tmp_path / "g").pieces()) == N


def test_what_a_stream_of_spark_counts_by_its_log_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "s/part-0.parquet")
    (tmp_path / "s/_spark_metadata").mkdir()
    (tmp_path / "s/_spark_metadata/0").write_text("v1\n{}")
    with pytest.raises(FctError, match=r"a stream of Spark wrote.* that _spark_metadata names"):
        open_source(tmp_path / "s")
    assert sum(p.rows for p in open_source(f"{tmp_path}/s/*.parquet").pieces()) == N  # its user says that all count


def test_caches_of_datasets_are_no_rows(tmp_path: Path) -> None:
    """The folder that load_dataset keeps: a split's rows, and what map, filter and shuffle left beside them."""
    folder = tmp_path / "cache"
    put(folder / "parquet-train.arrow")
    put(folder / "cache-0123456789abcdef.arrow")
    for where in (folder, f"{folder}/*.arrow"):
        with pytest.raises(FctError, match=r"means cache-0123456789abcdef.arrow too, which datasets left there"):
            open_source(where)
    (folder / "cache-0123456789abcdef.arrow").unlink()
    put(folder / "parquet-test-00000-of-00001.arrow")
    (folder / "dataset_info.json").write_text(json.dumps({"splits": {"train": {}, "test": {}}}))
    with pytest.raises(FctError, match=r"holds the splits train, test, .*such as .*/cache/\*-train\*.arrow"):
        open_source(folder)
    assert sum(p.rows for p in open_source(f"{folder}/*-train*.arrow").pieces()) == N


@pytest.fixture
def new(tmp_path: Path) -> Path:
    put(tmp_path / "old/a.parquet")
    h = fct.Transformation.random(D, D, 2, inner=8, side_info=False)
    fct.backfill(tmp_path / "old", tmp_path / "all/new", h, old_model="random-old", progress=False)
    return tmp_path / "all/new"


def test_files_of_an_unfinished_backfill_are_refused_by_any_name(new: Path) -> None:
    (new / "_fct/manifest.json").unlink()
    for where in (new, f"{new}/*.parquet", new.parent, f"{new.parent}/*/part-*.parquet"):
        with pytest.raises(FctError, match=r"an unfinished backfill"):
            open_source(where)


def test_mapped_and_unmapped_rows_are_not_one_gallery(new: Path) -> None:
    vectors = vector_array(np.ones((N, 2), np.float32))
    pq.write_table(pa.table({"id": np.arange(N), "embedding": vectors}), new / "more.parquet")
    (new / "_fct/space.json").unlink()
    with pytest.raises(SpaceMismatchError, match=r"expected vectors of one space, .*part-00000000.parquet says .* and "
                                                 r".*more.parquet does not say what it holds"):  # fmt: skip
        open_source(new).pieces()


Tagged = Callable[[Path], None]


@pytest.mark.parametrize("where", ["g", "g/**/*.npy"])
@pytest.mark.parametrize("tagged", ["g/a", "g/a/0.npy"])
def test_matrices_of_two_spaces_are_not_one_gallery(tmp_path: Path, where: str, tagged: str) -> None:
    for name in ("a", "b"):
        (tmp_path / "g" / name).mkdir(parents=True)
        np.save(tmp_path / "g" / name / "0.npy", np.ones((N, D), np.float32))
    tag_space(tmp_path / tagged, fct.EmbeddingSpace("new", D))
    with pytest.raises(SpaceMismatchError, match=r"a/0.npy is tagged 'new' .* and .*b/0.npy is not tagged"):
        open_source(tmp_path / where)
    tag_space(tmp_path / tagged.replace("g/a", "g/b"), fct.EmbeddingSpace("other", D))
    with pytest.raises(SpaceMismatchError, match=r"tagged 'new' .* and .*b/0.npy is tagged 'other'"):
        open_source(tmp_path / where)
    tag_space(tmp_path / tagged.replace("g/a", "g/b"), fct.EmbeddingSpace("new", D))
    assert sum(p.rows for p in open_source(tmp_path / where).pieces()) == 2 * N


@pytest.mark.parametrize("name", ["space.json", "_fct/space.json", "a.npy.space.json", "_fct/a.npy.space.json"])
def test_a_tag_that_is_no_file_or_has_no_end_is_refused_at_once(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "a.npy", np.ones((N, D), np.float32))
    tag = tmp_path / name
    tag.parent.mkdir(exist_ok=True)
    where = tmp_path / "a.npy" if "a.npy" in name else tmp_path
    os.mkfifo(tag)
    with pytest.raises(FctError, match=r"expected a file, .*space.json is none \(a pipe or a device\): remove it"):
        _ = open_source(where).space
    tag.unlink()
    with open(tag, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FctError, match=r"expected at most 67,108,864 bytes in .*space.json, it has 1,099,511,627,776"):
        _ = open_source(where).space


@pytest.mark.parametrize("place", ["lang=de", "lang=de/*.parquet", "lang=de/y=7/*.parquet"])
def test_partitions_that_the_gallerys_own_name_ends_with_are_columns_too(tmp_path: Path, place: str) -> None:
    put(tmp_path / "g/lang=de/y=7/a.parquet")
    source = open_source(tmp_path / "g" / place if "*" not in place else f"{tmp_path}/g/{place}".replace("lang=de/*",
                         "lang=de/y=*/*"))  # fmt: skip
    (piece,) = source.pieces()
    batch = next(source.read(piece, 0, N, N))
    assert (batch["lang"].to_pylist(), batch["y"].to_pylist()) == (["de"] * N, [7] * N)

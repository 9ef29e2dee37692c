"""The folder of a finished backfill, opened by the tools that people have: ids, payload and vectors are there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import open_source, tag_space
from tests.ray_here import ray_here

N, D = 50, 8
WORDS = [f"item {i}" for i in range(N)]


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(16, 16, D, inner=32, side_info=False)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    rows = np.random.default_rng(0).standard_normal((N, 16), dtype=np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 16)
    pq.write_table(pa.table({"id": np.arange(N) * 7, "text": WORDS, "embedding": vectors}), folder / "a.parquet", 20)
    return folder


@pytest.fixture(scope="module")
def new(old: Path, h: fct.Transformation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A gallery of several shards in each format of files."""
    root = tmp_path_factory.mktemp("new")
    for form in ("parquet", "arrow"):
        fct.backfill(old, root / form, h, old_model="random-old", format=form, shard_rows=20, progress=False)
    return {form: root / form for form in ("parquet", "arrow")}


@pytest.fixture(scope="module")
def want(old: Path, h: fct.Transformation) -> Any:
    rows = pq.read_table(old)["embedding"].combine_chunks().flatten().to_numpy().reshape(N, 16)
    return fct.transform_batch(rows, None, h, precision="fp32")


def check(columns: dict[str, Any], want: Any) -> None:
    ids = [int(i) for i in columns["id"]]
    order = np.argsort(ids)  # some engines read files at once, in no order
    assert sorted(ids) == [7 * i for i in range(N)]
    assert [columns["text"][i] for i in order] == WORDS
    vectors = np.stack([np.asarray(list(v), np.float32) for v in columns["embedding"]])[order]
    assert np.allclose(vectors, want, atol=0.05)


def pandas(folder: Path) -> dict[str, Any]:
    import pandas

    return {n: c.tolist() for n, c in pandas.read_parquet(folder).items()}


def parquet(folder: Path) -> dict[str, Any]:
    return dict(pq.read_table(folder).to_pydict())


def dataset(folder: Path) -> dict[str, Any]:
    return dict(pads.dataset(folder, format="parquet").to_table().to_pydict())


def duckdb(folder: Path) -> dict[str, Any]:
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql(f"select id, text, embedding from read_parquet('{folder}')").fetchall()
    return dict(zip(("id", "text", "embedding"), zip(*rows, strict=True), strict=True))


def polars(folder: Path) -> dict[str, Any]:
    polars = pytest.importorskip("polars")
    return dict(polars.scan_parquet(folder / "*.parquet").collect().to_dict(as_series=False))


def datasets(folder: Path) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    files, cache = str(folder / "*.parquet"), str(folder.parent / "cache")
    return dict(datasets.load_dataset("parquet", data_files=files, cache_dir=cache)["train"].to_dict())


def dask(folder: Path) -> dict[str, Any]:
    frame = pytest.importorskip("dask.dataframe").read_parquet(folder).compute()
    return {n: c.tolist() for n, c in frame.items()}


def daft(folder: Path) -> dict[str, Any]:
    return dict(pytest.importorskip("daft").read_parquet(str(folder)).to_pydict())


def chdb(folder: Path) -> dict[str, Any]:
    chdb = pytest.importorskip("chdb")
    table = pa.ipc.open_file(chdb.query(f"select * from file('{folder}/*.parquet')", "Arrow").bytes()).read_all()
    found = table.to_pydict()
    return {**found, "text": [t.decode() if isinstance(t, bytes) else t for t in found["text"]]}


@pytest.mark.parametrize("read", [pandas, parquet, dataset, duckdb, polars, datasets, dask, daft, chdb])
def test_a_parquet_gallery_opens_everywhere(read: Any, new: dict[str, Path], want: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(read(new["parquet"]), want)


@pytest.mark.slow
def test_a_parquet_gallery_opens_in_ray(new: dict[str, Path], want: Any) -> None:
    with ray_here(num_cpus=1) as ray:
        rows = ray.data.read_parquet(str(new["parquet"])).take_all()
    check({name: [row[name] for row in rows] for name in rows[0]}, want)


@pytest.mark.slow
def test_a_parquet_gallery_opens_in_spark(new: dict[str, Path], want: Any) -> None:
    sql = pytest.importorskip("pyspark.sql")
    spark = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        rows = [row.asDict() for row in spark.read.parquet(str(new["parquet"])).collect()]
    finally:
        spark.stop()
    check({name: [row[name] for row in rows] for name in rows[0]}, want)


def test_an_arrow_gallery_opens_as_one_dataset(new: dict[str, Path], want: Any) -> None:
    check(pads.dataset(new["arrow"], format="ipc").to_table().to_pydict(), want)


def test_an_arrow_gallery_opens_in_polars_and_datasets(new: dict[str, Path], want: Any) -> None:
    polars = pytest.importorskip("polars")
    check(polars.scan_ipc(new["arrow"] / "*.arrow").collect().to_dict(as_series=False), want)
    datasets = pytest.importorskip("datasets")
    files, cache = str(new["arrow"] / "*.arrow"), str(new["arrow"].parent / "cache")
    check(datasets.load_dataset("arrow", data_files=files, cache_dir=cache)["train"].to_dict(), want)


@pytest.mark.parametrize("form", ["npy", "bin"])
def test_matrices_lie_alone_with_their_rows_aside(form: Any, old: Path, h: fct.Transformation, tmp_path: Path) -> None:
    fct.backfill(old, tmp_path / "new", h, old_model="random-old", format=form, progress=False)
    assert [p.name for p in sorted((tmp_path / "new").iterdir()) if not p.name.startswith("_")] == [
        f"part-00000000.{'npy' if form == 'npy' else 'fbin'}"
    ]
    assert pads.dataset(tmp_path / "new" / "_rows", format="parquet").to_table()["text"].to_pylist() == WORDS


def test_what_is_ours_lies_in_one_folder(new: dict[str, Path]) -> None:
    for form, folder in new.items():
        assert {p.name for p in folder.iterdir() if p.suffix != f".{form}"} == {"_fct"}


def test_galleries_of_version_0_1_stay_readable_and_tagged(tmp_path: Path) -> None:
    """They have space.json, or a file's .space.json, among the data."""
    space = fct.EmbeddingSpace("mobile-1", 8)
    np.save(tmp_path / "a.npy", np.zeros((3, 8), np.float32))
    for tag, gallery in (("a.npy.space.json", "a.npy"), ("space.json", "."), ("space.json", "*.npy")):
        tag_space(tmp_path / "a.npy" if gallery == "a.npy" else tmp_path, space)
        written = tmp_path / "_fct" / tag
        written.rename(tmp_path / tag)
        assert open_source(str(tmp_path / gallery)).space == space
        assert sum(p.rows for p in open_source(str(tmp_path / gallery)).pieces()) == 3
        (tmp_path / tag).unlink()
        assert open_source(str(tmp_path / gallery)).space is None


def test_a_pattern_over_folders_has_the_tag_of_the_folder_around_them(tmp_path: Path) -> None:
    space = fct.EmbeddingSpace("mobile-1", 8)
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x" / "a.npy", np.zeros((3, 8), np.float32))
    tag_space(tmp_path, space)
    assert open_source(str(tmp_path / "*" / "a.npy")).space == space


def test_a_lance_gallery_named_without_suffix_is_a_lancedb_table(
    old: Path, h: fct.Transformation, tmp_path: Path
) -> None:
    lance = pytest.importorskip("lance")
    lancedb = pytest.importorskip("lancedb")
    lance.write_dataset(pq.read_table(old), str(tmp_path / "items.lance"))
    for _ in range(2):  # made, and gone on with
        report = fct.backfill(tmp_path / "items.lance", tmp_path / "db", h, old_model="random-old", progress=False)
    assert report.rows_out == N
    assert fct.verify_gallery(tmp_path / "db").ok
    assert sum(p.rows for p in open_source(tmp_path / "db").pieces()) == N
    table = lancedb.connect(str(tmp_path / "db")).open_table("items")
    assert table.search(np.ones(D, np.float32), vector_column_name="embedding").limit(3).to_arrow()["text"].to_pylist()


def test_a_database_of_several_tables_is_not_guessed_at(old: Path, tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    for name in ("a", "b"):
        lance.write_dataset(pq.read_table(old), str(tmp_path / f"{name}.lance"))
    with pytest.raises(fct.FctError, match=r"holds 2 tables: expected the path of one, such as .*a\.lance"):
        open_source(tmp_path)


@pytest.mark.slow
def test_a_tensor_column_of_ray_comes_back_as_two_dimensional_batches(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((60, 16), dtype=np.float32)
    h = fct.Transformation.random(16, 16, 8, inner=32, side_info=False)
    with ray_here(num_cpus=1) as ray:
        ray.data.from_numpy(values).write_parquet(str(tmp_path / "old"))
        fct.backfill(tmp_path / "old", tmp_path / "new", h, old_model="random-old", progress=False, precision="fp32")
        data = ray.data.read_parquet(str(tmp_path / "new"))
        shapes = data.map_batches(lambda b: {"shape": np.array([[*b["data"].shape, b["data"].dtype.itemsize]])})
        found = {tuple(row["shape"]) for row in shapes.take_all()}
        got = np.concatenate([batch["data"] for batch in data.iter_batches(batch_format="numpy")])
    assert {shape[1:] for shape in found} == {(8, 4)}, found
    np.testing.assert_array_equal(got, fct.transform_batch(values, None, h, precision="fp32"))

"""Which rows are the gallery: identities, partitions, markers, half-written files. In the field's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError
from fct.gallery import open_source, vector_array
from fct.gallery.discovery import natural, partition_columns


def table(start: int, n: int = 20) -> pa.Table:
    values = np.arange(start * 4, (start + n) * 4, dtype=np.float32).reshape(n, 4) / 100
    return pa.table({"id": range(start, start + n), "embedding": vector_array(values)})


def rows(source: Any) -> pa.Table:
    source = open_source(source)
    batches = [b for p in source.pieces() for b in source.read(p, 0, p.rows, 7)]
    return pa.Table.from_batches(batches, schema=source.schema)


def write(file: Path, start: int, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(start), file, **options)


@pytest.mark.parametrize("pattern", ["g/*/part-0.parquet", "g/d?/*.parquet", "g/d[123]/*", "g/**", "g"])
def test_the_same_file_name_in_each_folder(pattern: str, tmp_path: Path) -> None:
    for i in (1, 2, 3):
        write(tmp_path / f"g/d{i}/part-0.parquet", 100 * i)
    source = open_source(str(tmp_path / pattern))
    assert [p.name for p in source.pieces()] == [f"d{i}/part-0.parquet" for i in (1, 2, 3)]
    want = [x for i in (1, 2, 3) for x in range(100 * i, 100 * i + 20)]
    assert rows(source)["id"].to_pylist() == want


def test_two_pieces_of_one_identity_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "g/a.parquet", 0)
    source = open_source(tmp_path / "g")
    source._files *= 2  # type: ignore[attr-defined]  # of this kind of source
    with pytest.raises(FctError, match=r"expected each file once, .*a.parquet, .*a.parquet are all named 'a.parquet'"):
        source.pieces()


@pytest.mark.parametrize(
    "values",
    [
        {"year": ["2024", "2025"], "lang": ["de", "en"]},
        {"label": ["0", "007"]},
        {"label": ["3", "99999999999"]},
        {"tag": ["a%20b%2Fc", "%C3%A4"]},
        {"lang": ["de", "__HIVE_DEFAULT_PARTITION__"]},
        {"day": ["2024-01-01", "x=y"]},
    ],
)
def test_folder_names_are_columns_as_pyarrow_types_them(values: dict[str, list[str]], tmp_path: Path) -> None:
    for i in range(2):
        folder = "/".join(f"{key}={column[i]}" for key, column in values.items())
        write(tmp_path / f"g/{folder}/part-0.parquet", 20 * i)
    want = ds.dataset(tmp_path / "g", partitioning="hive").to_table().sort_by("id")
    got = rows(tmp_path / "g").sort_by("id")
    for key in values:
        assert got.schema.field(key).type == want.schema.field(key).type
        assert got[key].to_pylist() == want[key].to_pylist()
    assert rows(f"{tmp_path}/g/*=*/**").sort_by("id")[key].to_pylist() == want[key].to_pylist()


@pytest.mark.parametrize("key", ["_lang", "lang"])
def test_partitions_come_out_again(key: str, tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / f"g/{key}={i}/part-0.parquet", 20 * i)
    write(tmp_path / "g/_old/0/part-0.parquet", 400)
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    fct.backfill(tmp_path / "g", tmp_path / "new", h, old_model="random-old", progress=False)
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "g").ok
    got = rows(tmp_path / "new")
    assert list(zip(got["id"].to_pylist(), got[key].to_pylist(), strict=True)) == [(i, i // 20) for i in range(40)]
    assert "columns from folder names: " + key in open_source(tmp_path / "g").notes[0]


def partitioned(folder: Path, values: Any, name: str) -> Path:
    """A file in ``folder`` that has a column ``name`` of its own."""
    folder.mkdir(parents=True)
    held = table(0).drop_columns([name]) if name == "id" else table(0)
    pq.write_table(held.append_column(name, values) if name != "embedding" else held, folder / "a.parquet")
    return folder.parent


@pytest.mark.parametrize(
    ("folder", "values", "words"),
    [
        ("embedding=3", None, r"embedding=3, and the files have a column 'embedding' of fixed_size_list.*rename"),
        ("id=3", pa.array(range(20)), r"other values in its column 'id' than the folder .* says \(id=3\)"),
        ("side=x", pa.array([[1.0]] * 20), r"side=x, and the files have a column 'side' of list"),
        ("lang=de", pa.array(["fr"] * 20), r"other values in its column 'lang' than the folder .* says \(lang=de\)"),
        ("lang=de", pa.array([None] * 20, pa.string()), r"other values in its column 'lang'"),
        ("lang=__HIVE_DEFAULT_PARTITION__", pa.array(["fr"] * 20), r"lang=__HIVE_DEFAULT_PARTITION__"),
        ("n=x", pa.array(range(20)), r"n=x, and the files have a column 'n' of int64"),
    ],
)
def test_a_folder_and_a_column_that_disagree(folder: str, values: Any, words: str, tmp_path: Path) -> None:
    source = partitioned(tmp_path / "g" / folder, values, folder.partition("=")[0])
    with pytest.raises(FctError, match=words):
        rows(source)


@pytest.mark.parametrize("entry", ["backfill", "transform", "export", "vectors", "search"])
def test_no_entry_drops_a_partition_that_is_called_like_the_vectors(entry: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fct.cli.app import app

    source = partitioned(tmp_path / "g" / "embedding=3", None, "embedding")
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False).save(tmp_path / "h.safetensors")
    new, model = str(tmp_path / "new"), ["-t", str(h), "--old-model", "random-old"]
    named = {
        "backfill": ["backfill", str(source), new, *model],
        "transform": ["transform", str(source / "embedding=3/a.parquet"), f"{new}.parquet", *model],
        "export": ["export", str(source), new, "--to", "qdrant"],
        "search": ["search", "--queries", str(source), "--gallery", str(source), "--out", f"{new}.parquet"],
    }
    if entry == "vectors":  # fit and evaluate
        with pytest.raises(FctError, match=r"embedding=3"):
            fct.gallery.load_vectors(source)
        return
    result = CliRunner().invoke(app, named[entry])
    assert result.exit_code != 0
    assert "embedding=3" in " ".join((result.output + str(result.exception)).split())
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize(
    ("folder", "values"),
    [
        ("id=3", pa.array([3] * 20)),
        ("label=007", pa.array(["007"] * 20)),
        ("lang=de", pa.array(["de"] * 20).dictionary_encode()),
        ("day=2024-01-01", pa.array([19723] * 20, pa.int32()).cast(pa.date32())),
        ("lang=__HIVE_DEFAULT_PARTITION__", pa.array([None] * 20, pa.string())),
    ],
)
def test_a_folder_that_repeats_a_column_is_that_column(folder: str, values: Any, tmp_path: Path) -> None:
    name = folder.partition("=")[0]
    source = partitioned(tmp_path / "g" / folder, values, name)
    assert rows(source)[name].to_pylist() == values.to_pylist()
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    fct.backfill(source, tmp_path / "new", h, old_model="random-old", progress=False)
    assert fct.verify_gallery(tmp_path / "new", source=source, progress=False).proven


@pytest.mark.parametrize(
    "folder",
    ["_temporary/0/_temporary/attempt_1", ".spark-staging-1f/lang=de", ".hive-staging_hive_1", "__magic_job-1"],
)
def test_a_write_that_has_not_ended_is_refused(folder: str, tmp_path: Path) -> None:
    write(tmp_path / "g/part-0.parquet", 0)
    write(tmp_path / "g" / folder / "part-1.parquet", 20)
    with pytest.raises(FctError, match=r"a job of Spark, Hadoop or Hive that has not ended: .*part-1.parquet; wait"):
        open_source(tmp_path / "g")


def test_a_folder_of_spark_without_success_is_said(tmp_path: Path) -> None:
    write(tmp_path / "g/lang=de/part-00000-0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f-c000.snappy.parquet", 0)
    for place in (tmp_path / "g", tmp_path / "g/lang=de"):
        assert "has no _SUCCESS, which Spark writes last" in open_source(place).notes[0]
    (tmp_path / "g/_SUCCESS").touch()
    for place in (tmp_path / "g", tmp_path / "g/lang=de"):
        assert not [note for note in open_source(place).notes if "_SUCCESS" in note]


def test_json_beside_the_rows_is_named_unless_it_is_known(tmp_path: Path) -> None:
    write(tmp_path / "g/a.parquet", 0)
    for known in ("space.json", "a.parquet.space.json", "dataset_info.json"):
        (tmp_path / "g" / known).write_text('{"model_id": "m", "dim": 4}')
    assert len(open_source(tmp_path / "g").pieces()) == 1
    (tmp_path / "g/more.json").write_text('{"id": 3, "embedding": [1, 2, 3, 4]}')
    with pytest.raises(FctError, match=r"got \.json, \.parquet: .*more.json is no parquet data; move it elsewhere"):
        open_source(tmp_path / "g")
    (tmp_path / "g/a.parquet").unlink()
    with pytest.raises(FctError, match=r"write it once as Parquet, in DuckDB: COPY .*read_json"):
        open_source(tmp_path / "g")


def test_a_column_that_is_in_the_file_too_stays(tmp_path: Path) -> None:
    (tmp_path / "g/label=1").mkdir(parents=True)
    pq.write_table(table(0).append_column("label", pa.array([1] * 20)), tmp_path / "g/label=1/a.parquet")
    assert rows(tmp_path / "g").schema.field("label").type == pa.int64()


def test_bare_matrices_have_partitions_as_well(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"g/lang={'de' if i else 'en'}").mkdir(parents=True)
        np.save(tmp_path / f"g/lang={'de' if i else 'en'}/emb.npy", np.full((3, 4), i, np.float32))
    assert rows(tmp_path / "g")["lang"].to_pylist() == ["de"] * 3 + ["en"] * 3


def test_digits_are_what_int_reads() -> None:
    assert sorted(["10²5.parquet", "9.parquet", "a2", "a10", "٣.parquet"], key=natural)[0] == "٣.parquet"
    assert sorted(["a10", "a2", "a²"], key=natural) == ["a2", "a10", "a²"]


def test_empty_objects_that_stand_for_folders_are_no_data(tmp_path: Path) -> None:
    from fct.gallery.location import Location, _without_markers

    infos = {
        "b/g": {"size": 0}, "b/g/": {"size": 0}, "b/g/a=1": {"size": 0}, "b/g/a=1/": {"size": 0},
        "b/g/a_$folder$": {"size": 0}, "b/g/a=1/p.parquet": {"size": 9}, "b/g/half.parquet": {"size": 0},
    }  # fmt: skip
    assert _without_markers(infos, "b/g") == ["b/g/a=1/p.parquet", "b/g/half.parquet"]
    fs = fsspec.filesystem("memory")
    fs.pipe({"/marked/g/a.bin": b"x", "/marked/g/b/c.bin": b"y"})
    assert sorted(f.path for f in Location(fs, "/marked/g").find()) == ["/marked/g/a.bin", "/marked/g/b/c.bin"]


def test_half_written_files_are_all_named(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"g/{name}.parquet", 0)
    for name in "ac":
        file = tmp_path / f"g/{name}.parquet"
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(FctError, match=r"expected a whole Parquet file, .*a\.parquet is not.*g/c\.parquet is not"):
        open_source(tmp_path / "g").pieces()


def test_partition_values_of_files_above_are_null() -> None:
    schema, values = partition_columns(["a.parquet", "lang=de/b.parquet"])
    assert schema == pa.schema({"lang": pa.string()})
    assert values == [{"lang": None}, {"lang": "de"}]

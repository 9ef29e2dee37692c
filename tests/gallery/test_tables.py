"""A table is what its log says, a saved dataset what its state says; never the files that lie there."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError
from fct.gallery import open_source
from fct.gallery.tables import split_version

deltalake = pytest.importorskip("deltalake")


def table(ids: Any) -> pa.Table:
    ids = list(ids)
    vectors = [[float(i), 1.0, 2.0, 3.0] for i in ids]
    column = pa.array(vectors, pa.list_(pa.float32()))
    return pa.table({"id": ids, "embedding": column, "lang": [["de", "en", "fr"][i % 3] for i in ids]})


def rows(where: Any, batch_rows: int = 7, step: int = 11) -> pa.Table:
    """Read in shards, as a backfill reads."""
    source = open_source(where)
    batches = []
    for piece in source.pieces():
        for start in range(0, piece.rows, step):
            some = list(source.read(piece, start, min(step, piece.rows - start), batch_rows))
            assert sum(b.num_rows for b in some) == min(step, piece.rows - start)
            batches += some
    return pa.Table.from_batches(batches, schema=source.schema)


# ---- Delta ----


def test_delta_after_delete_overwrite_and_compaction(tmp_path: Path) -> None:
    where = str(tmp_path / "t")
    deltalake.write_deltalake(where, table(range(40)))
    deltalake.write_deltalake(where, table(range(40, 60)), mode="append")
    deltalake.DeltaTable(where).delete("id < 10")
    deltalake.DeltaTable(where).optimize.compact()
    assert sorted(rows(where)["id"].to_pylist()) == list(range(10, 60))
    assert sorted(rows(f"{where}?version=0")["id"].to_pylist()) == list(range(40))
    source = open_source(where)
    assert source.url == f"{where}?version=3"
    assert source.notes[0] == "source: a Delta table, read at version 3"
    deltalake.write_deltalake(where, table(range(5)), mode="overwrite")
    source.refresh()
    assert sum(p.rows for p in source.pieces()) == 50  # the version that was pinned
    with pytest.raises(FctError, match=r"the Delta table .* at version 99 cannot be read"):
        open_source(f"{where}?version=99")


def test_delta_partitions_and_evolution(tmp_path: Path) -> None:
    where = str(tmp_path / "t")
    odd = table(range(6)).set_column(2, "lang", pa.array(["a b", "x/y", "%", None, "ä", "de"]))
    deltalake.write_deltalake(where, odd, partition_by=["lang"])
    more = table([6]).append_column("more", pa.array([5]))
    deltalake.write_deltalake(where, more, mode="append", schema_mode="merge", partition_by=["lang"])
    got = rows(where).sort_by("id")
    assert got.column_names == ["id", "embedding", "lang", "more"]
    assert got["lang"].to_pylist() == ["a b", "x/y", "%", None, "ä", "de", "de"]
    assert got["more"].to_pylist() == [None] * 6 + [5]
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    deltalake.DeltaTable(where).delete(
        "id = 0"
    )  # its file stays in the folder; the version that is read has no such row
    got = got.slice(1)
    fct.backfill(where, tmp_path / "new", h, old_model="random-old", progress=False)
    assert rows(tmp_path / "new").sort_by("id")["lang"].to_pylist() == got["lang"].to_pylist()
    assert fct.verify_gallery(tmp_path / "new", source=where).ok


def write_log(root: Path, *versions: list[dict[str, Any]]) -> None:
    (root / "_delta_log").mkdir(parents=True)
    for number, actions in enumerate(versions):
        text = "".join(json.dumps(a) + "\n" for a in actions)
        (root / f"_delta_log/{number:020d}.json").write_text(text)


def field(name: str, kind: Any, stored: str = "") -> dict[str, Any]:
    more = {"delta.columnMapping.id": len(name), "delta.columnMapping.physicalName": stored} if stored else {}
    return {"name": name, "type": kind, "nullable": True, "metadata": more}


FLOATS = {"type": "array", "elementType": "float", "containsNull": True}


def metadata(fields: list[dict[str, Any]], **configuration: str) -> dict[str, Any]:
    return {"metaData": {"id": "0", "format": {"provider": "parquet", "options": {}}, "partitionColumns": [],
                         "schemaString": json.dumps({"type": "struct", "fields": fields}),
                         "configuration": configuration}}  # fmt: skip


def add(root: Path, made: pa.Table, name: str = "a.parquet", **more: Any) -> dict[str, Any]:
    (root / name).parent.mkdir(exist_ok=True)
    pq.write_table(made, root / name, row_group_size=30)
    size = (root / name).stat().st_size
    return {"add": {"path": name, "partitionValues": {}, "size": size, "modificationTime": 0,
                    "dataChange": True, "stats": json.dumps({"numRecords": made.num_rows}), **more}}  # fmt: skip


def deletion_vector(gone: list[int]) -> dict[str, Any]:
    bitmaps = pytest.importorskip("pyroaring")
    data = struct.pack("<i", 1681511377) + bitmaps.BitMap64(gone).serialize()
    data += bytes(-len(data) % 4)
    z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
    b85 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
    text = base64.b85encode(data).decode().translate(str.maketrans(b85, z85))
    return {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": len(data), "cardinality": len(gone)}


def test_a_deletion_vector_goes_to_its_own_file(tmp_path: Path) -> None:
    """Of files of which one's path ends with the other's, as partitions have them."""
    names = ["deletionVectors"]
    features = {"readerFeatures": names, "writerFeatures": names}
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}}
    (tmp_path / "t").mkdir()
    actions = [protocol, metadata([field("id", "long"), field("embedding", FLOATS), field("lang", "string")])]
    gone = {"b.parquet": [1], "t/b.parquet": [12, 13], "x/b.parquet": [25]}
    for number, (name, rows_) in enumerate(gone.items()):
        vector = deletion_vector([row - 10 * number for row in rows_])
        actions.append(add(tmp_path / "t", table(range(10 * number, 10 * number + 10)), name, deletionVector=vector))
    write_log(tmp_path / "t", actions)
    left = [i for i in range(30) if i not in (1, 12, 13, 25)]
    assert sorted(rows(tmp_path / "t")["id"].to_pylist()) == left


def test_delta_deletion_vectors_are_respected(tmp_path: Path) -> None:
    gone = [0, 1, 29, 30, 55, 99]
    vector = deletion_vector(gone)
    names = ["deletionVectors"]
    features = {"readerFeatures": names, "writerFeatures": names}
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}}
    (tmp_path / "t").mkdir()
    actions = [protocol, metadata([field("id", "long"), field("embedding", FLOATS), field("lang", "string")])]
    write_log(tmp_path / "t", [*actions, add(tmp_path / "t", table(range(100)), deletionVector=vector)])
    assert rows(tmp_path / "t")["id"].to_pylist() == [i for i in range(100) if i not in gone]
    (piece,) = open_source(tmp_path / "t").pieces()
    assert (piece.rows, piece.groups) == (94, (27, 28, 30, 9))


def test_delta_column_mapping(tmp_path: Path) -> None:
    protocol = {"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}}
    fields = [field("id", "long", "col-1"), field("embedding", FLOATS, "col-2")]
    (tmp_path / "t").mkdir()
    stored = table(range(20)).rename_columns(["col-1", "col-2", "col-dropped"])
    actions = [protocol, metadata(fields, **{"delta.columnMapping.mode": "name"}), add(tmp_path / "t", stored)]
    write_log(tmp_path / "t", actions)
    got = rows(tmp_path / "t")
    assert got.column_names == ["id", "embedding"]
    assert got["id"].to_pylist() == list(range(20))


@pytest.mark.parametrize(
    "path", ["../a.parquet", "/etc/a.parquet", "s3://elsewhere/a.parquet", "x/..%2F..%2Fa.parquet"]
)
def test_delta_files_outside_the_table_are_not_opened(path: str, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    action = add(tmp_path / "t", table(range(3)))
    action["add"]["path"] = path
    protocol = {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}}
    write_log(tmp_path / "t", [protocol, metadata([field("id", "long"), field("embedding", FLOATS)]), action])
    with pytest.raises(FctError, match="names a file outside it, which is not opened"):
        open_source(tmp_path / "t")


# ---- tables from inside, from above, unread ----


@pytest.mark.parametrize("inside", ["lang=de", "lang=de/*.parquet", "*/*.parquet", "lang=de/FILE"])
def test_a_part_of_a_table_is_refused_by_its_name(inside: str, tmp_path: Path) -> None:
    where = tmp_path / "t"
    deltalake.write_deltalake(str(where), table(range(6)), partition_by=["lang"])
    file = next((where / "lang=de").glob("*.parquet")).name
    with pytest.raises(FctError, match=rf"a Delta table.* name the table itself: {where}"):
        open_source(str(where / inside.replace("FILE", file)))


def test_a_folder_of_tables_is_refused(tmp_path: Path) -> None:
    deltalake.write_deltalake(str(tmp_path / "g/t"), table(range(6)))
    with pytest.raises(FctError, match=rf"holds a table or a saved dataset, .* name the table itself: {tmp_path}/g/t"):
        open_source(tmp_path / "g")


def test_hudi_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "t/.hoodie").mkdir(parents=True)
    (tmp_path / "t/data").mkdir()
    pq.write_table(table(range(3)), tmp_path / "t/data/a.parquet")
    with pytest.raises(FctError, match="is a Hudi table, whose rows are not those of its files"):
        open_source(tmp_path / "t")
    with pytest.raises(FctError, match="lies in a Hudi table"):
        open_source(tmp_path / "t/data")


@pytest.mark.parametrize(
    ("module", "mark"), [("deltalake", "_delta_log/0.json"), ("pyiceberg", "metadata/v1.metadata.json")]
)
def test_a_table_without_its_library_is_refused_by_its_name(
    module: str, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / mark).parent.mkdir(parents=True)
    (tmp_path / mark).write_text("{}")
    pq.write_table(table(range(3)), tmp_path / "a.parquet")
    with pytest.raises((FctError, ImportError), match=rf"{module[:5]}.*"):
        open_source(tmp_path)


def test_versions_are_of_tables() -> None:
    assert split_version("/a?version=3") == ("/a", 3)
    assert split_version("/a?versions=3") == ("/a?versions=3", None)


# ---- Iceberg ----


def iceberg(tmp_path: Path) -> Any:
    sql = pytest.importorskip("pyiceberg.catalog.sql", exc_type=ImportError)
    catalog = sql.SqlCatalog("c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}/w")
    catalog.create_namespace("n")
    return catalog.create_table("n.t", schema=table(range(1)).schema)


def test_iceberg_after_delete_and_overwrite(tmp_path: Path) -> None:
    made = iceberg(tmp_path)
    made.append(table(range(40)))
    first = made.metadata.current_snapshot_id
    made.append(table(range(40, 60)))
    made.delete("id < 10")
    where = made.location().removeprefix("file://")
    assert sorted(rows(where)["id"].to_pylist()) == list(range(10, 60))
    assert rows(f"{where}?version={first}")["id"].to_pylist() == list(range(40))
    assert open_source(where).url == f"{where}?version={made.metadata.current_snapshot_id}"
    assert rows(made.metadata_location.removeprefix("file://")).num_rows == 50
    with pytest.raises(FctError, match=r"lies in an Iceberg table.* name the table itself"):
        open_source(f"{where}/data")
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    report = fct.backfill(where, tmp_path / "new", h, old_model="random-old", progress=False)
    assert report.rows_out == 50


def test_an_iceberg_table_that_was_moved_is_refused(tmp_path: Path) -> None:
    made = iceberg(tmp_path)
    made.append(table(range(4)))
    where = Path(made.location().removeprefix("file://"))
    where.rename(tmp_path / "moved")
    with pytest.raises(
        FctError, match=r"names a file outside it, which is not opened: .*was the table moved or copied"
    ):
        open_source(tmp_path / "moved").pieces()


# ---- datasets ----


def test_a_saved_dataset_is_what_load_from_disk_reads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    where = str(tmp_path / "d")
    datasets.Dataset.from_dict(table(range(30)).to_pydict()).save_to_disk(where, num_shards=3)
    loaded = datasets.load_from_disk(where)
    loaded.map(lambda r: {"id": r["id"] + 1000})
    loaded.shuffle(seed=1).filter(lambda r: r["id"] % 2 == 0)
    assert list(tmp_path.glob("d/cache-*"))
    assert rows(where)["id"].to_pylist() == list(range(30))
    assert rows(f"{where}/data-*.arrow")["id"].to_pylist() == list(range(30))
    with pytest.raises(FctError, match=r"means cache-\w+.arrow.*, which the saved dataset"):
        open_source(f"{where}/*.arrow")
    with pytest.raises(FctError, match="holds a table or a saved dataset"):
        open_source(tmp_path)


def test_the_splits_of_a_dataset_dict_are_never_merged(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict(table(range(4)).to_pydict())
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(
        FctError, match=r"holds a DatasetDict; name one of its splits \(train, test\), such as .*/train"
    ):
        open_source(tmp_path / "d")
    assert rows(tmp_path / "d/test").num_rows == 4


def test_an_indices_mapping_is_followed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(table(range(30)).to_pydict()).save_to_disk(str(tmp_path / "d"))
    order = np.random.default_rng(0).permutation(30)[:20]
    indices = pa.table({"indices": pa.array(order, pa.uint64())})
    with pa.ipc.new_stream(tmp_path / "d/indices.arrow", indices.schema) as out:
        out.write_table(indices)
    state = json.loads((tmp_path / "d/state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "d/state.json").write_text(json.dumps(state))
    assert rows(tmp_path / "d")["id"].to_pylist() == order.tolist()


@pytest.mark.parametrize("name", ["../a.arrow", "/a.arrow", "", None])
def test_a_state_leads_nowhere_else(name: Any, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(FctError, match="expected names of"):
        open_source(tmp_path)


def test_what_load_from_disk_gave_it_opens_again(tmp_path: Path, rng: np.random.Generator) -> None:
    datasets = pytest.importorskip("datasets")
    old = rng.standard_normal((50, 4), dtype=np.float32)
    vectors = datasets.List(datasets.Value("float32"), length=4)
    features = {"id": datasets.Value("string"), "embedding": vectors, "label": datasets.ClassLabel(names=["a", "b"])}
    whole = datasets.Dataset.from_dict(
        {"id": [f"i{i}" for i in range(50)], "embedding": old.tolist(), "label": [i % 2 for i in range(50)]},
        features=datasets.Features(features),
    )
    whole.save_to_disk(str(tmp_path / "g"), num_shards=2)
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    how: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 10, "precision": "fp32"}
    fct.backfill(tmp_path / "g", tmp_path / "new", h, **how)
    got = datasets.load_from_disk(str(tmp_path / "new"))
    assert got["id"][:] == whole["id"][:]
    assert got.features["label"] == whole.features["label"]
    assert (got.features["embedding"].length, got.features["embedding"].feature.dtype) == (2, "float32")
    np.testing.assert_array_equal(
        np.array(got["embedding"][:], np.float32), fct.transform_batch(old, None, h, precision="fp32")
    )
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "g").ok
    (tmp_path / "new/_fct/done/00000002.json").unlink()
    assert fct.backfill(tmp_path / "g", tmp_path / "new", h, **how).shards_done == 1  # and goes on
    assert len(datasets.load_from_disk(str(tmp_path / "new"))) == 50
    fct.backfill(tmp_path / "g", tmp_path / "plain", h, format="parquet", **how)
    assert not (tmp_path / "plain/state.json").exists()


def test_a_rerun_goes_on_at_the_version_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fct.gallery.parquet_files import ParquetDestination

    where, new = str(tmp_path / "t"), tmp_path / "new"
    deltalake.write_deltalake(where, table(range(40)))
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    write = ParquetDestination.write

    def breaks(self: Any, shard: Any, *rest: Any) -> Any:
        if shard.number == 3:
            raise OSError(5, "Input/output error")
        return write(self, shard, *rest)

    how: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 10}
    monkeypatch.setattr(ParquetDestination, "write", breaks)
    with pytest.raises(FctError, match="Input/output error"):
        fct.backfill(where, new, h, **how)
    monkeypatch.setattr(ParquetDestination, "write", write)
    deltalake.write_deltalake(where, table(range(40, 60)), mode="append")
    report = fct.backfill(f"{where}/", new, h, **how)
    assert (report.rows_out, report.shards_done) == (40, 4 - report.shards_kept)
    assert f"{where}?version=1 is there, this backfill was begun with {where}?version=0 and goes on" in caplog.text
    assert rows(new)["id"].to_pylist() == list(range(40))
    assert fct.verify_gallery(new, source=where).ok  # held against the same version
    deltalake.DeltaTable(where).delete("id < 5")
    assert fct.backfill(where, new, h, **how).rows_out == 40
    with pytest.raises(FctError, match="holds another backfill"):
        fct.backfill(f"{where}?version=1", new, h, **how)  # whoever names a version means it


def test_what_was_appended_to_a_table_is_mapped_by_follow(tmp_path: Path) -> None:
    where, new = str(tmp_path / "t"), tmp_path / "new"
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    for ids in (range(40), range(40, 60)):
        deltalake.write_deltalake(where, table(ids), mode="append")
        fct.backfill(where, new, h, old_model="random-old", progress=False, follow=True)
    assert sorted(rows(new)["id"].to_pylist()) == list(range(60))
    assert fct.verify_gallery(new, source=where).ok

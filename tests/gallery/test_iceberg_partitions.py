"""Appends to partitioned Iceberg tables: every file of one partition, by every transform, one commit, verified."""

from __future__ import annotations

import datetime
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling import run
from fct.errors import FctError
from fct.gallery import iceberg_partitions
from fct.gallery.committed_files import CommittedFiles
from fct.gallery.iceberg_destination import IcebergDestination
from fct.gallery.iceberg_partitions import in_order
from fct.gallery.iceberg_table import IcebergSource
from tests.gallery.new_tables import COLUMNS, D_NEW, D_OLD, QUICK, ROWS, Iceberg, Killed, dies, gallery, plain, same

transforms = pytest.importorskip("pyiceberg.transforms")


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=16, side_info=False)


_DRAW = random.Random(3)
MORE = {
    "lang": pa.array([_DRAW.choice(["de", "en", None, "a/b=c", ""]) for _ in range(ROWS)]),
    "when": pa.array([None if i % 50 == 7 else datetime.datetime(1969, 12, 30) + datetime.timedelta(hours=i * 7 % 90)
                      for i in range(ROWS)], pa.timestamp("us")),
    "size": pa.array([_DRAW.randrange(-30, 30) for _ in range(ROWS)], pa.int16()),
    "nested": pa.array([None if i % 9 == 0 else {"kind": f"k{i % 3}"} for i in range(ROWS)]),
}  # fmt: skip
FIELDS = {"lang": pa.string(), "when": pa.timestamp("us"), "size": pa.int32()}
SCHEMA = COLUMNS
for _name, _kind in FIELDS.items():
    SCHEMA = SCHEMA.append(pa.field(_name, _kind))
SCHEMA = SCHEMA.append(pa.field("nested", pa.struct([("kind", pa.string())])))


def partitioned(new: Iceberg, *fields: tuple[str, Any], schema: pa.Schema = SCHEMA) -> Any:
    catalog = new.catalog()
    catalog.create_namespace_if_not_exists("shop")
    table = catalog.create_table("shop.items", schema=schema)
    with table.update_spec() as spec:
        for number, (column, transform) in enumerate(fields):
            spec.add_field(column, transform, f"p{number}")
    return new.table()


def values_of(table: Any, rows: pa.Table) -> set[tuple[Any, ...]]:
    """The partitions of some rows, row by row in Python, as the format's specification defines them."""
    found = set()
    for row in rows.to_pylist():
        key = []
        for field in table.spec().fields:
            name = table.schema().find_column_name(field.source_id)
            value = row["nested"] and row["nested"]["kind"] if name == "nested.kind" else row[name]
            if isinstance(value, datetime.datetime):
                value = (value - datetime.datetime(1970, 1, 1)) // datetime.timedelta(microseconds=1)
            key.append(field.transform.transform(table.schema().find_field(field.source_id).field_type)(value))
        found.add(tuple(key))
    return found


def require_partitions(new: Iceberg) -> None:
    """Every data file holds the rows of the one partition that its manifest names."""
    table = new.table()
    for task in table.scan().plan_files():
        rows = pq.ParquetFile(task.file.file_path.removeprefix("file://")).read()
        assert values_of(table, rows) == {tuple(task.file.partition[i] for i in range(len(task.file.partition)))}


SPECS: dict[str, list[tuple[str, Any]]] = {
    "identity": [("lang", transforms.IdentityTransform())],
    "bucket": [("id", transforms.BucketTransform(4))],
    "day": [("when", transforms.DayTransform())],
    "two of one column": [("when", transforms.MonthTransform()), ("when", transforms.BucketTransform(2))],
    "truncate and identity": [("title", transforms.TruncateTransform(6)), ("size", transforms.TruncateTransform(20))],
    "inside a struct": [("nested.kind", transforms.IdentityTransform())],
    "void": [("lang", transforms.VoidTransform())],
}


@pytest.mark.parametrize("spec", SPECS)
def test_rows_go_into_the_files_of_their_partitions(h: Any, tmp_path: Path, spec: str) -> None:
    new, source = Iceberg(tmp_path), gallery(tmp_path / "old", **MORE)
    partitioned(new, *SPECS[spec])
    fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert new.commits() == 1
    require_partitions(new)
    same(new.rows(), plain(source, h))
    checked = fct.verify_gallery(new.to, source=source, progress=False, deep=True, **new.how)
    assert checked.proven, checked
    assert (checked.compared, checked.spot_checked) == (ROWS - 2, ROWS - 2)


def test_a_scan_that_asks_for_one_partition_reads_its_files_alone(h: Any, tmp_path: Path) -> None:
    new, source = Iceberg(tmp_path), gallery(tmp_path / "old", **MORE)
    partitioned(new, *SPECS["identity"])
    fct.backfill(source, new.to, h, **QUICK, **new.how)
    scan = new.table().scan(row_filter="lang = 'de'")
    assert 0 < len(list(scan.plan_files())) < len(new.files()) / 2
    assert sorted(scan.to_arrow()["id"].to_pylist()) == sorted(
        r["id"] for r in pq.read_table(source).to_pylist() if r["lang"] == "de" and r["id"] not in (3, 555)
    )


@pytest.mark.parametrize("step", ["shard", "before", "after"])
def test_killed_anywhere_it_ends_with_one_commit(h: Any, tmp_path: Path, step: str) -> None:
    new, source = Iceberg(tmp_path), gallery(tmp_path / "old", **MORE)
    partitioned(new, *SPECS["identity"])
    place, name = (CommittedFiles, "as_stored") if step == "shard" else (IcebergDestination, "_append")
    real, calls = getattr(place, name), []

    def fourth(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, fourth if step == "shard" else dies(step, real))
        with pytest.raises(Killed):
            fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert new.empty() == (step != "after")
    fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert new.commits() == 1
    same(new.rows(), plain(source, h))
    assert fct.verify_gallery(new.to, source=source, progress=False, **new.how).proven
    stored = {str(p) for p in (new.where / "data").glob("*.parquet")}
    assert stored == set(new.files())


def test_what_came_later_and_rows_of_another_backfill_are_commits_of_their_own(h: Any, tmp_path: Path) -> None:
    new, source = Iceberg(tmp_path), gallery(tmp_path / "old", **MORE)
    partitioned(new, *SPECS["bucket"])
    fct.backfill(source, new.to, h, **QUICK, **new.how)
    few = {name: column[:300] for name, column in MORE.items()}
    gallery(source, 300, first=ROWS, **few)
    for _ in range(2):
        fct.backfill(source, new.to, h, **QUICK, **new.how, follow=True)
        assert new.commits() == 2
    same(new.rows(), plain(source, h))
    other = gallery(tmp_path / "other", 300, first=5000, **few)
    fct.backfill(other, new.to, h, **QUICK, **new.how, journal=tmp_path / "j")
    with pytest.raises(FctError, match="holds these very rows already, appended by another run"):
        fct.backfill(other, new.to, h, **QUICK, **new.how, journal=tmp_path / "lost")
    assert new.commits() == 3
    for gone, journal in ((source, None), (other, tmp_path / "j")):
        assert fct.verify_gallery(new.to, source=gone, progress=False, journal=journal, **new.how).proven


def test_a_reader_that_puts_rows_in_another_order_is_found(h: Any, tmp_path: Path) -> None:
    new, source = Iceberg(tmp_path), gallery(tmp_path / "old", **MORE)
    partitioned(new, *SPECS["identity"])
    fct.backfill(source, new.to, h, **QUICK, **new.how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iceberg_partitions, "_BLOCK", 7)  # blocks of a batch make no difference
        assert fct.verify_gallery(new.to, source=source, progress=False, **new.how).proven
        real = IcebergSource.put_in_order
        patch.setattr(
            IcebergSource, "put_in_order", lambda self, piece, read, rows: (
                batch for name in self.files_of(piece) for batch in real(self, name, read, rows)
            ) if piece in self._shards and self._shards.pop(piece) else real(self, piece, read, rows)
        )  # fmt: skip
        assert "differs from the source's" in fct.verify_gallery(new.to, source=source, **new.how).problems[0]


def test_the_rows_of_a_shard_are_each_there_once() -> None:
    batch = pa.record_batch({"x": [1, 2]})
    with pytest.raises(FctError, match="do not hold its rows 0 to 3 once each"):
        list(in_order([iter([batch]), iter([batch])], [np.array([0, 1]), np.array([1, 2])]))
    with pytest.raises(FctError, match="a file of a partitioned table ended 1 rows early"):
        list(in_order([iter([batch])], [np.array([0, 1, 2])]))
    (found,) = in_order([iter([batch]), iter([batch])], [np.array([1, 2]), np.array([0, 3])])
    assert found["x"].to_pylist() == [1, 1, 2, 2]


@pytest.mark.parametrize("said", [None, b"", b"!", b"eJwDAAAAAAE=", b"eJxjYGBgYGJiYGBkAAADGAAP"])
def test_a_file_that_does_not_say_its_rows_is_refused(h: Any, tmp_path: Path, said: bytes | None) -> None:
    place = tmp_path / "a.parquet"
    table = pa.table({"x": [1, 2, 3]})
    pq.write_table(table if said is None else table.replace_schema_metadata({"fct.rows": said}), place)
    with pytest.raises(FctError, match=r"a.parquet (does not say which rows|has 3 rows and says which)"):
        iceberg_partitions.rows_of_shard(fct.gallery.location_of(place), 3)


def test_shards_of_too_many_partitions_are_refused(h: Any, tmp_path: Path) -> None:
    new, source = Iceberg(tmp_path), gallery(tmp_path / "old", **MORE)
    partitioned(new, ("id", transforms.IdentityTransform()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iceberg_partitions, "_MOST", 99)
        with pytest.raises(FctError, match=r"at most 99 partitions .* order the source by these columns once, or cut"):
            fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert new.empty()


def test_a_table_partitioned_anew_meanwhile_is_left_alone(h: Any, tmp_path: Path) -> None:
    new, source = Iceberg(tmp_path), gallery(tmp_path / "old", **MORE)
    table = partitioned(new, *SPECS["identity"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IcebergDestination, "_append", dies("before", None))  # type: ignore[arg-type]
        with pytest.raises(Killed):
            fct.backfill(source, new.to, h, **QUICK, **new.how)
    with table.update_spec() as spec:
        spec.remove_field("p0")
    with pytest.raises(FctError, match=r"partitioned otherwise .* by p0 = identity of column \d+, and now by nothing"):
        fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert new.empty()


def test_the_writer_travels_to_other_processes(h: Any, tmp_path: Path) -> None:
    new = Iceberg(tmp_path)
    partitioned(new, *SPECS["truncate and identity"])
    from fct.gallery import open_destination

    writer = open_destination(new.to, "auto", storage_options=new.store)
    again = pickle.loads(pickle.dumps(writer))
    assert str(again._partitions) == str(writer._partitions)  # type: ignore[attr-defined]


@pytest.mark.parametrize("parted", [False, True])
def test_files_whose_rows_are_all_rejected_are_a_commit_without_rows(h: Any, tmp_path: Path, parted: bool) -> None:
    new, source = Iceberg(tmp_path), tmp_path / "old"
    few = {name: column[:120] for name, column in MORE.items()}
    if parted:
        partitioned(new, *SPECS["identity"])
    gallery(source, 120, bad=tuple(range(120)), **few)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "refuse_misfit", lambda *_, **__: None)  # which a sample of such rows would be
            report = fct.backfill(source, new.to, h, **QUICK, **new.how)
        assert (report.rows_out, report.rejects, new.commits()) == (0, 120, 1)
    checked = fct.verify_gallery(new.to, source=source, progress=False, **new.how)
    assert checked.problems == ()
    assert (checked.rows_in, checked.rows_out, checked.rejects, new.rows().num_rows) == (120, 0, 120, 0)
    gallery(source, 120, first=ROWS, **few)
    gallery(source, 120, first=2 * ROWS, bad=tuple(range(120)), **few)
    fct.backfill(source, new.to, h, **QUICK, **new.how, follow=True)
    checked = fct.verify_gallery(new.to, source=source, progress=False, **new.how)
    assert checked.proven, checked
    assert (checked.rows_in, checked.rows_out, new.commits(), new.rows().num_rows) == (360, 119, 2, 119)

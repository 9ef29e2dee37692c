"""verify of what was read from a database, and of what was written into one, by the clients' own counts and reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from tests.databases.conftest import D_OLD, Database, rows_of
from tests.databases.test_collections import STORES, close

QUICK: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 60, "batch_rows": 25}
ROWS = 150


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made: Any = STORES[request.param](tmp_path)
    made.make(rows_of(ROWS))
    yield made
    close()


def verified(new: Any, source: Any, journal: Path | None, **options: Any) -> Any:
    return fct.verify_gallery(new, source=source, journal=journal, progress=False, retries=0, **options)


def test_from_a_collection_to_another(store: Any, h: fct.Transformation, tmp_path: Path) -> None:
    source, new = store.place + "items", store.place + store.target
    fct.backfill(source, new, h, journal=tmp_path / "j", **QUICK)
    report = verified(new, source, tmp_path / "j")
    assert report.proven, (report.problems, report.unproven)
    assert (report.source_rows, report.compared, report.read_alike, report.spot_checked) == (ROWS,) * 4
    assert set(report.checksums) == {"pk" if store.place.startswith("milvus") else "id", "payload"}
    store.drop([7])
    problems, unproven = (lambda r: (r.problems, r.unproven))(verified(new, source, tmp_path / "j"))
    assert "expected 149 rows" in problems[0], "the new collection has a row that the source has not"
    assert "1 rows that were read are in the source no longer (first 7)" in unproven[0]
    store.add(rows_of(1), 900)
    (problem, *_) = verified(new, source, tmp_path / "j").problems
    assert "what came since, or was never read (first 900) has 1 rows in the source, none of them was read" in problem


def changed(store: Any, name: str, kind: str) -> None:
    """A row of the new collection is taken away, or its vector or its payload changed."""
    if store.place.startswith("qdrant"):
        from qdrant_client import models

        if kind == "gone":
            store.client.delete(name, [5])
        elif kind == "vector":
            store.client.update_vectors(name, [models.PointVectors(id=5, vector={"new": [1.0] * 12})])
        else:
            store.client.set_payload(name, {"label": "other"}, [5])
    elif store.place.startswith("milvus"):
        row = store.client.get(name, [5], output_fields=["*"])[0]
        if kind == "gone":
            store.client.delete(name, ids=[5])
        else:
            store.client.upsert(name, [dict(row) | ({"new": [1.0] * 12} if kind == "vector" else {"label": "other"})])
    else:
        made = store.client.get_collection(name, embedding_function=None)
        if kind == "gone":
            made.delete(ids=["5"])
        else:
            made.update(ids=["5"], **({"embeddings": [[1.0] * 12]} if kind == "vector" else {"metadatas": [{"n": 6}]}))


@pytest.mark.parametrize("kind", ["gone", "vector", "payload"])
def test_a_changed_row_of_a_new_collection_is_found(
    kind: str, store: Any, h: fct.Transformation, tmp_path: Path
) -> None:
    source, new = store.place + "items", store.place + store.target
    fct.backfill(source, new, h, journal=tmp_path / "j", **QUICK)
    changed(store, store.names[0], kind)
    problems = verified(new, source, tmp_path / "j").problems
    words = {
        "gone": "differs from the source's, first in row",
        "vector": "off the reference",
        "payload": "'payload' differs",
    }
    assert any(words[kind] in p for p in problems), problems


@pytest.mark.parametrize("fault", ["lost", "vectors swapped"])
def test_a_reader_of_collections_that_gives_other_rows_is_found(
    fault: str, store: Any, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fct.gallery.databases import database_source
    from fct.gallery.location import RetryPolicy

    source = store.place + "items"
    kind: Any = type(database_source(source, RetryPolicy()))
    scan, points = kind.scan, kind.points

    def fewer(self: Any) -> Iterator[pa.Array]:
        return (ids.slice(1) for ids in scan(self))

    def swapped(self: Any, ids: list[Any]) -> Any:
        (a, u, p), (b, v, q), *rest = points(self, ids)
        return [(a, v, p), (b, u, q), *rest]

    if fault == "lost":
        monkeypatch.setattr(kind, "scan", fewer)
    else:
        monkeypatch.setattr(kind, "points", swapped)
    fct.backfill(source, tmp_path / "new", h, format="parquet", **QUICK)
    (problem, *_) = verified(tmp_path / "new", source, None).problems
    assert ("none of them was read" if fault == "lost" else "fct reads other rows than") in problem


# ---- PostgreSQL ----
def filled(db: Database) -> None:
    db.items(rows_of(ROWS))
    db.run("ALTER TABLE items ADD at timestamptz, ADD born date, ADD ok boolean, ADD half real, ADD raw bytea")
    db.run(
        "UPDATE items SET at = timestamptz '2024-02-03 04:05:06.789012+00' + id * interval '1 us', ok = id % 2 = 0, "
        "born = date '1500-01-01' + id::int, half = id / 7.0, raw = decode(md5(id::text), 'hex')"
    )
    db.run("UPDATE items SET at = NULL, ok = NULL, half = NULL, raw = NULL, embedding = NULL WHERE id IN (3, 99)")


@pytest.mark.parametrize("how", ["another table", "another column", "files"])
def test_from_a_table(how: str, db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    filled(db)
    source, journal = db.url("items", vector="embedding"), tmp_path / "j"
    new: Any = {"another table": db.url("new", vector="v"), "another column": db.url("items", vector="v2")}.get(how)
    fct.backfill(source, new or tmp_path / "new", h, journal=journal, **QUICK)
    report = verified(new or tmp_path / "new", source, journal)
    assert report.proven, (report.problems, report.unproven)
    assert (report.source_rows, report.read_alike, report.compared) == (ROWS, ROWS, ROWS - 2)
    assert report.spot_checked == ROWS - 2
    assert ("raw" in report.checksums) == (how != "another column")


OF_21 = "(SELECT {0} FROM {1} WHERE id = 21) WHERE id = 20"
INTO = "INSERT INTO {0} SELECT 900, label, price, tags, extra, {1} FROM {0} WHERE id = 1"
CHANGES = {
    "DELETE FROM new WHERE id = 20": "column 'id' differs from the source's, first in row 19: 20 in the source, None",
    INTO.format("new", "v"): "expected 150 rows, .* counts 151",
    "UPDATE new SET label = 'x' WHERE id = 20": "column 'label' differs from the source's, first in row 19",
    "UPDATE new SET extra = '{}' WHERE id = 20": "column 'extra' differs from the source's, first in row 19",
    "UPDATE new SET v = " + OF_21.format("v", "new"): "row 19 of the source is .* off the reference",
    "UPDATE items SET embedding = " + OF_21.format("embedding", "items"): "was made of other rows",
    INTO.format("items", "embedding"): "none of them was read",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_is_no_longer_what_it_was(
    change: str, db: Database, h: fct.Transformation, tmp_path: Path
) -> None:
    db.items(rows_of(ROWS))
    source, new = db.url("items"), db.url("new", vector="v")
    fct.backfill(source, new, h, journal=tmp_path / "j", **QUICK)
    assert verified(new, source, tmp_path / "j").proven
    db.run(change)
    problems = verified(new, source, tmp_path / "j").problems
    assert any(re.search(CHANGES[change], p) for p in problems), problems


@pytest.mark.parametrize("fault", ["lost", "swapped"])
def test_a_reader_of_tables_that_gives_other_rows_is_found(
    fault: str, db: Database, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fct.gallery.databases.postgres_source import PostgresSource

    db.items(rows_of(ROWS))
    scan, fetch = PostgresSource.scan, PostgresSource.fetch

    def fewer(self: Any) -> Iterator[pa.Array]:
        return (ids.slice(0, len(ids) - 1) for ids in scan(self))

    def swapped(self: Any, ids: pa.Array, between: bool) -> pa.RecordBatch:
        rows = fetch(self, ids, between)
        place = rows.schema.get_field_index("embedding")
        order = [1, 0, *range(2, rows.num_rows)]
        return rows.set_column(place, rows.schema.field(place), rows.column(place).take(pa.array(order)))

    monkeypatch.setattr(PostgresSource, *(("scan", fewer) if fault == "lost" else ("fetch", swapped)))
    fct.backfill(db.url("items"), tmp_path / "new", h, format="parquet", **QUICK)
    (problem, *_) = verified(tmp_path / "new", db.url("items"), None).problems
    assert ("none of them was read" if fault == "lost" else "fct reads other rows than count") in problem


def test_from_files_into_a_table_and_a_collection(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    rows = rows_of(ROWS)
    table = pa.table(
        {
            "id": pa.array(range(ROWS), pa.int32()), "embedding": pa.array(list(rows), pa.list_(pa.float32(), D_OLD)),
            "text": [f"t {i}" if i % 4 else None for i in range(ROWS)], "score": np.arange(ROWS) / 3,
            "tags": [["a", "b"][: i % 3] for i in range(ROWS)], "at": pa.array(range(ROWS), pa.timestamp("ms")),
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "old.parquet")
    for new in (db.url("new", vector="v"), f"qdrant://{tmp_path / 'q'}?collection=c"):
        journal = tmp_path / new.partition(":")[0]
        fct.backfill(tmp_path / "old.parquet", new, h, journal=journal, **QUICK)
        report = verified(new, tmp_path / "old.parquet", journal)
        assert report.proven, (report.problems, report.unproven)
        assert report.compared == ROWS
    close()


def test_the_journal_has_to_be_this_destinations(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    db.items(rows_of(20))
    fct.backfill(db.url("items"), db.url("new", vector="v"), h, journal=tmp_path / "j", **QUICK)
    with pytest.raises(fct.FctError, match=r"journal: expected the journal of .*table=other.*, .* is of .*table=new"):
        verified(db.url("other"), None, tmp_path / "j")
    with pytest.raises(ValueError, match="journal: expected a folder of this machine"):
        verified(db.url("new", vector="v"), None, None)
    (why,) = verified(db.url("new", vector="v"), None, tmp_path / "j").unproven
    assert "the source was not opened" in why


def test_a_job_goes_on_with_another_password_and_with_no_other_table(
    db: Database, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fct.gallery.databases.postgres_destination import PostgresDestination

    db.items(rows_of(ROWS))
    db.items(rows_of(ROWS, seed=1), table="others")
    put = PostgresDestination.put
    puts: list[int] = []

    def breaks(self: Any, batches: Any) -> None:
        puts.append(1)
        if len(puts) == 2:
            raise fct.FctError("the server is gone")
        put(self, batches)

    def job(table: str, new: str, password: str) -> Any:
        source = db.url(table, vector="embedding", password=password)
        return fct.backfill(source, db.url(new, vector="v", password=password), h, journal=tmp_path / "j", **QUICK)

    monkeypatch.setattr(PostgresDestination, "put", breaks)
    with pytest.raises(fct.FctError, match="the server is gone"):
        job("items", "new", "first-password")
    monkeypatch.setattr(PostgresDestination, "put", put)
    assert "first-password" not in (tmp_path / "j/job.json").read_text()
    with pytest.raises(fct.FctError, match="source: a URL with another table than it was begun with"):
        job("others", "new", "first-password")
    with pytest.raises(fct.FctError, match="destination: a URL with another table than it was begun with"):
        job("items", "new2", "first-password")
    assert job("items", "new", "second-password").rows_out == ROWS
    assert verified(db.url("new", vector="v"), db.url("items", vector="embedding"), tmp_path / "j").proven

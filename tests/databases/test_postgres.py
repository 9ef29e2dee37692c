"""PostgreSQL with pgvector, a real server: what is read, what is written, what is refused."""

from __future__ import annotations

import gc
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import open_source
from tests.databases.conftest import D_NEW, Database, rows_of, vectors_of

ROWS = 3000
QUICK: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 500, "batch_rows": 200}


def mapped(db: Database, h: fct.Transformation, table: str, column: str, old: Any, *, atol: float = 2e-5) -> None:
    rows = db.run(f"SELECT id, {column}::text FROM {table} ORDER BY id")
    assert [i for i, _ in rows] == list(range(1, 1 + len(old))), "not every id once"
    want = fct.transform_batch(old, None, h, progress=False)
    assert np.allclose(vectors_of([v for _, v in rows]), want, atol=atol)


def type_of(db: Database, table: str, column: str) -> str:
    query = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = %s::regclass AND attname = %s"
    return str(db.run(query, table, column)[0][0])


def test_into_a_new_table(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    old = rows_of(ROWS)
    db.items(old)
    job = (db.url("items"), db.url("items_v2", vector="embedding"), h)
    report = fct.backfill(*job, journal=tmp_path / "j", **QUICK)
    assert (report.rows_in, report.rows_out, report.rejects, report.shards) == (ROWS, ROWS, 0, 6)
    mapped(db, h, "items_v2", "embedding", old)
    same = (
        "SELECT count(*) FROM items a JOIN items_v2 b USING (id) WHERE (a.label, a.price, a.tags, a.extra) "
        "IS NOT DISTINCT FROM (b.label, b.price, b.tags, b.extra)"
    )
    assert db.run(same) == [(ROWS,)]
    assert [type_of(db, "items_v2", c) for c in ("price", "embedding")] == ["numeric(8,2)", f"vector({D_NEW})"]
    assert "CREATE INDEX CONCURRENTLY" in " ".join(report.left_to_do)
    assert db.run("SELECT count(*) FROM pg_indexes WHERE tablename = 'items_v2'") == [(1,)]  # the primary key alone
    again = fct.backfill(*job, journal=tmp_path / "j", **QUICK)
    assert (again.shards_done, again.shards_kept) == (0, 6)


def test_into_a_new_column(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    old = rows_of(ROWS)
    db.items(old)
    before = db.run("SELECT id, label, price, tags, extra, embedding::text FROM items ORDER BY id")
    source, new = db.url("items", vector="embedding"), db.url("items", vector="embedding_v2")
    report = fct.backfill(source, new, h, journal=tmp_path / "j", **QUICK)
    mapped(db, h, "items", "embedding_v2", old)
    assert db.run("SELECT id, label, price, tags, extra, embedding::text FROM items ORDER BY id") == before
    assert any(line.startswith("added: ALTER TABLE") for line in report.left_to_do)


def test_half_vectors_stay_half(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    old = rows_of(400)
    db.items(old, kind="halfvec")
    fct.backfill(db.url("items"), db.url("items_v2", vector="embedding"), h, journal=tmp_path / "j", **QUICK)
    assert type_of(db, "items_v2", "embedding") == f"halfvec({D_NEW})"
    mapped(db, h, "items_v2", "embedding", old.astype(np.float16).astype(np.float32), atol=2e-3)


@pytest.mark.parametrize("kind", ["text", "uuid", "integer"])
def test_other_keys(db: Database, h: fct.Transformation, tmp_path: Path, kind: str) -> None:
    db.items(rows_of(300))
    key = {"text": "'item ' || id", "uuid": "md5(id::text)::uuid", "integer": "id::integer"}[kind]
    db.run(f"CREATE TABLE other AS SELECT {key} AS key, embedding FROM items")
    db.run("ALTER TABLE other ADD PRIMARY KEY (key)")
    fct.backfill(db.url("other"), db.url("other_v2", vector="embedding"), h, journal=tmp_path / "j", **QUICK)
    rows = db.run("SELECT a.embedding::text, b.embedding::text FROM other a JOIN other_v2 b USING (key)")
    assert len(rows) == 300
    want = fct.transform_batch(vectors_of([a for a, _ in rows]), None, h, progress=False)
    assert np.allclose(vectors_of([b for _, b in rows]), want, atol=2e-5)


def test_to_files_and_back(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    db.items(rows_of(500))
    fct.backfill(db.url("items"), tmp_path / "new", h, format="parquet", **QUICK)
    table = pq.read_table(sorted((tmp_path / "new").glob("*.parquet"))[0])
    assert table["label"][0].as_py() == "item 1"
    assert table["price"][0].as_py() == "1.25"
    back = fct.Transformation.random(D_NEW, D_NEW, 5, inner=16, side_info=False).with_(old_space=h.new_space)
    fct.backfill(tmp_path / "new", db.url("third", vector="v"), back, journal=tmp_path / "j", progress=False)
    assert db.run("SELECT count(*), min(label), max(extra->>'n') FROM third") == [(500, "item 1", "98")]


def test_rows_of_files_that_the_table_has_not_are_not_lost_in_a_new_column(
    db: Database, h: fct.Transformation, tmp_path: Path
) -> None:
    old = rows_of(600)
    db.items(old)
    db.run("CREATE TABLE others AS SELECT id FROM items WHERE id NOT IN (7, 520, 521, 530, 599)")
    db.run("ALTER TABLE others ADD PRIMARY KEY (id)")
    pq.write_table(pa.table({"id": np.arange(1, 601), "embedding": list(old)}), tmp_path / "old.parquet")
    job: Any = (tmp_path / "old.parquet", db.url("others", vector="v"), h)
    with pytest.raises(fct.FctError, match=r"expected a row of others for each id, 1 of a shard's ids have none \(7\)"):
        fct.backfill(*job, journal=tmp_path / "j", vector_column="embedding", **QUICK)
    db.run("INSERT INTO others VALUES (7)")
    with pytest.raises(fct.FctError, match=r"4 of a shard's ids have none \((\d+, ){3}\.\.\.\)"):
        fct.backfill(*job, journal=tmp_path / "j", vector_column="embedding", **QUICK)
    db.run("INSERT INTO others VALUES (520), (521), (530), (599)")
    fct.backfill(*job, journal=tmp_path / "j", vector_column="embedding", **QUICK)
    mapped(db, h, "others", "v", old)


def test_rows_that_can_not_be_mapped_are_set_aside(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    db.items(rows_of(300))
    db.run("UPDATE items SET embedding = NULL WHERE id IN (7, 8)")
    db.run("ALTER TABLE items ALTER embedding TYPE vector")
    db.run("UPDATE items SET embedding = '[1,2,3]' WHERE id = 20")
    report = fct.backfill(db.url("items"), db.url("new", vector="v"), h, journal=tmp_path / "j", **QUICK)
    assert (report.rows_in, report.rows_out, report.rejects) == (300, 297, 3)
    rejects = "".join(p.read_text() for p in (tmp_path / "j" / "rejects").glob("*.jsonl"))
    assert '"id": 7' in rejects
    assert "expected 16 elements, got 3" in rejects


def test_rows_that_come_and_go_meanwhile(
    db: Database, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fct.gallery.databases.postgres_destination import PostgresDestination

    old = rows_of(1200)
    db.items(old[:1000])
    put = PostgresDestination.put
    puts: list[int] = []

    def while_it_runs(self: Any, batches: Any) -> None:
        put(self, batches)
        puts.append(1)
        if len(puts) == 1:
            db.items(old[1000:1100], first=1001)
            db.run("DELETE FROM items WHERE id IN (3, 997)")
        if len(puts) == 3:
            db.items(old[1100:], first=1101)

    monkeypatch.setattr(PostgresDestination, "put", while_it_runs)
    job = (db.url("items"), db.url("new", vector="v"), h)
    report = fct.backfill(*job, journal=tmp_path / "j", follow=True, **QUICK)
    assert report.rows_in == 1200
    rows = db.run("SELECT id, v::text FROM new ORDER BY id")
    ids = [i for i, _ in rows]
    assert ids == [i for i in range(1, 1201) if i not in (3, 997)]
    want = fct.transform_batch(old, None, h, progress=False)[[i - 1 for i in ids]]
    assert np.allclose(vectors_of([v for _, v in rows]), want, atol=2e-5)


def refused(h: fct.Transformation, journal: Path, source: str, destination: str, message: str) -> str:
    with pytest.raises((fct.FctError, ValueError), match=message) as raised:
        fct.backfill(source, destination, h, journal=journal, retries=0, **QUICK)
    return str(raised.value)


def test_what_is_not_there(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    db.items(rows_of(50))
    db.run("CREATE TABLE bare (id bigint PRIMARY KEY, name text)")
    db.run("CREATE TABLE keyless (id bigint, embedding vector(16))")
    new, items, journal = db.url("new", vector="v"), db.url("items", vector="embedding"), tmp_path / "j"
    refused(h, journal, db.url("nothing"), new, "source: expected a table, there is no nothing")
    refused(h, journal, db.url("items", vector="emb"), new, "expected a column of items .*got 'emb'")
    refused(h, journal, db.url("items", vector="label"), new, "of type vector or halfvec .* 'label' is text")
    refused(h, journal, db.url("bare"), new, "expected a column of type vector or halfvec in bare")
    refused(h, journal, db.url("keyless"), new, "a primary key of one column, keyless has none")
    refused(h, journal, "postgresql:///x?host=/nowhere&table=items", new, r"opening .*No such file.*\(tried once\)")
    refused(h, journal, items.replace(db.name, "nodb"), new, 'database "nodb" does not exist')
    refused(h, journal, items, items, "destination: expected another place than the source")
    with pytest.raises(ValueError, match="journal: expected a folder of this machine"):
        fct.backfill(items, new, h, **QUICK)
    assert db.run("SELECT to_regclass('new')") == [(None,)]


def test_a_role_that_may_only_read(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    db.items(rows_of(50))
    reader = f"reader_{db.name}"
    db.run(f"CREATE ROLE {reader} LOGIN")
    db.run(f"GRANT SELECT ON items TO {reader}")
    source = db.url("items", user=reader, vector="embedding")
    refused(h, tmp_path / "a", source, db.url("new", user=reader, vector="v"), "refuses: permission denied for schema")
    refused(h, tmp_path / "b", source, db.url("items", user=reader, vector="v2"), "must be owner of table items")


def test_what_is_there_is_not_written_over(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    db.items(rows_of(50))
    db.run("CREATE TABLE new AS SELECT * FROM items")
    db.run("ALTER TABLE new ADD PRIMARY KEY (id)")
    new = db.url("new", vector="embedding")
    refused(h, tmp_path / "j", db.url("items"), new, "holds vectors in 'embedding' already")


def test_wrong_credentials_are_named_without_the_secret(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    db.items(rows_of(50))
    url = db.url("items", user="nobody", password="s3cretpass")
    said = refused(h, tmp_path / "j", url, db.url("new", vector="v"), 'role "nobody" does not exist')
    assert "s3cretpass" not in said


def test_never_faster_than_allowed(db: Database, h: fct.Transformation, tmp_path: Path) -> None:
    db.items(rows_of(600))
    job = (db.url("items"), db.url("new", vector="v"), h)
    assert fct.backfill(*job, journal=tmp_path / "j", max_rows_per_s=300, **QUICK).seconds > 1.5


def test_plan_touches_nothing(db: Database, h: fct.Transformation) -> None:
    db.items(rows_of(600))
    plan = fct.plan_backfill(db.url("items"), db.url("new", vector="v"), h, old_model="random-old")
    assert (plan.rows, plan.refusals) == (600, ())
    assert db.run("SELECT to_regclass('new')") == [(None,)]


@pytest.mark.parametrize("kind", ["smallint", "integer", "bigint"])
@pytest.mark.parametrize("nulls", [False, True])
def test_keys_and_vectors_that_the_server_joins(
    db: Database, h: fct.Transformation, tmp_path: Path, kind: str, nulls: bool
) -> None:
    """Without payload: negative keys, gaps, rows that lie in another order than their keys."""
    old = rows_of(2500)
    db.items(old)
    db.run(f"CREATE TABLE loose AS SELECT (7 * id - 9000)::{kind} AS id, embedding FROM items ORDER BY md5(id::text)")
    db.run("ALTER TABLE loose ADD PRIMARY KEY (id)")
    if nulls:
        db.run("UPDATE loose SET embedding = NULL WHERE id % 500 = 0")
    without = db.run("SELECT count(*) FROM loose WHERE embedding IS NULL")[0][0]
    assert bool(without) == nulls
    words = QUICK | {"shard_rows": 2000, "batch_rows": 1500}
    report = fct.backfill(db.url("loose"), db.url("loose_v2", vector="embedding"), h, journal=tmp_path / "j", **words)
    assert (report.rows_in, report.rejects) == (2500, without)
    assert [t for (t,) in db.run("SELECT DISTINCT pg_typeof(id)::text FROM loose_v2")] == [kind]
    rows = db.run("SELECT a.embedding::text, b.embedding::text FROM loose a JOIN loose_v2 b USING (id)")
    assert len(rows) == 2500 - without
    want = fct.transform_batch(vectors_of([a for a, _ in rows]), None, h, progress=False)
    assert np.allclose(vectors_of([b for _, b in rows]), want, atol=2e-5)


def test_no_connection_outlasts_its_reader(db: Database) -> None:
    """A service that opens a table an hour would end with as many sessions, and the collector with as many warnings."""
    db.items(rows_of(20))
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fct' AND datname = current_database()"
    source = open_source(db.url("items"))
    (piece,) = source.pieces()
    assert sum(batch.num_rows for batch in source.read(piece, 0, 20, 10)) == 20
    assert db.run(sessions)[0][0] == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        del source
        gc.collect()
    assert not [str(w.message) for w in caught if "psycopg" in str(w.message)]
    for _ in range(50):  # the server takes a moment to see it
        if db.run(sessions)[0][0] == 0:
            break
        time.sleep(0.1)
    assert db.run(sessions)[0][0] == 0

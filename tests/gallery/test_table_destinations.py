"""Delta and Iceberg as destinations: one commit at the end, whatever was killed when; read by their own libraries."""

from __future__ import annotations

import datetime
import decimal
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling.journal import Journal
from fct.errors import BackfillError, FctError
from fct.gallery import location_of, open_source
from fct.gallery.committed_files import CommittedFile, CommittedFiles
from fct.gallery.delta_destination import DeltaDestination
from fct.gallery.iceberg_destination import IcebergDestination

deltalake = pytest.importorskip("deltalake")
sql = pytest.importorskip("pyiceberg.catalog.sql", exc_type=ImportError)

D_OLD, D_NEW, ROWS = 8, 6, 1000
QUICK: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 100, "precision": "fp32"}


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=16, side_info=False)


def gallery(where: Path, n: int = ROWS, *, first: int = 0, bad: tuple[int, ...] = (3, 555), **more: Any) -> Path:
    where.mkdir(exist_ok=True)
    values = np.random.default_rng(first).standard_normal((n, D_OLD), dtype=np.float32)
    values[[b for b in bad if b < n], 1] = np.nan
    table = pa.table(
        {
            "id": np.arange(first, first + n),
            "title": pa.array([None if i % 7 == 0 else f"item {i} ü" for i in range(n)]),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), D_OLD),
            **more,
        }
    )
    pq.write_table(table, where / f"part-{first}.parquet", row_group_size=100)
    return where


class Delta:
    """A Delta table in a folder, and what its own library says of it."""

    title = "delta"

    def __init__(self, folder: Path) -> None:
        self.where = folder / "new"
        self.to, self.how = f"delta://{self.where}", dict[str, Any]()

    def commits(self) -> int:
        return int(deltalake.DeltaTable(str(self.where)).version()) + 1

    def rows(self) -> pa.Table:
        return pa.table(deltalake.QueryBuilder().register("t", deltalake.DeltaTable(str(self.where))).execute(
            "select * from t order by id").read_all())  # fmt: skip

    def files(self) -> list[str]:
        return list(deltalake.DeltaTable(str(self.where)).file_uris())

    def properties(self) -> dict[str, str]:
        return dict(next(f.metadata for f in deltalake.DeltaTable(str(self.where)).schema().fields if f.metadata))

    def empty(self) -> bool:
        return not (self.where / "_delta_log").exists()


class Iceberg:
    """A table of a catalog in SQLite."""

    title = "iceberg"

    def __init__(self, folder: Path) -> None:
        (folder / "lake").mkdir()
        self.where = folder / "lake/shop/items"
        lake = folder / "lake"
        self.store = {"type": "sql", "uri": f"sqlite:///{lake / 'catalog.db'}", "warehouse": str(lake)}
        self.to = "iceberg://prod/shop.items"
        self.how: dict[str, Any] = {"storage_options": self.store}

    def catalog(self) -> Any:
        return sql.SqlCatalog("prod", **self.store)

    def table(self) -> Any:
        return self.catalog().load_table("shop.items")

    def commits(self) -> int:
        return len(self.table().snapshots())

    def rows(self) -> pa.Table:
        return self.table().scan().to_arrow().sort_by("id")

    def files(self) -> list[str]:
        return [task.file.file_path.removeprefix("file://") for task in self.table().scan().plan_files()]

    def properties(self) -> dict[str, str]:
        return dict(self.table().properties)

    def empty(self) -> bool:
        return not self.catalog().table_exists("shop.items") or not self.table().snapshots()


@pytest.fixture(params=[Delta, Iceberg], ids=["delta", "iceberg"])
def new(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return request.param(tmp_path)


def plain(source: Path, h: fct.Transformation, **more: Any) -> pa.Table:
    """The same rows as plain Parquet."""
    where = source.parent / "plain"
    fct.backfill(source, where, h, format="parquet", **QUICK, **more)
    return pq.read_table(where).sort_by("id")


def vectors(table: pa.Table) -> Any:
    return np.array(table["embedding"].to_pylist(), np.float32)


def same(got: pa.Table, want: pa.Table) -> None:
    assert got["id"].to_pylist() == want["id"].to_pylist()
    assert got["title"].to_pylist() == want["title"].to_pylist()
    assert vectors(got).tobytes() == vectors(want).tobytes()


def test_a_new_table_is_one_commit_that_its_own_library_reads(new: Any, h: Any, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    source = gallery(tmp_path / "old")
    plan = fct.plan_backfill(source, new.to, h, old_model="random-old", **new.how)
    assert plan.refusals == ()
    assert new.empty()
    report = fct.backfill(source, new.to, h, **QUICK, **new.how)
    want = plain(source, h)
    assert (report.rows_in, report.rows_out, report.rejects, new.commits()) == (ROWS, ROWS - 2, 2, 1)
    same(new.rows(), want)
    same(ds.dataset(new.files()).to_table().sort_by("id"), want)
    same(duckdb.sql(f"select * from read_parquet({new.files()!r}) order by id").to_arrow_table(), want)
    said = new.properties()
    assert json.loads(said["fct.space"])["model_id"] == h.new_space.model_id
    assert said["fct.vector"] == "embedding"
    found = open_source(new.where)
    assert found.space == h.new_space
    assert sum(p.rows for p in found.pieces()) == ROWS - 2
    checked = fct.verify_gallery(new.where, source=source)
    assert checked.problems == ()
    assert (checked.compared, checked.spot_checked) == (ROWS - 2, ROWS - 2)
    again = fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert (again.shards_done, new.commits()) == (0, 1)


class Killed(BaseException):
    """Where the process ends."""


def dies(how: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, and the process ends before it or after it."""

    def dying(*args: Any, **more: Any) -> Any:
        if how == "after":
            real(*args, **more)
        raise Killed

    return dying


STEPS = ["shard", "begin", "before the commit", "after the commit", "before the manifest", "after the manifest"]


@pytest.mark.parametrize("step", STEPS)
def test_killed_anywhere_it_ends_with_one_commit(new: Any, h: Any, tmp_path: Path, step: str) -> None:
    source = gallery(tmp_path / "old")
    kind = DeltaDestination if new.title == "delta" else IcebergDestination
    place, name = {
        "shard": (CommittedFiles, "write"),
        "begin": (kind, "begin"),
        "before the commit": (kind, "_write" if new.title == "delta" else "_append"),
        "after the commit": (kind, "_write" if new.title == "delta" else "_append"),
        "before the manifest": (Journal, "finish"),
        "after the manifest": (Journal, "finish"),
    }[step]
    real, calls = getattr(place, name), []

    def third(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return real(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        dying = dies("after" if step.startswith(("after", "begin")) else "before", real)
        patch.setattr(place, name, third if step == "shard" else dying)
        with pytest.raises(Killed):
            fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert new.empty() == (step in ("shard", "begin", "before the commit"))
    fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert new.commits() == 1
    same(new.rows(), plain(source, h))
    assert fct.verify_gallery(new.where, source=source).problems == ()


KILL = """
import json, os, signal, sys
import fct
from fct.gallery.delta_destination import DeltaDestination
from fct.gallery.iceberg_destination import IcebergDestination

source, to, path, how, kind, when = sys.argv[1:]
place, name = {"delta": (DeltaDestination, "_write"), "iceberg": (IcebergDestination, "_append")}[kind]
real = getattr(place, name)

def dying(*args, **more):
    if when == "after":
        real(*args, **more)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(place, name, dying)
fct.backfill(source, to, path, **json.loads(how))
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_process_leaves_one_commit(new: Any, h: Any, tmp_path: Path, when: str) -> None:
    source, path = gallery(tmp_path / "old"), h.save(tmp_path / "h.safetensors")
    words = [str(source), new.to, str(path), json.dumps(QUICK | new.how), new.title, when]
    done = subprocess.run([sys.executable, "-c", KILL, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    report = fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert (report.shards_done, new.commits()) == (0, 1)
    same(new.rows(), plain(source, h))


def test_what_came_later_is_a_commit_of_its_own(new: Any, h: Any, tmp_path: Path) -> None:
    source = gallery(tmp_path / "old")
    fct.backfill(source, new.to, h, **QUICK, **new.how)
    gallery(source, 300, first=ROWS)
    for _ in range(2):
        fct.backfill(source, new.to, h, **QUICK, **new.how, follow=True)
        assert new.commits() == 2
    if new.title == "delta":  # the second commit names the new shards alone, so that streaming readers see them once
        log = (new.where / "_delta_log/00000000000000000001.json").read_text().splitlines()
        assert sum("add" in json.loads(line) for line in log) == 3
    same(new.rows(), plain(source, h))
    assert fct.verify_gallery(new.where, source=source).problems == ()


def test_a_damaged_shard_of_a_finished_table_is_seen_and_made_again(h: Any, tmp_path: Path) -> None:
    new, source = Delta(tmp_path), gallery(tmp_path / "old")
    fct.backfill(source, new.to, h, **QUICK)
    file = new.where / "part-00000004.parquet"
    file.write_bytes(file.read_bytes()[:-7] + b"1234567")
    assert "does not match its checksum" in fct.verify_gallery(new.where).problems[0]
    report = fct.backfill(source, new.to, h, **QUICK)
    assert (report.shards_done, new.commits()) == (1, 1)
    same(new.rows(), plain(source, h))


ODD = {
    "small": pa.array(np.arange(20) % 200, pa.uint8()),
    "wide": pa.array([2**64 - 1 - i for i in range(20)], pa.uint64()),
    "kind": pa.array(["a", "b", None, "a"] * 5).dictionary_encode(),
    "half": pa.array(np.arange(20), pa.float16()),
    "view": pa.array([f"v{i}" for i in range(20)], pa.string_view()),
    "blob": pa.array([bytes([i] * 4) for i in range(20)], pa.binary(4)),
    "none": pa.nulls(20),
    "when": pa.array([i * 1000 for i in range(20)], pa.timestamp("ns", "Europe/Berlin")),
    "naive": pa.array([datetime.datetime(2020, 1, 1, 0, 0, i) for i in range(20)], pa.timestamp("ms")),
    "day": pa.array([datetime.date(2020, 1, 1 + i) for i in range(20)]),
    "price": pa.array([decimal.Decimal(f"{i}.25") for i in range(20)], pa.decimal128(8, 2)),
    "tags": pa.array([["x", None], [], None, ["y"]] * 5, pa.large_list(pa.string())),
    "nested": pa.array([{"a": i, "b": [i]} for i in range(20)]),
    "pairs": pa.array([[("k", i)] for i in range(20)], pa.map_(pa.string(), pa.int32())),
}


def test_payload_of_every_type_has_a_place(new: Any, h: Any, tmp_path: Path) -> None:
    source = gallery(tmp_path / "old", 20, bad=(), **ODD)
    fct.backfill(source, new.to, h, **QUICK, **new.how)
    got = new.rows()
    for name, column in ODD.items():
        want = [v if not isinstance(v, datetime.datetime) or v.tzinfo is None else v.astimezone(datetime.timezone.utc)
                for v in column.to_pylist()]  # fmt: skip
        assert [None if v is None else v for v in got[name].to_pylist()] == want, name
    assert fct.verify_gallery(new.where, source=source).problems == ()


@pytest.mark.parametrize(
    "more, message",
    [
        ({"span": pa.array([1] * 20, pa.duration("s"))}, "can hold, 'span' is duration"),
        ({"Title": pa.array(["x"] * 20)}, "tells apart, got 'title' and 'Title'"),
    ],
)
def test_what_a_table_cannot_hold_is_refused_before_anything_is_written(
    new: Any, h: Any, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    source = gallery(tmp_path / "old", 20, bad=(), **more)
    with pytest.raises(FctError, match=message):
        fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert new.empty()


def test_nanoseconds_are_never_rounded(new: Any, h: Any, tmp_path: Path) -> None:
    source = gallery(tmp_path / "old", 20, bad=(), when=pa.array([5] * 20, pa.timestamp("ns")))
    with pytest.raises(FctError, match="expected times in whole microseconds, which the table holds"):
        fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert new.empty()


def test_halves_are_floats_there_or_bytes(new: Any, h: Any, tmp_path: Path) -> None:
    values = np.arange(20 * D_OLD, dtype=np.float16).reshape(20, D_OLD)
    np.save(tmp_path / "old.npy", values)
    with pytest.raises(
        ValueError, match=r"dtype: expected float32, or vector_format binary: an? .* has no half floats"
    ):
        fct.backfill(tmp_path / "old.npy", new.to, h, dtype="float16", **QUICK, **new.how)
    fct.backfill(tmp_path / "old.npy", new.to, h, **QUICK, **new.how)
    source = open_source(new.where)
    assert pa.types.is_float32(source.schema.field("vector").type.value_type)


# ---- what is there already ----


def test_a_delta_table_of_others_is_refused_by_name(h: Any, tmp_path: Path) -> None:
    source, where = gallery(tmp_path / "old"), tmp_path / "new"
    table = pa.table({"id": [1], "lang": ["de"]})
    deltalake.write_deltalake(str(where), table, partition_by=["lang"])
    assert "already holds other files" in fct.plan_backfill(source, where, h, old_model="random-old").refusals[0]
    for form in ("delta", "parquet"):
        with pytest.raises(
            BackfillError, match=r"expected an empty folder or a backfill to continue, .* holds a Delta"
        ):
            fct.backfill(source, where, h, format=form, **QUICK)
    assert pa.table(deltalake.DeltaTable(str(where)).to_pyarrow_table()).num_rows == 1


def test_a_delta_table_that_another_made_meanwhile_is_left_alone(h: Any, tmp_path: Path) -> None:
    source, new = gallery(tmp_path / "old"), Delta(tmp_path)
    real = DeltaDestination._write

    def late(self: Any, *args: Any, **more: Any) -> None:
        deltalake.write_deltalake(str(new.where), pa.table({"x": [1]}))
        real(self, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeltaDestination, "_write", late)
        with pytest.raises(FctError, match=r"could not be committed: .*all shards are there"):
            fct.backfill(source, new.to, h, **QUICK)
    with pytest.raises(FctError, match="is one that this backfill did not make"):
        fct.backfill(source, new.to, h, **QUICK)
    assert new.commits() == 1


def test_rows_are_appended_beside_those_of_another_backfill(h: Any, tmp_path: Path) -> None:
    new = Iceberg(tmp_path)
    fct.backfill(gallery(tmp_path / "a"), new.to, h, **QUICK, **new.how, journal=tmp_path / "ja")
    second = gallery(tmp_path / "b", first=5000)
    fct.backfill(second, new.to, h, **QUICK, **new.how, journal=tmp_path / "jb")
    assert (new.commits(), new.rows().num_rows) == (2, 2 * ROWS - 4)
    with pytest.raises(FctError, match="holds these very rows already, appended by another run"):
        fct.backfill(second, new.to, h, **QUICK, **new.how, journal=tmp_path / "lost")
    assert new.commits() == 2
    # The same names and sizes, other vectors: no rows of this gallery are there.
    third = gallery(tmp_path / "c", first=5000)
    table = pq.read_table(third / "part-5000.parquet")
    turned = pa.array(np.asarray(table["embedding"].combine_chunks().flatten())[::-1].copy())
    column = pa.FixedSizeListArray.from_arrays(turned, D_OLD)
    pq.write_table(table.set_column(2, "embedding", column), third / "part-5000.parquet", row_group_size=100)
    fct.backfill(third, new.to, h, **QUICK, **new.how, journal=tmp_path / "jc")
    assert new.commits() == 3


def test_a_commit_that_met_another_is_tried_again(h: Any, tmp_path: Path) -> None:
    from pyiceberg.exceptions import CommitFailedException, CommitStateUnknownException

    new, source = Iceberg(tmp_path), gallery(tmp_path / "old")
    real, calls = IcebergDestination._append, []

    def unlucky(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise CommitFailedException("another was first")
        real(self, *args)
        raise CommitStateUnknownException("the answer was lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IcebergDestination, "_append", unlucky)
        fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert (len(calls), new.commits(), new.rows().num_rows) == (2, 1, ROWS - 2)


def test_a_table_is_never_appended_to_itself(h: Any, tmp_path: Path) -> None:
    new = Iceberg(tmp_path)
    made(new, COLUMNS).append(pa.table({"id": [1], "title": ["x"], "embedding": [[1.0] * D_OLD]}, schema=COLUMNS))
    with pytest.raises(ValueError, match="destination: expected another place than the source, which is never written"):
        fct.backfill(new.to, new.to, h, **QUICK, **new.how)


def made(new: Iceberg, schema: pa.Schema, **properties: str) -> Any:
    catalog = new.catalog()
    catalog.create_namespace_if_not_exists("shop")
    return catalog.create_table("shop.items", schema=schema, properties=properties)


COLUMNS = pa.schema([("id", pa.int64()), ("title", pa.string()), ("embedding", pa.list_(pa.float32()))])


def test_a_table_made_before_takes_the_rows_that_fit(h: Any, tmp_path: Path) -> None:
    new, source = Iceberg(tmp_path), gallery(tmp_path / "old")
    made(new, COLUMNS)
    fct.backfill(source, new.to, h, **QUICK, **new.how)
    same(new.rows(), plain(source, h))
    assert new.properties()["fct.vector"] == "embedding"


@pytest.mark.parametrize(
    "schema, rows, properties, message",
    [
        (COLUMNS, 1, {}, "has rows and does not say which model made its vectors; if it was .* property 'fct.space'"),
        (COLUMNS, 0, {"fct.space": '{"model_id": "other", "dim": 6}'}, "expected vectors of .*holds those of .*other"),
        (COLUMNS, 0, {"fct.vector": "emb"}, "vectors in the column 'embedding', .* has them in 'emb'"),
        (COLUMNS.remove(1), 0, {}, "has other columns: title: not in the table"),
        (COLUMNS.set(0, pa.field("id", pa.string())), 0, {}, "id: int64, string in the table"),
        (COLUMNS.append(pa.field("must", pa.int32(), False)), 0, {}, "must: only in the table"),
    ],
    ids=["rows of no model", "another model", "another column", "a column less", "another type", "a required column"],
)  # fmt: skip
def test_a_table_that_the_rows_do_not_belong_in_is_refused(
    h: Any, tmp_path: Path, schema: pa.Schema, rows: int, properties: dict[str, str], message: str
) -> None:
    new, source = Iceberg(tmp_path), gallery(tmp_path / "old")
    table = made(new, schema, **properties)
    if rows:
        table.append(pa.table({"id": [1], "title": ["x"], "embedding": [[1.0] * D_NEW]}, schema=schema))
    with pytest.raises(FctError, match=message):
        fct.backfill(source, new.to, h, **QUICK, **new.how)
    assert new.commits() == rows


def test_rows_appended_to_an_iceberg_table_are_verified_among_those_of_others(h: Any, tmp_path: Path) -> None:
    new = Iceberg(tmp_path)
    here, there = gallery(tmp_path / "old"), gallery(tmp_path / "more", first=5000)
    fct.backfill(here, new.to, h, **QUICK, **new.how)
    fct.backfill(there, new.to, h, journal=tmp_path / "j", **QUICK, **new.how)

    def verified(source: Path, **more: Any) -> fct.VerifyReport:
        return fct.verify_gallery(new.to, source=source, transformation=h, progress=False, **new.how, **more)

    for report in (verified(here), verified(there, journal=tmp_path / "j", deep=True)):
        assert report.proven, report
        assert (report.source_rows, report.rows_out) == (ROWS, ROWS - 2)
    assert verified(here, journal=tmp_path / "j").problems
    new.table().delete("id = 5001")
    changed = verified(there, journal=tmp_path / "j")
    assert changed.ok
    assert re.search(
        r"998 were compared at snapshot .* has 89\d rows; they were deleted or rewritten", changed.unproven[0]
    )
    assert verified(here).proven
    with pytest.raises(fct.BackfillError, match=r"has no job.json of .*lake/shop/gone"):
        fct.verify_gallery("iceberg://prod/shop.gone", **new.how)


def test_an_iceberg_table_is_a_source_by_its_catalog(h: Any, tmp_path: Path) -> None:
    new = Iceberg(tmp_path)
    source = gallery(tmp_path / "old")
    fct.backfill(source, new.to, h, **QUICK, **new.how)
    found = open_source(new.to, storage_options=new.store)
    assert sum(p.rows for p in found.pieces()) == ROWS - 2
    assert found.space == h.new_space
    with pytest.raises(FctError, match=r"the catalog 'prod' could not be opened: .*--storage-option uri="):
        fct.verify_gallery(new.to)
    with pytest.raises(
        ValueError, match=r"expected the folder of the Iceberg table .*got iceberg://prod/shop.items, wh"
    ):
        location_of(new.to)
    with pytest.raises(FileNotFoundError, match=r"found no iceberg://prod/shop.gone"):
        open_source("iceberg://prod/shop.gone", storage_options=new.store)


@pytest.mark.parametrize(
    "to, how, message",
    [
        ("iceberg://prod", {}, r"destination: expected iceberg://CATALOG/NAMESPACE.TABLE, got iceberg://prod"),
        ("iceberg://prod/shop.items?uri=x", {}, "storage options"),
        ("iceberg://nowhere/shop.items", {}, "the catalog 'nowhere' could not be opened: .*--storage-option uri="),
        ("iceberg://prod/shop.items", {"format": "parquet"}, "format: expected auto, since the destination is an Ice"),
        ("delta://{}/x", {"format": "npy"}, "format: expected auto, since the destination is a Delta table"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_is_refused(h: Any, tmp_path: Path, to: str, how: Any, message: str) -> None:
    with pytest.raises((ValueError, FctError), match=message):
        fct.backfill(gallery(tmp_path / "old"), to.format(tmp_path), h, **QUICK, **how)


@pytest.mark.parametrize("extra", [None, {"name": "a.parquet", "rows": 3}, [], "a.parquet"])
def test_a_damaged_entry_of_a_shard_is_refused_before_anything_is_committed(extra: object) -> None:
    with pytest.raises(FctError, match="expected the journal's name, rows, bytes and xxh64 of a shard's file, got"):
        CommittedFile.of(extra)
    whole = {"name": "a.parquet", "rows": 3, "bytes": 40, "xxh64": "0" * 16}
    assert CommittedFile.of(whole).rows == 3

"""Delta and Iceberg as destinations: one commit at the end, whatever was killed when; read by their own libraries."""

from __future__ import annotations

import datetime
import decimal
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

import fct
from fct.backfilling.journal import Journal
from fct.errors import BackfillError, FctError
from fct.gallery import open_source
from fct.gallery.committed_files import CommittedFile, CommittedFiles
from fct.gallery.delta_destination import DeltaDestination
from fct.gallery.iceberg_destination import IcebergDestination
from tests.gallery.new_tables import D_NEW, D_OLD, QUICK, ROWS, Delta, Iceberg, Killed, dies, gallery, plain, same

deltalake = pytest.importorskip("deltalake")
sql = pytest.importorskip("pyiceberg.catalog.sql", exc_type=ImportError)


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=16, side_info=False)


@pytest.fixture(params=[Delta, Iceberg], ids=["delta", "iceberg"])
def new(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return request.param(tmp_path)


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

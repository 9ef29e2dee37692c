"""Columns of odd types, files of few rows or none, and places with odd names: mapped, or refused in words."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling import run, second_files
from fct.errors import BackfillError, FctError
from fct.gallery import open_source, vector_array
from tests.backfilling.conftest import D_NEW, D_OLD, D_SIDE

N, BAD = 100, 3
QUICK: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 50, "batch_rows": 20}


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=32, side_info=False)


@pytest.fixture
def rows(rng: np.random.Generator) -> Any:
    """Vectors of which row BAD is rejected."""
    found = rng.standard_normal((N, D_OLD), dtype=np.float32)
    found[BAD, 1] = np.nan
    return found


def put(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=30)


def stored(folder: Path) -> pa.Table:
    gallery = open_source(folder)
    batches = [batch for piece in gallery.pieces() for batch in gallery.read(piece, 0, piece.rows, 1000)]
    return pa.Table.from_batches([b.replace_schema_metadata(None) for b in batches])


def plain_ids(table: pa.Table) -> pa.Array:
    ids = table["id"].combine_chunks()
    return ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids


IDS: dict[str, Callable[[], pa.Array]] = {
    "dictionary": lambda: pa.array([f"a{i % 7}" for i in range(N)]).dictionary_encode(),
    "nested": lambda: pa.array([{"a": i, "b": [str(i)]} for i in range(N)]),
    "map": lambda: pa.array([[("a", i)] for i in range(N)], pa.map_(pa.string(), pa.int64())),
    "decimal": lambda: pa.array([decimal.Decimal(i) / 100 for i in range(N)], pa.decimal128(10, 2)),
    "time zone": lambda: pa.array(
        [datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)] * N, pa.timestamp("us", "Europe/Berlin")
    ),
    "unknown time zone": lambda: pa.array(np.arange(N) * 10**12, pa.timestamp("us", "Nowhere/Land")),
    "beyond Python's dates": lambda: pa.array([2**62] * N, pa.timestamp("us")),
    "nanoseconds": lambda: pa.array(np.arange(N) + 1, pa.duration("ns")),
    "binary": lambda: pa.array([b"\xff\x00%d" % i for i in range(N)]),
    "uuid": lambda: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(range(16))] * N, pa.binary(16))),
    "NaN": lambda: pa.array([float("nan")] * N),
    "null": lambda: pa.nulls(N),
    "line breaks": lambda: pa.array(['ü\u2028\n"'] * N),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_any_type_travel_and_are_named_in_rejects(
    kind: str, h: fct.Transformation, tmp_path: Path, rows: Any
) -> None:
    ids = IDS[kind]()
    put(tmp_path / "old/a.parquet", pa.table({"id": ids, "old": vector_array(rows)}))
    report = fct.backfill(tmp_path / "old", tmp_path / "new", h, vector_column="old", **QUICK)
    assert (report.rows_out, report.rejects) == (N - 1, 1)
    verified = fct.verify_gallery(tmp_path / "new", source=tmp_path / "old")
    assert verified.ok, verified.problems
    keep = np.delete(np.arange(N), BAD)
    got, want = plain_ids(stored(tmp_path / "new")), plain_ids(pa.table({"id": ids.take(pa.array(keep))}))
    assert got.type == want.type
    if kind == "NaN":
        assert np.isnan(got.to_numpy()).all()
    else:
        assert got.equals(want)
    (file,) = (tmp_path / "new/_fct/rejects").iterdir()
    (line,) = file.read_text().splitlines()
    named = json.loads(line)
    assert (named["row"], named["reason"]) == (BAD, "old: not finite")
    if kind == "beyond Python's dates":
        assert named["id"] == f"{2**62} (timestamp[us])"


@pytest.mark.parametrize("format", ["parquet", "arrow", "npy"])
def test_a_dictionary_that_changes_from_batch_to_batch(
    format: Any, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Arrow file can add to a dictionary and not replace it; a stream can do both."""
    vectors = vector_array(rng.standard_normal((N, D_OLD), dtype=np.float32))
    schema = pa.schema({"id": pa.dictionary(pa.int32(), pa.string()), "old": vectors.type})
    (tmp_path / "old").mkdir()
    names = [f"item {i % 37}" for i in range(N)]
    with pa.ipc.new_stream(tmp_path / "old/a.arrow", schema) as writer:
        for i in range(0, N, 10):
            ids = pa.array(names[i : i + 10][::-1]).dictionary_encode()
            columns = [pa.DictionaryArray.from_arrays(ids.indices.take(pa.array(range(9, -1, -1))), ids.dictionary)]
            writer.write_batch(pa.RecordBatch.from_arrays([*columns, vectors.slice(i, 10)], schema=schema))
    fct.backfill(tmp_path / "old", tmp_path / "new", h, format=format, **QUICK)
    if format == "npy":
        files = sorted((tmp_path / "new/_rows").glob("*.parquet"))
        got = [name for f in files for name in pq.read_table(f)["id"].to_pylist()]
    else:
        got = stored(tmp_path / "new")["id"].to_pylist()
    assert got == names
    if format == "arrow":  # batch by batch, in this thread
        monkeypatch.setattr(second_files, "_dataset", lambda *where: pytest.fail(f"read by pyarrow.dataset: {where}"))
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "old").proven


def test_what_a_dictionary_says_is_part_of_the_input(h: fct.Transformation, tmp_path: Path, rows: Any) -> None:
    """The same rows over other entries are other rows; the file's size does not tell."""
    file, new = tmp_path / "old/a.parquet", tmp_path / "new"

    def write(letter: str) -> None:
        ids = pa.array([f"{letter}{i % 7}" for i in range(N)]).dictionary_encode()
        put(file, pa.table({"id": ids, "old": vector_array(rows)}))

    write("a")
    size = file.stat().st_size
    fct.backfill(tmp_path / "old", new, h, **QUICK)
    (new / "_fct/done/00000001.json").unlink()
    write("b")
    os.utime(file, ns=(1, 1))
    assert file.stat().st_size == size
    with pytest.raises(BackfillError, match="changed since this backfill began"):
        fct.backfill(tmp_path / "old", new, h, **QUICK)


@pytest.mark.parametrize("vectors", ["large_list", "large_binary"])
def test_vectors_behind_64_bit_offsets(vectors: str, h: fct.Transformation, tmp_path: Path, rows: Any) -> None:
    if vectors == "large_list":
        column = pa.array(rows.tolist(), pa.large_list(pa.float32()))
    else:
        column = pa.array([row.tobytes() for row in rows], pa.large_binary())
    put(tmp_path / "old/a.parquet", pa.table({"id": np.arange(N), "old": column}))
    report = fct.backfill(tmp_path / "old", tmp_path / "new", h, **QUICK)
    assert (report.rows_out, report.rejects) == (N - 1, 1)
    want = fct.transform_batch(np.delete(rows, BAD, 0), None, h)
    column = stored(tmp_path / "new")["old"].combine_chunks()
    got = np.stack([np.frombuffer(v, np.float32) if isinstance(v, bytes) else v for v in column.to_pylist()])
    np.testing.assert_array_equal(got.astype(np.float32), want)


def test_columns_that_can_not_be_told_apart_or_hold_no_vectors_are_refused(
    h: fct.Transformation, tmp_path: Path, rows: Any
) -> None:
    ids, old = pa.array(np.arange(N)), vector_array(rows)
    cases: list[tuple[pa.Table, str]] = [
        (pa.Table.from_arrays([ids, ids, old], ["id", "id", "old"]), r"expected columns with names of.*'id' twice"),
        (pa.Table.from_arrays([ids, old, old], ["id", "old", "old"]), r"expected columns with names of.*'old' twice"),
        (
            pa.table(
                {"id": ids, "old": pa.array(np.nan_to_num(rows * 9).astype(np.int64).tolist(), pa.list_(pa.int64()))}
            ),
            r"vector_column: expected a list of float.*got id \(int64\), old \(list<element: int64>\)",
        ),
    ]
    for table, message in cases:
        put(tmp_path / "old/a.parquet", table)
        with pytest.raises((BackfillError, ValueError), match=message):
            fct.backfill(tmp_path / "old", tmp_path / "new", h, **QUICK)
    assert not (tmp_path / "new").exists()


def test_a_column_without_a_name_travels(h: fct.Transformation, tmp_path: Path, rows: Any) -> None:
    put(tmp_path / "old/a.parquet", pa.table({"": np.arange(N), "вектор 🙂": vector_array(rows)}))
    fct.backfill(tmp_path / "old", tmp_path / "new", h, **QUICK)
    table = stored(tmp_path / "new")
    assert table.schema.names == ["", "вектор 🙂"]
    assert table[""].to_pylist() == [i for i in range(N) if i != BAD]


def test_files_and_row_groups_of_no_row_and_of_one(h: fct.Transformation, tmp_path: Path, rows: Any) -> None:
    table = pa.table({"id": np.arange(N), "old": vector_array(rows)})
    source = tmp_path / "old"
    put(source / "0.parquet", table.slice(0, 0))
    put(source / "1.parquet", table.slice(0, 1))
    with pq.ParquetWriter(source / "2.parquet", table.schema) as writer:
        for start, count in ((0, 0), (1, 1), (2, 0), (2, 40), (42, 0), (42, 50), (0, 0)):
            writer.write_table(table.slice(start, count))
    for i in range(92, N):
        put(source / f"{i}.parquet", table.slice(i, 1))
    put(source / "200.parquet", table.slice(0, 0))
    report = fct.backfill(source, tmp_path / "new", h, **QUICK)
    assert (report.rows_in, report.rejects) == (N, 1)
    assert stored(tmp_path / "new")["id"].to_pylist() == [i for i in range(N) if i != BAD]
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "old").proven


# ---- places ----


@pytest.fixture
def old(tmp_path: Path, rows: Any) -> Path:
    put(tmp_path / "old/a.parquet", pa.table({"id": np.arange(N), "old": vector_array(rows)}))
    return tmp_path / "old"


@pytest.mark.parametrize(
    "name",
    ["sp ace é漢字", "per%20cent", "hash#tag", "qu?estion", "br[ack]et", "star*", "co::lon", "x:y", "back\\slash",
     "{curly}", "new\nline", "$HOME", "amp&;", "'\""],
)  # fmt: skip
def test_a_folder_may_be_called_anything(name: str, h: fct.Transformation, tmp_path: Path, old: Path) -> None:
    (tmp_path / name).mkdir()
    (old / "a.parquet").rename(tmp_path / name / f"{name}.parquet")
    report = fct.backfill(tmp_path / name, tmp_path / f"{name} new", h, **QUICK)
    assert (report.rows_in, report.rejects) == (N, 1)
    verified = fct.verify_gallery(tmp_path / f"{name} new", trust_journal=True)
    assert (verified.ok, verified.spot_checked > 0) == (True, True), verified.problems
    assert {p.name for p in tmp_path.iterdir()} == {"old", name, f"{name} new"}


def test_a_pattern_is_still_one(h: fct.Transformation, tmp_path: Path, old: Path) -> None:
    shutil.copy(old / "a.parquet", old / "b.parquet")
    shutil.copy(old / "a.parquet", old / "c.parquet")
    assert fct.backfill(old / "[ab].parq*", tmp_path / "new", h, **QUICK).rows_in == 2 * N


def test_a_destination_in_the_source_or_around_it_is_refused(
    h: fct.Transformation, tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(old)
    monkeypatch.chdir(tmp_path)
    for where, message in (
        (old, "expected another place than the source"),
        (old / "../old", "expected another place than the source"),
        (tmp_path / "link", "expected another place than the source"),
        ("old/", "expected another place than the source"),
        (old / "new", "expected a place apart from the source .* inside the source"),
        (old / "_new", "expected a place apart from the source .* inside the source"),
        (tmp_path / "link/new", "expected a place apart from the source .* inside the source"),
        (tmp_path, "expected a place apart from the source .* around the source"),
    ):
        with pytest.raises(ValueError, match=f"^destination: {message}"):
            fct.backfill(old, where, h, **QUICK)
    assert [p.name for p in old.iterdir()] == ["a.parquet"]
    assert {p.name for p in tmp_path.iterdir()} == {"old", "link"}
    with pytest.raises(ValueError, match=r"^destination: .* inside the source$"):
        fct.backfill(old / "**", old / "new2", h, **QUICK)
    # A name that only begins like the source's is another place, and so is a folder that a pattern does not reach.
    assert fct.backfill(old, tmp_path / "old2", h, **QUICK).rows_in == N
    assert fct.backfill(old / "*.parquet", old / "new", h, **QUICK).rows_in == N


def test_a_destination_is_not_the_side_informations_place(h: fct.Transformation, tmp_path: Path, old: Path) -> None:
    with_side = fct.Transformation.random(D_OLD, D_SIDE, D_NEW, inner=32)
    (tmp_path / "side").mkdir()
    np.save(tmp_path / "side/a.npy", np.ones((N, D_SIDE), np.float32))
    with pytest.raises(ValueError, match=r"^destination: expected another place than the side_source"):
        fct.backfill(old, tmp_path / "side", with_side, side_source=tmp_path / "side", **QUICK)


def test_what_is_no_file_or_no_folder_is_named(h: fct.Transformation, tmp_path: Path, old: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text").write_text("x")
    for where in (tmp_path / "text", tmp_path / "text/new"):
        with pytest.raises(NotADirectoryError, match=r"^destination: expected a folder.*text is a file$"):
            fct.backfill(old, where, h, **QUICK)
    odd = old / "odd.parquet"
    for make, message in (
        (lambda: odd.symlink_to(tmp_path / "nowhere"), "odd.parquet is a link to nothing"),
        (lambda: odd.symlink_to(tmp_path / "elsewhere"), "odd.parquet is a link to a folder, which is not followed"),
        (lambda: os.mkfifo(odd), r"expected files, .*odd.parquet is none \(a pipe"),
    ):
        make()
        with pytest.raises(FctError, match=message):
            fct.backfill(old, tmp_path / "new", h, **QUICK)
        odd.unlink()
    odd.symlink_to(old / "a.parquet")  # a link to a file is one
    (old / ".hidden.parquet").write_text("x")
    (old / "_temporary").mkdir()
    (old / "_temporary/b.parquet").write_text("x")
    with pytest.raises(
        FctError, match=r"a job of Spark, Hadoop or Hive that has not ended: .*_temporary holds b.parquet"
    ):
        fct.backfill(old, tmp_path / "new", h, **QUICK)
    (old / "_temporary/b.parquet").unlink()
    assert fct.backfill(old, tmp_path / "new", h, **QUICK).rows_in == 2 * N


def test_moved_galleries_go_on_and_say_where_they_are(h: fct.Transformation, tmp_path: Path, old: Path) -> None:
    fct.backfill(old, tmp_path / "new", h, **QUICK)
    (tmp_path / "new/_fct/done/00000001.json").unlink()
    old.rename(tmp_path / "old2")
    (tmp_path / "new").rename(tmp_path / "new2")
    report = fct.backfill(tmp_path / "old2", tmp_path / "new2", h, **QUICK)
    assert (report.shards_done, report.destination) == (1, str(tmp_path / "new2"))
    verified = fct.verify_gallery(tmp_path / "new2", source=tmp_path / "old2")
    assert (verified.ok, verified.spot_check_skipped, verified.destination) == (True, "", str(tmp_path / "new2"))
    assert verified.spot_checked > 0


@pytest.mark.parametrize("damage", [b"{", b"", b"[1]", b"\xff\xfe"])
def test_a_damaged_manifest_is_a_problem_and_is_written_again(
    damage: bytes, h: fct.Transformation, tmp_path: Path, old: Path
) -> None:
    fct.backfill(old, tmp_path / "new", h, **QUICK)
    manifest = tmp_path / "new/_fct/manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(damage)
    (problem,) = fct.verify_gallery(tmp_path / "new").problems
    assert "manifest.json is damaged" in problem
    assert fct.backfill(old, tmp_path / "new", h, **QUICK).shards_done == 0
    assert manifest.read_bytes() == whole
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "old").proven


@pytest.mark.parametrize("event", ["is new", "is gone", "changed"])
def test_input_that_changes_meanwhile_is_no_finished_backfill(
    event: str, h: fct.Transformation, tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once everything is mapped: nobody would miss the rows of a file that came too late."""
    file, new = old / "b.parquet", tmp_path / "new"
    if event != "is new":
        shutil.copy(old / "a.parquet", file)

    def happen() -> None:
        if event == "is gone":
            file.rename(tmp_path / "aside")
        elif event == "changed":
            os.utime(file, ns=(1, 1))
        else:
            shutil.copy(old / "a.parquet", file)

    def undo() -> None:
        if event == "is gone":
            (tmp_path / "aside").rename(file)
        elif event == "is new":
            file.unlink()

    from fct.backfilling.resume import finish

    def late(*arguments: Any, **how: Any) -> Any:
        happen()
        return finish(*arguments, **how)

    monkeypatch.setattr(run, "finish", late)
    with pytest.raises(BackfillError, match=rf"^source: b.parquet {event}, while the gallery was read"):
        fct.backfill(old, new, h, **QUICK)
    assert not (new / "_fct/manifest.json").exists()
    monkeypatch.setattr(run, "finish", finish)
    undo()
    assert fct.backfill(old, new, h, **QUICK).shards_done == 0
    assert fct.verify_gallery(new, source=old).proven

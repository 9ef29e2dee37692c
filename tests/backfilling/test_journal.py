"""A gallery's journal is somebody else's input: what is damaged or hostile in it is named, and leads nowhere."""

from __future__ import annotations

import collections
import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import fct
from fct.atomic_files import checksum_bytes
from fct.backfilling.marker import Marker
from fct.backfilling.run import backfill
from fct.errors import BackfillError, InUseError
from tests.backfilling.conftest import QUICK, contents

Make = Callable[..., Path]


@pytest.fixture
def finished(gallery: Make, h: fct.Transformation, tmp_path: Path) -> tuple[Path, Path]:
    source = gallery(900, bad=(5, 700))
    fct.backfill(source, tmp_path / "new", h, **QUICK)
    return source, tmp_path / "new"


def change(file: Path, **values: Any) -> None:
    body = json.loads(file.read_text())
    body.pop("xxh64", None)  # as version 0.1 wrote it: nothing but the content itself to go by
    file.write_text(json.dumps({**body, **values}))


def change_marker(file: Path, **values: Any) -> None:
    body = json.dumps({**json.loads(json.loads(file.read_text())["marker"]), **values})
    file.write_text(json.dumps({"marker": body, "xxh64": checksum_bytes(body.encode())}))


WRONG: dict[str, Any] = {
    "no object": b"[1]",
    "nothing": b"",
    "cut short": b'{"job": 1',
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a huge number": b'{"job": ' + b"9" * 10_000 + b"}",
    "NaN": b'{"job": NaN}',
    "another version": b'{"job": 2}',
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_job_is_one_error_that_names_the_file_and_says_what_to_do(
    name: str, finished: tuple[Path, Path], h: fct.Transformation
) -> None:
    source, new = finished
    before = contents(new)
    (new / "_fct/job.json").write_bytes(WRONG[name])
    for use in (lambda: fct.verify_gallery(new), lambda: fct.backfill(source, new, h, **QUICK)):
        with pytest.raises(BackfillError, match=r"new/_fct/job\.json is not a job.*Restore the file from a copy"):
            use()
    assert contents(new) == before


VALUES: dict[str, tuple[str, Any]] = {
    "shard_rows": ("shard_rows: expected a whole number from 1", 0),
    "batch_rows": ("batch_rows: expected a whole number from 1", -1),
    "scale": ("scale: expected a number", "1"),
    "keep_side": ("keep_side: expected true or false", 1),
    "dtype": ("dtype: expected one of float32, float16", "object"),
    "vector": ("vector: expected text", ["old"]),
    "pieces": ("pieces: expected a list", {}),
    "new_space": (r"new_space\.dim: expected a whole number", {"model_id": "x", "dim": 1e9}),
    "surprise": ("'surprise' is no name of it", 1),
    "passes": ("more files in an earlier pass", [[9, 0]]),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_value_of_a_job_is_checked(name: str, finished: tuple[Path, Path]) -> None:
    message, value = VALUES[name]
    change(finished[1] / "_fct/job.json", **{name: value})
    with pytest.raises(BackfillError, match=message):
        fct.verify_gallery(finished[1])


def test_a_changed_job_is_known_by_its_checksum(finished: tuple[Path, Path]) -> None:
    file = finished[1] / "_fct/job.json"
    file.write_text(file.read_text().replace('"batch_rows": 128', '"batch_rows": 129'))
    with pytest.raises(BackfillError, match="does not match its checksum"):
        fct.verify_gallery(finished[1])


@pytest.mark.parametrize("what", ["groups", "groups that hold other rows", "shard_rows", "fewer shards", "order"])
def test_no_changed_number_makes_a_run_keep_other_rows(
    what: str, finished: tuple[Path, Path], h: fct.Transformation
) -> None:
    source, new = finished
    file = new / "_fct/job.json"
    pieces = json.loads(file.read_text())["pieces"]
    if what == "groups":
        pieces[0]["groups"] = [100, pieces[0]["rows"] - 100]
    elif what == "groups that hold other rows":
        pieces[0]["groups"] = [1]
    change(
        file,
        pieces=list(reversed(pieces)) if what == "order" else pieces,
        shard_rows={"shard_rows": 100, "fewer shards": 5000}.get(what, 300),
    )
    try:
        fct.backfill(source, new, h, **QUICK)
    except BackfillError:
        return
    ids = collections.Counter(i for f in sorted(new.glob("*.parquet")) for i in pq.read_table(f)["id"].to_pylist())
    assert set(ids.values()) == {1}
    assert len(ids) == 898
    assert fct.verify_gallery(new, source=source).ok


def test_a_marker_of_other_rows_is_not_believed(finished: tuple[Path, Path], h: fct.Transformation) -> None:
    source, new = finished
    before = contents(new)
    change_marker(new / "_fct/done/00000001.json", start=0)
    (problem,) = (p for p in fct.verify_gallery(new).problems if p.startswith("shard 1 "))
    assert "was made of rows from 0 on of file 0, not of 2" in problem
    assert fct.backfill(source, new, h, **QUICK).shards_done == 1
    assert contents(new) == before


def test_a_marker_of_a_shard_that_the_job_does_not_have_is_refused(
    finished: tuple[Path, Path], h: fct.Transformation
) -> None:
    source, new = finished
    shutil.copy(new / "_fct/done/00000001.json", new / "_fct/done/00000099.json")
    with pytest.raises(BackfillError, match=r"00000099\.json names shard 99, and the job in .* has 4"):
        fct.backfill(source, new, h, **QUICK)


HUGE = {"10^12 shards": {"shard_rows": 1, "rows": 10**12}, "10^17 rows": {"shard_rows": 1, "rows": 10**17}}


@pytest.mark.parametrize("name", HUGE)
def test_numbers_without_end_end_at_once(name: str, finished: tuple[Path, Path]) -> None:
    file = finished[1] / "_fct/job.json"
    pieces = json.loads(file.read_text())["pieces"]
    pieces[0] |= {"groups": [], "rows": HUGE[name]["rows"]}
    change(file, pieces=pieces, shard_rows=HUGE[name]["shard_rows"])
    start = time.perf_counter()
    with pytest.raises(BackfillError, match=r"expected at most 2,000,000 shards"):
        fct.verify_gallery(finished[1])
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "name", ["../" * 20 + "dev/zero", "/dev/zero", "a/../../x", "", "a//b", "x\0", "C:\\x", "pipe"]
)
def test_a_marker_names_files_inside_the_gallery_alone(name: str, finished: tuple[Path, Path]) -> None:
    new = finished[1]
    os.mkfifo(new / "pipe")
    output = {"name": name, "bytes": 0, "xxh64": "0" * 16}
    file = new / "_fct/done/00000000.json"
    outputs = json.loads(json.loads(file.read_text())["marker"])["outputs"]
    change_marker(file, outputs=[*outputs, output])
    start = time.perf_counter()
    problems = fct.verify_gallery(new).problems
    assert any(p.startswith("shard 0 ") for p in problems)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "what", ["_fct", "_fct/done", "_fct/rejects", "_fct/parts", "_fct/lock", "_fct/job.json", "_fct/manifest.json"]
)
def test_no_link_of_a_gallery_is_followed(
    what: str, finished: tuple[Path, Path], h: fct.Transformation, tmp_path: Path
) -> None:
    source, new = finished
    outside, link = tmp_path / "outside", new / what
    if link.exists():
        link.rename(outside)
    else:
        outside.mkdir()
    (outside if outside.is_dir() else tmp_path).joinpath("precious.txt").write_text("precious")
    link.symlink_to(outside)
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    with pytest.raises(BackfillError, match=f"new/{what} is a link"):
        fct.backfill(source, new, h, **QUICK)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before


def test_a_lock_that_is_a_hard_link_overwrites_nothing(h: fct.Transformation, gallery: Make, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "new/_fct").mkdir(parents=True)
    os.link(tmp_path / "precious", tmp_path / "new/_fct/lock")
    with pytest.raises(BackfillError, match="also a file of another name"):
        fct.backfill(gallery(), tmp_path / "new", h, **QUICK)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_lock_that_is_no_file_is_named(kind: str, h: fct.Transformation, gallery: Make, tmp_path: Path) -> None:
    (tmp_path / "new/_fct").mkdir(parents=True)
    make = os.mkfifo if kind == "pipe" else os.mkdir
    make(tmp_path / "new/_fct/lock")
    with pytest.raises(BackfillError, match=r"_fct/lock is none"):
        fct.backfill(gallery(), tmp_path / "new", h, **QUICK)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_held_by_a_heartbeat(
    code: int, h: fct.Transformation, gallery: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def none(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    new, source = tmp_path / "new", gallery()
    (new / "_fct").mkdir(parents=True)
    held = {"who": "process 1 on far", "time": time.time()}
    (new / "_fct/lock").write_text(json.dumps(held))
    with pytest.raises(InUseError, match="being written by process 1 on far"):
        fct.backfill(source, new, h, **QUICK)
    (new / "_fct/lock").write_text(json.dumps(held | {"time": time.time() + 9999}))
    with pytest.raises(InUseError, match=r"ahead of this machine's clock.*remove .*_fct/lock"):
        fct.backfill(source, new, h, **QUICK)
    (new / "_fct/lock").write_text(json.dumps(held | {"time": time.time() - 99}))
    assert fct.backfill(source, new, h, **QUICK).rows_out == 3000
    assert not (new / "_fct/lock").exists()


@pytest.mark.parametrize("damage", [b"", b"[", b'{"who": 1}', b'{"who": "x", "time": "soon"}', b"x" * 10_000])
def test_what_is_no_lock_is_replaced(damage: bytes, h: fct.Transformation, gallery: Make, tmp_path: Path) -> None:
    from fct.backfilling.lock import _heartbeat
    from fct.gallery import location_of

    (tmp_path / "_fct").mkdir()
    (tmp_path / "_fct/lock").write_bytes(damage)
    with _heartbeat(location_of(tmp_path / "_fct/lock"), "new"):
        assert "process" in json.loads((tmp_path / "_fct/lock").read_text())["who"]


def test_rejects_are_checked(finished: tuple[Path, Path], h: fct.Transformation) -> None:
    source, new = finished
    file = new / "_fct/rejects/part-00000000.jsonl"
    whole = file.read_bytes()
    for damage, message in (
        (whole.replace(b'"row": 5', b'"row": 6'), "does not match its checksum"),
        (whole + b"\n", "has .* bytes, expected"),
    ):
        file.write_bytes(damage)
        assert any(p.startswith("shard 0 ") for p in fct.verify_gallery(new).problems), message
    rows = json.loads(whole)
    for value in (901, -1, "5", None, 2**70):
        line = (json.dumps(rows | {"row": value}) + "\n").encode()
        file.write_bytes(line)
        rejected = {"name": "rejects/part-00000000.jsonl", "bytes": len(line), "xxh64": checksum_bytes(line)}
        change_marker(new / "_fct/done/00000000.json", rejected=rejected)
        (problem,) = fct.verify_gallery(new).problems
        assert "part-00000000.jsonl is damaged: line 1.row: expected a whole number from 0 to" in problem
    shutil.rmtree(new / "_fct/done")
    assert fct.backfill(source, new, h, **QUICK).shards_done > 1
    assert file.read_bytes() == whole


def test_the_input_checksum_does_not_depend_on_batches(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source = gallery(900)
    found = []
    for batch_rows in (7, 128, 4096):
        new = tmp_path / f"new{batch_rows}"
        backfill(source, new, h, progress=False, shard_rows=300, batch_rows=batch_rows)
        markers = [Marker.from_json(f.read_bytes()) for f in sorted((new / "_fct/done").glob("*.json"))]
        found.append([m.input for m in markers if m])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == len(found[0])


def test_markers_say_which_rows_they_are_of(finished: tuple[Path, Path]) -> None:
    markers = [Marker.from_json(f.read_bytes()) for f in sorted((finished[1] / "_fct/done").glob("*.json"))]
    starts = np.cumsum([0] + [m.rows_in for m in markers if m and m.piece == 0])
    assert [m.start for m in markers if m and m.piece == 0] == starts[:-1].tolist()
    assert np.sum([m.rows_in for m in markers if m]) == 900


@pytest.mark.parametrize("store", ["", "memory:/"])
def test_a_file_of_the_journal_may_have_its_largest_size_and_not_a_byte_more(store: str, tmp_path: Path) -> None:
    from fct.backfilling.journal import Journal
    from fct.gallery.location import location_of

    (tmp_path / "new/_fct").mkdir(parents=True)
    journal = Journal(location_of(f"{store}{tmp_path}/new/_fct"), location_of(f"{store}{tmp_path}/new"))
    journal.inside("manifest.json").write_bytes(b"x" * 100)
    assert journal.read("manifest.json", 100) == b"x" * 100
    assert journal.read("manifest.json", 100, 100) == b"x" * 100
    with pytest.raises(BackfillError, match=r"manifest\.json is larger than 99 bytes: no backfill wrote it; remove it"):
        journal.read("manifest.json", 99)


@pytest.mark.parametrize("name", ["shard_rows", "batch_rows"])
def test_a_job_without_rows_in_a_shard_is_refused_and_one_row_is_enough(name: str, finished: tuple[Path, Path]) -> None:
    import dataclasses

    from fct.backfilling.job import Job

    job = Job.from_json((finished[1] / "_fct/job.json").read_bytes(), "job.json")
    values: dict[str, Any] = {name: 1}
    dataclasses.replace(job, **values).require_sound()
    values = {name: 0}
    with pytest.raises(BackfillError, match="shard_rows, batch_rows: expected at least 1, got"):
        dataclasses.replace(job, **values).require_sound()


def test_markers_in_a_store_without_folders_are_found() -> None:
    """An object store knows names alone: the shards' numbers are read off them, whole, and nothing else counts."""
    from fct.backfilling.journal import Journal
    from fct.gallery.location import location_of

    new = location_of("memory://marked")
    journal = Journal(new / "_fct", new)
    assert journal.marked() == []
    for name in ("00000003.json", "00000012.json", "notes.json", "00000004.json.part"):
        (journal.root / "done" / name).write_bytes(b"{}")
    assert journal.marked() == [3, 12]
    assert journal.marker(3) is None, "no whole one"

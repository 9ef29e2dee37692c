"""A gallery in whose folder nothing but data lies: its journal is elsewhere (``--journal``)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling.claim import claimed_by, take_claim
from fct.backfilling.journal import Journal
from fct.gallery import location_of, open_source

N, D = 60, 8
QUICK: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 20}


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(16, 16, D, inner=32, side_info=False)


def old_gallery(folder: Path, *names: str, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for i, name in enumerate(names or ("a.parquet",)):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(N * 16, dtype=np.float32)), 16)
        pq.write_table(pa.table({"id": np.arange(N) + 1000 * i, "embedding": vectors}), folder / name, 20)
    return folder


def names_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def polars(folder: Path, form: Any) -> list[int]:
    read = pytest.importorskip("polars")
    frame = read.scan_parquet(folder) if form == "parquet" else read.scan_ipc(folder)
    return [int(i) for i in frame.collect()["id"].to_list()]


def datasets(folder: Path, form: Any) -> list[int]:
    load = pytest.importorskip("datasets").load_dataset
    rows = load(str(folder), cache_dir=str(folder.parent / "cache"))["train"]
    return [int(i) for i in rows["id"]]


def daft(folder: Path, form: Any) -> list[int]:
    if form != "parquet":
        pytest.skip("daft reads no Arrow files")
    return [int(i) for i in pytest.importorskip("daft").read_parquet(str(folder)).to_pydict()["id"]]


@pytest.fixture(scope="module", params=["parquet", "arrow"])
def new(request: pytest.FixtureRequest, h: fct.Transformation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    old_gallery(root / "old")
    fct.backfill(root / "old", root / "new", h, format=request.param, journal=root / "j", **QUICK)
    return root


def form_of(root: Path) -> Any:
    return next(p.suffix[1:] for p in (root / "new").iterdir())


def test_nothing_but_data_lies_there(new: Path) -> None:
    assert names_in(new / "new") == {f"part-{i:08d}.{form_of(new)}" for i in range(3)}


@pytest.mark.parametrize("read", [polars, datasets, daft])
def test_the_folder_itself_opens(read: Any, new: Path) -> None:
    assert sorted(read(new / "new", form_of(new))) == list(range(N))


def test_readers_know_its_space_and_refuse_another_model(new: Path, h: fct.Transformation) -> None:
    assert open_source(new / "new").space == h.new_space
    with pytest.raises(fct.SpaceMismatchError, match=r"already holds vectors of .*random-new"):
        fct.backfill(new / "new", new / "third", h, progress=False)


def test_verify_wants_its_journal(new: Path) -> None:
    assert fct.verify_gallery(new / "new", source=new / "old", journal=new / "j", progress=False).proven
    with pytest.raises(fct.BackfillError, match=r"has no job\.json"):
        fct.verify_gallery(new / "new", source=new / "old")


def test_a_finished_job_started_again_does_nothing(new: Path, h: fct.Transformation) -> None:
    before = {p: p.stat().st_mtime_ns for p in (new / "new").iterdir()}
    report = fct.backfill(new / "old", new / "new", h, format=form_of(new), journal=new / "j", **QUICK)
    assert (report.shards_done, report.shards_kept) == (0, 3)
    assert {p: p.stat().st_mtime_ns for p in (new / "new").iterdir()} == before


def test_search_plan_and_upgrading_gallery(new: Path, h: fct.Transformation) -> None:
    how: dict[str, Any] = {"old_model": "random-old", "journal": new / "j", "shard_rows": 20, "format": form_of(new)}
    plan = fct.plan_backfill(new / "old", new / "new", h, **how)
    assert not plan.refusals
    gallery = fct.UpgradingGallery(new / "old", new / "new", h, **how)
    assert gallery.done() == 1.0
    queries = np.random.default_rng(3).standard_normal((4, D), dtype=np.float32)
    want = fct.topk(queries, fct.gallery.load_vectors(new / "new"), 5)
    np.testing.assert_array_equal(gallery.topk(queries, 5).indices, want.indices)


def test_another_job_is_refused_whatever_its_journal(new: Path, h: fct.Transformation, tmp_path: Path) -> None:
    other = old_gallery(tmp_path / "other", seed=1)
    form, to = form_of(new), new / "new"
    with pytest.raises(fct.BackfillError, match=r"expected an empty folder or a backfill to continue, .* holds part-"):
        fct.backfill(other, to, h, format=form, journal=tmp_path / "j2", **QUICK)
    with pytest.raises(fct.BackfillError, match=r"expected an empty folder or a backfill to continue, .* holds part-"):
        fct.backfill(other, to, h, format=form, **QUICK)
    with pytest.raises(fct.BackfillError, match=r"is the journal of .*new, not of .*elsewhere"):
        fct.backfill(other, tmp_path / "elsewhere", h, format=form, journal=new / "j", **QUICK)
    assert names_in(to) == {f"part-{i:08d}.{form}" for i in range(3)}


def test_a_moved_gallery_takes_its_journal_in(h: fct.Transformation, tmp_path: Path) -> None:
    old_gallery(tmp_path / "old")
    fct.backfill(tmp_path / "old", tmp_path / "new", h, journal=tmp_path / "j", **QUICK)
    (tmp_path / "new").rename(tmp_path / "moved")
    with pytest.raises(fct.BackfillError, match=r"the journal belongs in it, as .*moved/_fct"):
        fct.backfill(tmp_path / "old", tmp_path / "moved", h, journal=tmp_path / "j", **QUICK)
    (tmp_path / "j").rename(tmp_path / "moved" / "_fct")
    assert fct.backfill(tmp_path / "old", tmp_path / "moved", h, **QUICK).shards_kept == 3
    assert fct.verify_gallery(tmp_path / "moved", source=tmp_path / "old", progress=False).proven


@pytest.mark.parametrize(
    ("journal", "words"),
    [
        ("new/j", "expected a folder apart from the destination"),
        ("old/j", "journal: expected a place apart from the source"),
        ("mine", "journal: expected an empty folder, .* holds letter.txt"),
    ],
)
def test_a_journal_lies_apart(journal: str, words: str, h: fct.Transformation, tmp_path: Path) -> None:
    old_gallery(tmp_path / "old")
    (tmp_path / "mine" / "parts").mkdir(parents=True)
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises((ValueError, fct.BackfillError), match=words):
        fct.backfill(tmp_path / "old", tmp_path / "new", h, journal=tmp_path / journal, **QUICK)
    assert names_in(tmp_path / "mine") - {"lock"} == {"parts", "letter.txt"}
    assert (
        not [n for n in names_in(tmp_path / "new") if n.endswith(".parquet")] if (tmp_path / "new").exists() else True
    )


@pytest.mark.parametrize("form", ["npy", "bin", "lance", "delta"])
def test_formats_that_are_read_with_their_journal_are_refused(form: Any, h: fct.Transformation, tmp_path: Path) -> None:
    pytest.importorskip({"lance": "lance", "delta": "deltalake"}.get(form, "numpy"))
    with pytest.raises(ValueError, match=f"journal: expected None with format {form}"):
        fct.backfill(old_gallery(tmp_path / "old"), tmp_path / "new", h, format=form, journal=tmp_path / "j", **QUICK)
    assert not (tmp_path / "new").exists()


_RUN = """
import sys, time, fct
from fct.gallery.parquet_files import ParquetDestination
write = ParquetDestination.write
def slow(self, shard, *more):
    if shard.number == 1:
        print("one is done", flush=True)
        time.sleep(60)
    return write(self, shard, *more)
ParquetDestination.write = slow
fct.backfill(*sys.argv[1:4], journal=sys.argv[4], old_model="random-old", progress=False, shard_rows=20)
"""


def test_a_killed_job_is_unfinished_to_all_and_is_gone_on_with(h: fct.Transformation, tmp_path: Path) -> None:
    old, to, j = old_gallery(tmp_path / "old"), tmp_path / "new", tmp_path / "j"
    h.save(tmp_path / "h.safetensors")
    command = [sys.executable, "-c", _RUN, str(old), str(to), str(tmp_path / "h.safetensors"), str(j)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "one is done\n"
        until = time.monotonic() + 20
        while not (j / "done/00000000.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(fct.InUseError):
            fct.backfill(old, to, h, journal=j, **QUICK)
        run.send_signal(signal.SIGKILL)
    with pytest.raises(fct.FctError, match=r"unfinished backfill"):
        open_source(to)
    with pytest.raises(fct.FctError, match=r"unfinished backfill"):
        open_source(to / "*.parquet")
    with pytest.raises(fct.BackfillError, match=r"unfinished backfill with its journal at .*j.*--journal"):
        fct.backfill(old, to, h, **QUICK)
    with pytest.raises(fct.BackfillError, match=r"unfinished backfill with its journal at .*j.*--journal"):
        fct.verify_gallery(to, source=old)
    with pytest.raises(fct.BackfillError, match=r"unfinished backfill with its journal at .*j"):
        fct.backfill(old, to, h, journal=tmp_path / "j2", **QUICK)
    assert "unfinished" in str(fct.verify_gallery(to, source=old, journal=j, progress=False).problems)
    report = fct.backfill(old, to, h, journal=j, **QUICK)
    assert report.shards_kept >= 1
    assert report.rows_out == N
    assert names_in(to) == {f"part-{i:08d}.parquet" for i in range(3)}
    assert fct.verify_gallery(to, source=old, journal=j, progress=False).proven


def test_one_of_two_journals_gets_the_folder(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    journals = [Journal(location_of(tmp_path / n), location_of(tmp_path / "new"), apart=True) for n in ("a", "b")]
    assert take_claim(journals[0])
    assert not take_claim(journals[0])
    with pytest.raises(fct.BackfillError, match=r"is an unfinished backfill with its journal at .*a"):
        take_claim(journals[1])


def test_a_claim_that_somebody_made_leads_nowhere(h: fct.Transformation, tmp_path: Path) -> None:
    """It is somebody's input: shown escaped, and never followed."""
    old, outside = old_gallery(tmp_path / "old"), tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "_fct").symlink_to(outside)
    with pytest.raises(fct.BackfillError, match=r"is a link"):
        fct.backfill(old, tmp_path / "new", h, journal=tmp_path / "j", **QUICK)
    (tmp_path / "new" / "_fct").unlink()
    (tmp_path / "new" / "_fct").mkdir()
    claim = tmp_path / "new" / "_fct" / "job.json"
    claim.write_text('{"key": "' + "0" * 32 + '", "journal": "\\u001b[31mred"}')
    assert claimed_by(location_of(tmp_path / "new")) == ("0" * 32, "\x1b[31mred")
    with pytest.raises(fct.BackfillError) as caught:
        fct.backfill(old, tmp_path / "new", h, journal=tmp_path / "j", **QUICK)
    assert "\x1b" not in str(caught.value)
    assert not list(outside.iterdir())


def test_what_comes_later_follows(h: fct.Transformation, tmp_path: Path) -> None:
    old, how = old_gallery(tmp_path / "old", "a.parquet"), {"journal": tmp_path / "j", **QUICK}
    fct.backfill(old, tmp_path / "new", h, **how)
    old_gallery(tmp_path / "old", "a.parquet", "b.parquet")
    os.utime(old / "a.parquet")
    fct.backfill(old, tmp_path / "new", h, follow=True, **how)
    assert sum(p.rows for p in open_source(tmp_path / "new").pieces()) == 2 * N
    assert fct.verify_gallery(tmp_path / "new", source=old, journal=tmp_path / "j", progress=False).proven
    assert "_fct" not in names_in(tmp_path / "new")


def test_rejects_lie_with_the_journal_on_another_disk(
    h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.ones((N, 16), np.float32)
    vectors[5] = np.nan
    old = tmp_path / "old.parquet"
    pq.write_table(pa.table({"id": range(N), "embedding": vectors.tolist()}), old)
    really = os.replace

    def replace(a: Any, b: Any) -> None:
        if str(tmp_path / "new") in str(a) and str(tmp_path / "j") in str(b):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        really(a, b)

    monkeypatch.setattr(os, "replace", replace)
    report = fct.backfill(old, tmp_path / "new", h, journal=tmp_path / "j", **QUICK)
    assert report.rejects == 1
    assert report.rejects_folder == str(tmp_path / "j" / "rejects")
    assert fct.verify_gallery(tmp_path / "new", source=old, journal=tmp_path / "j", progress=False).proven
    assert "_fct" not in names_in(tmp_path / "new")

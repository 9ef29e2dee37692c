from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct import ref
from fct.backfilling.job import cut_shards
from fct.backfilling.journal import Journal
from fct.backfilling.marker import Marker
from fct.backfilling.run import _UNDER_WAY
from fct.errors import BackfillError, FctError, InUseError, QualityGateError, RejectLimitError
from fct.gallery import Piece, open_source, tag_space, vector_array
from fct.gallery.parquet_files import ParquetDestination
from tests.backfilling.conftest import D_NEW, D_OLD, D_SIDE, QUICK, contents

Make = Callable[..., Path]


def rows_of(folder: Path, column: str = "old") -> tuple[list[str], Any, list[int]]:
    table = pa.concat_tables([pq.read_table(f) for f in sorted(folder.glob("part-*.parquet"))])
    vectors = np.stack(table[column].to_pylist()).astype(np.float32) if len(table) else np.empty((0, 0))
    return table["id"].to_pylist(), vectors, table["tag"].to_pylist()


def test_every_row_is_mapped_in_order_and_payload_travels(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source = gallery(3000, bad=(5, 1700), side_bad=(2999,))
    report = fct.backfill(source, tmp_path / "new", h, **QUICK)
    assert (report.rows_in, report.rows_out, report.rejects) == (3000, 2997, 3)
    # part-2 stands before part-10.
    table = pa.concat_tables([pq.read_table(source / f"part-{i}.parquet") for i in (2, 10)])
    keep = np.ones(3000, bool)
    keep[[5, 1700, 2999]] = False
    table = table.filter(keep)
    ids, vectors, tags = rows_of(tmp_path / "new")
    assert ids == table["id"].to_pylist()
    assert tags == table["tag"].to_pylist()
    want = ref.transform(np.stack(table["old"].to_pylist()), np.stack(table["side"].to_pylist()), h)
    np.testing.assert_allclose(vectors, want, rtol=1e-4, atol=1e-4)
    lines = [
        json.loads(line) for f in sorted(Path(report.rejects_folder).iterdir()) for line in f.read_text().splitlines()
    ]
    assert [(r["id"], r["row"], r["reason"]) for r in lines] == [
        ("item-5", 5, "old: not finite"),
        ("item-1700", 1700, "old: not finite"),
        ("item-2999", 2999, "side-information: not finite"),
    ]
    assert open_source(tmp_path / "new").space == h.new_space
    verified = fct.verify_gallery(tmp_path / "new", source=source)
    assert verified.ok, verified.problems
    assert verified.spot_checked >= 200
    assert verified.worst_error < 1e-5


def test_started_again_redoes_only_what_is_not_proven(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source, new = gallery(), tmp_path / "new"
    fct.backfill(source, new, h, **QUICK)
    before = contents(new)
    (new / "part-00000001.parquet").unlink()
    flipped = bytearray((new / "part-00000002.parquet").read_bytes())
    flipped[200] ^= 4
    (new / "part-00000002.parquet").write_bytes(flipped)
    marker = new / "_fct/done/00000003.json"
    marker.write_bytes(marker.read_bytes()[:-20])
    lying = json.loads((new / "_fct/done/00000004.json").read_text())
    lying["marker"] = lying["marker"].replace('"rejects": 0', '"rejects": 1')
    (new / "_fct/done/00000004.json").write_text(json.dumps(lying))
    problems = fct.verify_gallery(new).problems
    assert len([p for p in problems if p.startswith("shard ")]) == 4
    report = fct.backfill(source, new, h, **QUICK)
    assert report.shards_done == 4
    assert contents(new) == before
    assert fct.verify_gallery(new, source=source).proven


def test_what_must_not_be_mixed_is_refused(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source, new = gallery(), tmp_path / "new"
    fct.backfill(source, new, h, **QUICK)
    other = fct.Transformation.random(D_OLD, D_SIDE, D_NEW, inner=64, seed=1)
    with pytest.raises(BackfillError, match="another transformation"):
        fct.backfill(source, new, other, **QUICK)
    with pytest.raises(BackfillError, match="dtype: 'float32', now 'float16'"):
        fct.backfill(source, new, h, dtype="float16", **QUICK)
    with pytest.raises(fct.SpaceMismatchError, match="wrong direction"):
        fct.backfill(new, tmp_path / "again", h, **QUICK)
    stranger = h.with_(old_space=fct.EmbeddingSpace("clip", D_OLD))
    with pytest.raises(fct.SpaceMismatchError, match=r"expected vectors of 'clip'.*got vectors of 'random-old'"):
        fct.backfill(source, tmp_path / "again", stranger, **QUICK)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(BackfillError, match=r"expected an empty folder.*thesis"):
        fct.backfill(source, tmp_path / "full", h, **QUICK)
    (tmp_path / "deep/2024/_tmp").mkdir(parents=True)
    (tmp_path / "deep/2024/_tmp/a.parquet").write_text("of nobody")
    (tmp_path / "deep/_fct").mkdir()
    assert not fct.plan_backfill(source, tmp_path / "deep", h, measure_seconds=0).refusals
    (tmp_path / "deep/2024/rows.parquet").write_text("mine, and whoever reads the folder would read it")
    with pytest.raises(BackfillError, match=r"expected an empty folder.*deep holds 2024/rows.parquet"):
        fct.backfill(source, tmp_path / "deep", h, **QUICK)
    assert "already holds other files" in fct.plan_backfill(source, tmp_path / "deep", h).refusals[0]
    # Batch size, shard size and threads are not part of the job.
    assert fct.backfill(source, new, h, progress=False, batch_rows=64, shard_rows=99, threads=1).shards_done == 0


def test_vectors_of_another_length_are_refused_before_anything_is_written(
    gallery: Make, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    source, new = gallery(), tmp_path / "new"
    np.save(tmp_path / "silent.npy", np.ones((9, D_OLD), np.float32))
    short = fct.Transformation.random(D_OLD - 1, D_OLD - 1, D_NEW, inner=64, side_info=False)
    with pytest.raises(FctError, match=r"source: expected vectors of 'random-old' \(15-d, l2\), got 16-d"):
        fct.backfill(tmp_path / "silent.npy", new, short, old_model="random-old", **QUICK)
    with pytest.raises(FctError, match=r"side_source: expected 7-d vectors of 'random-side', got 8-d"):
        fct.backfill(source, new, fct.Transformation.random(D_OLD, D_SIDE - 1, D_NEW, inner=64), **QUICK)
    assert not new.exists()
    binary = pa.table({"vector": vector_array(rng.standard_normal((9, D_OLD), dtype=np.float32), "binary")})
    (tmp_path / "binary").mkdir()
    pq.write_table(binary, tmp_path / "binary/a.parquet")
    plain = fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=64, side_info=False)
    plan = fct.plan_backfill(tmp_path / "binary", new, plain, old_model="random-old", binary_dtype="float16")
    assert plan.refusals == (f"source: expected vectors of {plain.old_space}, got 32-d vectors",)


def test_a_run_that_failed_before_its_first_shard_does_not_hold_the_place(
    gallery: Make, h: fct.Transformation, tmp_path: Path
) -> None:
    source, new = gallery(), tmp_path / "new"

    def full(self: Any, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    other = fct.Transformation.random(D_OLD, D_SIDE, D_NEW, inner=64, seed=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParquetDestination, "begin", full)
        with pytest.raises(BackfillError, match=r"could not be begun at .*No space left.*start again"):
            fct.backfill(source, new, other, **QUICK)
    assert (new / "_fct/job.json").exists()
    assert fct.backfill(source, new, h, **QUICK).rows_out == 3000
    assert fct.verify_gallery(new, source=source).proven
    with pytest.raises(FctError, match="holds another backfill"):
        fct.backfill(source, new, other, **QUICK)


def test_a_silent_gallery_must_be_named(tmp_path: Path, rng: np.random.Generator) -> None:
    h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
    source = tmp_path / "old"
    source.mkdir()
    np.save(source / "a.npy", rng.standard_normal((50, 8), dtype=np.float32))
    with pytest.raises(fct.SpaceMismatchError, match=r"does not say which model.*--old-model"):
        fct.backfill(source, tmp_path / "new", h, **QUICK)
    with pytest.raises(fct.SpaceMismatchError, match="got vectors of 'bert'"):
        fct.backfill(source, tmp_path / "new", h, old_model="bert", **QUICK)
    tag_space(source, h.old_space)
    assert fct.backfill(source, tmp_path / "new", h, **QUICK).rows_out == 50


def test_restored_input_goes_on_and_changed_input_is_refused(
    gallery: Make, h: fct.Transformation, tmp_path: Path
) -> None:
    source, new = gallery(), tmp_path / "new"
    fct.backfill(source, new, h, **QUICK)
    before = contents(new)
    (new / "_fct/done/00000000.json").unlink()
    file = source / "part-2.parquet"
    data = file.read_bytes()
    file.write_bytes(data)  # the same bytes, another mtime
    os.utime(file, ns=(1, 1))
    assert fct.backfill(source, new, h, **QUICK).shards_done == 1
    assert contents(new) == before
    table = pq.read_table(file)
    rolled = table.set_column(3, "tag", [np.roll(table["tag"].to_numpy(), 1)]).replace_schema_metadata(
        table.schema.metadata
    )
    pq.write_table(rolled, file, row_group_size=500, write_page_checksum=True)
    with pytest.raises(BackfillError, match=r"changed since this backfill began|\(rows, bytes\)"):
        fct.backfill(source, new, h, **QUICK)


def test_second_process_is_told(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    from fct.backfilling.journal import Journal
    from fct.gallery import location_of

    source, place = gallery(), location_of(tmp_path / "new")
    with (
        Journal(place / "_fct", place).lock(),
        pytest.raises(InUseError, match=f"being written by process {os.getpid()}"),
    ):
        fct.backfill(source, tmp_path / "new", h, **QUICK)
    assert fct.backfill(source, tmp_path / "new", h, **QUICK).rows_out == 3000


def test_max_rejects_stops_and_keeps(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source = gallery(3000, bad=(1, 2, 3))
    with pytest.raises(RejectLimitError, match="at most 2 rejected rows, got 3"):
        fct.backfill(source, tmp_path / "new", h, max_rejects=2, **QUICK)
    assert fct.backfill(source, tmp_path / "new", h, max_rejects=3, **QUICK).shards_kept > 0


def test_a_row_that_its_scale_makes_infinite_is_rejected(tmp_path: Path) -> None:
    rows = np.ones((50, D_OLD), np.float32)
    rows[7, 2] = 1e30
    np.save(tmp_path / "old.npy", rows)
    h = fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=64, side_info=False)
    report = fct.backfill(tmp_path / "old.npy", tmp_path / "new", h, old_model="random-old", scale=1e10, **QUICK)
    assert (report.rows_out, report.rejects) == (49, 1)
    (file,) = (tmp_path / "new/_fct/rejects").iterdir()
    assert json.loads(file.read_text())["reason"] == "vector: not finite"


def test_quality_gate_and_plan(gallery: Make, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator) -> None:
    source = gallery(bad=(0,))
    old, side = (rng.standard_normal((200, d), dtype=np.float32) for d in (D_OLD, D_SIDE))
    pairs = {"old": old, "side": side, "new": fct.transform_batch(old, side, h)}
    plan = fct.plan_backfill(
        source, tmp_path / "new", h, pairs=pairs, min_recall=0.99, measure_seconds=0.02, price_per_hour=3.6, workers=2
    )
    assert plan.refusals == ()
    assert plan.quality is not None
    assert plan.quality.recall_at_10 == 1.0
    assert plan.rows == 3000
    assert plan.bytes_out == 3000 * D_NEW * 4
    assert plan.reject_reasons == {"old: not finite": 1}
    assert plan.cost_per_billion_rows == pytest.approx(1e9 / plan.rows_per_second / 1000)
    assert plan.seconds == pytest.approx(3000 / plan.rows_per_second / 2)
    assert plan.scores is not None
    assert plan.scores.threshold(plan.scores.old[3]) == pytest.approx(plan.scores.new[3])
    assert not (tmp_path / "new").exists()
    pairs["new"] = rng.standard_normal((200, D_NEW), dtype=np.float32)
    bad = fct.plan_backfill(source, tmp_path / "new", h, pairs=pairs, min_recall=0.9, measure_seconds=0.02)
    assert "below 0.9" in bad.gate_refusals[0]
    with pytest.raises(QualityGateError, match="recall@10"):
        fct.backfill(source, tmp_path / "new", h, pairs=pairs, min_recall=0.9, **QUICK)
    assert not (tmp_path / "new").exists()


def test_full_disk_and_lost_permission_are_named(
    gallery: Make, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fct.gallery.location import Location

    source, new = gallery(), tmp_path / "new"
    publish, calls = Location.publish, []

    def full(self: Location, part: Path) -> None:
        calls.append(part)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        publish(self, part)

    monkeypatch.setattr(Location, "publish", full)
    with pytest.raises(BackfillError, match=r"No space left on device.*start again"):
        fct.backfill(source, new, h, retries=0, **QUICK)
    monkeypatch.setattr(Location, "publish", publish)
    report = fct.backfill(source, new, h, **QUICK)
    assert report.shards_kept >= 3
    fct.backfill(source, tmp_path / "plain", h, **QUICK)
    assert contents(new) == contents(tmp_path / "plain")


def test_what_a_lost_worker_left_half_written_is_taken_away(
    gallery: Make, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, sweep, left = tmp_path / "new", Journal.sweep, []

    def lost(self: Journal) -> None:
        for name in (".part-00.parquet.k3.part", "_fct/done/.000001.json.k3.part", "_fct/parts/k3/part-00.parquet"):
            left.append(new / name)
            left[-1].parent.mkdir(parents=True, exist_ok=True)
            left[-1].write_bytes(b"half")
        sweep(self)

    source = gallery()
    monkeypatch.setattr(Journal, "sweep", lost)
    fct.backfill(source, new, h, **QUICK)
    monkeypatch.undo()
    assert left
    assert not [path for path in left if path.exists()]
    fct.backfill(source, tmp_path / "plain", h, **QUICK)
    assert contents(new) == contents(tmp_path / "plain")


def test_damaged_input_is_named_and_resumable(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source, new = gallery(), tmp_path / "new"
    fct.backfill(source, tmp_path / "plain", h, **QUICK)
    file = source / "part-10.parquet"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    column = pq.read_metadata(file).row_group(1).column(1)
    flipped[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(fct.FctError, match=r"part-10.parquet is damaged"):
        fct.backfill(source, new, h, **QUICK)
    file.write_bytes(whole[:-100])
    with pytest.raises(fct.FctError, match=r"part-10.parquet"):
        fct.backfill(source, new, h, **QUICK)
    file.write_bytes(whole)
    assert fct.backfill(source, new, h, **QUICK).rows_out == 3000
    assert contents(new) == contents(tmp_path / "plain")


def test_upgrading_gallery_answers_the_same_throughout(
    gallery: Make, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    source, new = gallery(3000, bad=(7,)), tmp_path / "new"
    options = {k: v for k, v in QUICK.items() if k != "progress"}
    live = fct.UpgradingGallery(source, new, h, **options)
    queries = rng.standard_normal((5, D_NEW), dtype=np.float32)
    before = live.topk(queries, 9)
    with pytest.raises(fct.SpaceMismatchError, match="queries"):
        live.topk(queries, 9, query_space=h.old_space)
    fct.backfill(source, new, h, **QUICK)
    (new / "_fct/done/00000002.json").unlink()  # half way
    between, keep = live.topk(queries, 9), np.delete(np.arange(3000), 7)
    stored = rows_of(new)[1]
    want = fct.topk(queries, stored, 9)
    for got in (before, between):
        np.testing.assert_array_equal(got.indices, keep[want.indices])
        np.testing.assert_array_equal(got.distances, want.distances)
    assert live.done() == pytest.approx(1 - 1 / len(live._job.shards))
    fct.backfill(source, new, h, **QUICK)
    assert live.done() == 1
    at_the_end = live.topk(queries, 9)
    np.testing.assert_array_equal(at_the_end.indices, keep[want.indices])
    np.testing.assert_array_equal(at_the_end.distances, want.distances)


def test_rolling_back_is_deleting_the_new_folder(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source = gallery()
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in source.rglob("*")}
    fct.backfill(source, tmp_path / "new", h, **QUICK)
    assert {p.name for p in tmp_path.iterdir()} == {"old", "new"}
    shutil.rmtree(tmp_path / "new")
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in source.rglob("*")} == before
    assert fct.backfill(source, tmp_path / "new", h, **QUICK).shards_kept == 0


def test_another_backend_may_go_on(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    """The backend is not in the fingerprint: the halves of two backends agree within the precision's tolerance."""
    source, new = gallery(), tmp_path / "new"
    fct.backfill(source, new, h, precision="fp32", backend="cpu", **QUICK)
    whole = rows_of(new)[1]
    for number in (1, 4, 8):
        (new / f"_fct/done/{number:08d}.json").unlink()
    report = fct.backfill(source, new, h, precision="fp32", backend="torch", **QUICK)
    assert (report.shards_done, report.backend) == (3, "torch")
    np.testing.assert_allclose(rows_of(new)[1], whole, rtol=1e-4, atol=1e-5)
    verified = fct.verify_gallery(new, source=source)
    assert verified.ok, verified.problems


@pytest.mark.parametrize("slow", ["reading", pytest.param("writing", marks=pytest.mark.slow)])
def test_the_plan_counts_reading_and_writing(
    slow: str, gallery: Make, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fct.gallery.parquet_files import ParquetDestination, ParquetSource

    source = gallery()
    read, write = ParquetSource.read_file, ParquetDestination.write_file

    def reading(self: Any, *args: Any) -> Any:
        for batch in read(self, *args):
            time.sleep(batch.num_rows / 20_000)
            yield batch

    def writing(self: Any, path: Path, shard: Any, *args: Any) -> None:
        write(self, path, shard, *args)
        time.sleep(shard.rows / 20_000)

    if slow == "reading":
        monkeypatch.setattr(ParquetSource, "read_file", reading)
    else:
        monkeypatch.setattr(ParquetDestination, "write_file", writing)
    plan = fct.plan_backfill(source, tmp_path / "new", h, measure_seconds=0.1, sample_rows=64)
    assert plan.binds == slow
    assert 2_000 < plan.rows_per_second < 20_000
    assert plan.h_rows_per_second > 20_000
    assert plan.seconds == pytest.approx(3000 / plan.rows_per_second)


def test_the_plan_counts_a_stated_upload(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source = gallery()
    quick: dict[str, Any] = {"measure_seconds": 0.05, "sample_rows": 64}
    here = fct.plan_backfill(source, tmp_path / "new", h, **quick)
    assert (here.upload_left_out, here.upload_rows_per_second) == (False, None)
    silent = fct.plan_backfill(source, "memory://new", h, **quick)
    assert silent.upload_left_out
    assert silent.binds != "uploading"
    slow = fct.plan_backfill(source, "memory://new", h, upload_mb_per_s=0.1, **quick)
    assert not slow.upload_left_out
    assert slow.binds == "uploading"
    assert slow.rows_per_second == slow.upload_rows_per_second
    assert slow.seconds == pytest.approx(3000 / slow.rows_per_second)
    # What travels is files with every column, not only vectors.
    fct.backfill(source, tmp_path / "new", h, **QUICK)
    written = sum(f.stat().st_size for f in (tmp_path / "new").glob("*.parquet"))
    assert slow.upload_rows_per_second == pytest.approx(0.1e6 / (written / 3000), rel=0.7)
    assert slow.upload_rows_per_second < 0.1e6 / (4 * D_NEW)
    fast = fct.plan_backfill(source, "memory://new", h, upload_mb_per_s=1e6, **quick)
    assert fast.binds != "uploading"
    assert fast.rows_per_second > 10 * slow.rows_per_second
    for wrong in (0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="upload_mb_per_s: expected a positive number"):
            fct.plan_backfill(source, "memory://new", h, upload_mb_per_s=wrong)


def test_shards_cover_every_row_once() -> None:
    random.seed(0)
    for _ in range(200):
        pieces = []
        for i in range(random.randint(1, 4)):
            groups = tuple(random.randint(0, 40) for _ in range(random.randint(1, 5)))
            pieces.append(Piece(str(i), sum(groups), 0, "", groups))
        size = random.randint(1, 30)
        shards = cut_shards(pieces, size)
        assert [s.number for s in shards] == list(range(len(shards)))
        at = dict.fromkeys(range(len(pieces)), 0)
        first = 0
        for s in shards:
            assert (s.start, s.first) == (at[s.piece], first)
            assert 0 < s.rows <= 2 * size
            at[s.piece] += s.rows
            first += s.rows
        assert at == {i: p.rows for i, p in enumerate(pieces)}


def test_a_changed_marker_is_not_believed() -> None:
    marker = Marker(1, "f", 10, 9, 1, "00", (), None, "cpu")
    data = marker.to_json()
    assert Marker.from_json(data) == marker
    for i in range(0, len(data), 7):
        torn = bytearray(data)
        torn[i] ^= 1
        assert Marker.from_json(bytes(torn)) != marker or Marker.from_json(bytes(torn)) is None
        assert Marker.from_json(data[:i]) is None


def _child(source: str, new: str, path: str, log: str) -> None:
    """One run, which writes down each shard as it begins to read it."""
    from fct.backfilling.pipeline import ShardReader

    batches = ShardReader.batches

    def logged(self: Any, shard: Any) -> Any:
        with open(log, "a") as file:
            file.write(f"{shard.number}\n")
        yield from batches(self, shard)

    ShardReader.batches = logged  # type: ignore[assignment, method-assign]  # in this process alone
    fct.backfill(source, new, path, progress=False, shard_rows=300, batch_rows=64, threads=1)


@pytest.mark.slow
def test_twenty_kills_leave_the_bytes_of_an_undisturbed_run(
    gallery: Make, h: fct.Transformation, tmp_path: Path
) -> None:
    source, new, path = gallery(5000, bad=(100, 4000)), tmp_path / "new", tmp_path / "h.safetensors"
    h.save(path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fct.backfilling.run", "fct.ops.transform.cpu_backend", "pyarrow.parquet"])

    log = tmp_path / "begun"

    def run(target: Path, kill_after: float | None = None) -> tuple[float, bool]:
        log.write_text("")
        process = context.Process(target=_child, args=(str(source), str(target), str(path), str(log)))
        start = time.perf_counter()
        process.start()
        process.join(kill_after)
        if kill_after is not None and process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return time.perf_counter() - start, process.exitcode != 0

    run(tmp_path / "warm")
    whole, _ = run(tmp_path / "plain")
    random.seed(int(time.time()))
    kills = redone = 0
    while kills < 20:
        before = {p.name: p.read_bytes() for p in (new / "_fct/done").glob("[0-9]*.json")}
        took, killed = run(new, random.uniform(0.1, 0.9) * whole)
        if not killed:  # the undisturbed run may have met a slow moment, and kills that come too late prove nothing
            whole = min(whole, took)
        after = {p.name: p.read_bytes() for p in (new / "_fct/done").glob("[0-9]*.json")}
        redone += sum(after.get(name) != data for name, data in before.items())  # a proven shard stays as it is
        begun = log.read_text().split()
        assert len(begun) == len(set(begun))
        assert not {f"{int(n):08d}.json" for n in begun} & set(before)
        assert sum(f"{int(n):08d}.json" not in after for n in begun) <= _UNDER_WAY  # all that a kill can cost
        kills += killed
        if (new / "_fct/manifest.json").exists():
            assert contents(new) == contents(tmp_path / "plain")
            shutil.rmtree(new)
    run(new)
    assert redone == 0
    assert contents(new) == contents(tmp_path / "plain")
    verified = fct.verify_gallery(new, source=source)
    assert verified.ok, verified.problems
    assert verified.rejects == 2


def lists_of(lengths: list[int], rng: np.random.Generator) -> pa.Array:
    return pa.array([rng.standard_normal(n).astype(np.float32) for n in lengths], pa.list_(pa.float32()))


def test_a_gallery_in_which_no_sampled_row_fits_is_refused_as_the_plan_refuses_it(
    h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Vectors of another length, where the column's type does not tell it, and rows that are bad one and all."""
    n, source, new = 3000, tmp_path / "old", tmp_path / "new"
    source.mkdir()
    side = vector_array(rng.standard_normal((n, D_SIDE), dtype=np.float32))
    hollow = pa.array([None] * n, pa.list_(pa.float32()))
    for old, message in (
        (lists_of([D_OLD + 4] * n, rng), r"source: expected vectors of 'random-old' \(16-d, l2\), got 20-d vectors"),
        (hollow, "source: every row of the sample would be rejected: old: null"),
    ):
        pq.write_table(pa.table({"old": old, "side": side}), source / "a.parquet", row_group_size=250)
        plan = fct.plan_backfill(source, new, h, old_model="random-old", measure_seconds=0.01)
        assert [re.fullmatch(message, why) is not None for why in plan.refusals] == [True]
        with pytest.raises(BackfillError, match=f"^{message}$"):
            fct.backfill(source, new, h, old_model="random-old", **QUICK)
        assert not new.exists()


@pytest.mark.parametrize("good", [[2999], list(range(600, 3000))])
def test_a_gallery_of_which_only_some_rows_are_bad_is_not_refused(
    good: list[int], h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The first runs of the sample hold bad rows only: it is the others that tell."""
    n, source, new = 3000, tmp_path / "old", tmp_path / "new"
    source.mkdir()
    lengths = [D_OLD if i in set(good) else D_OLD + 4 for i in range(n)]
    side = vector_array(rng.standard_normal((n, D_SIDE), dtype=np.float32))
    pq.write_table(pa.table({"old": lists_of(lengths, rng), "side": side}), source / "a.parquet", row_group_size=250)
    assert fct.plan_backfill(source, new, h, old_model="random-old", measure_seconds=0.01).refusals == ()
    report = fct.backfill(source, new, h, old_model="random-old", **QUICK)
    assert (report.rows_out, report.rejects) == (len(good), n - len(good))
    shutil.rmtree(new / "_fct/done")
    assert fct.backfill(source, new, h, old_model="random-old", **QUICK).rows_out == len(good)


def test_the_number_of_a_row_stands_before_its_vector(tmp_path: Path, rng: np.random.Generator) -> None:
    np.save(tmp_path / "old.npy", rng.standard_normal((20, D_OLD), dtype=np.float32))
    h = fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=16, side_info=False)
    fct.backfill(tmp_path / "old.npy", tmp_path / "new", h, old_model="random-old", format="parquet", **QUICK)
    table = pq.read_table(tmp_path / "new/part-00000000.parquet")
    assert table.column_names[0] == "row"
    assert table.num_columns == 2
    assert table["row"].to_pylist() == list(range(20))


def test_a_space_may_have_one_dimension(tmp_path: Path, rng: np.random.Generator) -> None:
    np.save(tmp_path / "old.npy", rng.standard_normal((20, D_OLD), dtype=np.float32))
    h = fct.Transformation.random(D_OLD, D_OLD, 1, inner=16, side_info=False)
    fct.backfill(tmp_path / "old.npy", tmp_path / "new", h, old_model="random-old", **QUICK)
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "old.npy").proven

"""verify proves it from outside: each way in which rows get lost, injected behind a journal that agrees, is found by
comparing with the source."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.atomic_files import checksum_bytes
from fct.errors import BackfillError
from fct.fit.precision_choice import calibrate
from fct.gallery import open_source
from tests.backfilling.conftest import D_NEW, D_OLD, QUICK

Make = Callable[..., Path]
N = 600


def files(new: Path) -> list[Path]:
    return sorted(new.glob("part-*.parquet"))


def seal(new: Path) -> None:
    """Markers and manifest that agree with whatever the files are now: what only a look outside can tell."""
    total = 0
    for number, file in enumerate(files(new)):
        path = new / f"_fct/done/{number:08d}.json"
        body = json.loads(json.loads(path.read_text())["marker"])
        data, rows = file.read_bytes(), pq.read_metadata(file).num_rows
        body["outputs"] = [{"name": file.name, "bytes": len(data), "xxh64": checksum_bytes(data)}]
        total += rows
        text = json.dumps(body, sort_keys=True)
        path.write_text(json.dumps({"marker": text, "xxh64": checksum_bytes(text.encode())}))


def edit(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(file)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), file)


def taken(*order: int) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.take([*order, *range(len(order), len(table))])

    return change


def column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        i = table.schema.get_field_index(name)
        values = pa.array(change(table.column(name).to_pylist()), table.schema.field(i).type)
        return table.set_column(i, table.schema.field(i), values)

    return changed


def swapped(values: list[Any]) -> list[Any]:
    return [values[1], values[0], *values[2:]]


EDITS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "two rows swapped": (taken(1, 0), r"column 'id' differs from the source's, first in row 0: 'item-0' in the source"),
    "a row doubled, another dropped": (taken(0, 0), r"column 'id' differs from the source's, first in row 1"),
    "ids swapped": (column("id", swapped), r"column 'id' differs from the source's, first in row 0"),
    "payload changed": (column("tag", lambda v: [*v[:7], v[7] + 1, *v[8:]]), r"column 'tag' differs .* in row 7: "),
    "payload swapped": (column("tag", lambda v: v[::-1]), "column 'tag' differs"),
    "vectors swapped": (column("old", swapped), r"standard deviations of what rounding to (fp32|bf16|int8) explains"),
    "a vector changed": (column("old", lambda v: [[x * 1.5 for x in v[0]], *v[1:]]), "standard deviations of what"),
    "a column lost": (lambda t: t.drop_columns(["tag"]), "column 'tag' of the source is not in the result"),
}


@pytest.fixture
def pair(gallery: Make, h: fct.Transformation, tmp_path: Path) -> tuple[Path, Path]:
    source = gallery(N)
    fct.backfill(source, tmp_path / "new", h, progress=False, shard_rows=200, batch_rows=64)
    return source, tmp_path / "new"


@pytest.mark.parametrize("kind", EDITS)
def test_a_result_that_is_not_the_source_is_found(kind: str, pair: tuple[Path, Path]) -> None:
    source, new = pair
    change, message = EDITS[kind]
    assert fct.verify_gallery(new, source=source).proven
    for file in files(new) if kind == "a column lost" else files(new)[:1]:
        edit(file, change)
    seal(new)
    report = fct.verify_gallery(new, source=source)
    assert not report.ok
    assert any(re.search(message, p) for p in report.problems), report.problems


def test_shard_files_that_are_exchanged_are_found(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source, new = gallery(N), tmp_path / "new"
    fct.backfill(source, new, h, progress=False, shard_rows=100, batch_rows=64)
    sizes = [pq.read_metadata(f).num_rows for f in files(new)]
    a, b = next((i, j) for i in range(len(sizes)) for j in range(i + 1, len(sizes)) if sizes[i] == sizes[j])
    one, two = files(new)[a], files(new)[b]
    one.rename(new / "x"), two.rename(one), (new / "x").rename(two)
    assert any("does not match its checksum" in p or "bytes, expected" in p for p in fct.verify_gallery(new).problems)
    seal(new)
    assert any("column 'id' differs" in p for p in fct.verify_gallery(new, source=source).problems)


@pytest.mark.parametrize("kind", ["dropped", "doubled", "a foreign file", "a file gone"])
def test_rows_that_do_not_add_up_are_found(kind: str, pair: tuple[Path, Path]) -> None:
    source, new = pair
    if kind == "dropped":
        edit(files(new)[0], lambda t: t.slice(1))
    elif kind == "doubled":
        edit(files(new)[0], lambda t: pa.concat_tables([t, t.slice(0, 1)]))
    elif kind == "a foreign file":
        shutil.copy(files(new)[0], new / "part-99999999.parquet")
    else:
        files(new)[0].unlink()
    if kind in ("dropped", "doubled"):
        seal(new)
    report = fct.verify_gallery(new, source=source)
    words = {"dropped": "its shard wrote", "doubled": "its shard wrote", "a foreign file": "was made by no shard"}
    assert any(words.get(kind, "is missing") in p for p in report.problems), report.problems


@pytest.mark.parametrize("kind", ["grown", "shrunk", "another file", "gone"])
def test_the_source_is_counted_by_another_reader(kind: str, pair: tuple[Path, Path]) -> None:
    source, new = pair
    file = source / "part-2.parquet"
    if kind == "grown":
        shutil.copy(file, source / "part-3.parquet")
    elif kind == "shrunk":
        edit(file, lambda t: t.slice(1))
    elif kind == "another file":
        file.rename(source / "part-1.parquet")
    else:
        file.unlink()
    problems = fct.verify_gallery(new, source=source).problems
    found = {"grown": "part-3.parquet has 307 rows in the source, none of them was read"}
    assert any(found.get(kind, "part-2.parquet") in p for p in problems), problems


def test_a_reader_that_reads_every_piece_from_one_file_is_found(
    gallery: Make, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fct 0.1 read ``g/*/emb.npy``: right counts everywhere, and one file's rows in place of the other's."""
    from fct.gallery.file_gallery import FileSource

    source = tmp_path / "old"
    source.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(source / f"{name}.npy", rng.standard_normal((50, D_OLD)).astype(np.float32))
    plain = fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=32, side_info=False)
    with monkeypatch.context() as patched:
        patched.setattr(FileSource, "file_of", lambda self, piece: self.files[-1])
        fct.backfill(source, tmp_path / "new", plain, old_model="random-old", **QUICK)
    report = fct.verify_gallery(tmp_path / "new", source=source)
    assert report.problems[0].endswith("was made of other rows than numpy reads in the source now"), report.problems


def test_without_a_source_it_says_what_was_not_proven(pair: tuple[Path, Path]) -> None:
    source, new = pair
    report = fct.verify_gallery(new)
    assert (report.ok, report.proven, report.source_rows, report.spot_checked) == (True, False, None, 0)
    (why,) = report.unproven
    assert why.startswith("not proven: that the gallery holds all rows of its source, with their ids, payload and vec")
    assert f"only the gallery's journal names it ({source})" in why
    source.rename(source.with_name("elsewhere"))
    (why,) = fct.verify_gallery(new, trust_journal=True).unproven
    assert "found nothing at" in why
    assert fct.verify_gallery(new, source=source.with_name("elsewhere")).proven


def test_the_journals_source_is_never_opened_unasked(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from fct.backfilling import new_gallery, verify

    opened: list[str] = []
    real = open_source

    def watched(where: Any, **how: Any) -> Any:
        opened.append(str(where))
        return real(where, **how)

    for module in (verify, new_gallery):
        monkeypatch.setattr(module, "open_source", watched)
    source, new = pair
    assert fct.verify_gallery(new).ok
    assert set(opened) == {str(new)}
    assert fct.verify_gallery(new, trust_journal=True).proven
    assert str(source) in opened


@pytest.mark.parametrize("rows", [N, N - 1])
def test_the_users_own_count_is_held_against_it(
    rows: int, gallery: Make, h: fct.Transformation, tmp_path: Path
) -> None:
    source, new = gallery(N), tmp_path / "new"
    if rows != N:
        with pytest.raises(BackfillError, match="expect_rows: expected 599 rows, the source has 600"):
            fct.backfill(source, new, h, expect_rows=rows, **QUICK)
        assert not new.exists()
        fct.backfill(source, new, h, **QUICK)
        (problem,) = fct.verify_gallery(new, source=source, expect_rows=rows).problems
        assert problem == "expected 599 rows by your own count, the source had 600"
    else:
        fct.backfill(source, new, h, expect_rows=rows, **QUICK)
        assert fct.verify_gallery(new, source=source, expect_rows=rows).proven


def _inputs(rng: np.random.Generator) -> tuple[Any, Any]:
    old, side = (rng.standard_normal((512, d), dtype=np.float32) for d in (D_OLD, 8))
    return old, side


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bounds_are_calculated_for_the_jobs_own_precision(
    precision: Any, dtype: Any, gallery: Make, tmp_path: Path, rng: np.random.Generator
) -> None:
    source, new = gallery(N), tmp_path / "new"
    h = calibrate(fct.Transformation.random(D_OLD, 8, D_NEW, inner=64), *_inputs(rng))
    fct.backfill(source, new, h, precision=precision, dtype=dtype, **QUICK)
    report = fct.verify_gallery(new, source=source, deep=True)
    assert report.proven, report
    assert report.spot_checked == N


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_of_a_gpu_is_no_key_error(
    precision: Any, pair: tuple[Path, Path], h: fct.Transformation, rng: np.random.Generator
) -> None:
    from dataclasses import replace

    from fct.backfilling.spot_check import VectorChecker
    from fct.backfilling.verify import gallery_journal
    from fct.gallery import open_source

    source, new = pair
    journal, job = gallery_journal(new)
    coarse = replace(job, precision=precision, backend="torch" if precision == "fp16" else "triton")
    h = calibrate(h, *_inputs(rng))
    checker = VectorChecker(journal, coarse, open_source(source), None, open_source(new), h)
    found = checker.run(100, seed=0, deep=False)
    assert (found.rows >= 100, found.problems) == (True, [])


def test_checksums_of_columns_do_not_depend_on_the_cut(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source = gallery(N)
    found = []
    for shard_rows in (50, 300):
        fct.backfill(source, tmp_path / f"{shard_rows}", h, progress=False, shard_rows=shard_rows, batch_rows=64)
        found.append(fct.verify_gallery(tmp_path / f"{shard_rows}", source=source).checksums)
    assert found[0] == found[1]
    assert set(found[0]) == {"id", "tag"}


@pytest.mark.parametrize("form", ["npy", "arrow", "parquet", "bin", "lance"])
def test_every_format_is_compared_with_its_source(
    form: Any, h: fct.Transformation, gallery: Make, tmp_path: Path
) -> None:
    source = gallery(N, bad=(3, 100, 599))
    new = tmp_path / ("new.lance" if form == "lance" else "new")
    fct.backfill(source, new, h, format=form, **QUICK)
    report = fct.verify_gallery(new, source=source)
    assert report.proven, report
    assert (report.source_rows, report.compared, report.rejects) == (N, N - 3, 3)


def test_a_marker_behind_the_last_shard_is_named(pair: tuple[Path, Path]) -> None:
    _, new = pair
    shards = len(files(new))
    shutil.copy(new / "_fct/done/00000000.json", new / f"_fct/done/{shards:08d}.json")
    problems = fct.verify_gallery(new).problems
    assert f"the journal has a marker of shard {shards}, the job has {shards}" in problems


@pytest.mark.parametrize("lost", [20, 22])
def test_twenty_lost_shards_are_named_and_the_others_counted(
    lost: int, gallery: Make, h: fct.Transformation, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    fct.backfill(gallery(N), new, h, progress=False, shard_rows=24, batch_rows=64)
    for number in range(lost):
        (new / f"_fct/done/{number:08d}.json").unlink()
    problems = fct.verify_gallery(new).problems
    assert len([p for p in problems if re.fullmatch(r"shard \d+ has no whole marker", p)]) == 20
    more = [p for p in problems if "more shards like these" in p]
    assert more == ([] if lost == 20 else ["and 2 more shards like these"])


def test_rejects_and_bytes_of_all_shards_are_added_up(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    new = tmp_path / "new"
    fct.backfill(gallery(N, bad=(3, 100, 599)), new, h, progress=False, shard_rows=100, batch_rows=64)
    report = fct.verify_gallery(new)
    assert (report.rows_in, report.rows_out, report.rejects) == (N, N - 3, 3)
    assert report.bytes == sum(file.stat().st_size for file in files(new))
    assert report.shards == len(files(new)) > 3

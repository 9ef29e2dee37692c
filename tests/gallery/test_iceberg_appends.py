"""Appends to Iceberg tables: beside the rows of others, into partitions, and what is refused and left as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError
from fct.gallery import location_of, open_source
from fct.gallery.iceberg_destination import IcebergDestination
from tests.gallery.new_tables import COLUMNS, D_NEW, D_OLD, QUICK, ROWS, Iceberg, gallery, made, plain, same


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=16, side_info=False)


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

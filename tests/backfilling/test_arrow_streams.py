"""Arrow streams from Python as the gallery: datasets, tables, and functions that make a stream anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError
from fct.gallery import open_source
from tests.backfilling.conftest import QUICK, contents

Make = Callable[..., Path]


def rows_of(folder: Path) -> pa.Table:
    return ds.dataset(sorted(str(f) for f in folder.glob("*.parquet"))).to_table()


def sources(folder: Path) -> dict[str, object]:
    """The same rows in the order of the ids, by several libraries."""
    table = ds.dataset(folder, format="parquet").to_table().sort_by("id")
    pq.write_table(table, folder.parent / "sorted.parquet", row_group_size=700)
    one = str(folder.parent / "sorted.parquet")
    found: dict[str, object] = {"dataset": ds.dataset(one), "table": table, "reader": lambda: table.to_reader(613)}
    duckdb = pytest.importorskip("duckdb")
    found["duckdb"] = lambda: duckdb.connect().sql(f"SELECT * FROM '{one}' ORDER BY id")
    polars = pytest.importorskip("polars")
    found["polars"] = polars.scan_parquet(one).sort("id").collect
    return found


@pytest.mark.parametrize("kind", ["dataset", "table", "reader", "duckdb", "polars"])
def test_a_stream_is_mapped_as_its_rows_in_a_file_are(
    gallery: Make, tmp_path: Path, h: fct.Transformation, kind: str
) -> None:
    source = sources(gallery(9000))[kind]
    fct.backfill(str(tmp_path / "sorted.parquet"), tmp_path / "want", h, **QUICK)
    fct.backfill(source, tmp_path / "got", h, old_model="random-old", **QUICK)
    want, got = rows_of(tmp_path / "want"), rows_of(tmp_path / "got")
    assert got["id"].cast(pa.string()).equals(want["id"].cast(pa.string()))
    assert got["tag"].equals(want["tag"])
    vectors = [pc.list_flatten(t["old"].combine_chunks()).to_numpy() for t in (want, got)]
    assert (vectors[0] == vectors[1]).all()
    found = fct.verify_gallery(tmp_path / "got", source=source)
    assert found.ok, found


def test_a_reader_that_is_read_once_is_refused_by_name(gallery: Make, tmp_path: Path, h: fct.Transformation) -> None:
    table = ds.dataset(gallery(), format="parquet").to_table()
    with pytest.raises(
        FctError, match=r"RecordBatchReader may be read once only.*pass a function that makes a new one"
    ):
        fct.backfill(table.to_reader(), tmp_path / "new", h, **QUICK)
    reader = table.to_reader()
    with pytest.raises(FctError, match=r"from row 0 on.*make a new stream at each call"):
        fct.backfill(lambda: reader, tmp_path / "new", h, **QUICK)


def test_a_connection_that_has_one_result_open_at_a_time(gallery: Make, tmp_path: Path, h: fct.Transformation) -> None:
    duckdb = pytest.importorskip("duckdb")
    one = ds.dataset(gallery(9000), format="parquet").to_table().sort_by("id")
    connection = duckdb.connect()
    connection.register("t", one)
    fct.backfill(
        lambda: connection.sql("SELECT * FROM t ORDER BY id"), tmp_path / "got", h, old_model="random-old", **QUICK
    )
    assert rows_of(tmp_path / "got")["id"].to_pylist() == one["id"].to_pylist()
    held = pa.RecordBatchReader.from_stream(connection.sql("SELECT * FROM t"))
    with pytest.raises(FctError, match=r"cannot be read: .*give each a connection of its own, .*cursor\(\)"):
        open_source(lambda: connection.sql("SELECT * FROM t")).schema  # noqa: B018
    held.close()


@pytest.mark.parametrize("change", ["one value", "one row less", "one row more", "order"])
def test_other_rows_at_the_second_reading_are_refused_before_they_are_handed_on(gallery: Make, change: str) -> None:
    table = ds.dataset(gallery(8192), format="parquet").to_table()
    late = table.slice(8000).set_column(3, "tag", pa.array([99] * 192, pa.int64()))
    other = {
        "one value": pa.concat_tables([table.slice(0, 8000), late]),
        "one row less": table.slice(0, 8191),
        "one row more": pa.concat_tables([table, table.slice(0, 1)]),
        "order": pa.concat_tables([table.slice(0, 8000), table.slice(8100), table.slice(8000, 100)]),
    }[change]
    now = [table]
    source = open_source(lambda: now[0])
    (piece,) = source.pieces()
    source._idle.clear()  # type: ignore[attr-defined]  # of this kind of source
    now[0] = other
    assert sum(b.num_rows for b in source.read(piece, 0, 4096, 1000)) == 4096
    with pytest.raises(FctError, match=r"other rows at another reading, from row (4096|8192) on.*ORDER BY id"):
        list(source.read(piece, 4096, 4096, 1000))


def test_a_resumed_job_refuses_a_stream_of_other_rows(gallery: Make, tmp_path: Path, h: fct.Transformation) -> None:
    table = ds.dataset(gallery(), format="parquet").to_table()
    fct.backfill(lambda: table, tmp_path / "new", h, **QUICK)
    before = contents(tmp_path / "new")
    with pytest.raises(FctError):
        fct.backfill(lambda: table.slice(1), tmp_path / "new", h, **QUICK)
    assert contents(tmp_path / "new") == before
    found = fct.verify_gallery(tmp_path / "new", source=lambda: table.slice(1))
    assert not found.ok


def test_what_a_function_returns_is_checked(tmp_path: Path, h: fct.Transformation) -> None:
    with pytest.raises(FctError, match=r"to return a pyarrow.RecordBatchReader.*got list"):
        fct.backfill(lambda: [1.0], tmp_path / "new", h, **QUICK)

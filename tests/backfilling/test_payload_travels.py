"""Payload is untouched in value and meaning, whatever its type and name; what a format cannot hold is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError
from fct.gallery import open_source, tag_space, vector_array
from fct.gallery.beside_rows import load_ids

N, D = 6, 8


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(D, D, 4, inner=16, side_info=False)


def put(folder: Path, rows: np.ndarray | None = None, **columns: pa.Array) -> Path:
    folder.mkdir(parents=True)
    table = pa.table({**columns, "embedding": vector_array(np.ones((N, D), np.float32) if rows is None else rows)})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return folder


COLUMNS = {
    "an interval": (pa.array([pa.MonthDayNano([1, 2, 3])] * N), "month_day_nano_interval"),
    "runs": (pa.RunEndEncodedArray.from_arrays(pa.array([2, N], pa.int32()), pa.array(["a", "b"])), "run_end_encoded"),
    "nothing in a struct": (pa.array([{"a": {}}] * N, pa.struct([("a", pa.struct([]))])), r"struct<a: struct<>>"),
    "seconds past milliseconds": (pa.array([2**62] * N, pa.timestamp("s")), r"timestamp\[s\]"),
    "a null in a dictionary": (
        pa.DictionaryArray.from_arrays(pa.array([0, 1] * 3, pa.int8()), pa.array(["a", None])), "dictionary"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", COLUMNS)
def test_what_parquet_cannot_hold_is_refused_by_its_column_and_arrow_holds_it(
    tmp_path: Path, h: fct.Transformation, what: str
) -> None:
    column, kind = COLUMNS[what]
    old = put(tmp_path / "old", p=column)
    with pytest.raises(FctError, match=rf"the column 'p' \({kind}.*cannot be kept in Parquet: .*--format arrow"):
        fct.backfill(old, tmp_path / "p", h, old_model="random-old", format="parquet", progress=False)
    assert not list((tmp_path / "p").glob("*.parquet"))
    fct.backfill(old, tmp_path / "new", h, old_model="random-old", progress=False)
    assert fct.verify_gallery(tmp_path / "new", source=old).ok


@pytest.mark.parametrize("kind", [pa.list_(pa.string_view()), pa.large_list(pa.binary_view()),
                                  pa.struct([("a", pa.string_view())])], ids=str)  # fmt: skip
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_lists_and_structs_of_views_travel(tmp_path: Path, h: fct.Transformation, kind: pa.DataType, form: str) -> None:
    """As polars writes lists of text to Arrow files."""
    text = b"x" if "binary" in str(kind) else "x"
    values = [{"a": text}, None] if pa.types.is_struct(kind) else [[text, None], None]
    old = put(tmp_path / "old", p=pa.array(values * 3, kind))
    fct.backfill(old, tmp_path / "new", h, old_model="random-old", format=form, progress=False)  # type: ignore[arg-type]  # one of the formats
    source = open_source(tmp_path / "new")
    got = [row for piece in source.pieces() for b in source.read(piece, 0, piece.rows, N) for row in b["p"].to_pylist()]
    assert got == values * 3
    assert fct.verify_gallery(tmp_path / "new", source=old).ok


@pytest.mark.parametrize("bad", [False, True])
def test_a_users_column_called_row_is_no_row_number(tmp_path: Path, h: fct.Transformation, bad: bool) -> None:
    """Bare matrices leave numbers of rows beside them, under that name; never in place of the user's."""
    for i, column in enumerate((pa.array([f"r{i}" for i in range(N)]), pa.array(np.arange(N) * 3))):
        rows = np.ones((N, D), np.float32)
        rows[2, 1] = np.nan if bad else 1
        old = put(tmp_path / f"old{i}", rows, row=column)
        fct.backfill(old, tmp_path / f"new{i}", h, old_model="random-old", format="npy", progress=False)
        want = [v for j, v in enumerate(column.to_pylist()) if j != 2 or not bad]
        assert pq.read_table(tmp_path / f"new{i}/_rows/part-00000000.parquet")["row"].to_pylist() == want
        ids = load_ids(tmp_path / f"new{i}", "row")
        assert ids is not None
        assert ids.to_pylist() == want
        assert fct.verify_gallery(tmp_path / f"new{i}", source=old).ok


def test_a_journals_folder_that_is_a_link_is_not_tagged_through(tmp_path: Path) -> None:
    put(tmp_path / "g")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "g/_fct").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FctError, match=r"g/_fct is a link, and a gallery's own files are not followed elsewhere"):
        tag_space(tmp_path / "g", fct.EmbeddingSpace("m", D))
    assert not list((tmp_path / "elsewhere").iterdir())

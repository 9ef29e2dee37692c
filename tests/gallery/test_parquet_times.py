"""INT96, Spark's default for timestamps: what Arrow's nanoseconds cannot hold is refused, never wrapped."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fct.errors import FctError
from fct.gallery import open_source, vector_array

NOW = datetime.datetime(2024, 2, 29, 1, 2, 3, 456789)
FAR = {"after 2262": datetime.datetime(9999, 12, 31), "before 1677": datetime.datetime(1, 1, 1)}


def column(kind: str, last: datetime.datetime) -> pa.Array:
    times: list[Any] = [NOW, None, datetime.datetime(1900, 1, 1, 0, 0, 0, 1), last]
    stamp = pa.timestamp("us")
    if kind == "list":
        return pa.array([[t] for t in times[:3]] + [[NOW, last]], pa.list_(stamp))
    if kind == "struct":
        return pa.array([{"at": t, "n": 1} for t in times], pa.struct([("at", stamp), ("n", pa.int8())]))
    if kind == "map":
        return pa.array([[("k", t)] for t in times], pa.map_(pa.string(), stamp))
    return pa.array(times, stamp)


def rows(folder: Path, kind: str, last: datetime.datetime, batch_rows: int) -> list[Any]:
    folder.mkdir(exist_ok=True)
    values = column(kind, last)
    vectors = vector_array(np.ones((len(values), 4), np.float32))
    table = pa.table({"at": values, "embedding": vectors})
    pq.write_table(table, folder / "a.parquet", use_deprecated_int96_timestamps=True, row_group_size=3)
    source = open_source(folder)
    (piece,) = source.pieces()
    parts = list(source.read(piece, 0, piece.rows, batch_rows))
    got = pa.Table.from_batches(parts)["at"]
    return list(got.cast(values.type).to_pylist())


@pytest.mark.parametrize("batch_rows", [1, 2, 100])
@pytest.mark.parametrize("kind", ["alone", "list", "struct", "map"])
def test_times_travel_or_are_refused_by_their_column(tmp_path: Path, kind: str, batch_rows: int) -> None:
    assert rows(tmp_path / "g", kind, NOW, batch_rows) == column(kind, NOW).to_pylist()
    for last in FAR.values():
        with pytest.raises(FctError, match=r"a.parquet has times before 1677 or after 2262 in the column 'at', kept as "
                                           r"INT96.*TIMESTAMP_MICROS"):  # fmt: skip
            rows(tmp_path / "g", kind, last, batch_rows)

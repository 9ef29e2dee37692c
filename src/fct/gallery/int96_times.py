"""Parquet's INT96 timestamps, which Spark writes by default: any year fits, and Arrow reads them as 64-bit nanoseconds.

Years before 1677 and after 2262 wrap around there without an error, so that such a column is read a second time, in
microseconds, and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from fct.errors import FctError
from fct.gallery.interfaces import Batches
from fct.gallery.location import Location
from fct.types import Array

if TYPE_CHECKING:
    import pyarrow.parquet as pq


__all__ = ["columns_of_int96", "unwrapped"]


def columns_of_int96(schema: pq.ParquetSchema) -> list[str]:
    """The columns of a Parquet schema that hold INT96, alone or within lists, structs and maps."""
    columns = (schema.column(i) for i in range(len(schema)))
    return list(dict.fromkeys(c.path.partition(".")[0] for c in columns if c.physical_type == "INT96"))


def unwrapped(batches: Batches, again: Batches, names: Sequence[str], file: Location) -> Batches:
    """``batches``, once the columns ``names`` of ``again``, the same rows in microseconds, say the same times.

    Raises:
        FctError: a time that nanoseconds cannot hold.
    """
    left: pa.RecordBatch | None = None
    for batch in batches:
        others, missing = [], batch.num_rows
        while missing:
            other = left if left is not None else next(again)
            others.append(other.slice(0, missing))
            left = other.slice(missing) if other.num_rows > missing else None
            missing -= others[-1].num_rows
        for name in names if others else ():
            micros = pa.chunked_array([other.column(name) for other in others])
            pairs = zip(_times(batch.column(name)), _times(micros.combine_chunks()), strict=True)
            if any(not np.array_equal(nano // 1000, micro) for nano, micro in pairs):
                raise FctError(
                    f"source: {file} has times before 1677 or after 2262 in the column {name!r}, kept as INT96, which "
                    "Arrow reads wrapped around: write them as microseconds (in Spark: "
                    "spark.sql.parquet.outputTimestampType=TIMESTAMP_MICROS)"
                )
        yield batch


def _times(column: pa.Array) -> Iterator[Array]:
    """The timestamps in a column as int64, nulls left out, however deep they lie."""
    if pa.types.is_timestamp(column.type):
        yield column.drop_null().cast(pa.int64()).to_numpy()
    elif pa.types.is_map(column.type):
        yield from _times(column.keys)
        yield from _times(column.items)
    elif pa.types.is_nested(column.type):
        parts = column.flatten()
        for part in parts if isinstance(parts, list) else [parts]:
            yield from _times(part)

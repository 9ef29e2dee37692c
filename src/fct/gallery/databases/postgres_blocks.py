"""Integer keys and vectors as the server joins them: a thousand rows a message, where COPY sends one message a row.

A message costs its reader about 3 us, which is more than the rest of reading an id, and as much as reading a vector of
384 floats. ``string_agg`` of what ``int8send`` and ``vector_send`` give is the same bytes without the messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fct.gallery.databases.postgres_copy import Column, arrow_type
from fct.types import NumpyDType

if TYPE_CHECKING:
    from psycopg.sql import Composable, Composed

__all__ = ["BLOCK_ROWS", "INTS", "fits_blocks", "id_blocks", "joined_ids", "joined_rows", "row_block"]

BLOCK_ROWS = 1024  # of a message: the server joins larger ones no faster, and holds them whole
INTS = ("int2", "int4", "int8")
_VECTORS: dict[str, NumpyDType] = {"vector": np.dtype(">f4"), "halfvec": np.dtype(">f2")}
_IDS = 131_072  # of a message of ids


def fits_blocks(columns: Sequence[Column]) -> bool:
    """Whether every column is an integer or a vector of a length that the table knows."""
    return all((c.type in INTS and not c.raw) or (c.type in _VECTORS and c.dim) for c in columns)


def id_blocks(table: Composable, key: Column) -> Composed:
    """The query for all values of an integer key, ascending, in few rows of many bytes."""
    from psycopg import sql

    return sql.SQL(
        "SELECT string_agg(int8send({key}::bigint), ''::bytea ORDER BY {key}) FROM (SELECT {key}, (row_number() OVER "
        "(ORDER BY {key}) - 1) / {size} AS part FROM {table}) AS keys GROUP BY part ORDER BY part"
    ).format(key=sql.Identifier(key.name), table=table, size=sql.Literal(_IDS))


def joined_ids(rows: Sequence[tuple[Any, ...]], key: Column) -> pa.Array:
    return pa.array(np.frombuffer(b"".join(row[0] for row in rows), ">i8").astype(np.int64))


def row_block(table: Composable, key: str, columns: Sequence[Column], low: int, high: int) -> Composed:
    """The query for the rows between two keys: their number, then each column's bytes, in no order."""
    from psycopg import sql

    joined = []
    for column in columns:
        send = "int8send({}::bigint)" if column.type in INTS else f"{column.type}_send({{}})"
        joined.append(sql.SQL("string_agg(" + send + ", ''::bytea)").format(sql.Identifier(column.name)))
    return sql.SQL("SELECT count(*), {columns} FROM {table} WHERE {key} >= {low} AND {key} <= {high}").format(
        columns=sql.SQL(", ").join(joined), table=table, key=sql.Identifier(key), low=sql.Literal(low),
        high=sql.Literal(high),
    )  # fmt: skip


def joined_rows(found: Sequence[tuple[Any, ...]], columns: Sequence[Column]) -> pa.RecordBatch | None:
    """The rows of several blocks. None where a value is null, which ``string_agg`` leaves out."""
    found = [block for block in found if block[0]]
    arrays = []
    for place, column in enumerate(columns, 1):
        kind: NumpyDType = _VECTORS.get(column.type, np.dtype(">i8"))
        width = 1 if column.type in INTS else column.dim
        ahead = 0 if column.type in INTS else 2  # a vector's own dimension and a zero, 2 bytes each
        record = np.dtype([("ahead", ">i2", (ahead,)), ("values", kind, (width,))])
        if any(block[place] is None or len(block[place]) != block[0] * record.itemsize for block in found):
            return None
        values = np.empty((sum(block[0] for block in found), width), kind.newbyteorder("="))
        at = 0
        for block in found:
            rows = np.frombuffer(block[place], record)
            if ahead and (rows["ahead"][:, 0] != width).any():
                return None
            values[at : at + block[0]] = rows["values"]
            at += block[0]
        flat = pa.array(values.reshape(-1))
        arrays.append(flat if column.type in INTS else pa.FixedSizeListArray.from_arrays(flat, type=arrow_type(column)))
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([column.field() for column in columns]))

"""PostgreSQL by ``count(*)`` and plain SELECTs whose values are read as text: another way than binary COPY."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fct.backfilling.database_store import Rows, Store
from fct.gallery.databases.postgres_copy import Column
from fct.gallery.databases.postgres_server import Server, table_of
from fct.gallery.databases.postgres_source import PostgresSource
from fct.types import Id

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.rows import TupleRow
    from psycopg.sql import Composed, Identifier


__all__ = ["PostgresStore"]

_TIMES = ("timestamp", "timestamptz")
_WHOLE = ("int2", "int4", "int8")


class PostgresStore(Store):
    """The table of a source, and the columns that this one reads."""

    by = "count(*) and a plain SELECT"

    def __init__(self, source: PostgresSource) -> None:
        self._server, self._table = Server(source.address), table_of(source.address)
        self._columns = list(source.columns)
        self._key = next(c for c in self._columns if c.name == source.id_column)

    def count(self) -> int:
        from psycopg import sql

        query = sql.SQL("SELECT count(*) FROM {}").format(self._table)
        return int(self._server.run(lambda c: c.execute(query).fetchall()[0][0]))

    def ids(self) -> Iterator[Id]:
        from psycopg import sql

        query = sql.SQL("SELECT {}::text FROM {}").format(sql.Identifier(self._key.name), self._table)
        read = _reader(self._key)
        yield from (read(row[0].encode()) for row in self._server.run(lambda c: c.execute(query).fetchall()))

    def key(self, value: Id) -> Id:
        return str(uuid.UUID(str(value))) if self._key.type == "uuid" else value

    def rows(self, ids: list[Id]) -> Rows:
        from psycopg import sql

        key, kind = sql.Identifier(self._key.name), sql.SQL(self._key.type)
        wanted = sql.SQL(", ").join(_selected(column) for column in [self._key, *self._columns])
        query = sql.SQL("SELECT {} FROM {} WHERE {} = ANY(%s::{}[])").format(wanted, self._table, key, kind)

        def ask(connection: Connection[TupleRow]) -> Rows:
            with connection.cursor(binary=True) as cursor:
                cursor.execute(query, [[str(i) for i in ids]])
                return self._decoded(cursor.pgresult)

        found: Rows = self._server.run(ask)
        return found

    def _decoded(self, result: Any) -> Rows:
        readers = [_reader(column) for column in self._columns]
        found: Rows = {}
        for i in range(result.ntuples):
            cells = [result.get_value(i, j + 1) for j in range(len(readers))]
            found[_reader(self._key)(result.get_value(i, 0))] = {
                column.name: None if cell is None else read(cell)
                for column, read, cell in zip(self._columns, readers, cells, strict=True)
            }
        return found


def _selected(column: Column) -> Identifier | Composed:
    """The column as text, or as the server's own bytes where these are carried over."""
    from psycopg import sql

    name = sql.Identifier(column.name)
    if column.raw:
        return name
    if column.type == "bytea":
        return sql.SQL("encode({}, 'hex')").format(name)
    if column.type in _TIMES:
        return sql.SQL(
            "CASE WHEN isfinite({0}) THEN (extract(epoch FROM {0}) * 1000000)::bigint::text END"
        ).format(name)  # fmt: skip
    return sql.SQL("{}::text").format(name)


def _reader(column: Column) -> Callable[[bytes], Any]:
    kind = column.type
    if column.raw:
        return bytes
    if column.is_vector:
        dtype = np.float32 if kind == "vector" else np.float16
        return lambda cell: np.array(cell.strip(b"[]").split(b","), np.float64).astype(dtype)
    if kind in _WHOLE or kind in _TIMES:
        return int
    if kind == "float4":
        return lambda cell: float(np.float32(cell.decode()))
    if kind == "float8":
        return float
    if kind == "bool":
        return lambda cell: cell == b"true"
    if kind == "bytea":
        return lambda cell: bytes.fromhex(cell.decode())
    return bytes.decode

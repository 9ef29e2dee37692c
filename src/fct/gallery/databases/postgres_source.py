"""PostgreSQL with pgvector as a source: primary-key ranges by binary COPY, under one snapshot."""

from __future__ import annotations

import select
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa

from fct.gallery.databases.address import Address
from fct.gallery.databases.database_gallery import DatabaseError, DatabaseSource
from fct.gallery.databases.postgres_blocks import (
    BLOCK_ROWS,
    INTS,
    fits_blocks,
    id_blocks,
    joined_ids,
    joined_rows,
    row_block,
)
from fct.gallery.databases.postgres_copy import Column, decode
from fct.gallery.databases.postgres_server import Server, columns_of, key_of, table_of
from fct.gallery.interfaces import VECTOR_KEY
from fct.gallery.location import RetryPolicy
from fct.spaces import EmbeddingSpace

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.rows import TupleRow
    from psycopg.sql import Composed

__all__ = ["PostgresSource"]

_IDS = ("int2", "int4", "int8", "text", "varchar", "uuid")


class PostgresSource(DatabaseSource):
    """Rows of a table. One transaction holds one snapshot for the scan and every range of a run."""

    kind: ClassVar[str] = "postgresql"
    page: ClassVar[int] = 16384

    def __init__(self, address: Address, retry_policy: RetryPolicy) -> None:
        super().__init__(address, retry_policy)
        self.raw = False  # payload as the server's bytes, for another PostgreSQL table
        self._server = Server(address)
        self._snapshot = ""
        self._found: list[Column] | None = None

    def _all(self) -> list[Column]:
        if self._found is None:
            self._found = self.retry_policy.ask(lambda: self._server.run(self._look_at), f"opening {self.url}", moves=0)
        return self._found

    def _look_at(self, connection: Connection[TupleRow]) -> list[Column]:
        found = columns_of(connection, self.address)
        if not found:
            raise DatabaseError(f"source: expected a table, there is no {self.address.table} in {self.url}")
        names = [c.name for c in found]
        vectors = [c.name for c in found if c.is_vector]
        wanted = self.address.vector
        if wanted and wanted not in names:
            raise DatabaseError(
                f"source: expected a column of {self.address.table} ({', '.join(names)}), got {wanted!r}"
            )
        if not vectors or (wanted and wanted not in vectors):
            what = f"{wanted!r} is {found[names.index(wanted)].shown}" if wanted else "it has none"
            raise DatabaseError(
                f"source: expected a column of type vector or halfvec in {self.address.table} "
                f"({', '.join(vectors) or 'none'}), {what}"
            )
        self.id_column = key_of(connection, self.address, "source")
        key = found[names.index(self.id_column)]
        if key.type not in _IDS:
            raise DatabaseError(f"source: expected a primary key of type {', '.join(_IDS)}, {key.name} is {key.shown}")
        side = self.address.options.get("side", "")
        if side and side not in names:
            raise DatabaseError(f"source: expected a column of {self.address.table} as side, got {side!r}")
        return found

    @property
    def columns(self) -> list[Column]:
        """What is read: id, vectors, and the payload where it is wanted."""
        found = self._all()
        named = (self.id_column, self.address.vector, self.address.options.get("side", ""), *self.needed)
        only = self.address.options.get("columns")
        wanted = None if only is None else set(filter(None, only.split(",")))
        chosen = []
        for column in found:
            if column.name in named or (not self.address.vector and not self.needed and column.is_vector):
                chosen.append(column)
            elif self.payload and (wanted is None or column.name in wanted):
                raw = self.raw and not column.is_vector
                chosen.append(Column(column.name, column.type, column.shown, column.dim, raw))
        return chosen

    @property
    def schema(self) -> pa.Schema:
        columns = self.columns
        metadata = {VECTOR_KEY: self.address.vector.encode()} if self.address.vector else None
        return pa.schema([c.field() for c in columns], metadata)

    @property
    def space(self) -> EmbeddingSpace | None:
        return None

    def suit(self, destination: Address) -> None:
        super().suit(destination)
        self.raw = destination.kind == self.address.kind

    # ---- reading ----
    def _in_snapshot(self) -> Connection[TupleRow]:
        """A connection that sees what the first one of this run saw."""
        connection = self._server.get()
        if connection.info.transaction_status == 0:  # idle: not in the transaction yet
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            if self._snapshot:
                from psycopg import Error, sql

                try:
                    connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(self._snapshot)))
                    return connection
                except Error:  # its holder is gone: this connection holds another from now on
                    connection.execute("ROLLBACK")
                    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            row = connection.execute("SELECT pg_export_snapshot()").fetchone()
            self._snapshot = str(row[0]) if row else ""
        return connection

    def _copy(self, connection: Connection[TupleRow], query: Composed) -> bytes:
        from psycopg import pq, sql
        from psycopg.errors import error_from_result

        # Straight from libpq: psycopg's own loop waits and wakes for each row, which costs more than the row.
        link = connection.pgconn
        result = link.exec_(sql.SQL("COPY ({}) TO STDOUT (FORMAT BINARY)").format(query).as_bytes(connection))
        if result.status != pq.ExecStatus.COPY_OUT:
            raise error_from_result(result)
        parts: list[bytes | memoryview] = []
        while True:
            size, data = link.get_copy_data(1)
            if size < 0:
                break
            if size:
                parts.append(data)
            else:
                select.select([link.socket], [], [])
                link.consume_input()
        while (end := link.get_result()) is not None:
            if end.status != pq.ExecStatus.COMMAND_OK:
                raise error_from_result(end)
        return b"".join(parts)

    def scan(self) -> Iterator[pa.Array]:
        from psycopg import sql

        columns = self.columns
        key = next(c for c in columns if c.name == self.id_column)

        def ids(connection: Connection[TupleRow]) -> pa.Array:
            if key.type in INTS:
                found = self._run_in_blocks(self._in_snapshot(), id_blocks(table_of(self.address), key))
                return joined_ids(found, key)
            query = sql.SQL("SELECT {id} FROM {table} ORDER BY {id}").format(
                id=sql.Identifier(key.name), table=table_of(self.address)
            )
            return decode(self._copy(self._in_snapshot(), query), [key]).column(0)

        self.release()  # what is there now, not what was there when the run began
        yield self._server.run(ids)

    def release(self) -> None:
        """Ends the snapshot, so that the server may clean up; what is read next sees what is there then."""
        self._snapshot = ""
        self._server.drop()

    def fetch(self, ids: pa.Array, between: bool) -> pa.RecordBatch:
        from psycopg import sql

        columns = self.columns
        key = sql.Identifier(self.id_column)
        if between:
            low, high = sql.Literal(ids[0].as_py()), sql.Literal(ids[-1].as_py())
            which = sql.SQL("{key} >= {low} AND {key} <= {high}").format(key=key, low=low, high=high)
        else:
            which = sql.SQL("{key} = ANY({ids})").format(key=key, ids=sql.Literal(ids.to_pylist()))
        selected = sql.SQL(", ").join(sql.Identifier(c.name) + sql.SQL(c.select) for c in columns)
        query = sql.SQL("SELECT {columns} FROM {table} WHERE {which} ORDER BY {key}").format(
            columns=selected, table=table_of(self.address), which=which, key=key
        )
        if between and fits_blocks(columns):
            rows = self._in_blocks(ids, columns)
            if rows is not None:
                return rows
        stream = self._server.run(lambda connection: self._copy(self._in_snapshot(), query))
        return decode(stream, columns)

    def _in_blocks(self, ids: pa.Array, columns: list[Column]) -> pa.RecordBatch | None:
        """The rows between the first and the last of these ids; None where one of them has a null."""
        asked = [
            row_block(table_of(self.address), self.id_column, columns, some[0].as_py(), some[-1].as_py())
            for some in (ids.slice(first, BLOCK_ROWS) for first in range(0, len(ids), BLOCK_ROWS))
        ]
        found = self._server.run(lambda _: [self._run_in_blocks(self._in_snapshot(), query) for query in asked])
        return joined_rows([row for rows in found for row in rows], columns)

    def _run_in_blocks(self, connection: Connection[TupleRow], query: Composed) -> list[tuple[bytes | int, ...]]:
        with connection.cursor(binary=True) as cursor:
            return cursor.execute(query, prepare=False).fetchall()

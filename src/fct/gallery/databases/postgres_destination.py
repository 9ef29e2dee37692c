"""PostgreSQL with pgvector as a destination: a new table, or a new column of one that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa

from fct.gallery.databases.address import Address
from fct.gallery.databases.database_gallery import DatabaseDestination, DatabaseError
from fct.gallery.databases.postgres_copy import END, HEADER, PG_TYPE, Column, encode, pg_type_of
from fct.gallery.databases.postgres_server import Server, columns_of, key_of, quoted, table_of
from fct.gallery.interfaces import VECTOR_KEY
from fct.gallery.location import RetryPolicy
from fct.spaces import EmbeddingSpace

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.rows import TupleRow
    from psycopg.sql import Composable, Composed

__all__ = ["PostgresDestination"]

_HNSW = {"vector": 2000, "halfvec": 4000}  # dimensions that pgvector's HNSW takes


class PostgresDestination(DatabaseDestination):
    """A new table, made with the right dimension; or a new column of a table that is there, which the URL names."""

    kind: ClassVar[str] = "postgresql"
    keeps_json: ClassVar[bool] = False

    def __init__(self, address: Address, retry_policy: RetryPolicy) -> None:
        super().__init__(address, retry_policy)
        self._server = Server(address)
        self._types: list[str] = []
        self._as_column: bool | None = None
        self._told: list[str] = []

    def _vector(self, schema: pa.Schema) -> str:
        return self.address.vector or str((schema.metadata or {})[VECTOR_KEY].decode())

    def _settle(self, schema: pa.Schema) -> list[Column]:
        """The table as it is; decides whether a column of it is meant, or a table of our own."""
        found: list[Column] = self.retry_policy.ask(
            lambda: self._server.run(lambda c: columns_of(c, self.address)), f"opening {self.url}", moves=0
        )
        return found

    def holds_rows(self, schema: pa.Schema) -> str:
        from psycopg import sql

        found = {c.name: c for c in self._settle(schema)}
        name = self._vector(schema)
        self._as_column = bool(found)
        if taken := self._taken(schema, found):
            return taken
        if not found or name not in found:
            return ""
        query = sql.SQL("SELECT 1 FROM {} WHERE {} IS NOT NULL LIMIT 1").format(
            table_of(self.address), sql.Identifier(name)
        )
        some = self._server.run(lambda c: c.execute(query).fetchone())
        return f"holds vectors in {name!r} already" if some else ""

    def _taken(self, schema: pa.Schema, found: Mapping[str, Column]) -> str:
        """Whether a column of the owner's has the name of the one that says which rows are re-embedded."""
        flag = self.true_column(schema)
        return f"has a column {flag!r} already (--true-column names another)" if flag in found else ""

    def prepare(self, schema: pa.Schema, space: EmbeddingSpace, *, begun: bool) -> None:
        vector = self._vector(schema)
        entry = schema.field((schema.metadata or {})[VECTOR_KEY].decode())
        half = entry.type.value_type == pa.float16()
        wanted = f"{'halfvec' if half else 'vector'}({space.dim})"
        found = {c.name: c for c in self._settle(schema)}
        if self._as_column is None:
            self._as_column = self._begun_as_column()
        flag = self.true_column(schema)
        if self._as_column:
            self._add_columns(found, {vector: wanted} | ({flag: "boolean"} if flag else {}))
        elif not found:
            self._create(schema, vector, wanted)
        found = {c.name: c for c in self._settle(schema)}
        if found[vector].dim not in (0, space.dim) or not found[vector].is_vector:
            raise DatabaseError(
                f"destination: expected a column of {wanted}, {vector} of {self.address.table} is {found[vector].shown}"
            )
        self._remember(self._as_column)
        rest = self._rest(schema) if not self._as_column else [flag] if flag else []
        names = [self._id(), vector, *rest]
        self._types = [found[name].type for name in names]
        self._raw = [False, False, *(_is_raw(schema.field(n)) for n in names[2:])]
        self._names, self._rest_names = names, names[2:]

    def _id(self) -> str:
        return self.address.options.get("id") or self.id_column

    def _rest(self, schema: pa.Schema) -> list[str]:
        vector = (schema.metadata or {})[VECTOR_KEY].decode()
        return [n for n in schema.names if n not in (self.id_column, vector)]

    def _mark(self) -> Path | None:
        return None if self._journal is None else self._journal / "written-as-column"

    def _remember(self, column: bool) -> None:
        mark = self._mark()
        if mark is not None and column:
            mark.touch()

    def _begun_as_column(self) -> bool:
        mark = self._mark()
        return mark is not None and mark.exists()

    def _add_columns(self, found: Mapping[str, Column], wanted: Mapping[str, str]) -> None:
        """Those of ``wanted``, name -> type, that the table has not."""
        from psycopg import sql

        key = self._server.run(lambda c: key_of(c, self.address, "destination"))
        if key != self._id():
            raise DatabaseError(
                f"destination: expected the key of {self.address.table} ({key}) to be the source's id ({self._id()}): "
                "name it in the URL (&id=)"
            )
        parts = [
            sql.SQL("ADD COLUMN {} " + kind).format(sql.Identifier(n)) for n, kind in wanted.items() if n not in found
        ]
        if not parts:
            return
        add = sql.SQL("ALTER TABLE {} ").format(table_of(self.address)) + sql.SQL(", ").join(parts)

        def do(connection: Connection[TupleRow]) -> None:
            connection.execute("SET lock_timeout = '5s'")  # who waits for a served table's lock holds up its readers
            connection.execute(add)
            connection.execute("SET lock_timeout = 0")
            self._told.append(f"added: {add.as_string(connection)}")

        self.retry_policy.ask(lambda: self._server.run(do), f"adding a column to {self.url}", moves=0)

    def _create(self, schema: pa.Schema, vector: str, wanted: str) -> None:
        from psycopg import sql

        parts = [sql.Identifier(self._id()) + sql.SQL(f" {pg_type_of(schema.field(self.id_column))} PRIMARY KEY")]
        parts += [sql.Identifier(n) + sql.SQL(f" {pg_type_of(schema.field(n))}") for n in self._rest(schema)]
        parts.append(sql.Identifier(vector) + sql.SQL(f" {wanted}"))
        create = sql.SQL("CREATE TABLE IF NOT EXISTS {} ({})").format(table_of(self.address), sql.SQL(", ").join(parts))

        def do(connection: Connection[TupleRow]) -> None:
            connection.execute(create)
            self._told.append(f"created: {create.as_string(connection)}")

        self.retry_policy.ask(lambda: self._server.run(do), f"creating {self.url}", moves=0)

    # ---- writing ----
    def put(self, batches: Sequence[pa.RecordBatch]) -> None:
        blocks, ids = [], []
        for batch in batches:
            key, vectors, rest = self.split(batch)
            arrays = [key, vectors, *(rest.column(n) for n in self._rest_names)]
            blocks.append(encode(arrays, self._types, self._raw))
            ids.append(key)
        self._server.run(lambda c: self._put(c, blocks, pa.concat_arrays(ids)))

    def _put(self, connection: Connection[TupleRow], blocks: list[bytes], ids: pa.Array) -> None:
        from psycopg import errors, sql

        table, names = table_of(self.address), sql.SQL(", ").join(map(sql.Identifier, self._names))
        key = sql.Identifier(self._names[0])
        with connection.transaction():
            if self._as_column:
                connection.execute(
                    sql.SQL("CREATE TEMP TABLE fct_new ON COMMIT DROP AS SELECT {} FROM {} LIMIT 0").format(
                        names, table
                    )
                )
                _copy_in(connection, sql.SQL("fct_new"), names, blocks)
                new = sql.SQL(", ").join(
                    sql.SQL("{n} = fct_new.{n}").format(n=sql.Identifier(name)) for name in self._names[1:]
                )
                where = sql.SQL("{t}.{k} = fct_new.{k}").format(t=table, k=key)
                connection.execute(sql.SQL("UPDATE {t} SET {new} FROM fct_new WHERE ").format(t=table, new=new) + where)
                if not self.same_rows:
                    self._refuse_strangers(connection, where)
                return
            try:
                with connection.transaction():
                    _copy_in(connection, table, names, blocks)
            except errors.UniqueViolation:  # the shard, or some of it, was written before: once more, over it
                connection.execute(sql.SQL("DELETE FROM {} WHERE {} = ANY({})").format(table, key, self._array(ids)))
                _copy_in(connection, table, names, blocks)

    def _refuse_strangers(self, connection: Connection[TupleRow], condition: Composable) -> None:
        """Rows of another place that the table has no row for: they would be lost. What is read from the table itself
        may have been deleted since."""
        from psycopg import sql

        missing = "SELECT {k}::text, count(*) OVER () FROM fct_new WHERE NOT EXISTS (SELECT FROM {t} WHERE "
        query = sql.SQL(missing).format(k=sql.Identifier(self._names[0]), t=table_of(self.address)) + condition
        found = connection.execute(query + sql.SQL(") LIMIT 3")).fetchall()
        if found:
            first = ", ".join(str(row[0]) for row in found) + (", ..." if found[0][1] > len(found) else "")
            raise DatabaseError(
                f"destination: expected a row of {self.address.table} for each id, {found[0][1]} of a shard's ids have "
                f"none ({first}): a further column holds vectors of rows that are there; insert these rows and start "
                "again, which goes on, or write into a new table"
            )

    def _array(self, ids: pa.Array) -> Composed:
        from psycopg import sql

        kind = {"int2": "smallint", "int4": "integer", "int8": "bigint"}.get(self._types[0], self._types[0])
        return sql.Literal(ids.to_pylist()) + sql.SQL(f"::{kind}[]")

    def remove(self, ids: pa.Array) -> None:
        from psycopg import sql

        if self._as_column or (self._as_column is None and self._begun_as_column()):
            return  # a row that was deleted took its column along
        for start in range(0, len(ids), 10_000):
            query = sql.SQL("DELETE FROM {} WHERE {} = ANY({})").format(
                table_of(self.address), sql.Identifier(self._id()), self._array(ids.slice(start, 10_000))
            )
            self._server.run(lambda c, q=query: c.execute(q))

    def after(self, space: EmbeddingSpace) -> list[str]:
        name = self.address.vector or "embedding"
        kind = self._types[1] if len(self._types) > 1 else "vector"
        table = quoted(self.address)
        if space.dim > _HNSW.get(kind, 2000):
            index = f"no index yet: HNSW takes at most {_HNSW[kind]} dimensions of {kind}, these have {space.dim}"
        else:
            index = f'CREATE INDEX CONCURRENTLY ON {table} USING hnsw ("{name}" {kind}_{space.metric}_ops);'
        return [*self._told, f"now run: {index}", f"and: ANALYZE {table};"]


def _copy_in(connection: Connection[TupleRow], table: Composable, names: Composable, blocks: list[bytes]) -> None:
    from psycopg import sql

    with (
        connection.cursor() as cursor,
        cursor.copy(sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(table, names)) as copy,
    ):
        copy.write(HEADER)
        for block in blocks:
            copy.write(block)
        copy.write(END)


def _is_raw(entry: pa.Field) -> bool:
    return pa.types.is_binary(entry.type) and PG_TYPE in (entry.metadata or {}) and entry.metadata[PG_TYPE] != b"bytea"

"""A connection to PostgreSQL: made when it is needed, again after it broke; and what a table looks like."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from fct.extras import need
from fct.gallery.databases.address import Address
from fct.gallery.databases.database_gallery import DatabaseError
from fct.gallery.databases.postgres_copy import Column
from fct.types import JsonDict

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.rows import TupleRow
    from psycopg.sql import Identifier

__all__ = ["Server", "columns_of", "key_of", "quoted", "table_of"]

T = TypeVar("T")

_COLUMNS = """
SELECT a.attname, t.typname, format_type(a.atttypid, a.atttypmod), a.atttypmod
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"""
_KEYS = """
SELECT a.attname, i.indisprimary
FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
WHERE i.indrelid = %s::regclass AND i.indisunique AND i.indnkeyatts = 1 AND i.indpred IS NULL AND a.attnotnull
ORDER BY i.indisprimary DESC"""


class Server:
    """A connection that is made when it is needed, and again after it broke."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._connection: Connection[TupleRow] | None = None
        self._end: Callable[[], object] | None = None

    def __getstate__(self) -> JsonDict:
        return {"address": self.address, "_connection": None, "_end": None}

    def get(self) -> Connection[TupleRow]:
        if self._connection is None or self._connection.closed:
            self.drop()
            self._connection = self._connect()
            self._end = weakref.finalize(self, _close, self._connection, os.getpid())  # no reader says when it ends
        return self._connection

    def _connect(self) -> Connection[TupleRow]:
        psycopg = need("psycopg", "postgresql")
        a = self.address
        own = {k: v for k, v in a.options.items() if k not in ("id", "side", "columns")}
        given = {"host": a.host, "user": a.user, "password": a.password, "dbname": a.path.strip("/")}
        words: JsonDict = {k: v for k, v in given.items() if v} | own
        if a.host:
            words.setdefault("port", a.port)
        words.setdefault("connect_timeout", 10)
        try:
            found: Connection[TupleRow] = psycopg.connect(autocommit=True, application_name="fct", **words)
        except psycopg.ProgrammingError as error:
            raise DatabaseError(
                f"{a.shown}: expected what libpq takes in the URL, got other: {a.hidden(str(error))}"
            ) from None
        except psycopg.OperationalError as error:
            said = a.hidden(str(error))
            if any(
                w in said
                for w in ("authentication failed", "no password", "pg_hba.conf", "does not exist", "not permitted")
            ):
                raise DatabaseError(f"{a.shown}: the server refuses the connection: {said}") from None
            raise ConnectionError(said) from None
        found.execute("SET statement_timeout = 0")
        found.execute("SET client_encoding = 'UTF8'")
        return found

    def drop(self) -> None:
        """Lets the connection go: the next call makes another."""
        end, self._connection, self._end = self._end, None, None
        if end is not None:
            end()

    def run(self, do: Callable[..., T]) -> T:
        """``do(connection)``; refusals become DatabaseError, and what may pass a ConnectionError."""
        psycopg = need("psycopg", "postgresql")
        try:
            return do(self.get())
        except psycopg.Error as error:
            broken = self._connection is not None and self._connection.broken
            self.drop()
            state = error.sqlstate or ""
            said = self.address.hidden(str(error))
            passing = not state or state[:2] in ("08", "40", "53", "55", "57", "58") or state == "XX000"
            if broken or (passing and isinstance(error, psycopg.OperationalError | psycopg.InternalError)):
                raise ConnectionError(said) from None
            raise DatabaseError(f"{self.address.shown}: PostgreSQL refuses: {said}") from None
        except BaseException:
            self.drop()
            raise


def _close(connection: Connection[TupleRow], made_by: int) -> None:
    if os.getpid() == made_by:  # a forked process would end its parent's session
        connection.close()


def table_of(address: Address) -> Identifier:
    from psycopg import sql

    return sql.Identifier(*address.table.split("."))


def quoted(address: Address) -> str:
    return ".".join('"' + part.replace('"', '""') + '"' for part in address.table.split("."))


def columns_of(connection: Connection[TupleRow], address: Address) -> list[Column]:
    """[] where there is no such table."""
    if connection.execute("SELECT to_regclass(%s)", [quoted(address)]).fetchone() == (None,):
        return []
    rows = connection.execute(_COLUMNS, [quoted(address)]).fetchall()
    vectors = ("vector", "halfvec")
    return [Column(n, t, shown, max(0, m) if t in vectors else 0) for n, t, shown, m in rows]


def key_of(connection: Connection[TupleRow], address: Address, what: str) -> str:
    """The one column by which rows are told apart."""
    keys = [str(name) for name, _ in connection.execute(_KEYS, [quoted(address)]).fetchall()]
    wanted = address.options.get("id", "")
    if not keys:
        raise DatabaseError(
            f"{what}: expected a table with a primary key of one column, {address.table} has none: rows could not be "
            "told apart, and a job that was killed could not go on"
        )
    if wanted and wanted not in keys:
        raise DatabaseError(
            f"{what}: expected a unique, non-null column of {address.table} ({', '.join(keys)}) as id, got {wanted!r}"
        )
    return wanted or keys[0]

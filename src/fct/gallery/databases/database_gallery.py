"""What all vector databases share: pieces that are lists of ids, rows asked for by id, writes that may be repeated."""

from __future__ import annotations

import json
import threading
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from fct.atomic_files import write_bytes
from fct.errors import FctError
from fct.gallery.databases.address import Address
from fct.gallery.databases.id_lists import IdLists, minus
from fct.gallery.interfaces import TRUE_KEY, VECTOR_KEY, Batches, Destination, Piece, Shard, Source
from fct.gallery.json_values import json_values, lost_numbers
from fct.gallery.location import RetryPolicy
from fct.spaces import EmbeddingSpace
from fct.terminal import plain_log
from fct.types import JsonDict

__all__ = ["JSON_KEY", "DatabaseDestination", "DatabaseError", "DatabaseSource", "json_rows"]

JSON_KEY = {b"fct.json": b"row"}  # metadata of a column that holds a row's payload as one JSON object
_log = plain_log("fct.gallery")


class DatabaseError(FctError):
    """What waiting does not cure: a wrong password, a missing table, a role that may not write."""


class _Pace:
    """No more than so many rows a second, averaged from the first row on."""

    def __init__(self, rows_per_second: float) -> None:
        self._rate, self._next = rows_per_second, 0.0

    def wait(self, rows: int) -> None:
        now = time.monotonic()
        self._next = max(self._next, now) + rows / self._rate
        time.sleep(max(0.0, self._next - now))


class DatabaseSource(Source):
    """Rows of a table or a collection that goes on being served while it is read.

    id_column: the schema's name for the ids. follow: whether rows that come are looked for again and again; else once.
    """

    transient: ClassVar[bool] = True
    id_column: str = "id"
    page: ClassVar[int] = 4096  # rows asked for at once

    def __init__(self, address: Address, retry_policy: RetryPolicy) -> None:
        self.address, self.retry_policy = address, retry_policy
        self.follow = False
        self.payload = True  # whether the other columns are wanted
        self.needed: tuple[str, ...] = ()  # the columns that are mapped
        self.left = 0  # rows that came too late to be looked for
        self._lists = IdLists(f"{address.kind}:{address.table}")
        self._pace: _Pace | None = None
        self._look = False
        self._gone: pa.Array | None = None

    @property
    def url(self) -> str:
        return self.address.shown

    @property
    def holds(self) -> str:
        """The store's word for what is read."""
        return "table" if self.address.kind == "postgresql" else "collection"

    @abstractmethod
    def scan(self) -> Iterator[pa.Array]:
        """Every id that is there now, once."""

    @abstractmethod
    def fetch(self, ids: pa.Array, between: bool) -> pa.RecordBatch:
        """Rows of these ids, in any order; ids that are gone are left out.

        between: the ids are neighbours of one look, so that a range finds them; other rows may then come along.
        """

    def limit(self, rows_per_second: float | None) -> None:
        """Reads no faster from now on."""
        self._pace = None if rows_per_second is None else _Pace(rows_per_second)

    def suit(self, destination: Address) -> None:
        """Reads what this destination takes: where it is the same table, no payload."""
        self.payload = destination.location() != self.address.location()

    def release(self) -> None:
        """Gives back what the server holds for this reader: a snapshot, a lock."""

    def live_in(self, journal: Path) -> None:
        self._lists.live_in(journal)

    def settle(self) -> None:
        self._lists.settle()

    def refresh(self) -> None:
        self._look = True

    def pieces(self) -> Sequence[Piece]:
        if not self._lists.generations():
            self._lists.add(self._scan())
        elif self._look:
            self._find_new()
        self._look = False
        return self._lists.pieces()

    def _scan(self) -> list[pa.Array]:
        return self.retry_policy.ask(lambda: list(self.scan()), f"looking at {self.url}", moves=1 << 30)

    def _find_new(self) -> None:
        known = self._lists.all()
        found = self._scan()
        now = pa.chunked_array(found) if found else pa.chunked_array([], known.type)
        self._gone = minus(known, now)
        new = minus(now, known)
        self.left = 0
        if len(new) and (self.follow or self._lists.generations() == 1):
            self._lists.add([new])
            _log.warning("source: %d rows came while it was read; they are mapped in a further pass", len(new))
        elif len(new):
            self.left = len(new)
            _log.warning("source: %d rows came since the second pass and are not mapped: add --follow", len(new))

    def ids(self, piece: Piece) -> pa.Array:
        """Those of a piece, as they were listed."""
        return self._lists.ids(piece)

    def gone(self) -> pa.Array | None:
        """The ids that had been there and are not any more, as the last look found; None before there was one."""
        return self._gone

    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        ids = self._lists.ids(piece, start, rows)
        between = self._lists.first(piece)
        step = max(1, min(self.page, batch_rows))
        for first in range(0, len(ids), step):
            some = ids.slice(first, step)
            if self._pace is not None:
                self._pace.wait(len(some))
            yield self._in_order(some, self.fetch(some, between))

    def _in_order(self, ids: pa.Array, rows: pa.RecordBatch) -> pa.RecordBatch:
        """One row for each id, null but for its id where it is gone."""
        place = rows.schema.get_field_index(self.id_column)
        found = rows.column(place)
        if found.equals(ids):
            return rows
        rows = rows.take(pc.index_in(ids, value_set=found))
        return rows.set_column(place, rows.schema.field(place), ids)


class DatabaseDestination(Destination):
    """A table or a collection that is written by id: a shard that is written twice leaves what it leaves once.

    hollow: counts the numbers of each column that became null, since JSON has none for them.
    """

    keeps_json: ClassVar[bool] = True  # whether payload becomes an object of JSON there

    def __init__(self, address: Address, retry_policy: RetryPolicy) -> None:
        self.address, self.retry_policy = address, retry_policy
        self.id_column, self.switch = "", False
        self.hollow: Counter[str] = Counter()
        self.same_rows = False  # the rows that are read are the ones that are written to
        self._source: DatabaseSource | None = None
        self._journal: Path | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> JsonDict:
        return self.__dict__ | {"_lock": None}

    def __setstate__(self, state: JsonDict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def url(self) -> str:
        return self.address.shown

    def watch(self, source: Source, id_column: str, journal: Path) -> None:
        """What is mapped into it: rows that the source loses are taken out at the end."""
        if not id_column:
            raise DatabaseError(
                f"id_column: expected the column of the ids, by which {self.url} is written, and {source.url} has none "
                "that is called so: name it (--id-column)"
            )
        if isinstance(source, DatabaseSource):
            if source.address.location() == self.address.location() and self.address.vector in source.needed:
                raise DatabaseError(
                    f"destination: expected another place than the source, which is never written to: {self.url} is "
                    "what is read"
                )
            source.suit(self.address)
            self._source = source
            self.same_rows = source.address.location() == self.address.location()
        self.id_column, self._journal = id_column, journal

    # ---- what a store does ----
    @abstractmethod
    def holds_rows(self, schema: pa.Schema) -> str:
        """What is in the place of the new vectors that no run of this job put there, in words; "" for nothing."""

    @abstractmethod
    def prepare(self, schema: pa.Schema, space: EmbeddingSpace, *, begun: bool) -> None:
        """Makes what must exist. begun: by an earlier run of this job; all of it may be there."""

    @abstractmethod
    def put(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Writes rows by id; those that are there are written over."""

    @abstractmethod
    def remove(self, ids: pa.Array) -> None:
        """Takes rows out; ids that are not there are no error."""

    # ---- the protocol ----
    def refuse(self, rest: pa.Schema) -> None:
        """Raises DatabaseError for payload that has no place there. rest: the columns beside ids and vectors."""
        if self.keeps_json:
            try:
                json_rows(pa.RecordBatch.from_pylist([], rest), self.hollow)
            except ValueError as error:
                raise DatabaseError(f"destination: {error}") from None

    def begin(self, schema: pa.Schema, space: EmbeddingSpace) -> None:
        vector = (schema.metadata or {})[VECTOR_KEY].decode()
        self.refuse(pa.schema([field for field in schema if field.name not in (self.id_column, vector)]))
        mark = None if self._journal is None else self._journal / "written.json"
        begun = mark is not None and mark.is_file() and json.loads(mark.read_bytes()).get("to") == self.url
        if not begun and (what := self.holds_rows(schema)):
            raise DatabaseError(
                f"destination: expected a new place or the journal of the job that began this one, {self.url} {what}: "
                "name another, or take it away"
            )
        if mark is not None and not begun:
            write_bytes(str(mark), json.dumps({"to": self.url}).encode())
        if self._source is not None:
            self._source.release()  # a column cannot be added under a reader's transaction
        self.prepare(schema, space, begun=begun)

    def write(self, shard: Shard, batches: Batches, scratch: Path) -> tuple[Mapping[str, Path], object]:
        held = [batch for batch in batches if batch.num_rows]
        if held:
            moves = sum(batch.nbytes for batch in held)
            with self._lock:
                self.retry_policy.ask(lambda: self.put(held), f"writing to {self.url}", moves=8 * moves)
        return {}, None

    def finish(self, extras: Sequence[object], schema: pa.Schema, space: EmbeddingSpace) -> None:
        gone = None if self._source is None else self._source.gone()
        if self._source is not None:
            self._source.release()
        for line in lost_numbers(self.hollow):
            _log.warning("%s", line)
        if gone is not None and len(gone):
            self.retry_policy.ask(lambda: self.remove(gone), f"removing from {self.url}", moves=1 << 30)
            _log.warning("destination: %d rows that the source lost meanwhile were taken out", len(gone))

    # ---- for the stores ----
    @staticmethod
    def true_column(schema: pa.Schema) -> str:
        """The column that says which rows a partial backfill re-embedded; "" where the backfill is a whole one."""
        return next((field.name for field in schema if (field.metadata or {}).get(TRUE_KEY)), "")

    def split(self, batch: pa.RecordBatch) -> tuple[pa.Array, pa.Array, pa.RecordBatch]:
        """(ids, vectors, the other columns)"""
        vector = (batch.schema.metadata or {})[VECTOR_KEY].decode()
        return (
            batch.column(self.id_column),
            batch.column(vector),
            batch.drop_columns([self.id_column, vector]),
        )


def json_rows(rest: pa.RecordBatch, hollow: Counter[str]) -> list[JsonDict]:
    """Each row's payload as an object for JSON: what a column of such objects has, the other columns by name.

    hollow: counts, by column, the floats that JSON has no number for and that became null.

    Raises:
        ValueError: a value that JSON cannot hold; names the column.
    """
    rows: list[JsonDict] = [{} for _ in range(rest.num_rows)]
    for entry, column in zip(rest.schema, rest.columns, strict=True):
        if not (entry.metadata or {}).get(b"fct.json"):
            for row, value in zip(rows, json_values(column, entry.name, 0, hollow), strict=True):
                row[entry.name] = value
    for entry, column in zip(rest.schema, rest.columns, strict=True):
        if (entry.metadata or {}).get(b"fct.json"):
            for row, text in zip(rows, column.to_pylist(), strict=True):
                row.update(json.loads(text) if text else {})
    return rows

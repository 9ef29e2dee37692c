"""Stores that hold points: an id, vectors and one object of payload. Their payload travels as a column of JSON."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from fct.errors import FctError
from fct.gallery.databases.address import Address
from fct.gallery.databases.database_gallery import (
    JSON_KEY,
    DatabaseDestination,
    DatabaseError,
    DatabaseSource,
    json_rows,
)
from fct.gallery.interfaces import VECTOR_KEY
from fct.gallery.location import RetryPolicy
from fct.types import Array, Id, JsonDict

__all__ = ["PAYLOAD", "CollectionSource", "asked", "clients", "points_of", "rows_of_points", "vectors_of"]

T = TypeVar("T")

PAYLOAD = "payload"
Point = tuple[Id, Mapping[str, Any], Mapping[str, Any] | None]  # id, vectors by name, payload
clients: dict[tuple[str, str, int, str], Any] = {}
"""One client for each server or folder in this process: a store in a folder can be opened once."""

_REFUSED = ("Unauthorized", "401", "403", "Forbidden", "authentication", "auth check failure", "API key", "permission")

_LATER = (408, 409, 423, 425, 429)
_WRONG = ("InvalidArgumentError", "InvalidDimensionException", "UniqueConstraintError", "ParamError")
_MARKS = {"qdrant": "meta.json", "chroma": "chroma.sqlite3", "milvus": ""}  # of a store in a folder or a file


def _is_final(error: Exception) -> bool:
    """Whether asking again does not help: what was asked is wrong, and not the server unwell."""
    status = getattr(error, "status_code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _LATER
    # NotImplementedError is a client's word for a call that this kind of store does not have: no later try finds it.
    wrong = isinstance(error, (ValueError, TypeError, NotImplementedError)) and not isinstance(error, OSError)
    return wrong or type(error).__name__ in _WRONG


def asked(address: Address, do: Callable[..., T]) -> T:
    """``do()``; a refusal becomes a DatabaseError without the address's secrets, the rest an error that may pass."""
    try:
        return do()
    except FctError:
        raise
    except Exception as error:
        said = address.hidden(f"{type(error).__name__}: {error}")[:500]
        if any(word.lower() in said.lower() for word in _REFUSED):
            raise DatabaseError(f"{address.shown}: the server refuses: {said}") from None
        if _is_final(error):
            raise DatabaseError(f"{address.shown}: {said}") from None
        raise ConnectionError(said) from None


def rows_of_points(points: Sequence[Point], schema: pa.Schema, id_column: str) -> pa.RecordBatch:
    """Points in the schema's columns; a vector or a payload that is missing is null."""
    columns = []
    for entry in schema:
        if entry.name == id_column:
            columns.append(pa.array([key for key, _, _ in points], entry.type))
        elif entry.name == PAYLOAD and (entry.metadata or {}).get(b"fct.json"):
            # In one order of names, which a store may give in another each time: the same row is the same text.
            texts = [None if p is None else json.dumps(p, default=str, sort_keys=True) for _, _, p in points]
            columns.append(pa.array(texts, pa.string()))
        else:
            rows = [v.get(entry.name) for _, v, _ in points]
            whole = [None if row is None else np.asarray(row, np.float32) for row in rows]
            columns.append(pa.array(whole, pa.list_(pa.float32())))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def points_of(destination: DatabaseDestination, batch: pa.RecordBatch) -> tuple[list[Id], Array, list[JsonDict]]:
    """(ids, (n, d) float32, payload objects) of a batch."""
    ids, vectors, rest = destination.split(batch)
    try:
        return ids.to_pylist(), vectors_of(vectors), json_rows(rest, destination.hollow)
    except ValueError as error:  # a time that has no text
        raise DatabaseError(f"destination: {error}") from None


def vectors_of(column: pa.Array) -> Array:
    """A whole column of fixed-size lists as (n, d) float32."""
    flat: Array = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), -1).astype(np.float32, copy=False)


class CollectionSource(DatabaseSource):
    """What the sources of such stores share: the schema, and rows asked for by their ids."""

    def __init__(self, address: Address, retry_policy: RetryPolicy) -> None:
        super().__init__(address, retry_policy)
        self._facts: tuple[str, pa.DataType, tuple[str, ...]] | None = None

    @abstractmethod
    def look(self) -> tuple[str, pa.DataType, tuple[str, ...]]:
        """(name of the ids, their type, names of the vectors). Raises DatabaseError where there is no collection."""

    @abstractmethod
    def points(self, ids: list[Id]) -> list[Point]:
        """The points of these ids that are there."""

    @property
    def facts(self) -> tuple[str, pa.DataType, tuple[str, ...]]:
        if self._facts is None:
            self._require_there()
            self._facts = self.retry_policy.ask(lambda: asked(self.address, self.look), f"opening {self.url}", moves=0)
            wanted, names = self.address.vector, self._facts[2]
            if wanted and wanted not in names:
                known = ", ".join(names)
                raise DatabaseError(f"source: expected a vector of {self.address.table} ({known}), got {wanted!r}")
            self.id_column = self._facts[0]
        return self._facts

    def _require_there(self) -> None:
        """Raises DatabaseError for a local store that is not there: its client would make one."""
        place = self.address.path
        if not self.address.host and not os.path.exists(os.path.join(place, _MARKS[self.address.kind])):
            raise DatabaseError(f"source: expected a store of {self.address.kind} at {place}, there is none")

    @property
    def schema(self) -> pa.Schema:
        key, kind, names = self.facts
        wanted = (self.address.vector, self.address.options.get("side", ""))
        kept = [n for n in names if not self.address.vector or n in wanted or n in self.needed]
        fields = [pa.field(key, kind), *(pa.field(n, pa.list_(pa.float32())) for n in kept)]
        if self.payload:
            fields.append(pa.field(PAYLOAD, pa.string(), metadata=JSON_KEY))
        metadata = {VECTOR_KEY: self.address.vector.encode()} if self.address.vector else None
        return pa.schema(fields, metadata)

    def fetch(self, ids: pa.Array, between: bool) -> pa.RecordBatch:
        points = asked(self.address, lambda: self.points(ids.to_pylist()))
        return rows_of_points(points, self.schema, self.facts[0])

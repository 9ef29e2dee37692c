"""Store: one table or collection by its client's own count and ordinary reads, row by row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from fct.types import Id

__all__ = ["PAGE", "Rows", "Store"]

PAGE = 1000
Rows = dict[Id, Mapping[str, object]]  # by id: column -> value


class Store(ABC):
    """One table or collection. by: how it is read, for messages."""

    by: str

    @abstractmethod
    def count(self) -> int:
        """The store's own count of rows."""

    @abstractmethod
    def ids(self) -> Iterator[Id]:
        """The id of every row."""

    @abstractmethod
    def rows(self, ids: list[Id]) -> Rows:
        """What is there of these ids."""

    def key(self, value: Id) -> Id:
        """An id as the store gives it back."""
        return value

    def batch(self, ids: pa.Array, schema: pa.Schema, id_column: str, *, asked: bool = True) -> pa.RecordBatch:
        """One row for each id under a schema, null where it is gone. asked: its id as it was asked for all the same."""
        keys = [self.key(value) for value in ids.to_pylist()]
        found: Rows = {}
        for start in range(0, len(keys), PAGE):
            found |= self.rows(keys[start : start + PAGE])
        none: Mapping[str, object] = {}
        columns = []
        for field in schema:
            if field.name == id_column:
                there = pa.array([asked or key in found for key in keys])
                columns.append(pc.if_else(there, ids, pa.scalar(None, ids.type)).cast(field.type))
            else:
                columns.append(_array([found.get(key, none).get(field.name) for key in keys], field.type))
        return pa.RecordBatch.from_arrays(columns, schema=schema)


def _array(values: list[object], kind: pa.DataType) -> pa.Array:
    if pa.types.is_timestamp(kind):  # microseconds
        return pa.array(values, pa.int64()).cast(pa.timestamp("us", kind.tz)).cast(kind)
    return pa.array(values, kind)

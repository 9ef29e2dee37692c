"""A new gallery in a database, read back by id: what the job wrote there, in the words of the store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from fct.backfilling.job import Job
from fct.backfilling.second_databases import store_of
from fct.gallery.databases import DatabaseSource, database_source
from fct.gallery.databases.database_gallery import json_rows
from fct.gallery.databases.documents import PAYLOAD, CollectionSource
from fct.gallery.databases.postgres_copy import PG_TYPE
from fct.gallery.interfaces import Source
from fct.gallery.location import RetryPolicy
from fct.types import JsonDict

__all__ = ["DatabaseResult", "canonical", "in_one_spelling", "is_json"]

_VECTORS = {"qdrant": "vector", "milvus": "vector", "chroma": "embedding"}
_JSON = ("json", "jsonb")


class DatabaseResult:
    """The rows that a job wrote into a table or a collection. vector: the column of the new vectors there.

    same_location: whether they became a further vector of the rows that were read, so that there is no payload.
    """

    def __init__(self, url: str, job: Job, source: Source, retry_policy: RetryPolicy) -> None:
        plain = database_source(url, retry_policy, name="gallery").address
        self.vector = plain.vector or _VECTORS.get(plain.kind, job.vector)
        named = replace(plain, vector="" if plain.kind == "qdrant" and not plain.vector else self.vector)
        self.source = type(database_source(url, retry_policy, name="gallery"))(named, retry_policy)
        self.same_location = False
        if isinstance(source, DatabaseSource):
            source.suit(plain)
            self.same_location = source.address.location() == plain.location()
            if (
                self.same_location and not source.address.vector
            ):  # else the new vector would be read as the old one's payload
                source.address = replace(source.address, vector=job.vector)
            if plain.kind == "postgresql" == source.address.kind:
                self.source.raw = True  # type: ignore[attr-defined]
        # As numbers, not as the server's bytes: what says which rows are true, and what they were chosen by.
        self.source.needed = tuple(filter(None, (self.vector, job.true_column, job.ordered_by)))
        self._schema, self._job = self.source.schema, job
        self.id_column = self.source.id_column
        self._store = store_of(self.source)
        self.by = self._store.by

    def count(self) -> int:
        return self._store.count()

    def columns(self, source: Sequence[str]) -> list[str]:
        """Which columns can be compared, of these of the source."""
        if self.same_location:
            return [self._job.id_column]
        if isinstance(self.source, CollectionSource):
            return [self._job.id_column, PAYLOAD]
        return [name for name in source if name == self._job.id_column or name in self._schema.names]

    def wanted(self, batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
        """The source's rows as they should be there."""
        ids = batch.column(self._job.id_column).cast(self._schema.field(self.id_column).type)
        arrays: list[pa.Array] = []
        for name in columns:
            if name == self._job.id_column:
                arrays.append(pa.array([self._store.key(value) for value in ids.to_pylist()], ids.type))
            elif isinstance(self.source, CollectionSource):
                arrays.append(pa.array(self._payload(batch), pa.string()))
            else:
                arrays.append(_as_json(batch.column(name), self._schema.field(name)))
        return pa.RecordBatch.from_arrays(arrays, list(columns))

    def _payload(self, batch: pa.RecordBatch) -> list[str]:
        job = self._job
        own = {job.id_column, job.vector} | (set() if job.keep_side or not job.side_column else {job.side_column})
        rest = batch.drop_columns([name for name in batch.schema.names if name in own])
        rows = json_rows(rest, Counter())
        if self.source.kind == "chroma":
            from fct.gallery.databases.chroma_collection import _record

            parts = ((_record(row, rest.schema)) for row in rows)
            rows = [dict(zip(("metadata", "document", "uri"), part, strict=True)) for part in parts]
        return [canonical(row) for row in rows]

    def found(self, ids: pa.Array, columns: Sequence[str]) -> pa.RecordBatch:
        """What is there of these ids: null where nothing is."""
        rows = self._store.batch(
            ids.cast(self._schema.field(self.id_column).type), self._schema, self.id_column, asked=False
        )
        arrays: list[pa.Array] = []
        for name in columns:
            if name == self._job.id_column:
                keys = [None if v is None else self._store.key(v) for v in rows.column(self.id_column).to_pylist()]
                arrays.append(pa.array(keys, rows.column(self.id_column).type))
            elif name == PAYLOAD and isinstance(self.source, CollectionSource):
                texts = rows.column(PAYLOAD).to_pylist()
                arrays.append(pa.array([canonical(self._own(json.loads(t)) if t else {}) for t in texts], pa.string()))
            else:
                arrays.append(_as_json(rows.column(name), self._schema.field(name)))
        return pa.RecordBatch.from_arrays(arrays, list(columns))

    def _own(self, payload: JsonDict) -> JsonDict:
        """A payload without what a partial backfill says in it."""
        flag = self._job.true_column
        if self.source.kind == "chroma":
            return payload | {
                "metadata": {k: v for k, v in (payload.get("metadata") or {}).items() if k != flag} or None
            }
        return {k: v for k, v in payload.items() if k != flag}

    def vectors(self, ids: pa.Array) -> pa.RecordBatch:
        """The new vectors of these ids, in the column :attr:`vector`, and which are true where a column says so."""
        kind, flag = self._schema.field(self.id_column).type, self._job.true_column
        rows = self._store.batch(ids.cast(kind), self._schema, self.id_column)
        return rows.select([self.vector, *([flag] if flag in rows.schema.names else [])])

    def beside(self, stream: Iterator[pa.RecordBatch], columns: Sequence[str]) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """(the source's rows as they should be there, what is there of their ids), two streams in one order."""
        waiting: list[pa.Array] = []

        def want() -> Iterator[pa.RecordBatch]:
            for batch in stream:
                waiting.append(batch.column(self._job.id_column))
                yield self.wanted(batch, columns)

        def got() -> Iterator[pa.RecordBatch]:
            while waiting:
                yield self.found(waiting.pop(0), columns)

        return want(), got()


def canonical(value: object) -> str:
    """An object as JSON in one spelling; what is null is not there."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}
    return json.dumps(value, sort_keys=True, default=lambda v: list(v) if hasattr(v, "__iter__") else str(v))


def is_json(field: pa.Field) -> bool:
    """Whether a column holds a row's payload as JSON."""
    return bool((field.metadata or {}).get(b"fct.json"))


def in_one_spelling(batches: Iterator[pa.RecordBatch], names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """These columns of JSON in one order of names: two ways of asking a store may give two."""
    for batch in batches:
        for name in names:
            place = batch.schema.get_field_index(name)
            texts = [None if t is None else canonical(json.loads(t)) for t in batch.column(place).to_pylist()]
            batch = batch.set_column(place, batch.schema.field(place), pa.array(texts, batch.schema.field(place).type))
        yield batch


def _as_json(column: pa.Array, there: pa.Field) -> pa.Array:
    """A column that the table holds as JSON, in one spelling; others as they are."""
    kind = (there.metadata or {}).get(PG_TYPE, b"").decode()
    if kind not in _JSON or pa.types.is_binary(column.type):
        return column
    values = column.to_pylist()
    parsed = [json.loads(v) if isinstance(v, str) and pa.types.is_string(column.type) else v for v in values]
    texts = [
        None if v is None else json.dumps(p, sort_keys=True, default=str) for v, p in zip(values, parsed, strict=True)
    ]
    return pa.array(texts, pa.string())

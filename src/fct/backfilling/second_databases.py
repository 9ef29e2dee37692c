"""Databases as galleries are read a second time: the lists of ids that the journal keeps, the rows one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from fct.backfilling.database_store import PAGE, Store
from fct.backfilling.row_reader import RowReader
from fct.backfilling.second_collections import ChromaStore, MilvusStore, QdrantStore
from fct.backfilling.second_postgres import PostgresStore
from fct.errors import FctError
from fct.gallery.databases import DatabaseSource
from fct.gallery.databases.documents import CollectionSource
from fct.gallery.databases.postgres_source import PostgresSource
from fct.types import Id

__all__ = ["DatabaseReader", "store_of"]


def store_of(source: DatabaseSource) -> Store:
    """The second way into what a source reads."""
    if isinstance(source, PostgresSource):
        return PostgresStore(source)
    assert isinstance(source, CollectionSource)
    stores: dict[str, Callable[[CollectionSource], Store]] = {
        "qdrant": QdrantStore, "milvus": MilvusStore, "chroma": ChromaStore,
    }  # fmt: skip
    return stores[source.kind](source)


class DatabaseReader(RowReader):
    """The lists of ids that the journal keeps, held against the ids that are there; rows by their ids.

    gone: ids of the lists that the store has no longer.
    """

    def __init__(self, source: DatabaseSource, lists: Path) -> None:
        self._store, self._source = store_of(source), source
        self.by = self._store.by
        label = f"{source.address.kind}:{source.address.table}"
        self.files = {
            f"{label}/{folder.name}/{file.stem}": file
            for folder in sorted(lists.glob("look-*"))
            for file in sorted(folder.glob("*.arrow"))
        }
        if not self.files:
            raise FctError(f"{source.url}: expected the job's lists of ids in {lists}; name its journal (--journal)")
        self._schema = source.schema
        self.gone: set[Id] = set()

    def ids(self, name: str) -> pa.Array:
        with pa.OSFile(str(self.files[name])) as file:
            return pa.ipc.open_file(file).read_all().column(0).combine_chunks()

    def counts(self) -> dict[str, int]:
        now = list(self._store.ids())
        there, total = set(now), self._store.count()
        if total != len(now) or len(there) != len(now):
            raise FctError(
                f"{self._source.url} counts {total:,} rows, its ids are {len(now):,} ({len(there):,} of them different)"
            )
        found, listed = {}, set[Id]()
        for name in self.files:
            ids = self.ids(name).to_pylist()
            twice = len(ids) - len(set(ids) - listed)
            if twice:
                raise FctError(f"{name} lists {twice:,} ids that were listed before")
            listed |= set(ids)
            found[name] = len(ids)
        self.gone = listed - there
        new = there - listed
        if new:
            found[f"what came since, or was never read (first {min(map(str, new))})"] = len(new)
        return found

    def read(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        ids = self.ids(name)
        schema = pa.schema([self._schema.field(c) for c in columns])
        for start in range(0, len(ids), PAGE):
            yield self._store.batch(ids.slice(start, PAGE), schema, self._source.id_column)

"""Collections by their clients' own counts and ordinary reads: another way than the source's pages and points."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from fct.backfilling.database_store import PAGE, Rows, Store
from fct.gallery.databases.documents import PAYLOAD, CollectionSource, asked
from fct.types import Id, JsonDict

__all__ = ["ChromaStore", "MilvusStore", "QdrantStore"]


class _CollectionStore(Store):
    def __init__(self, source: CollectionSource) -> None:
        self.address, self.table = source.address, source.address.table
        self.key_name, _, self.vectors = source.facts

    def ask(self, do: Callable[[], object]) -> Any:
        return asked(self.address, do)


def _point(vectors: Mapping[str, Any], payload: Mapping[str, Any] | None) -> Mapping[str, Any]:
    found: JsonDict = {n: None if v is None else np.asarray(v, np.float32) for n, v in vectors.items()}
    return found | {PAYLOAD: None if payload is None else json.dumps(payload, default=str, sort_keys=True)}


class QdrantStore(_CollectionStore):
    by = "Qdrant's count and scroll"

    def __init__(self, source: CollectionSource) -> None:
        super().__init__(source)
        from fct.gallery.databases.qdrant_collection import _client

        self.client = _client(self.address)

    def count(self) -> int:
        return int(self.ask(lambda: self.client.count(self.table, exact=True)).count)

    def ids(self) -> Iterator[Id]:
        at: Any = None
        while True:
            page, at = self.ask(partial(self._page, at))
            yield from (point.id for point in page)
            if at is None:
                return

    def _page(self, at: Any) -> Any:
        return self.client.scroll(self.table, limit=PAGE, offset=at, with_payload=False, with_vectors=False)

    def key(self, value: Id) -> Id:
        return str(uuid.UUID(value)) if isinstance(value, str) else value

    def rows(self, ids: list[Id]) -> Rows:
        from qdrant_client import models

        some = models.Filter(must=[models.HasIdCondition(has_id=[i for i in ids if not isinstance(i, bytes)])])
        page, _ = self.ask(
            lambda: self.client.scroll(
                self.table, scroll_filter=some, limit=len(ids), with_payload=True, with_vectors=True
            )
        )
        return {
            p.id: _point(p.vector if isinstance(p.vector, dict) else {self.vectors[0]: p.vector}, p.payload)
            for p in page
        }


class MilvusStore(_CollectionStore):
    by = "Milvus' count and query"

    def __init__(self, source: CollectionSource) -> None:
        super().__init__(source)
        from fct.gallery.databases.milvus_collection import _client

        self.client = _client(self.address)

    def count(self) -> int:
        (row,) = self.ask(
            lambda: self.client.query(
                self.table, filter="", output_fields=["count(*)"], consistency_level="Strong"
            )
        )  # fmt: skip
        return int(row["count(*)"])

    def ids(self) -> Iterator[Id]:
        pages = self.ask(lambda: self.client.query_iterator(self.table, batch_size=PAGE, output_fields=[self.key_name]))
        try:
            while page := self.ask(pages.next):
                yield from (row[self.key_name] for row in page)
        finally:
            pages.close()

    def rows(self, ids: list[Id]) -> Rows:
        page = self.ask(
            lambda: self.client.query(
                self.table, filter=f"{self.key_name} in {json.dumps(ids, ensure_ascii=False)}", output_fields=["*"],
                consistency_level="Strong",
            )
        )  # fmt: skip
        own = {self.key_name, *self.vectors}
        return {
            row[self.key_name]: _point(
                {n: row[n] for n in self.vectors if n in row}, {k: v for k, v in row.items() if k not in own}
            )
            for row in page
        }


class ChromaStore(_CollectionStore):
    by = "Chroma's count and get"

    def _collection(self) -> Any:
        from fct.gallery.databases.chroma_collection import _collection

        return self.ask(lambda: _collection(self.address))

    def count(self) -> int:
        return int(self.ask(self._collection().count))

    def ids(self) -> Iterator[Id]:
        yield from self.ask(lambda: self._collection().get(include=[]))["ids"]

    def rows(self, ids: list[Id]) -> Rows:
        what = {"metadata": "metadatas", "document": "documents", "uri": "uris"}
        page = self.ask(lambda: self._collection().get(ids=ids, include=["embeddings", *what.values()]))
        found = {}
        for i, key in enumerate(page["ids"]):
            beside = {name: page[many][i] for name, many in what.items() if page.get(many) is not None}
            payload = {name: value for name, value in beside.items() if value is not None}
            found[key] = _point({self.vectors[0]: page["embeddings"][i]}, payload)
        return found

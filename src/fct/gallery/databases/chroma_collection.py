"""Chroma: records in pages of ids; into a new collection, in batches under the client's limit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from fct.extras import need
from fct.gallery.databases.address import Address
from fct.gallery.databases.database_gallery import DatabaseDestination, DatabaseError
from fct.gallery.databases.documents import CollectionSource, Point, asked, clients, points_of
from fct.mixed_warning import warn_other_metric
from fct.spaces import EmbeddingSpace
from fct.types import Id, JsonDict

if TYPE_CHECKING:
    pass


__all__ = ["ChromaDestination", "ChromaSource"]

_PAGE = 1000
_VECTOR = "embedding"
_SPACES = {"l2": "l2", "ip": "ip", "cosine": "cosine"}


def _client(address: Address) -> Any:
    """``chroma://host:8000`` (a token from CHROMA_TOKEN), or the folder of a persistent client."""
    chromadb = need("chromadb", "chroma")
    key = (address.kind, address.host, address.port, address.path)
    if key not in clients:
        settings = chromadb.Settings(anonymized_telemetry=False)
        if not address.host:
            if not os.path.isdir(address.path) and not os.path.isdir(os.path.dirname(address.path.rstrip("/"))):
                raise DatabaseError(f"{address.shown}: expected the folder of a Chroma database, there is none")
            clients[key] = chromadb.PersistentClient(address.path, settings=settings)
        else:
            token = address.password or os.environ.get("CHROMA_TOKEN", "")
            try:
                clients[key] = chromadb.HttpClient(
                    address.host,
                    address.port,
                    ssl=address.options.get("https") in ("1", "true"),
                    headers={"Authorization": f"Bearer {token}"} if token else None,
                    settings=settings,
                    **{k: address.options[k] for k in ("tenant", "database") if k in address.options},
                )
            except ValueError as error:  # which it says of a server that does not answer, too
                raise ConnectionError(str(error)) from error
    return clients[key]


def _collection(address: Address) -> Any:
    """None where there is none."""
    from chromadb.errors import NotFoundError

    try:
        return _client(address).get_collection(address.table, embedding_function=None)
    except NotFoundError:
        return None


class ChromaSource(CollectionSource):
    kind: ClassVar[str] = "chroma"
    page: ClassVar[int] = _PAGE

    def look(self) -> tuple[str, pa.DataType, tuple[str, ...]]:
        if _collection(self.address) is None:
            raise DatabaseError(f"source: expected a collection, there is no {self.address.table} at {self.url}")
        return "id", pa.string(), (self.address.vector or _VECTOR,)

    def _there(self) -> Any:
        found = asked(self.address, lambda: _collection(self.address))
        if found is None:
            raise DatabaseError(f"source: expected a collection, there is no {self.address.table} at {self.url}")
        return found

    def scan(self) -> Iterator[pa.Array]:
        collection, at = self._there(), 0
        seen: set[str] = set()  # pages go by number: a row that is deleted meanwhile moves the others
        while page := asked(self.address, lambda at=at: collection.get(limit=_PAGE, offset=at, include=[])["ids"]):
            at += len(page)
            fresh = [i for i in page if i not in seen]
            seen.update(fresh)
            yield pa.array(fresh, pa.string())

    def points(self, ids: list[Id]) -> list[Point]:
        include = ["embeddings", "metadatas", "documents", "uris"] if self.payload else ["embeddings"]
        found = self._there().get(ids=ids, include=include)
        points: list[Point] = []
        for i, key in enumerate(found["ids"]):
            payload = {
                name: found[what][i]
                for name, what in (("metadata", "metadatas"), ("document", "documents"), ("uri", "uris"))
                if found.get(what) is not None and found[what][i] is not None
            }
            points.append((key, {self.facts[2][0]: found["embeddings"][i]}, payload))
        return points


class ChromaDestination(DatabaseDestination):
    kind: ClassVar[str] = "chroma"

    def holds_rows(self, schema: pa.Schema) -> str:
        def look() -> str:
            collection = _collection(self.address)
            return f"holds {collection.count()} records" if collection is not None and collection.count() else ""

        return str(self.retry_policy.ask(lambda: asked(self.address, look), f"opening {self.url}", moves=0))

    def prepare(self, schema: pa.Schema, space: EmbeddingSpace, *, begun: bool) -> None:
        def make() -> None:
            there = _collection(self.address)
            if there is not None:
                metric = str(((there.configuration or {}).get("hnsw") or {}).get("space", space.metric))
                warn_other_metric(space, metric, f"destination: {self.url}", stacklevel=2)
            else:
                _client(self.address).create_collection(
                    self.address.table,
                    configuration={"hnsw": {"space": _SPACES[space.metric]}},
                    metadata={"fct.space": json.dumps(space.to_dict(), sort_keys=True)},
                    embedding_function=None,
                )

        self.retry_policy.ask(lambda: asked(self.address, make), f"preparing {self.url}", moves=0)

    def put(self, batches: Sequence[pa.RecordBatch]) -> None:
        most = int(asked(self.address, lambda: _client(self.address).get_max_batch_size()))
        collection = asked(self.address, lambda: _collection(self.address))
        for batch in batches:
            ids, vectors, payloads = points_of(self, batch)
            for start in range(0, len(ids), most):
                part = slice(start, start + most)
                words = [_record(p, batch.schema) for p in payloads[part]]
                rows = {
                    "ids": [str(i) for i in ids[part]],
                    "embeddings": vectors[part],
                    "metadatas": [w[0] for w in words],
                    "documents": [w[1] for w in words] if any(w[1] is not None for w in words) else None,
                    "uris": [w[2] for w in words] if any(w[2] is not None for w in words) else None,
                }
                asked(self.address, lambda rows=rows: collection.upsert(**rows))

    def remove(self, ids: pa.Array) -> None:
        collection = _collection(self.address)
        for start in range(0, len(ids), _PAGE):
            asked(self.address, lambda s=start: collection.delete(ids=ids.slice(s, _PAGE).to_pylist()))

    def finish(self, extras: Sequence[object], schema: pa.Schema, space: EmbeddingSpace) -> None:
        super().finish(extras, schema, space)
        if self.switch:
            raise DatabaseError("switch_alias: expected False, since Chroma has no aliases, got True")

    def after(self, space: EmbeddingSpace) -> list[str]:
        return [f'when you are ready, search the collection "{self.address.table}": Chroma has no aliases']


_ITS_OWN = {"metadata", "document", "uri"}


def _record(payload: JsonDict, schema: pa.Schema) -> tuple[JsonDict | None, str | None, str | None]:
    """(metadata, document, uri). What did not come from Chroma is metadata: numbers, texts, booleans, else as JSON."""
    if set(payload) <= _ITS_OWN and not _ITS_OWN & set(schema.names):
        return payload.get("metadata") or None, payload.get("document"), payload.get("uri")
    some = {k: v for k, v in payload.items() if v is not None}
    flat = {k: v if isinstance(v, (str, int, float, bool)) else json.dumps(v) for k, v in some.items()}
    return flat or None, None, None

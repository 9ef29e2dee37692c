"""Qdrant: points by scroll and by id; into a new collection with the same payload, or a new named vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

import pyarrow as pa

from fct.extras import need
from fct.gallery.databases.address import Address
from fct.gallery.databases.database_gallery import DatabaseDestination, DatabaseError
from fct.gallery.databases.documents import CollectionSource, Point, asked, clients, points_of
from fct.mixed_warning import warn_other_metric
from fct.spaces import EmbeddingSpace
from fct.types import Id, JsonDict

if TYPE_CHECKING:
    from qdrant_client import QdrantClient


__all__ = ["QdrantDestination", "QdrantSource"]

_PAGE = 1000
_UNNAMED = "vector"  # what the one vector without a name is called in a schema
_DISTANCES = {"l2": "Euclid", "ip": "Dot", "cosine": "Cosine"}


def _client(address: Address) -> QdrantClient:
    """``qdrant://host:6333`` (the key from QDRANT_API_KEY, or as the password), or the folder of the local mode."""
    import os

    qdrant = need("qdrant_client", "qdrant")
    key = (address.kind, address.host, address.port, address.path)
    if key not in clients:
        if not address.host:
            clients[key] = qdrant.QdrantClient(path=address.path)
        else:
            scheme = "https" if address.options.get("https") in ("1", "true") else "http"
            secret = address.password or os.environ.get("QDRANT_API_KEY") or None
            url = f"{scheme}://{address.host}:{address.port}{address.path.rstrip('/')}"
            clients[key] = qdrant.QdrantClient(url=url, api_key=secret, timeout=60, check_compatibility=False)
    client: QdrantClient = clients[key]
    return client


def _vectors(client: QdrantClient, address: Address) -> JsonDict | None:
    """Name -> parameters of the collection's dense vectors; None where there is no collection."""
    if not client.collection_exists(address.table):
        return None
    found = client.get_collection(address.table).config.params.vectors
    return dict(found) if isinstance(found, dict) else {_UNNAMED: found}


class QdrantSource(CollectionSource):
    kind: ClassVar[str] = "qdrant"
    page: ClassVar[int] = _PAGE

    def look(self) -> tuple[str, pa.DataType, tuple[str, ...]]:
        client = _client(self.address)
        vectors = _vectors(client, self.address)
        if vectors is None:
            raise DatabaseError(f"source: expected a collection, there is no {self.address.table} at {self.url}")
        dense = tuple(name for name, how in vectors.items() if how.multivector_config is None)
        if not dense:
            raise DatabaseError(
                f"source: expected a collection with a dense vector, {self.address.table} has "
                f"{', '.join(vectors) or 'none'}, of which each point has several"
            )
        first, _ = client.scroll(self.address.table, limit=1, with_payload=False, with_vectors=False)
        text = bool(first) and isinstance(first[0].id, str)
        return "id", pa.string() if text else pa.uint64(), dense

    def scan(self) -> Iterator[pa.Array]:
        client, kind, at = _client(self.address), self.facts[1], None
        while True:
            points, at = asked(
                self.address,
                lambda at=at: client.scroll(
                    self.address.table, limit=_PAGE, offset=at, with_payload=False, with_vectors=False
                ),
            )
            ids = [p.id for p in points]
            if any(isinstance(i, str) != pa.types.is_string(kind) for i in ids):
                raise DatabaseError(f"source: expected ids that are all numbers or all UUIDs, {self.url} has both")
            yield pa.array(ids, kind)
            if at is None:
                return

    def points(self, ids: list[Id]) -> list[Point]:
        found = _client(self.address).retrieve(
            self.address.table,
            [i for i in ids if not isinstance(i, bytes)],
            with_payload=self.payload,
            with_vectors=True,
            timeout=60,
        )
        return [(p.id, p.vector if isinstance(p.vector, dict) else {_UNNAMED: p.vector}, p.payload) for p in found]


class QdrantDestination(DatabaseDestination):
    kind: ClassVar[str] = "qdrant"
    _flag = ""  # of the payload: whether a row was re-embedded; set where the points are those that are read

    def holds_rows(self, schema: pa.Schema) -> str:
        def look() -> str:
            client = _client(self.address)
            vectors = _vectors(client, self.address)
            name = self.address.vector or _UNNAMED
            if vectors is None or name not in vectors:
                return ""
            points, _ = client.scroll(self.address.table, limit=1, with_payload=False, with_vectors=True)
            held = points and (not isinstance(points[0].vector, dict) or name in points[0].vector)
            return f"holds points with {name!r} already" if held else ""

        def taken() -> str:
            """Whether the owner's payload has the name that says which rows are re-embedded."""
            from qdrant_client import models

            flag, client = self.true_column(schema), _client(self.address)
            if not flag or not self._same() or _vectors(client, self.address) is None:
                return ""
            empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=flag))
            points, _ = client.scroll(self.address.table, models.Filter(must_not=[empty]), limit=1, with_payload=False)
            return f"has {flag!r} in its payload already (--true-column names another)" if points else ""

        return str(self.retry_policy.ask(lambda: asked(self.address, look) or asked(self.address, taken),
                                     f"opening {self.url}", moves=0))  # fmt: skip

    def prepare(self, schema: pa.Schema, space: EmbeddingSpace, *, begun: bool) -> None:
        self._flag = self.true_column(schema)
        self.retry_policy.ask(
            lambda: asked(self.address, lambda: self._prepare(space)), f"preparing {self.url}", moves=0
        )

    def _same(self) -> bool:
        """Whether the points are those that are read: then they get a further vector, and keep the rest."""
        return self._source is not None and self._source.address.location() == self.address.location()

    def _prepare(self, space: EmbeddingSpace) -> None:
        from qdrant_client import models

        client, name = _client(self.address), self.address.vector
        vectors = _vectors(client, self.address)
        like = models.VectorParams(size=space.dim, distance=models.Distance(_DISTANCES[space.metric]))
        if vectors is None:
            client.create_collection(self.address.table, vectors_config={name: like} if name else like)
        elif (name or _UNNAMED) not in vectors:
            if not self._same() or not name:
                raise DatabaseError(
                    f"destination: expected a new collection, or a named vector of the one that is read, "
                    f"{self.address.table} has {', '.join(vectors)}"
                )
            config = models.DenseVectorNameConfig(
                dense=models.DenseVectorConfig(size=space.dim, distance=like.distance)
            )
            client.create_vector_name(self.address.table, name, config)
        elif vectors[name or _UNNAMED].size != space.dim:
            size = vectors[name or _UNNAMED].size
            raise DatabaseError(f"destination: expected {space.dim}-d vectors, {self.address.table} has {size}-d ones")
        else:
            there = {distance: metric for metric, distance in _DISTANCES.items()}
            metric = there.get(str(vectors[name or _UNNAMED].distance.value), "another metric")
            warn_other_metric(space, metric, f"destination: {self.url}", stacklevel=2)

    def put(self, batches: Sequence[pa.RecordBatch]) -> None:

        for batch in batches:
            ids, vectors, payloads = points_of(self, batch)
            for start in range(0, len(ids), _PAGE):
                part = slice(start, start + _PAGE)
                asked(self.address, lambda i=ids[part], v=vectors[part], p=payloads[part]: self._put(i, v.tolist(), p))

    def _put(self, ids: list[int | str | UUID], vectors: list[list[float]], payloads: list[JsonDict]) -> None:
        from qdrant_client import models

        client, name = _client(self.address), self.address.vector
        rows: list[Any] = [{name: row} if name else row for row in vectors]
        if self._same():
            there = {p.id for p in client.retrieve(self.address.table, ids, with_payload=False)}
            some = [models.PointVectors(id=i, vector=v) for i, v in zip(ids, rows, strict=True) if i in there]
            if some:
                client.update_vectors(self.address.table, some, wait=True)
            for said in (True, False) if self._flag else ():
                marked = [i for i, p in zip(ids, payloads, strict=True) if i in there and p[self._flag] is said]
                if marked:
                    client.set_payload(self.address.table, {self._flag: said}, marked, wait=True)
            return
        points = [models.PointStruct(id=i, vector=v, payload=p) for i, v, p in zip(ids, rows, payloads, strict=True)]
        client.upsert(self.address.table, points, wait=True)

    def remove(self, ids: pa.Array) -> None:
        if self._same():
            return
        client = _client(self.address)
        for start in range(0, len(ids), _PAGE):
            some = ids.slice(start, _PAGE).to_pylist()
            asked(self.address, lambda s=some: client.delete(self.address.table, s, wait=True))

    def finish(self, extras: Sequence[object], schema: pa.Schema, space: EmbeddingSpace) -> None:
        super().finish(extras, schema, space)
        alias = self.address.options.get("alias", "")
        if self.switch and not alias:
            raise DatabaseError("switch_alias: expected the alias in the destination's URL (&alias=NAME), got none")
        if not self.switch:
            return
        from qdrant_client import models

        client = _client(self.address)
        known = {a.alias_name for a in asked(self.address, client.get_aliases).aliases}
        change: list[Any] = []
        if alias in known:
            change.append(models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias)))
        create = models.CreateAlias(collection_name=self.address.table, alias_name=alias)
        change.append(models.CreateAliasOperation(create_alias=create))
        asked(self.address, lambda: client.update_collection_aliases(change))

    def after(self, space: EmbeddingSpace) -> list[str]:
        alias = self.address.options.get("alias", "") or "ALIAS"
        if self.switch:
            return [f"alias {alias} leads to {self.address.table} now"]
        if self._same():
            return [f'search with using="{self.address.vector}"']
        return [
            f"switch the alias when you are ready (or --switch-alias): POST /collections/aliases "
            f'{{"actions": [{{"delete_alias": {{"alias_name": "{alias}"}}}}, {{"create_alias": {{"collection_name": '
            f'"{self.address.table}", "alias_name": "{alias}"}}}}]}}'
        ]

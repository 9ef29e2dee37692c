"""Milvus, and Milvus Lite in a file: entities by a query iterator and by id; into a new collection."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa

from fct.extras import need
from fct.gallery.databases.address import Address
from fct.gallery.databases.database_gallery import DatabaseDestination, DatabaseError
from fct.gallery.databases.documents import CollectionSource, Point, asked, clients, points_of
from fct.spaces import EmbeddingSpace
from fct.types import Id, JsonDict

if TYPE_CHECKING:
    from pymilvus import MilvusClient


__all__ = ["MilvusDestination", "MilvusSource"]

_PAGE = 1000
_METRICS = {"l2": "L2", "ip": "IP", "cosine": "COSINE"}
_LENGTH = 65535  # of a string that says nothing of its length: the most there is


def _client(address: Address) -> MilvusClient:
    """``milvus://host:19530`` (``user:password@``, or MILVUS_TOKEN), or the file of a Milvus Lite."""
    milvus = need("pymilvus", "milvus")
    key = (address.kind, address.host, address.port, address.path)
    if key not in clients:
        if not address.host:
            need("milvus_lite", "milvus")
            clients[key] = milvus.MilvusClient(address.path)
        else:
            scheme = "https" if address.options.get("https") in ("1", "true") else "http"
            token = f"{address.user}:{address.password}" if address.password else os.environ.get("MILVUS_TOKEN", "")
            clients[key] = milvus.MilvusClient(
                f"{scheme}://{address.host}:{address.port}", token=token, db_name=address.path.strip("/"), timeout=60
            )
    return clients[key]


def _fields(client: MilvusClient, address: Address) -> list[JsonDict] | None:
    if not client.has_collection(address.table):
        return None
    return list(client.describe_collection(address.table)["fields"])


class MilvusSource(CollectionSource):
    kind: ClassVar[str] = "milvus"
    page: ClassVar[int] = _PAGE

    def look(self) -> tuple[str, pa.DataType, tuple[str, ...]]:
        from pymilvus import DataType

        client = _client(self.address)
        fields = _fields(client, self.address)
        if fields is None:
            raise DatabaseError(f"source: expected a collection, there is no {self.address.table} at {self.url}")
        client.load_collection(self.address.table)
        key = next(f for f in fields if f.get("is_primary"))
        dense = (DataType.FLOAT_VECTOR, DataType.FLOAT16_VECTOR, DataType.BFLOAT16_VECTOR)
        vectors = tuple(f["name"] for f in fields if f["type"] in dense)
        return key["name"], pa.int64() if key["type"] == DataType.INT64 else pa.string(), vectors

    def scan(self) -> Iterator[pa.Array]:
        key, kind, _ = self.facts
        rows = asked(
            self.address,
            lambda: _client(self.address).query_iterator(self.address.table, batch_size=_PAGE, output_fields=[key]),
        )
        try:
            while page := asked(self.address, rows.next):
                yield pa.array([row[key] for row in page], kind)
        finally:
            rows.close()

    def points(self, ids: list[Id]) -> list[Point]:
        key, _, names = self.facts
        wanted = ["*"] if self.payload else [key, *(n for n in self.schema.names if n in names)]
        found = _client(self.address).get(self.address.table, ids, output_fields=wanted)
        own = {key, *names}
        return [
            (row[key], {n: row[n] for n in names if n in row}, {k: v for k, v in row.items() if k not in own})
            for row in found
        ]


class MilvusDestination(DatabaseDestination):
    kind: ClassVar[str] = "milvus"

    @property
    def _vector(self) -> str:
        return self.address.vector or "vector"

    def refuse(self, rest: pa.Schema) -> None:
        super().refuse(rest)
        if self._vector in rest.names:
            raise DatabaseError(
                f"destination: the payload has a column {self._vector!r}, which is what {self.url} calls the vectors: "
                "name them otherwise (&vector=NAME)"
            )

    def holds_rows(self, schema: pa.Schema) -> str:
        def look() -> str:
            return "is there already" if _client(self.address).has_collection(self.address.table) else ""

        return str(self.retry_policy.ask(lambda: asked(self.address, look), f"opening {self.url}", moves=0))

    def prepare(self, schema: pa.Schema, space: EmbeddingSpace, *, begun: bool) -> None:
        self.retry_policy.ask(
            lambda: asked(self.address, lambda: self._prepare(schema, space)), f"preparing {self.url}", moves=0
        )

    def _prepare(self, schema: pa.Schema, space: EmbeddingSpace) -> None:
        from pymilvus import DataType

        client, key = _client(self.address), schema.field(self.id_column)
        if client.has_collection(self.address.table):
            client.load_collection(self.address.table)
            return
        made = client.create_schema(auto_id=False, enable_dynamic_field=True)
        if pa.types.is_integer(key.type):
            made.add_field(self.id_column, DataType.INT64, is_primary=True)
        else:
            made.add_field(self.id_column, DataType.VARCHAR, is_primary=True, max_length=_LENGTH)
        made.add_field(self._vector, DataType.FLOAT_VECTOR, dim=space.dim)
        for field in self._like_the_source():
            made.add_field(field["name"], field["type"], nullable=True, **field["params"])
        # Milvus loads a collection, and so reads it by id, only with an index: the plainest; its owner replaces it.
        index = client.prepare_index_params()
        index.add_index(self._vector, index_type="FLAT", metric_type=_METRICS[space.metric])
        client.create_collection(self.address.table, schema=made, index_params=index, consistency_level="Strong")
        client.load_collection(self.address.table)

    def _like_the_source(self) -> list[JsonDict]:
        """The typed payload fields of a source that is Milvus too; all else is in the dynamic field."""
        if not isinstance(self._source, MilvusSource):
            return []
        key, _, vectors = self._source.facts
        fields = _fields(_client(self._source.address), self._source.address) or []
        return [f for f in fields if f["name"] not in (key, *vectors)]

    def put(self, batches: Sequence[pa.RecordBatch]) -> None:
        client = _client(self.address)
        for batch in batches:
            ids, vectors, payloads = points_of(self, batch)
            rows = []
            for key, row, payload in zip(ids, vectors, payloads, strict=True):
                twice = payload.keys() & {self.id_column, self._vector}
                if twice:  # of an object that another store kept
                    raise DatabaseError(
                        f"destination: the payload of {key!r} has a value {min(twice)!r}, and so has the id or the "
                        f"vector in {self.url}: name the vector otherwise (&vector=NAME), or rename the payload's"
                    )
                rows.append({**payload, self.id_column: key, self._vector: row})
            for start in range(0, len(rows), _PAGE):
                asked(self.address, lambda some=rows[start : start + _PAGE]: client.upsert(self.address.table, some))

    def remove(self, ids: pa.Array) -> None:
        client = _client(self.address)
        for start in range(0, len(ids), _PAGE):
            some = ids.slice(start, _PAGE).to_pylist()
            asked(self.address, lambda s=some: client.delete(self.address.table, ids=s))

    def finish(self, extras: Sequence[object], schema: pa.Schema, space: EmbeddingSpace) -> None:
        super().finish(extras, schema, space)
        client = _client(self.address)
        asked(self.address, lambda: client.flush(self.address.table))
        if self.switch:
            alias = self.address.options.get("alias", "")
            if not alias:
                raise DatabaseError("switch_alias: expected the alias in the destination's URL (&alias=NAME), got none")
            asked(self.address, lambda: client.alter_alias(self.address.table, alias))

    def after(self, space: EmbeddingSpace) -> list[str]:
        table, alias = self.address.table, self.address.options.get("alias", "") or "ALIAS"
        switch = f"alias {alias} leads to {table} now" if self.switch else (
            f'when you are ready: client.alter_alias("{table}", "{alias}")'
        )  # fmt: skip
        steps = f'release_collection("{table}"), drop_index("{table}", "{self._vector}"), create_index("{table}", ...)'
        return [f'the index is FLAT, which is exact; for HNSW: {steps}, load_collection("{table}")', switch]

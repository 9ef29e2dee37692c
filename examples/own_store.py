"""Your own store in thirty lines: Qdrant's client in local mode, as a source and as a destination.

Needs: pip install qdrant-client
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from qdrant_client import QdrantClient, models

import fct
from fct.gallery import Destination, Piece, Shard, Source, vector_array, vector_block


class QdrantSource(Source):
    kind, url, schema = "qdrant", "qdrant:old", pa.schema({"id": pa.int64(), "vector": pa.list_(pa.float32(), 16)})

    def __init__(self, client: QdrantClient, space: fct.EmbeddingSpace) -> None:
        self.client, self._space = client, space

    @property
    def space(self) -> fct.EmbeddingSpace:
        return self._space

    def pieces(self) -> list[Piece]:  # ids are 0 ... n - 1 here
        return [Piece("all", self.client.count("old").count, 0, "")]

    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        for first in range(start, start + rows, batch_rows):
            ids = list(range(first, min(first + batch_rows, start + rows)))
            points = {p.id: p.vector for p in self.client.retrieve("old", ids, with_vectors=True)}
            values = np.array([points[i] for i in ids], np.float32)
            yield pa.record_batch([pa.array(ids), vector_array(values)], schema=self.schema)


class QdrantDestination(Destination):
    kind, url = "qdrant", ""

    def __init__(self, client: QdrantClient, journal: str, dim: int) -> None:
        self.client, self.url, self.dim = client, journal, dim  # the journal lies in this folder

    def write(self, shard: Shard, batches: Iterator[pa.RecordBatch], scratch: Path) -> tuple[Mapping[str, Path], Any]:
        for batch in batches:  # by id: writing a shard twice leaves the same
            values = vector_block(batch.column("vector"), self.dim).values
            points = models.Batch(ids=batch.column("id").to_pylist(), vectors=values.tolist())
            self.client.upsert("new", points)
        return {}, None


def main() -> None:
    client, rng = QdrantClient(":memory:"), np.random.default_rng(0)
    h = fct.Transformation.random(16, 16, 8, inner=32, side_info=False)
    for name, d in (("old", 16), ("new", 8)):
        client.create_collection(name, vectors_config=models.VectorParams(size=d, distance=models.Distance.EUCLID))
    rows = rng.standard_normal((500, 16), dtype=np.float32)
    client.upsert("old", models.Batch(ids=list(range(500)), vectors=rows.tolist()))
    with tempfile.TemporaryDirectory() as journal:
        destination = QdrantDestination(client, journal, h.d_new)
        report = fct.backfill(QdrantSource(client, h.old_space), destination, h, progress=False, shard_rows=100)
    assert client.count("new").count == report.rows_out == 500
    print(report)


if __name__ == "__main__":
    main()

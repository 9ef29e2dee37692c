"""Qdrant's local mode, Milvus Lite and Chroma's persistent client: the same promises for each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.gallery.databases import chroma_collection
from fct.gallery.databases.address import Address
from fct.gallery.databases.chroma_collection import ChromaSource
from fct.gallery.databases.database_gallery import DatabaseError
from fct.gallery.databases.documents import clients
from fct.gallery.location import RetryPolicy
from tests.databases.conftest import D_OLD, rows_of

ROWS = 2500
QUICK: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 600, "batch_rows": 300}


class Qdrant:
    def __init__(self, folder: Path) -> None:
        self.place = f"qdrant://{folder / 'qdrant'}?collection="
        from fct.gallery.databases.address import Address
        from fct.gallery.databases.qdrant_collection import _client

        self.client: Any = _client(Address.parse(self.place + "x", "source"))

    def make(self, vectors: Any) -> None:
        from qdrant_client import models

        self.client.create_collection(
            "items", vectors_config={"old": models.VectorParams(size=D_OLD, distance=models.Distance.EUCLID)}
        )
        self.add(vectors, 0)

    def add(self, vectors: Any, first: int) -> None:
        from qdrant_client import models

        points = [
            models.PointStruct(id=i, vector={"old": v}, payload={"label": f"item {i}", "n": i})
            for i, v in enumerate(vectors.tolist(), first)
        ]
        self.client.upsert("items", points)

    def drop(self, ids: list[int]) -> None:
        self.client.delete("items", ids)

    def rows(self, name: str, vector: str) -> dict[int, tuple[Any, str]]:
        found, _ = self.client.scroll(name, limit=10_000, with_vectors=True)
        return {p.id: (p.vector[vector], p.payload["label"]) for p in found}

    target = "items_v2&vector=new"
    names = ("items_v2", "new")


class Milvus:
    def __init__(self, folder: Path) -> None:
        self.place = f"milvus://{folder / 'milvus.db'}?collection="
        from fct.gallery.databases.address import Address
        from fct.gallery.databases.milvus_collection import _client

        self.client = _client(Address.parse(self.place + "x", "source"))

    def make(self, vectors: Any) -> None:
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("pk", DataType.INT64, is_primary=True)
        schema.add_field("old", DataType.FLOAT_VECTOR, dim=D_OLD)
        schema.add_field("label", DataType.VARCHAR, max_length=200)
        index = self.client.prepare_index_params()
        index.add_index("old", index_type="FLAT", metric_type="L2")
        self.client.create_collection("items", schema=schema, index_params=index)
        self.add(vectors, 0)

    def add(self, vectors: Any, first: int) -> None:
        rows = [{"pk": i, "old": v, "label": f"item {i}", "n": i} for i, v in enumerate(vectors, first)]
        self.client.insert("items", rows)

    def drop(self, ids: list[int]) -> None:
        self.client.delete("items", ids=ids)

    def rows(self, name: str, vector: str) -> dict[int, tuple[Any, str]]:
        self.client.load_collection(name)
        found = []
        pages = self.client.query_iterator(name, batch_size=1000, output_fields=["*"])
        while page := pages.next():
            found += page
        assert len({r["pk"] for r in found}) == len(found), "an id twice"
        return {r["pk"]: (r[vector], r["label"]) for r in found}

    target = "items_v2&vector=new"
    names = ("items_v2", "new")


class Chroma:
    def __init__(self, folder: Path) -> None:
        self.place = f"chroma://{folder / 'chroma'}?collection="
        from fct.gallery.databases.address import Address
        from fct.gallery.databases.chroma_collection import _client

        self.client = _client(Address.parse(self.place + "x", "source"))

    def make(self, vectors: Any) -> None:
        self.collection = self.client.create_collection("items", embedding_function=None)
        self.add(vectors, 0)

    def add(self, vectors: Any, first: int) -> None:
        ids = range(first, first + len(vectors))
        collection = self.client.get_collection("items", embedding_function=None)
        collection.add(
            ids=[str(i) for i in ids], embeddings=vectors, metadatas=[{"label": f"item {i}", "n": i} for i in ids],
            documents=[f"text {i}" for i in ids],
        )  # fmt: skip

    def drop(self, ids: list[int]) -> None:
        self.client.get_collection("items", embedding_function=None).delete(ids=[str(i) for i in ids])

    def rows(self, name: str, vector: str) -> dict[int, tuple[Any, str]]:
        found = self.client.get_collection(name, embedding_function=None).get(
            include=["embeddings", "metadatas", "documents"]
        )
        assert found["documents"][0] == f"text {found['ids'][0]}"
        labels = [m["label"] for m in found["metadatas"]]
        return {int(i): (v, t) for i, v, t in zip(found["ids"], found["embeddings"], labels, strict=True)}

    target = "items_v2"
    names = ("items_v2", "embedding")


STORES = {"qdrant": Qdrant, "milvus": Milvus, "chroma": Chroma}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made: Callable[[Path], Any] = STORES[request.param]
    yield made(tmp_path)
    close()


def close() -> None:
    for client in clients.values():
        if hasattr(client, "close"):
            client.close()
    clients.clear()
    if "milvus_lite" in sys.modules:  # closing a client leaves the server in this process, and its lock, as they are
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_all()


def right(store: Any, h: fct.Transformation, old: Any, ids: list[int]) -> None:
    found = store.rows(*store.names)
    assert sorted(found) == ids, "not every id once"
    want = fct.transform_batch(old, None, h, progress=False)[ids]
    assert np.allclose(np.array([found[i][0] for i in ids]), want, atol=2e-5)
    assert [found[i][1] for i in ids] == [f"item {i}" for i in ids], "payload was not carried over"


def test_into_a_new_collection(store: Any, h: fct.Transformation, tmp_path: Path) -> None:
    old = rows_of(ROWS)
    store.make(old)
    job = (store.place + "items", store.place + store.target, h)
    report = fct.backfill(*job, journal=tmp_path / "j", **QUICK)
    assert (report.rows_in, report.rows_out) == (ROWS, ROWS)
    right(store, h, old, list(range(ROWS)))
    assert report.left_to_do
    again = fct.backfill(*job, journal=tmp_path / "j", **QUICK)
    assert again.shards_done == 0


def test_rows_that_come_and_go_meanwhile(
    store: Any, h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fct.gallery.databases import database_destination
    from fct.gallery.location import RetryPolicy

    old = rows_of(1300)
    store.make(old[:1200])
    kind = type(database_destination(store.place + store.target, RetryPolicy()))
    put = kind.put
    puts: list[int] = []

    def while_it_runs(self: Any, batches: Any) -> None:
        put(self, batches)
        puts.append(1)
        if len(puts) == 1:
            store.add(old[1200:], 1200)
            store.drop([5, 1190])

    monkeypatch.setattr(kind, "put", while_it_runs)
    job = (store.place + "items", store.place + store.target, h)
    fct.backfill(*job, journal=tmp_path / "j", **QUICK)
    right(store, h, old, [i for i in range(1300) if i not in (5, 1190)])


def test_what_is_not_there_and_what_is(store: Any, h: fct.Transformation, tmp_path: Path) -> None:
    store.make(rows_of(50))
    target = store.place + store.target
    with pytest.raises(fct.FctError, match="source: expected a collection, there is no nothing"):
        fct.backfill(store.place + "nothing", target, h, journal=tmp_path / "j", retries=0, **QUICK)
    there = store.place + "items&vector=" + ("embedding" if store.place.startswith("chroma") else "old")
    with pytest.raises(fct.FctError, match=r"expected a new place|another place than the source"):
        fct.backfill(store.place + "items", there, h, journal=tmp_path / "k", retries=0, **QUICK)


def test_a_named_vector_and_an_alias_of_qdrant(h: fct.Transformation, tmp_path: Path) -> None:
    store, old = Qdrant(tmp_path), rows_of(700)
    store.make(old)
    fct.backfill(store.place + "items&vector=old", store.place + "items&vector=v2", h, journal=tmp_path / "j", **QUICK)
    found = store.rows("items", "v2")
    want = fct.transform_batch(old, None, h, progress=False)
    assert np.allclose(np.array([found[i][0] for i in range(700)]), want, atol=2e-5)
    assert np.allclose([store.rows("items", "old")[i][0] for i in range(3)], old[:3])
    target = store.place + "items_v2&alias=live"
    report = fct.backfill(
        store.place + "items&vector=old", target, h, journal=tmp_path / "k", switch_alias=True, **QUICK
    )
    assert report.left_to_do == ("alias live leads to items_v2 now",)
    assert [a.collection_name for a in store.client.get_aliases().aliases] == ["items_v2"]
    close()


JOB = """
import sys, fct
fct.backfill(*sys.argv[1:4], journal=sys.argv[4], old_model="random-old", progress=False, shard_rows=200,
             batch_rows=100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", STORES)
def test_ten_kills_leave_every_id_once(name: str, h: fct.Transformation, h_file: Path, tmp_path: Path) -> None:
    store: Any = STORES[name](tmp_path)
    old = rows_of(4000)
    for start in range(0, len(old), 1000):
        store.make(old[:1000]) if start == 0 else store.add(old[start : start + 1000], start)
    close()
    words = (store.place + "items", store.place + store.target, str(h_file), str(tmp_path / "j"))
    job = [sys.executable, "-c", JOB, *words]
    done = tmp_path / "j" / "done"
    for kill in range(10):
        process = subprocess.Popen(job, stderr=subprocess.PIPE)
        killed_after(process, done, kill + 1)
    last = subprocess.run(job, capture_output=True, text=True, timeout=300)
    if name == "chroma" and last.returncode and "hnsw segment writer" in last.stderr:
        # Seen once: the index of a Chroma that lives in the killed process is broken for good.
        assert "what is done is kept" in last.stderr
        pytest.skip("Chroma's own index did not outlive the kill of its process; fct named it and stopped")
    assert last.returncode == 0, last.stderr[-2000:]
    store = STORES[name](tmp_path)
    right(store, h, old, list(range(4000)))
    close()


def killed_after(process: subprocess.Popen[bytes], done: Path, shards: int) -> None:
    """Kills a job once so many shards are marked, in the middle of a later one."""
    import time

    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if done.is_dir() and len(list(done.glob("*.json"))) >= shards:
            time.sleep(0.01 * (shards % 4))
            break
        time.sleep(0.005)
    process.kill()
    process.wait()


def test_a_chroma_collection_that_is_deleted_while_it_is_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ChromaSource(Address.parse("chroma://localhost?collection=shoes", "source"), RetryPolicy())
    monkeypatch.setattr(chroma_collection, "_collection", lambda address: None)
    with pytest.raises(DatabaseError, match="expected a collection, there is no shoes"):
        source.points(["a"])
    with pytest.raises(DatabaseError, match="expected a collection, there is no shoes"):
        next(source.scan())

"""Files into collections: ids and payload that the store cannot keep as they are, refused before anything is there."""

from __future__ import annotations

import datetime
import decimal
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError, MissingExtraError
from fct.gallery import open_source
from fct.gallery.databases.address import Address
from fct.gallery.databases.documents import asked, clients
from tests.databases.conftest import D_OLD, rows_of

N = 40
HOW: dict[str, Any] = {
    "old_model": "random-old",
    "progress": False,
    "shard_rows": 15,
    "precision": "fp32",
    "threads": 1,
}
IDS = list(range(100, 100 + N))


def files(folder: Path, ids: Any = IDS, **more: Any) -> Path:
    table = pa.table({"id": ids, "embedding": list(rows_of(N)), **more})
    pq.write_table(table, folder / "old.parquet")
    return folder / "old.parquet"


@pytest.mark.parametrize(
    "ids, message",
    [
        ([None, *IDS[1:]], "row 0 has null"),
        ([*IDS[:-1], 101], "rows 1 and 39 both have 101: the second would overwrite the first"),
        ([-1, *IDS[1:]], "row 0 has -1"),
        ([f"x{i}" for i in IDS], "unsigned integers or UUIDs in 'id', row 0 has 'x100'"),
        ([float(i) for i in IDS], "column 'id' is double"),
    ],
    ids=["null", "twice", "negative", "no UUID", "floats"],
)
def test_ids_that_are_none_there_are_refused_before_anything_is_written(
    h: fct.Transformation, tmp_path: Path, ids: Any, message: str
) -> None:
    qdrant = pytest.importorskip("qdrant_client")
    to = f"qdrant://{tmp_path}/store?collection=new"
    with pytest.raises(FctError, match=rf"id_column: .*{message}.*new is written by id"):
        fct.backfill(files(tmp_path, ids), to, h, journal=tmp_path / "j", **HOW)
    clients.clear()
    assert not qdrant.QdrantClient(path=str(tmp_path / "store")).get_collections().collections


def test_payload_is_json_of_the_same_value_and_meaning(
    h: fct.Transformation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("qdrant_client")
    more = {
        "when": pa.array([1_600_000_000_123_456_789] * N, pa.timestamp("ns", "UTC")),
        "day": pa.array([datetime.date(1500, 2, 3)] * N),
        "price": pa.array([decimal.Decimal("1.50")] * N),
        "score": pa.array([float("nan"), float("inf"), *([0.5] * (N - 2))]),
        "tags": pa.array([[{"a": 1.0, "b": None}]] * N),
    }
    source, to = files(tmp_path, **more), f"qdrant://{tmp_path}/store?collection=new"
    fct.backfill(source, to, h, journal=tmp_path / "j", **HOW)
    assert "payload: 2 values of 'score' that are NaN or infinite became null" in caplog.text
    checked = fct.verify_gallery(to, source=source, journal=tmp_path / "j", progress=False)
    assert checked.proven, checked
    found = open_source(to)
    (piece,) = found.pieces()
    (batch,) = found.read(piece, 0, N, 99)
    rows = [json.loads(text) for text in batch["payload"].to_pylist()]
    assert rows[2] == {
        "when": "2020-09-13T12:26:40.123456789Z", "day": "1500-02-03", "price": "1.50", "score": 0.5,
        "tags": [{"a": 1.0, "b": None}],
    }  # fmt: skip
    assert [row["score"] for row in rows[:2]] == [None, None]


@pytest.mark.parametrize("store", ["qdrant", "milvus", "chroma"])
def test_bytes_are_refused_by_name(h: fct.Transformation, tmp_path: Path, store: str) -> None:
    pytest.importorskip({"qdrant": "qdrant_client", "milvus": "milvus_lite", "chroma": "chromadb"}[store])
    source = files(tmp_path, blob=pa.array([[b"\xff"]] * N))
    with pytest.raises(FctError, match="payload: column 'blob' is binary, which JSON cannot hold"):
        fct.backfill(source, f"{store}://{tmp_path}/s.db?collection=new", h, journal=tmp_path / "j", **HOW)


def test_payload_called_like_the_vectors_of_milvus_is_refused(h: fct.Transformation, tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite")
    source, to = files(tmp_path, vector=["mine"] * N), f"milvus://{tmp_path}/s.db?collection=new"
    with pytest.raises(FctError, match=r"the payload has a column 'vector', which is what .* calls the vectors"):
        fct.backfill(source, to, h, journal=tmp_path / "j", **HOW)


@pytest.mark.parametrize("store, module", [("qdrant", "qdrant_client"), ("milvus", "pymilvus"), ("chroma", "chromadb")])
def test_a_store_that_is_not_there_is_not_made_by_reading(
    h: fct.Transformation, tmp_path: Path, store: str, module: str
) -> None:
    pytest.importorskip(module)
    with pytest.raises(FctError, match=rf"expected a store of {store} at .*typo, there is none"):
        fct.backfill(f"{store}://{tmp_path}/typo?collection=c", tmp_path / "new", h, journal=tmp_path / "j", **HOW)
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    "module, url",
    [("psycopg", "postgresql://u@h/d?table=t"), ("qdrant_client", "qdrant://h?collection=c"),
     ("pymilvus", "milvus://h?collection=c"), ("chromadb", "chroma://h?collection=c"), ("s3fs", "s3://b/new")],
)  # fmt: skip
def test_a_missing_extra_is_named_before_a_journal_is_begun(
    h: fct.Transformation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, url: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtraError, match=r"destination: .*which is not installed: pip install 'fct-embeddings\["
    ):
        fct.backfill(files(tmp_path), url, h, journal=tmp_path / "j", **HOW)
    assert not (tmp_path / "j").exists()


def test_points_of_several_vectors_are_refused_by_name(h: fct.Transformation, tmp_path: Path) -> None:
    qdrant = pytest.importorskip("qdrant_client")
    models, client = qdrant.models, qdrant.QdrantClient(path=str(tmp_path / "s"))
    several = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    like = models.VectorParams(size=D_OLD, distance=models.Distance.EUCLID, multivector_config=several)
    client.create_collection("c", vectors_config=like)
    client.upsert("c", [models.PointStruct(id=1, vector=np.ones((2, D_OLD)).tolist())])
    client.close()
    with pytest.raises(FctError, match="expected a collection with a dense vector, c has vector, of which each point"):
        fct.backfill(f"qdrant://{tmp_path}/s?collection=c", tmp_path / "new", h, journal=tmp_path / "j", **HOW)


class Unwell(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"answered {status}")
        self.status_code = status


class InvalidArgumentError(Exception):
    """As Chroma calls it."""


@pytest.mark.parametrize(
    "error, final",
    [(Unwell(400), True), (Unwell(422), True), (Unwell(429), False), (Unwell(503), False), (OSError("reset"), False),
     (InvalidArgumentError("name"), True), (ValueError("wrong"), True)],
)  # fmt: skip
def test_what_waiting_does_not_cure_is_not_asked_again(error: Exception, final: bool) -> None:
    def fails() -> None:
        raise error

    do: Callable[[], None] = fails
    with pytest.raises(FctError if final else ConnectionError):
        asked(Address.parse("qdrant://h?collection=c", "source"), do)

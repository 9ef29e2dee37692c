"""A partial backfill into PostgreSQL and Milvus: broken off, wrong answers, killed, gone on with, and verified."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import vector_array
from fct.gallery.databases.address import Address
from fct.gallery.databases.documents import clients
from tests.databases.conftest import D_NEW, D_OLD, Database, rows_of, vectors_of

N = 240
ROOT = Path(__file__).parents[2]
LENGTH = 0.8
INFO = {"mixed": {"correction": {"kind": "length", "value": LENGTH}, "k": 10,
                  "points": [{"true_share": 0.5, "recall": 0.5, "corrected_recall": 0.6}]}}  # fmt: skip
KNOBS: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 60, "batch_rows": 30}


def unit_h() -> fct.Transformation:
    """One whose mapped rows stand 0.8 long among true ones."""
    h = fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=16, side_info=False, normalise=True)
    return h.with_(new_space=fct.EmbeddingSpace("unit", D_NEW, metric="ip", normalised=True), info=INFO)


def true_vectors(ids: list[int]) -> Any:
    rows = np.stack([np.random.default_rng([7, i]).standard_normal(D_NEW).astype(np.float32) for i in ids])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Model:
    """Counts what it was asked for; from its fourth call on it fails as a test wants it to."""

    def __init__(self, how: str = "") -> None:
        self.asked: list[int] = []
        self.how, self.calls = how, 0

    def __call__(self, ids: list[int]) -> Any:
        self.calls += 1
        failing = self.calls > 3
        if failing and self.how == "raises":
            raise ConnectionError("quota used up")
        self.asked += [] if failing and self.how else ids
        rows = true_vectors(ids)
        return {"short": rows[:-1], "wide": np.pad(rows, ((0, 0), (0, 1)))}.get(self.how, rows) if failing else rows


class Table:
    """``items`` with ids from 1 on in PostgreSQL, and what a backfill made of them."""

    def __init__(self, db: Database, as_column: bool) -> None:
        self.db = db
        db.items(rows_of(N))
        db.run("ALTER TABLE items ADD COLUMN views integer")
        db.run("UPDATE items SET views = id")
        self.source = db.url("items", vector="embedding")
        self.table, self.vector = ("items", "embedding_v2") if as_column else ("items_v2", "embedding")
        self.target = db.url(self.table, vector=self.vector)

    def found(self) -> dict[int, tuple[Any, bool]]:
        rows = self.db.run(f"SELECT id, {self.vector}::text, reembedded FROM {self.table} ORDER BY id")
        return {i - 1: (v, true) for (i, _, true), v in zip(rows, vectors_of([r[1] for r in rows]), strict=True)}


class Collection:
    """The same in Milvus Lite, from a Parquet file."""

    def __init__(self, folder: Path) -> None:
        table = {"id": np.arange(1, N + 1), "views": np.arange(1, N + 1), "old": vector_array(rows_of(N))}
        pq.write_table(pa.table(table), folder / "items.parquet")
        self.source = str(folder / "items.parquet")
        self.target = f"milvus://{folder / 'milvus.db'}?collection=items_v2"

    def found(self) -> dict[int, tuple[Any, bool]]:
        from fct.gallery.databases.milvus_collection import _client

        client = _client(Address.parse(self.target, "x"))
        client.load_collection("items_v2")
        rows = client.query("items_v2", filter="id > 0", limit=10_000, output_fields=["*"])
        assert len({row["id"] for row in rows}) == len(rows), "an id twice"
        return {row["id"] - 1: (np.array(row["vector"], np.float32), row["reembedded"]) for row in rows}


@pytest.fixture(params=["new table", "new column", "milvus"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "milvus":
        pytest.importorskip("milvus_lite")
        yield Collection(tmp_path)
        close()
    else:
        yield Table(request.getfixturevalue("db"), request.param == "new column")


def close() -> None:
    for client in clients.values():
        client.close()
    clients.clear()
    if "milvus_lite" in sys.modules:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_all()


def right(place: Any, asked: list[int]) -> None:
    """Every row once; those asked for are the model's own, the others mapped and shorter."""
    found = place.found()
    assert sorted(found) == list(range(N)), "not every id once"
    assert sorted(i for i, (_, true) in found.items() if true) == sorted(i - 1 for i in asked)
    mapped = fct.transform_batch(rows_of(N), None, unit_h(), progress=False)
    for i, (vector, true) in found.items():
        want = true_vectors([i + 1])[0] if true else LENGTH * mapped[i]
        np.testing.assert_allclose(vector, want, atol=2e-5, err_msg=f"row {i}, {true}")


@pytest.mark.parametrize("how", ["raises", "short", "wide"])
def test_what_fails_in_the_middle_loses_nothing(place: Any, tmp_path: Path, how: str) -> None:
    words = {"raises": "quota used up", "short": r"expected \((\d+), 12\), a vector of 'unit' for each id, .*got \(",
             "wide": r"got \(\d+, 13\)"}  # fmt: skip
    kw = {"journal": tmp_path / "j", "budget": 0.25, "reembed_ids": 10, **KNOBS}
    first, second = Model(how), Model()
    with pytest.raises(fct.BackfillError, match=words[how]):
        fct.backfill(place.source, place.target, unit_h(), reembed=first, **kw)
    kept = first.asked
    assert 20 <= len(kept) <= 30
    report = fct.backfill(place.source, place.target, unit_h(), reembed=second, **kw)
    assert (report.rows_out, report.reembedded, report.chosen) == (N, 60, 60)
    assert not set(kept) & set(second.asked), "paid for twice"
    right(place, kept + second.asked)
    again = fct.backfill(place.source, place.target, unit_h(), reembed=Model("raises"), **kw)
    assert again.shards_done == 0
    verified = fct.verify_gallery(place.target, journal=tmp_path / "j", source=place.source)
    assert verified.problems == ()
    assert verified.proven, verified.unproven
    assert verified.true_rows > 0


@pytest.mark.parametrize("budget", [0, 1])
def test_none_and_all(place: Any, tmp_path: Path, budget: int) -> None:
    model = Model()
    report = fct.backfill(
        place.source, place.target, unit_h(), reembed=model, budget=budget, journal=tmp_path / "j", **KNOBS
    )
    assert (report.reembedded, len(model.asked)) == (budget * N, budget * N)
    right(place, model.asked)


def test_in_the_order_of_use_and_by_pairs(place: Any, tmp_path: Path) -> None:
    log = {"id": np.arange(1, N + 1), "count": np.arange(N)[::-1]}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    pairs = {"id": np.arange(1, 101), "new": true_vectors(list(range(1, 101)))}
    report = fct.backfill(
        place.source, place.target, unit_h(), reembed=pairs, budget=0.1, order="access",
        access_log=tmp_path / "log.parquet", journal=tmp_path / "j", **KNOBS,
    )  # fmt: skip
    assert report.reembedded == 24
    right(place, list(range(1, 25)))
    assert fct.verify_gallery(place.target, journal=tmp_path / "j", source=place.source, reembed=pairs).proven


@pytest.mark.parametrize("as_column", [False, True], ids=["new table", "new column"])
def test_by_a_column_of_the_table(db: Database, tmp_path: Path, as_column: bool) -> None:
    """Read as a number, where the other columns are carried as the server's bytes, or not read at all."""
    table, model = Table(db, as_column), Model()
    fct.backfill(
        table.source, table.target, unit_h(), reembed=model, budget=0.1, order="views", journal=tmp_path / "j", **KNOBS
    )
    right(table, list(range(N - 23, N + 1)))
    assert db.run(f"SELECT count(*) FROM {table.table} WHERE views = id") == [(N,)]
    verified = fct.verify_gallery(table.target, journal=tmp_path / "j", source=table.source)
    assert verified.proven, (verified.problems, verified.unproven)


def test_a_column_that_the_owner_has_is_left_alone(db: Database, tmp_path: Path) -> None:
    table = Table(db, as_column=True)
    db.run("ALTER TABLE items ADD COLUMN reembedded text DEFAULT 'mine'")
    kw = {"reembed": Model(), "budget": 0.1, **KNOBS}
    for _ in range(2):  # a journal that is there makes no difference
        with pytest.raises(fct.FctError, match=r"has a column 'reembedded' already \(--true-column names another\)"):
            fct.backfill(table.source, table.target, unit_h(), journal=tmp_path / "j", **kw)
    assert db.run("SELECT DISTINCT reembedded FROM items") == [("mine",)]
    fct.backfill(table.source, table.target, unit_h(), true_column="is_new", journal=tmp_path / "k", **kw)
    assert db.run("SELECT count(*) FROM items WHERE is_new") == [(24,)]
    assert db.run("SELECT DISTINCT reembedded FROM items") == [("mine",)]


JOB = """
import json, os, signal, sys
from tests.databases.test_partial_databases import KNOBS, unit_h, true_vectors
import fct
source, target, journal, notes, calls = sys.argv[1:]
def model(ids, left=[int(calls)]):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    with open(notes, "a") as file:
        file.write("".join(f"{i}\\n" for i in ids))
    return true_vectors(ids)
fct.backfill(source, target, unit_h(), reembed=model, budget=0.5, reembed_ids=10, journal=journal, **KNOBS)
"""


@pytest.mark.slow
def test_a_job_that_was_killed_asks_for_little_twice(place: Any, tmp_path: Path) -> None:
    """Killed in a call of the function, in the middle of a shard, with shards before it written."""
    if isinstance(place, Collection):
        close()
    words = [sys.executable, "-c", JOB, place.source, place.target, str(tmp_path / "j"), str(tmp_path / "notes")]
    killed = subprocess.run([*words, "7"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert killed.returncode == -9, killed.stderr[-2000:]
    last = subprocess.run([*words, "1000"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert last.returncode == 0, last.stderr[-2000:]
    asked = [int(line) for line in (tmp_path / "notes").read_text().split()]
    assert len(set(asked)) == N // 2
    assert len(asked) - len(set(asked)) <= 10, "more than the call under way"
    right(place, sorted(set(asked)))


def test_qdrant_s_points_that_get_a_further_vector_say_which_are_true(tmp_path: Path) -> None:
    pytest.importorskip("qdrant_client")
    from qdrant_client import models

    from fct.gallery.databases.qdrant_collection import _client

    url = f"qdrant://{tmp_path / 'db'}?collection=items&vector="
    client = _client(Address.parse(url + "old", "x"))
    config = {"old": models.VectorParams(size=D_OLD, distance=models.Distance.EUCLID)}
    client.create_collection("items", vectors_config=config)
    client.upsert("items", [models.PointStruct(id=i, vector={"old": v}, payload={"n": i})
                            for i, v in enumerate(rows_of(40).tolist(), 1)])  # fmt: skip
    model = Model()
    kw = {"journal": tmp_path / "j", "budget": 0.25, **KNOBS}
    fct.backfill(url + "old", url + "new", unit_h(), reembed=model, **kw)
    points: list[Any] = client.scroll("items", limit=1000, with_vectors=True)[0]
    assert sorted(p.id for p in points if p.payload["reembedded"]) == sorted(model.asked)
    assert all(set(p.payload) == {"n", "reembedded"} and set(p.vector) == {"old", "new"} for p in points)
    client.set_payload("items", {"mine": "1"}, [5])
    kw["journal"] = tmp_path / "k"
    with pytest.raises(fct.FctError, match=r"has 'mine' in its payload already \(--true-column names another\)"):
        fct.backfill(url + "old", url + "other", unit_h(), reembed=model, true_column="mine", **kw)
    close()

"""Cascade: the nearest mapped rows are ranked by true vectors, which are paid for once and found again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling.journal import Journal
from fct.backfilling.true_index import TrueIndex
from fct.backfilling.true_vectors import TrueVectors
from fct.errors import BackfillError, FctWarning
from fct.gallery import vector_array
from fct.gallery.location import location_of
from tests.backfilling.conftest import contents

N, D_OLD, D_NEW = 600, 8, 6


class Model:
    """The new model: its vector of an item, and how often it was asked for each."""

    def __init__(self, vectors: Any) -> None:
        self.vectors, self.lock = vectors, threading.Lock()
        self.asked: list[Any] = []

    def __call__(self, ids: list[str]) -> Any:
        with self.lock:
            self.asked += ids
        return self.vectors[[int(i.removeprefix("item-")) for i in ids]]


@pytest.fixture
def h() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=16, side_info=False)


@pytest.fixture
def half_done(tmp_path: Path, h: fct.Transformation, rng: np.random.Generator) -> tuple[fct.UpgradingGallery, Any]:
    """(a gallery of which every other shard is finished, true vectors near the mapped ones)."""
    old = rng.standard_normal((N, D_OLD), dtype=np.float32)
    table = {"id": [f"item-{i}" for i in range(N)], "embedding": vector_array(old)}
    pq.write_table(pa.table(table), tmp_path / "old.parquet")
    options: dict[str, Any] = {"old_model": "random-old", "shard_rows": 100}
    fct.backfill(tmp_path / "old.parquet", tmp_path / "new", h, progress=False, **options)
    for number in range(0, 6, 2):
        (tmp_path / f"new/_fct/done/{number:08d}.json").unlink()
    true = fct.transform_batch(old, None, h, progress=False) + 0.3 * rng.standard_normal((N, D_NEW))
    return fct.UpgradingGallery(tmp_path / "old.parquet", tmp_path / "new", h, **options), true.astype(np.float32)


def test_the_answer_is_that_of_the_true_vectors_among_the_nearest(
    half_done: tuple[fct.UpgradingGallery, Any], rng: np.random.Generator
) -> None:
    live, true = half_done
    queries = rng.standard_normal((7, D_NEW), dtype=np.float32)
    model = Model(true)
    near = live.topk(queries, 50).indices
    found = live.search(queries, 5, rerank=model, depth=50)
    for i, query in enumerate(queries):
        distances = ((true[near[i]].astype(np.float64) - query) ** 2).sum(axis=1).astype(np.float32)
        order = np.lexsort((near[i], distances))[:5]
        assert found.indices[i].tolist() == near[i][order].tolist()
        np.testing.assert_array_equal(found.distances[i], distances[order])
    assert sorted(model.asked) == sorted(f"item-{i}" for i in np.unique(near)), "each of the nearest, once"
    whole = live.search(queries, 5, rerank=model, depth=N)
    want = fct.topk(queries, true, 5)
    np.testing.assert_array_equal(whole.indices, want.indices)
    np.testing.assert_allclose(whole.distances, want.distances, rtol=1e-6)
    assert len(model.asked) == N


def test_nothing_is_paid_for_twice(
    half_done: tuple[fct.UpgradingGallery, Any], h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Not by a later search, by another process, or by a partial backfill of the same gallery."""
    live, true = half_done
    queries = rng.standard_normal((3, D_NEW), dtype=np.float32)
    first = Model(true)
    want = live.search(queries, 4, rerank=first, depth=40)
    again = Model(true)
    live.search(queries, 4, rerank=again, depth=40)
    other = fct.UpgradingGallery(tmp_path / "old.parquet", tmp_path / "new", h, old_model="random-old", shard_rows=100)
    found = other.search(queries, 4, rerank=again, depth=40)
    np.testing.assert_array_equal(found.indices, want.indices)
    assert again.asked == []
    before = contents(tmp_path / "new")
    report = fct.backfill(
        tmp_path / "old.parquet", tmp_path / "new", h, old_model="random-old", shard_rows=100, progress=False
    )
    assert report.rows_out == N
    assert contents(tmp_path / "new").items() >= before.items()
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "old.parquet", deep=True).proven


def test_a_gallery_that_is_not_begun_is_left_alone(
    h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    old = rng.standard_normal((50, D_OLD), dtype=np.float32)
    np.save(tmp_path / "old.npy", old)
    live = fct.UpgradingGallery(tmp_path / "old.npy", tmp_path / "new", h, old_model="random-old")
    asked: list[int] = []

    def model(ids: list[int]) -> Any:
        asked.extend(ids)
        return np.ones((len(ids), D_NEW), np.float32)

    found = live.search(np.ones((1, D_NEW), np.float32), 3, rerank=model, depth=10)
    live.search(np.ones((1, D_NEW), np.float32), 3, rerank=model, depth=10)
    assert sorted(asked) == sorted(set(asked)), "rows go by their number"
    assert found.distances.tolist() == [[0, 0, 0]]
    assert not (tmp_path / "new").exists()
    fct.backfill(tmp_path / "old.npy", tmp_path / "new", h, old_model="random-old", progress=False)


def test_a_function_that_fails_loses_nothing(
    half_done: tuple[fct.UpgradingGallery, Any], rng: np.random.Generator
) -> None:
    live, true = half_done
    query = rng.standard_normal((1, D_NEW), dtype=np.float32)
    model = Model(true)

    def quota(ids: list[str]) -> Any:
        if model.asked:
            raise ConnectionError("quota used up")
        return model(ids)

    with pytest.raises(BackfillError, match="rerank: the function raised ConnectionError: quota used up"):
        live.search(query, 5, rerank=quota, depth=400)
    paid = len(model.asked)
    assert paid == 256
    live.search(query, 5, rerank=model, depth=400)
    assert len(model.asked) == len(set(model.asked)) == 400
    with pytest.raises(BackfillError, match=r"rerank: .*got \(200, 3\)"):
        live.search(query, 5, rerank=lambda ids: np.ones((len(ids), 3), np.float32), depth=N)

    def some(ids: list[str]) -> Any:  # an item that is gone keeps its mapped score
        return [None if i.endswith("7") else true[int(i.removeprefix("item-"))] for i in ids]

    with pytest.warns(FctWarning, match="UpgradingGallery: mapped rows stand among true ones uncorrected"):
        assert live.search(query, N, rerank=some, depth=N).indices.shape == (1, N)
    with pytest.raises(ValueError, match="depth: expected a whole number of at least 10"):
        live.search(query, 10, rerank=model, depth=9)


def test_threads_ask_once(half_done: tuple[fct.UpgradingGallery, Any], rng: np.random.Generator) -> None:
    live, true = half_done
    queries = rng.standard_normal((40, 1, D_NEW), dtype=np.float32)
    model = Model(true)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda q: live.search(q, 5, rerank=model, depth=60).indices.tolist(), queries))
    assert len(model.asked) == len(set(model.asked))
    assert found == [live.search(q, 5, rerank=model, depth=60).indices.tolist() for q in queries]


def test_a_file_that_went_into_a_larger_one_since_it_was_listed_is_not_missed(
    tmp_path: Path, h: fct.Transformation, rng: np.random.Generator
) -> None:
    old, true = (rng.standard_normal((40, d), dtype=np.float32) for d in (D_OLD, D_NEW))
    pq.write_table(pa.table({"id": np.arange(40), "embedding": vector_array(old)}), tmp_path / "old.parquet")
    plan = fct.plan_backfill(
        tmp_path / "old.parquet", tmp_path / "new", h, old_model="random-old", measure_seconds=0.01
    )
    assert plan.job is not None
    place = location_of(tmp_path / "true")
    (piece,), store = plan.job.pieces, TrueVectors(Journal(place, place), plan.job.new_space)
    index = TrueIndex(plan.job, store)
    for rows in ([1, 5], [2, 9]):
        store.save(piece, np.array(rows), true[rows])
    index.refresh()
    store.merge(piece, 0, 40)  # as another thread or process does
    vectors, there = index.take(np.array([1, 2, 5, 7, 9]))
    assert there.tolist() == [True, True, True, False, True]
    np.testing.assert_array_equal(vectors[there], true[[1, 2, 5, 9]])


def test_what_a_depth_is_worth(rng: np.random.Generator, h: fct.Transformation) -> None:
    old = rng.standard_normal((400, D_OLD), dtype=np.float32)
    new = fct.transform_batch(old, None, h, progress=False) + 0.5 * rng.standard_normal((400, D_NEW)).astype(np.float32)
    curve = fct.rerank_curve(old, None, new, h, depths=(5, 50, 399, 5000), k=10, progress=False)
    assert list(curve.recalls) == [10, 50, 399]
    recalls = list(curve.recalls.values())
    assert recalls[0] < recalls[1] < recalls[2] == 1.0
    mapped = fct.transform_batch(old, None, h, progress=False)
    truth = fct.topk(new, new, 10, same_items=True).indices
    near = fct.topk(new, mapped, 50, same_items=True).indices
    by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth.tolist(), near.tolist(), strict=True)])
    assert recalls[1] == pytest.approx(by_hand)
    assert "    50: 0." in str(curve)
    with pytest.raises(ValueError, match="new: expected at least k \\+ 2 = 12 pairs, got 5"):
        fct.rerank_curve(old[:5], None, new[:5], h)

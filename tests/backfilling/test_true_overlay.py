"""UpgradingGallery.topk counts rows by true vectors that were kept, exactly, and tells where nothing corrects them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctWarning
from fct.gallery import vector_array

N, D = 600, 8
HOW: dict[str, Any] = {"old_model": "random-old", "shard_rows": 100}
MEASURED = {
    "k": 10,
    "correction": {"kind": "length", "value": 0.9},
    "points": [{"true_share": 0.5, "recall": 0.4, "corrected_recall": 0.6}],
}


@pytest.fixture
def h() -> fct.Transformation:
    return fct.Transformation.random(D, D, D, inner=16, side_info=False).with_(info={"mixed": MEASURED})


@pytest.fixture
def old(tmp_path: Path, rng: np.random.Generator) -> Path:
    rows = rng.standard_normal((N, D), dtype=np.float32)
    rows[17, 2] = np.nan
    table = {"id": [f"item-{i}" for i in range(N)], "embedding": vector_array(rows)}
    pq.write_table(pa.table(table), tmp_path / "old.parquet")
    return tmp_path / "old.parquet"


def model(ids: list[str]) -> Any:
    return np.stack([np.random.default_rng([3, int(i[5:])]).standard_normal(D).astype(np.float32) for i in ids])


def mixture(old: Path, h: fct.Transformation, asked: list[str]) -> tuple[Any, Any]:
    """(the rows that count, the numbers of those that are rows of the gallery)."""
    rows = np.stack([np.asarray(v, np.float32) for v in pq.read_table(old)["embedding"].to_pylist()])
    good = np.flatnonzero(np.isfinite(rows).all(axis=1))
    rows[17] = 0
    mapped = fct.transform_batch(rows, None, h, progress=False)
    numbers = [int(i[5:]) for i in asked]
    mapped[numbers] = model(asked)
    return mapped, good


@pytest.mark.filterwarnings("ignore:UpgradingGallery")
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_before_during_and_after_a_backfill(
    old: Path, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator, cache_bytes: int
) -> None:
    """Many rows of a shard are true, so that one question is not enough to find k others; one was rejected."""
    asked: list[str] = []

    def counted(ids: list[str]) -> Any:
        asked.extend(ids)
        return model(ids)

    live = fct.UpgradingGallery(old, tmp_path / "new", h, cache_bytes=cache_bytes, **HOW)
    queries = rng.standard_normal((4, D), dtype=np.float32)
    live.search(queries, 3, rerank=counted, depth=180)
    assert 180 < len(asked) < N
    near = rng.standard_normal((5, D), dtype=np.float32)

    def check(gallery: fct.UpgradingGallery) -> None:
        rows, good = mixture(old, h, asked)
        for some, k in ((near, 7), (queries, 120)):
            want = fct.topk(some, rows[good], k)
            found = gallery.topk(some, k)
            np.testing.assert_array_equal(found.indices, good[want.indices])
            np.testing.assert_allclose(found.distances, want.distances, rtol=1e-6)

    check(live)
    fct.backfill(old, tmp_path / "new", h, progress=False, **HOW)
    for number in (1, 4):
        (tmp_path / f"new/_fct/done/{number:08d}.json").unlink()
    check(live)
    # Paid for before there was a journal: kept in it as soon as there is one, for other processes.
    before = len(asked)
    live.search(queries, 3, rerank=counted, depth=180)
    assert len(asked) == before
    check(fct.UpgradingGallery(old, tmp_path / "new", h, cache_bytes=cache_bytes, **HOW))
    other = fct.UpgradingGallery(old, tmp_path / "new", h, **HOW)
    other.search(near, 3, rerank=counted, depth=40)
    assert len(asked) == len(set(asked)) > before
    check(live)


@pytest.mark.filterwarnings("ignore:UpgradingGallery")
def test_vectors_stay_on_the_disk(old: Path, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator) -> None:
    fct.backfill(old, tmp_path / "new", h, progress=False, **HOW)
    live = fct.UpgradingGallery(old, tmp_path / "new", h, **HOW)
    for query in rng.standard_normal((40, 1, D), dtype=np.float32):
        live.search(query, 3, rerank=model, depth=8)
    held = [part for shard in live._cascade.index._shards.values() for part in shard.parts]
    assert held
    assert all(isinstance(part, np.memmap) for part in held)
    assert len(list((tmp_path / "new/_fct/true").iterdir())) <= 6 * 32, "joined as they grow many"


def test_uncorrected_mixtures_are_told_once_with_the_measured_loss(
    old: Path, h: fct.Transformation, tmp_path: Path, rng: np.random.Generator
) -> None:
    query = rng.standard_normal((1, D), dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FctWarning)
        live = fct.UpgradingGallery(old, tmp_path / "new", h, **HOW)
        live.topk(query, 3)
        live.search(query, 3, rerank=model, depth=20)  # all of these are true
    words = (
        r"UpgradingGallery: .*with 50% true rows recall@10 is 0\.400 so, and 0\.600 with mapped rows written by --mixed"
    )
    with pytest.warns(FctWarning, match=words) as caught:
        live.topk(query, 3)
    assert caught[0].filename == __file__
    live.topk(query, 3)  # told once: a warning would be an error
    with warnings.catch_warnings():
        warnings.simplefilter("error", FctWarning)
        mixed = fct.UpgradingGallery(old, tmp_path / "mixed", h, mixed=True, **HOW)
        mixed.search(query, 3, rerank=model, depth=20)
        mixed.topk(query, 3)

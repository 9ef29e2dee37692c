"""What fct opens it closes: no file, folder or connection is left for the collector, which would say so in the midst of
somebody else's work (and, in these tests, of somebody else's test)."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import vector_array
from fct.gallery.export_ids import RULES, IdCheck
from fct.scratch import ScratchFolder

N, D = 300, 8


@contextmanager
def nothing_left_open() -> Iterator[None]:
    gc.collect()  # what earlier tests left is not ours
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
    left = [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)]
    assert not left, left


def write(folder: Path, *, bad: tuple[int, ...] = ()) -> None:
    rng = np.random.default_rng(0)
    rows, side = (rng.standard_normal((N, d), dtype=np.float32) for d in (D, 4))
    rows[list(bad), 0] = np.nan
    ids = pa.array([f"item-{i}" for i in range(N)])
    pq.write_table(pa.table({"id": ids, "embedding": vector_array(rows)}), folder / "old.parquet")
    order = rng.permutation(N)
    pq.write_table(pa.table({"id": ids.take(order), "side_info": vector_array(side[order])}), folder / "side.parquet")


OPTIONS: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 100}


def matrices_with_rejects(folder: Path) -> None:
    write(folder, bad=(3, 250))
    h = fct.Transformation.random(D, D, 6, inner=16, side_info=False)
    fct.backfill(folder / "old.parquet", folder / "new", h, format="npy", **OPTIONS)
    assert fct.verify_gallery(folder / "new", source=folder / "old.parquet").proven


def a_join_by_id(folder: Path) -> None:
    write(folder)
    h = fct.Transformation.random(D, 4, 6, inner=16)
    how = {**OPTIONS, "side_source": folder / "side.parquet", "side_join": "id"}
    plan = {name: value for name, value in how.items() if name != "progress"}
    assert not fct.plan_backfill(folder / "old.parquet", folder / "new", h, measure_seconds=0.001, **plan).refusals
    fct.backfill(folder / "old.parquet", folder / "new", h, **how)
    sides: dict[str, Any] = {"source": folder / "old.parquet", "side_source": folder / "side.parquet"}
    assert fct.verify_gallery(folder / "new", **sides).proven


def an_upgrade_that_asks_for_true_vectors(folder: Path) -> None:
    write(folder)
    h = fct.Transformation.random(D, D, 6, inner=16, side_info=False)
    live = fct.UpgradingGallery(folder / "old.parquet", folder / "new", h, old_model="random-old", shard_rows=100)
    queries = np.random.default_rng(1).standard_normal((3, 6), dtype=np.float32)
    live.search(queries, 5, rerank=lambda ids: np.ones((len(ids), 6), np.float32), depth=20)


def ids_that_are_given_up(folder: Path) -> None:
    check = IdCheck(RULES["milvus"], "id", pa.int64(), folder)
    for first in range(0, 500, 100):
        check(pa.array(range(first, first + 100)), first)
    assert any(folder.iterdir()), "they lie in files"
    del check
    gc.collect()
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    "use", [matrices_with_rejects, a_join_by_id, an_upgrade_that_asks_for_true_vectors, ids_that_are_given_up]
)
def test_nothing_is_left_for_the_collector(
    use: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fct.gallery.export_ids._HELD", 100)
    with nothing_left_open():
        use(tmp_path)


def test_a_file_that_is_left_open_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(AssertionError, match="unclosed file"), nothing_left_open():
        open(tmp_path / "x")  # noqa: SIM115


def test_a_scratch_folder_lasts_as_long_as_its_last_owner(tmp_path: Path) -> None:
    folder = ScratchFolder("a-", tmp_path)
    path, other = folder.path, folder
    (path / "x").write_text("x")
    del folder
    gc.collect()
    assert (path / "x").exists()
    other.remove()
    other.remove()
    assert not path.exists()
    path = ScratchFolder("b-", tmp_path).path
    gc.collect()
    assert not path.exists()

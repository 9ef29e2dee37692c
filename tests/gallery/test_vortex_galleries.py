"""Vortex files as new galleries: read again by vortex-data itself, by fct, from another store, and after kills."""

from __future__ import annotations

import datetime
import decimal
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.backfilling.journal import Journal
from fct.backfilling.single import transform_file
from fct.errors import FctError
from fct.gallery import open_source
from fct.gallery.vortex_files import VortexDestination

vortex = pytest.importorskip("vortex", reason="vortex-data is not installed")

D, N = 8, 300
HOW: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 100, "precision": "fp32"}
PAYLOAD: dict[str, Any] = {
    "title": pa.array([None if i % 7 == 0 else f"item {i} ü" for i in range(N)]),
    "kind": pa.array(["a", None, "b"] * (N // 3)).dictionary_encode(),
    "big": pa.array([2**64 - 1 - i for i in range(N)], pa.uint64()),
    "when": pa.array([i * 1001 - 10**15 for i in range(N)], pa.timestamp("ns", "Europe/Berlin")),
    "old": pa.array([-14_830_974_000_000_000 - i for i in range(N)], pa.timestamp("us")),
    "day": pa.array([datetime.date(2020, 1, 1 + i % 28) for i in range(N)]),
    "price": pa.array([decimal.Decimal(f"{i}.25") for i in range(N)]),
    "tags": pa.array([["x", None], [], None] * (N // 3), pa.large_list(pa.string())),
    "nested": pa.array([{"a": i, "b": [i]} if i % 5 else None for i in range(N)]),
    "pairs": pa.array([[("k", i)] for i in range(N)], pa.map_(pa.string(), pa.int32())),
    "blob": pa.array([bytes([i % 256] * 4) for i in range(N)]),
    "none": pa.nulls(N),
    "key": pa.ExtensionArray.from_storage(
        pa.uuid(), pa.array([uuid.UUID(int=i).bytes for i in range(N)], pa.binary(16))
    ),
}


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(D, D, 6, inner=16, side_info=False)


def gallery(where: Path, **more: Any) -> Path:
    where.mkdir()
    rows = np.random.default_rng(1).standard_normal((N, D), dtype=np.float32)
    rows[[3, 155], 1] = np.nan
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), D)
    pq.write_table(pa.table({"id": np.arange(N), "embedding": vectors, **more}), where / "a.parquet")
    return where


def test_rows_and_payload_come_back_as_they_were(h: Any, tmp_path: Path) -> None:
    source, new = gallery(tmp_path / "old", **PAYLOAD), tmp_path / "new"
    assert not fct.plan_backfill(source, new, h, old_model="random-old", format="vortex", measure_seconds=0).refusals
    fct.backfill(source, new, h, format="vortex", **HOW)
    fct.backfill(source, tmp_path / "plain", h, format="parquet", **HOW)
    got = pa.concat_tables([vortex.open(str(f)).to_arrow().read_all() for f in sorted(new.glob("*.vortex"))])
    want = pq.read_table(tmp_path / "plain")
    assert got.num_rows == N - 2
    for name in want.column_names:
        assert got[name].to_pylist() == want[name].to_pylist(), name
    checked = fct.verify_gallery(new, source=source, progress=False, deep=True)
    assert checked.proven, checked
    assert open_source(new).space == h.new_space
    # What is Vortex stays Vortex; one file of it is mapped as well.
    back = fct.Transformation.random(6, 6, D, inner=16, side_info=False).with_(old_space=h.new_space)
    fct.backfill(new, tmp_path / "back", back, progress=False)
    assert list((tmp_path / "back").glob("*.vortex"))
    one = next(new.glob("*-00000001.vortex"))
    assert transform_file(one, tmp_path / "one.vortex", back, old_model=h.new_space.model_id) == 99
    assert len(vortex.open(str(tmp_path / "one.vortex"))) == 99


@pytest.mark.parametrize("column", [pa.array([1] * N, pa.duration("us")), pa.array([b"abcd"] * N, pa.binary(4))])
def test_what_it_has_no_type_for_is_refused_before_anything_is_written(h: Any, tmp_path: Path, column: Any) -> None:
    source, new = gallery(tmp_path / "old", odd=column), tmp_path / "new"
    with pytest.raises(FctError, match=r"the column 'odd' \(.*\) cannot be kept in Vortex.* --format"):
        fct.backfill(source, new, h, format="vortex", **HOW)
    assert not list(new.glob("*.vortex"))


def test_killed_it_goes_on_and_an_error_of_the_rows_is_told_in_its_own_words(h: Any, tmp_path: Path) -> None:
    source, new = gallery(tmp_path / "old"), tmp_path / "new"
    real, calls = Journal.mark, []

    def second(self: Journal, marker: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, marker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "mark", second)
        with pytest.raises(KeyboardInterrupt):
            fct.backfill(source, new, h, format="vortex", **HOW)
    assert fct.backfill(source, new, h, format="vortex", **HOW).shards_kept >= 1
    assert fct.verify_gallery(new, source=source, progress=False).proven

    def broken() -> Any:
        yield pa.record_batch({"x": [1]})
        raise FctError("of the rows")

    writer = VortexDestination(fct.gallery.location_of(tmp_path))
    with pytest.raises(FctError, match=r"^of the rows$"):
        writer.write_file(tmp_path / "a.vortex", None, broken(), {})  # type: ignore[arg-type]


def test_in_another_store(h: Any, tmp_path: Path) -> None:
    source = gallery(tmp_path / "old", title=PAYLOAD["title"])
    store = fsspec.filesystem("memory")
    store.put(str(source), "/vortex/old", recursive=True)
    try:
        fct.backfill("memory://vortex/old", "memory://vortex/new", h, format="vortex", **HOW)
        assert len(store.glob("/vortex/new/*.vortex")) == 3
        checked = fct.verify_gallery("memory://vortex/new", source="memory://vortex/old", progress=False)
        assert checked.proven, checked
    finally:
        store.rm("/vortex", recursive=True)

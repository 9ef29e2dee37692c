"""h over Arrow batches: transform_batch's own rows, bad ones null and counted, small and packed once a process."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import fct
from fct import arrow_mapper
from fct.gallery import vector_array
from fct.ops.weights import packed_names
from fct.transform import transform_finite

D_OLD, D_SIDE, D_NEW, ROWS = 12, 6, 10, 40


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_SIDE, D_NEW, inner=32)


@pytest.fixture
def old(rng: np.random.Generator) -> Any:
    return rng.standard_normal((ROWS, D_OLD), dtype=np.float32)


@pytest.fixture
def side(rng: np.random.Generator) -> Any:
    return rng.standard_normal((ROWS, D_SIDE), dtype=np.float32)


def batch_of(old: Any, side: Any, form: str = "fixed_size_list") -> pa.RecordBatch:
    ids = pa.array([f"item-{i}" for i in range(len(old))])
    return pa.record_batch({"id": ids, "v": vector_array(old, form), "s": vector_array(side, form)})


def values(column: pa.Array) -> Any:
    if pa.types.is_binary(column.type):
        return np.stack([np.frombuffer(v.as_py(), np.float32) for v in column])
    return np.array(column.to_pylist(), np.float32)


@pytest.mark.parametrize("form", ["fixed_size_list", "list", "binary"])
def test_the_rows_are_transform_batchs(h: fct.Transformation, old: Any, side: Any, form: str) -> None:
    mapper = h.arrow_mapper(vector="v", side="s", out="new", precision="fp32")
    want = fct.transform_batch(old, side, h, precision="fp32", progress=False)
    batch = batch_of(old, side, form)
    got = mapper(batch)
    assert got.schema.names == ["id", "v", "s", "new"]
    assert np.array_equal(values(got.column("new")), want)
    assert got.column("id").equals(batch.column("id"))
    table = pa.Table.from_batches([batch.slice(0, 7), batch.slice(7)])
    assert np.array_equal(values(mapper(table)["new"].combine_chunks()), want)
    parts = list(mapper(iter([batch.slice(3, 5), batch.slice(8, 0)])))
    assert [part.num_rows for part in parts] == [5, 0]
    assert np.array_equal(values(parts[0].column("new")), want[3:8])
    assert np.array_equal(values(mapper.column(batch.column("v"), batch.column("s"))), want)


def test_bad_rows_are_null_counted_and_explained(h: fct.Transformation, old: Any, side: Any) -> None:
    old[3, 0], side[5, 1] = np.nan, np.inf
    batch = batch_of(old, side)
    vectors = pa.array([None if i == 7 else row for i, row in enumerate(old.tolist())], pa.list_(pa.float32()))
    batch = batch.set_column(1, "v", vectors)
    mapper = h.arrow_mapper(vector="v", side="s", out="new", why="why", precision="fp32")
    got = mapper(batch)
    assert [i for i in range(ROWS) if not got.column("new")[i].is_valid] == [3, 5, 7]
    assert {i: w for i, w in enumerate(got.column("why").to_pylist()) if w} == {
        3: "v: not finite", 5: "s: not finite", 7: "v: null",
    }  # fmt: skip
    assert dict(mapper.bad) == {"v: not finite": 1, "s: not finite": 1, "v: null": 1}
    good = [i for i in range(ROWS) if i not in (3, 5, 7)]
    want = fct.transform_batch(old[good], side[good], h, precision="fp32", progress=False)
    assert np.array_equal(values(got.column("new").take(pa.array(good))), want)
    with pytest.raises(
        ValueError, match="v: expected vectors that can be mapped, 3 of 40 rows cannot; row 3: v: not finite"
    ):
        h.arrow_mapper(vector="v", side="s", on_bad="raise")(batch)


def test_in_the_place_of_the_old_vectors(h: fct.Transformation, old: Any, side: Any) -> None:
    got = h.arrow_mapper(vector="v", side="s", out="v", dtype="float16")(batch_of(old, side))
    assert got.schema.names == ["id", "v", "s"]
    assert got.schema.field("v").type == pa.list_(pa.float16(), D_NEW)


def test_nothing_but_bad_rows_and_no_rows(h: fct.Transformation, old: Any, side: Any) -> None:
    mapper = h.arrow_mapper(vector="v", side="s", out="new")
    old[:] = np.nan
    assert mapper(batch_of(old, side)).column("new").null_count == ROWS
    empty = pa.Table.from_batches([], batch_of(old, side).schema)
    assert mapper(empty).schema.field("new").type == pa.list_(pa.float32(), D_NEW)


def test_pickled_it_is_small_and_packs_once(
    h: fct.Transformation, old: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapper = h.arrow_mapper(vector="v", side="s", precision="fp32")
    mapper(batch_of(old, side))
    data = pickle.dumps(mapper)
    assert len(data) < 4 * h.parameters * 1.2 + 10_000
    monkeypatch.setattr(arrow_mapper, "_here", type(arrow_mapper._here)())
    one, two = pickle.loads(data), pickle.loads(data)
    assert one.h is two.h
    one(batch_of(old, side))
    assert [precision for _, precision, _ in packed_names(two.h)] == ["fp32"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vector": "v"}, r"side: expected the column of the side-information \(6-d"),
        ({"vector": "v", "side": "s", "on_bad": "drop"}, "on_bad: expected one of null, raise, got 'drop'"),
        ({"vector": "v", "side": "s", "threads": 0}, "threads: expected a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments(h: fct.Transformation, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        h.arrow_mapper(**wrong)


def test_wrong_columns(h: fct.Transformation, old: Any, side: Any) -> None:
    batch = batch_of(old, side)
    with pytest.raises(ValueError, match=r"vector: expected a column \(id, v, s\), got 'old'"):
        h.arrow_mapper(vector="old", side="s")(batch)
    with pytest.raises(ValueError, match="out: expected the name of a new column, 'id' is there already"):
        h.arrow_mapper(vector="v", side="s", out="id")(batch)
    with pytest.raises(ValueError, match="vectors: expected 12 elements a row"):
        h.arrow_mapper(vector="s", side="v")(batch)


def test_a_worker_loads_no_torch(h: fct.Transformation, tmp_path: Path) -> None:
    h.save(tmp_path / "h.safetensors")
    code = (
        "import sys, fct; m = fct.Transformation.load(sys.argv[1]).arrow_mapper(vector='v', side='s'); "
        "print('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "h.safetensors")], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"


def test_a_table_in_many_small_pieces_is_mapped_at_once(
    h: fct.Transformation, old: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, calls = batch_of(old, side), []
    real = transform_finite
    monkeypatch.setattr(arrow_mapper, "transform_finite", lambda *a, **k: (calls.append(len(a[0])), real(*a, **k)))
    mapper = h.arrow_mapper(vector="v", side="s", out="new", precision="fp32")
    table = pa.Table.from_batches([batch.slice(i, 1) for i in range(ROWS)])
    got = mapper(table)
    assert calls == [ROWS]
    assert np.array_equal(values(got["new"].combine_chunks()), values(mapper(batch).column("new")))
    assert got.select(["id", "v", "s"]).combine_chunks().equals(pa.Table.from_batches([batch]).select(["id", "v", "s"]))


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (None, "NoneType"),
        (7, "int"),
        ("rows.parquet", "str"),
        ([7], "an iterable of int"),
        (pa.array([1.0]), "an iterable of DoubleScalar"),
        (iter([pa.table({"v": [[1.0, 2.0]]})]), "an iterable of Table"),
    ],
)
def test_what_is_no_batch_is_refused(rows: Any, what: str) -> None:
    mapper = fct.Transformation.random(2, 2, 3, inner=4, side_info=False).arrow_mapper(vector="v")
    with pytest.raises(
        TypeError, match=f"^rows: expected a pyarrow RecordBatch, a Table or an iterable .*, got {what}$"
    ):
        list(mapper(rows))

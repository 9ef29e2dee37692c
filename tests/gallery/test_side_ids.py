"""Rows joined by position are checked by id where both sides have ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError
from fct.gallery import vector_array
from fct.gallery.side_ids import columns_in_common, require_same_ids

N = 200


def galleries(folder: Path, ids: pa.Array, others: pa.Array | None, name: str = "id") -> tuple[Path, Path, Any, Any]:
    rng = np.random.default_rng(0)
    old, side = rng.standard_normal((N, 16), dtype=np.float32), rng.standard_normal((N, 4), dtype=np.float32)
    for where in ("g", "s"):
        (folder / where).mkdir()
    pq.write_table(pa.table({"id": ids, "embedding": vector_array(old)}), folder / "g/a.parquet")
    columns = {"side_info": vector_array(side)} if others is None else {name: others, "side_info": vector_array(side)}
    pq.write_table(pa.table(columns), folder / "s/a.parquet")
    return folder / "g", folder / "s", old, side


@pytest.mark.parametrize(
    "others",
    [None, pa.array(range(N), pa.int32()), pa.array(range(N), pa.uint32())],
)
@pytest.mark.parametrize("name", ["id", "pk"])
def test_the_same_ids_in_another_spelling(others: pa.Array | None, name: str, tmp_path: Path) -> None:
    h = fct.Transformation.random(16, 4, 8, inner=32)
    g, s, old, side = galleries(tmp_path, pa.array(range(N)), others, name)
    fct.backfill(g, tmp_path / "n", h, side_source=s, old_model="random-old", progress=False, precision="fp32")
    got = np.array(pq.read_table(tmp_path / "n/part-00000000.parquet")["embedding"].to_pylist(), np.float32)
    np.testing.assert_array_equal(got, fct.transform_batch(old, side, h, precision="fp32"))


def test_another_order_is_refused_at_the_first_difference(tmp_path: Path) -> None:
    order = list(range(N))
    order[117], order[118] = 118, 117
    h = fct.Transformation.random(16, 4, 8, inner=32)
    ids = pa.array([f"item-{i}" for i in range(N)])
    g, s, _, _ = galleries(tmp_path, ids, ids.take(pa.array(order)).cast(pa.large_string()))
    options: dict[str, Any] = {"side_source": s, "old_model": "random-old"}
    with pytest.raises(
        FctError,
        match="row 117 is item-117 there and item-118 in the side-information: join them by id with --side-join id",
    ):
        fct.backfill(g, tmp_path / "n", h, progress=False, **options)
    (why,) = fct.plan_backfill(g, tmp_path / "n", h, measure_seconds=0.01, **options).refusals
    assert "row 117 is item-117 there" in why


def test_ids_of_another_kind_are_refused() -> None:
    with pytest.raises(FctError, match=r"side_source: expected ids of the gallery's type: .* id: string, .* id: int64"):
        require_same_ids(pa.array([1]), pa.array(["1"]), 0)
    require_same_ids(pa.array([1, None]), pa.array([1, None]), 0)
    require_same_ids(pa.array([float("nan"), 1.0]), pa.array([float("nan"), 1.0]), 0)
    with pytest.raises(FctError, match="row 8 is None there and 2 in"):
        require_same_ids(pa.array([1, None]), pa.array([1, 2]), 7)


@pytest.mark.parametrize("name", ["item_id", "docId", "product-key", "ID", "user.uuid"])
def test_ids_of_a_name_that_fct_does_not_take_for_ids_are_compared_where_both_have_them(name: str) -> None:
    side = pa.schema([(name, pa.int64()), ("side_info", pa.list_(pa.float32(), 4))])
    assert columns_in_common(pa.schema([(name, pa.int64()), ("label", pa.int8())]), side, "") == [(name, name)]
    with pytest.raises(
        FctError, match=rf"row 11 is 2 there and 3 in.*--id-column {name}.*if '{name}' is no id of a row"
    ):
        require_same_ids(pa.array([1, 2, 3]), pa.array([1, 3, 2]), 10, name)


def test_columns_that_are_no_ids_are_not_compared() -> None:
    names = ["label", "paid", "valid", "keyword", "idea", "grid"]
    schema = pa.schema([(name, pa.int64()) for name in names])
    assert columns_in_common(schema, schema, "") == []
    require_same_ids(pa.array(["a", "a"]), pa.array(["b", "b"]), 0, "model_id")  # one for the whole gallery

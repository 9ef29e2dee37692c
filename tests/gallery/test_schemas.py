"""One dataset in several spellings is one gallery; what cannot be one is refused with the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import FctError
from fct.gallery import open_source
from fct.gallery.schemas import conform, difference

TEXT = ["a", None, "c"]
VALUES = np.arange(12, dtype=np.float32).reshape(3, 4).tolist()


def write(folder: Path, *columns: dict[str, pa.Array], suffix: str = ".arrow") -> Path:
    folder.mkdir()
    for i, some in enumerate(columns):
        made = pa.table(some)
        if suffix == ".parquet":
            pq.write_table(made, folder / f"{i}.parquet")
        else:
            with pa.ipc.new_file(folder / f"{i}.arrow", made.schema) as out:
                out.write_table(made)
    return folder


def rows(where: Path) -> pa.Table:
    source = open_source(where)
    batches = [b for p in source.pieces() for b in source.read(p, 0, p.rows, 2)]
    for batch in batches:
        batch.validate(full=True)
        assert batch.schema.equals(source.schema)
    return pa.Table.from_batches(batches)


def text(kind: pa.DataType) -> pa.Array:
    return pa.array(TEXT, kind)


PAIRS = {
    "large_string": (text(pa.string()), text(pa.large_string())),
    "string_view": (text(pa.string_view()), text(pa.string())),
    "categorical": (text(pa.string()).dictionary_encode(), text(pa.large_string())),
    "categories of two widths": (
        text(pa.string()).dictionary_encode(),
        text(pa.string()).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
    ),
    "polars Enum": (
        text(pa.string()).dictionary_encode().cast(pa.dictionary(pa.uint8(), pa.string())), text(pa.string_view())
    ),
    "binary": (pa.array([b"a", None, b"c"]), pa.array([b"a", None, b"c"], pa.binary(1))),
    "ids": (pa.array([1, 2, 3], pa.int32()), pa.array([1, 2, 3], pa.int64())),
    "ids without a sign": (pa.array([1, 2, 3], pa.uint32()), pa.array([1, 2, 3], pa.int64())),
    "all None": (pa.nulls(3), text(pa.large_string())),
    "list": (pa.array([[1], None, []], pa.list_(pa.int64())), pa.array([[1], None, []], pa.large_list(pa.int32()))),
    "struct": (
        pa.array([{"x": 1}, None, {"x": 2}], pa.struct([("x", pa.int32())])),
        pa.array([{"x": 1}, None, {"x": 2}], pa.struct([("x", pa.int64())])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("what", PAIRS)
def test_payload_in_two_spellings(what: str, turned: bool, tmp_path: Path) -> None:
    a, b = PAIRS[what] if not turned else PAIRS[what][::-1]
    vectors = pa.array(VALUES, pa.list_(pa.float32(), 4))
    got = rows(write(tmp_path / "g", {"x": a, "embedding": vectors}, {"x": b, "embedding": vectors}))
    assert got["x"].to_pylist() == a.to_pylist() + b.to_pylist()
    (note,) = open_source(tmp_path / "g").notes
    assert "files spell their columns differently; read as one" in note


LISTS = {
    "list": pa.list_(pa.float32()), "large_list": pa.large_list(pa.float32()), "fixed": pa.list_(pa.float32(), 4),
    "list_view": pa.list_view(pa.float32()), "large_list_view": pa.large_list_view(pa.float32()),
    "float64": pa.list_(pa.float64()), "float64 fixed": pa.list_(pa.float64(), 4), "half": pa.list_(pa.float16()),
    "tensor": pa.fixed_shape_tensor(pa.float32(), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("b", LISTS)
@pytest.mark.parametrize("a", ["list", "fixed", "large_list", "list_view"])
def test_vectors_in_two_spellings(a: str, b: str, tmp_path: Path) -> None:
    def column(kind: pa.DataType) -> pa.Array:
        if isinstance(kind, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(kind, pa.array(VALUES, kind.storage_type))
        return pa.array(VALUES, kind)

    write(tmp_path / "g", {"embedding": column(LISTS[a])}, {"embedding": column(LISTS[b])})
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    report = fct.backfill(tmp_path / "g", tmp_path / "new", h, old_model="random-old", progress=False, precision="fp32")
    assert (report.rows_out, report.rejects) == (6, 0)
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "g").ok
    got = pa.concat_tables(pa.ipc.open_file(f).read_all() for f in sorted((tmp_path / "new").glob("*.arrow")))
    want = fct.transform_batch(np.array(VALUES * 2, np.float32), None, h, precision="fp32")
    np.testing.assert_array_equal(np.array(got["embedding"].to_pylist(), np.float32), want)


def test_order_nullability_and_a_missing_column(tmp_path: Path) -> None:
    vectors = pa.array(VALUES, pa.list_(pa.float32(), 4))
    first = pa.table({"id": [1, 2, 3], "embedding": vectors, "tag": TEXT})
    second = pa.table({"embedding": vectors, "id": [4, 5, 6], "more": [0.5, 1, 2]})
    second = second.cast(second.schema.set(1, pa.field("id", pa.int64(), nullable=False)))
    (tmp_path / "g").mkdir()
    pq.write_table(first, tmp_path / "g/a.parquet")
    pq.write_table(second, tmp_path / "g/b.parquet")
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    fct.backfill(tmp_path / "g", tmp_path / "new", h, old_model="random-old", progress=False)
    assert fct.verify_gallery(tmp_path / "new", source=tmp_path / "g").ok
    got = rows(tmp_path / "g")
    assert got.column_names == ["id", "embedding", "tag", "more"]
    assert got["tag"].to_pylist() == [*TEXT, None, None, None]
    assert got["more"].to_pylist() == [None, None, None, 0.5, 1, 2]
    assert got.schema.field("id").nullable


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ({"x": pa.array([1])}, {"x": pa.array(["1"])}, r"1.arrow has x: string, .*0.arrow has x: int64$"),
        ({"x": pa.array([1])}, {"x": pa.array([1.5])}, r"x: double, .* x: int64$"),
        ({"x": pa.array([1], pa.uint64())}, {"x": pa.array([1])}, r"x: int64, .* x: uint64$"),
        ({"x": pa.array([[1.0]], pa.list_(pa.float32(), 1))}, {"x": pa.array([[1.0, 2]], pa.list_(pa.float32(), 2))},
         r"x: fixed_size_list<item: float>\[2\], .* x: fixed_size_list<item: float>\[1\]$"),
        ({"x": pa.array([1]), "v": pa.array([[1.0]])}, {"x": pa.array([1])}, "has no 'v', which is a column of vec"),
        ({"x": pa.array([0], pa.timestamp("us"))}, {"x": pa.array([0], pa.timestamp("us", "UTC"))}, "tz=UTC"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_is_refused_with_the_difference_alone(
    a: dict[str, Any], b: dict[str, Any], why: str, tmp_path: Path
) -> None:
    same = {"id": pa.array([7])}
    with pytest.raises(FctError, match=why) as caught:
        open_source(write(tmp_path / "g", same | a, same | b)).pieces()
    assert "id: int64" not in str(caught.value)


def test_a_required_column_may_not_be_missing(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False), ("x", pa.int64())])
    (tmp_path / "g").mkdir()
    pq.write_table(pa.table([[1], [2]], schema=schema), tmp_path / "g/a.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "g/b.parquet")
    with pytest.raises(FctError, match=r"b.parquet has no 'id', which may not be null in .*a.parquet"):
        open_source(tmp_path / "g").pieces()


def test_a_dictionary_of_views_travels(tmp_path: Path) -> None:
    words = pa.DictionaryArray.from_arrays(
        pa.array([0, 1, 0, None], pa.uint32()), pa.array(["a", "b"], pa.string_view())
    )
    vectors = pa.array([[1.0, 2, 3, 4]] * 4, pa.list_(pa.float32(), 4))
    folder = write(tmp_path / "g", {"embedding": vectors, "tag": words})
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    fct.backfill(folder, tmp_path / "new", h, old_model="random-old", progress=False)
    (file,) = (tmp_path / "new").glob("*.arrow")
    assert pa.ipc.open_file(file).read_all()["tag"].to_pylist() == ["a", "b", "a", None]


@pytest.mark.parametrize("inner", ["top", "list", "struct"])
def test_views_of_text_beside_a_row_that_is_rejected(inner: str, tmp_path: Path) -> None:
    """Arrow neither takes nor leaves out rows of them: what polars writes as IPC, deltalake's rewritten files."""
    view = pa.string_view()
    kind = {"top": view, "list": pa.list_(view), "struct": pa.struct([("a", view)])}[inner]
    values = [None, "a", "b", "a longer text than twelve bytes"]
    told = values if inner == "top" else [None if v is None else [v] if inner == "list" else {"a": v} for v in values]
    vectors = pa.array([[1.0, 2, 3, 4], [1.0, float("nan"), 3, 4], [0.0] * 4, [1.0] * 4], pa.list_(pa.float32(), 4))
    folder = write(tmp_path / "g", {"embedding": vectors, "note": pa.array(told, kind)})
    h = fct.Transformation.random(4, 4, 2, inner=8, side_info=False)
    assert fct.backfill(folder, tmp_path / "new", h, old_model="random-old", progress=False).rejects == 1
    (file,) = (tmp_path / "new").glob("*.arrow")
    assert pa.ipc.open_file(file).read_all()["note"].to_pylist() == [told[0], *told[2:]]
    assert fct.verify_gallery(tmp_path / "new", source=folder).proven


def test_differences_in_words() -> None:
    a = pa.schema([pa.field("x", pa.int64()), pa.field("y", pa.string())])
    assert difference(a, a) == []
    b = pa.schema([pa.field("x", pa.int32(), nullable=False), pa.field("z", pa.string())])
    assert difference(a, b) == [
        "y: only in the first", "z: only in the second", "x: int64, int32", "x: may, may not be null"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_text_of_any_kind_becomes_a_category(kind: pa.DataType) -> None:
    wanted = pa.schema([pa.field("label", pa.dictionary(pa.int8(), pa.string()))])
    given = pa.record_batch({"label": pa.array(["a", None, "b", "a"], kind)})
    found = conform(given, wanted)
    assert found.schema.equals(wanted)
    assert found.column(0).to_pylist() == ["a", None, "b", "a"]

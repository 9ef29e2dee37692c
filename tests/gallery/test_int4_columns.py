"""A column of 4-bit codes says by its type what it holds: read everywhere, and refused by name where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import load_pairs, load_vectors, vector_array, vector_block
from fct.gallery.columns import SIDE_NAMES, VECTOR_NAMES, pick_column
from fct.gallery.vectors import vector_dim, vector_type
from fct.packed_int4 import pack_int4

N, D_OLD, D_NEW = 120, 5, 4


def bytes_of(codes: Any) -> pa.Array:
    """The codes' bytes without a word about what they are."""
    values = pack_int4(codes).values
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.shape[1]), len(values), [None, pa.py_buffer(values)])


def structs(name: str, width: int, n: int = N) -> pa.Array:
    return pa.StructArray.from_arrays([pa.array([bytes(width)] * n, pa.binary(width))], [name])


@pytest.fixture(params=[16, 7])
def codes(request: pytest.FixtureRequest, rng: np.random.Generator) -> Any:
    return np.clip(np.floor(rng.standard_normal((N, request.param)) * 3), -8, 7).astype(np.int8)


def written(folder: Path, side: pa.Array, rng: np.random.Generator) -> tuple[Path, Any, Any]:
    """(Parquet of pairs with side-information, old, new)."""
    old, new = (rng.standard_normal((N, d), dtype=np.float32) for d in (D_OLD, D_NEW))
    table = {"id": np.arange(N), "old": vector_array(old), "new": vector_array(new), "side": side}
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    return folder / "pairs.parquet", old, new


def test_the_type_says_it_and_the_codes_come_back(codes: Any) -> None:
    packed, d = pack_int4(codes), codes.shape[1]
    column = packed.to_arrow()
    assert str(column.type) == f"struct<int4x{d}: fixed_size_binary[{(d + 1) // 2}]>"
    assert vector_type(column.type) == "binary"
    assert vector_dim(column) == d
    np.testing.assert_array_equal(vector_block(column, d).values, codes)
    np.testing.assert_array_equal(vector_block(column.slice(3, 50), d).values, codes[3:53])
    assert len(pack_int4(codes[:0]).to_arrow()) == 0
    assert vector_block(pack_int4(codes[:0]).to_arrow(), d).values.shape == (0, d)
    with pytest.raises(ValueError, match=f"expected {d + 1} elements a row, got a column of"):
        vector_block(column, d + 1)


def test_rows_without_codes_are_set_aside(codes: Any) -> None:
    d, column = codes.shape[1], pack_int4(codes).to_arrow()
    inner = column.field(0).to_pylist()
    inner[4] = None
    torn = pa.array([None if i == 2 else {f"int4x{d}": v} for i, v in enumerate(inner)], column.type)
    block = vector_block(torn, d)
    assert block.bad == {2: "null", 4: "null"}
    np.testing.assert_array_equal(block.values, np.delete(codes, [2, 4], axis=0))


def test_every_reader_takes_it(codes: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    """Pairs for a fit, a backfill and its verification, and the payload that a backfill carries along."""
    file, old, _ = written(tmp_path, pack_int4(codes).to_arrow(), rng)
    np.testing.assert_array_equal(load_pairs(file)["side"], codes)
    np.testing.assert_array_equal(load_vectors(f"{file}:side"), codes)
    assert pick_column(pq.read_schema(file), "auto", VECTOR_NAMES, "x") == "old"
    assert pick_column(pq.read_schema(file), "auto", SIDE_NAMES, "x") == "side"
    h = fct.Transformation.random(D_OLD, codes.shape[1], D_NEW, inner=8)
    kw: dict[str, Any] = {"old_model": "random-old", "progress": False, "vector_column": "old", "keep_side_info": True}
    fct.backfill(file, tmp_path / "new", h, **kw)
    table = pq.read_table(tmp_path / "new")
    want = fct.transform_batch(old, codes.astype(np.float32), h)
    np.testing.assert_array_equal(np.array(table["old"].to_pylist(), np.float32), want)
    assert table.schema.field("side").type == pack_int4(codes).to_arrow().type
    report = fct.verify_gallery(tmp_path / "new", source=file)
    assert report.proven, (report.problems, report.unproven)
    assert report.read_alike == N
    other = fct.Transformation.random(D_OLD, codes.shape[1] + 1, D_NEW, inner=8)
    with pytest.raises(fct.FctError, match=rf"expected {codes.shape[1] + 1}-d vectors of .*got {codes.shape[1]}-d"):
        fct.backfill(file, tmp_path / "other", other, **kw)


@pytest.mark.parametrize(("name", "width"), [("int2x16", 4), ("fp4x16", 8), ("int4x16", 7), ("nf4x16", 8)])
def test_codes_of_a_later_version_are_refused_by_name(
    name: str, width: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Above all no fit goes on without the side-information that it does not understand."""
    file, *_ = written(tmp_path, structs(name, width), rng)
    words = rf"column 'side': expected .*got a column of codes '{name}', struct<.*a later version of fct may read them"
    with pytest.raises(ValueError, match="pairs: " + words):
        load_pairs(file)
    with pytest.raises(ValueError, match="vectors: " + words):
        load_vectors(f"{file}:side")
    h = fct.Transformation.random(D_OLD, 16, D_NEW, inner=8)
    with pytest.raises(ValueError, match=words):
        fct.backfill(file, tmp_path / "new", h, old_model="random-old", vector_column="old", progress=False)
    assert not (tmp_path / "new").exists()
    records = np.zeros(N, [(name, np.uint8, (width,))])
    with pytest.raises(ValueError, match=rf"side_info: expected .*got .*{name}.*a later fct may read these codes"):
        fct.transform_batch(np.ones((N, D_OLD), np.float32), records, h)


def test_a_user_s_own_struct_is_payload(tmp_path: Path, rng: np.random.Generator) -> None:
    """Neither its one field's name nor its type is of any interest where it is not meant."""
    old = rng.standard_normal((N, D_OLD), dtype=np.float32)
    table = {"id": np.arange(N), "old": vector_array(old), "box": structs("int2x16", 4), "size": structs("a3x4", 2)}
    pq.write_table(pa.table(table), tmp_path / "old.parquet")
    h = fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=8, side_info=False)
    fct.backfill(tmp_path / "old.parquet", tmp_path / "new", h, old_model="random-old", progress=False)
    assert pq.read_table(tmp_path / "new", columns=["box", "size"]).to_pylist()[0] == {
        "box": {"int2x16": bytes(4)}, "size": {"a3x4": bytes(2)},
    }  # fmt: skip


def test_bare_bytes_are_not_taken_for_floats(tmp_path: Path, rng: np.random.Generator) -> None:
    """64 bytes could be 16 float32 or 128 codes: where no h says which, what is no embedding is refused."""
    codes = np.clip(np.floor(rng.standard_normal((N, 128)) * 3), -8, 7).astype(np.int8)
    file, *_ = written(tmp_path, bytes_of(codes), rng)
    with pytest.raises(ValueError, match=r"pairs: column 'side' .*packed 4-bit codes\? .*PackedInt4.to_arrow\(\)"):
        load_pairs(file)
    floats = rng.standard_normal((N, 16), dtype=np.float32)
    file, *_ = written(tmp_path, vector_array(floats, "binary"), rng)
    np.testing.assert_array_equal(load_pairs(file)["side"], floats)


def test_version_0_1_refuses_every_form(codes: Any) -> None:
    """What it knew: numbers in lists, and binaries of d float32 or float16 a row. Run on such files once, it said

    - of this column: ``side_column: expected a list or binary column, 'side' is struct<int4x16:
      fixed_size_binary[8]>``;
    - of bare bytes: ``side_source: expected 16-d vectors of 'random-side', got 2-d vectors``, since ceil(d / 2) bytes
      are never 4 d or 2 d; where another h has just that width it takes them for floats, which the struct prevents;
    - of a packed ``.npy``: ``source: expected (n, d) rows in C order in side.npy, got (120,) |V8``.
    """
    packed, d = pack_int4(codes), codes.shape[1]
    kind = packed.to_arrow().type
    known = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_fixed_size_binary(kind)
    assert not known
    assert bytes_of(codes).type.byte_width not in (4 * d, 2 * d)
    assert packed.records.ndim == 1

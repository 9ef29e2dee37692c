from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typing_extensions import assert_type

import fct
from fct import _C, ref, search
from fct.errors import ArtifactError, BackendError
from fct.ops.search.cpu_search import Shadow, build_shadow
from fct.packed_int4 import pack_int4
from fct.types import Array

OLD, NEW = fct.EmbeddingSpace("old", 12), fct.EmbeddingSpace("new", 12)


@pytest.fixture
def rows(rng: np.random.Generator) -> Any:
    return rng.standard_normal((300, 12), dtype=np.float32)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("precision", ["auto", "int8", "fp32"])
def test_equals_the_reference(rows: Any, metric: str, precision: str) -> None:
    got = fct.topk(rows[:40], rows, 9, metric=metric, precision=precision)
    want = ref.topk(rows[:40], rows, 9, metric)
    np.testing.assert_array_equal(got.indices, want[1])
    np.testing.assert_allclose(got.distances, want[0], rtol=1e-6, atol=1e-13)
    assert (got.distances.dtype, got.indices.dtype) == (np.float32, np.int64)


def test_the_same_kind_goes_out(rows: Any) -> None:
    tensor = torch.from_numpy(rows)
    got = fct.topk(tensor[:3].bfloat16(), tensor, 2)
    assert isinstance(got.distances, torch.Tensor)
    assert got.indices.dtype == torch.int64
    assert fct.topk(rows[:0], rows, 2).indices.shape == (0, 2)


def test_agrees_with_the_blocked_products(rows: Any) -> None:
    from fct.ops.search.float64 import topk_blocked
    from fct.rows import rows_of

    for metric in ("l2", "ip", "cosine"):
        for kind in (rows, torch.from_numpy(rows)):
            a = topk_blocked(rows_of(kind, "q"), rows_of(kind, "g"), 5, metric, True)
            b = fct.topk(rows, rows, 5, metric=metric, same_items=True)
            np.testing.assert_array_equal(np.asarray(a[1]), b.indices)


def test_prepared_appended_saved_and_loaded(rows: Any, tmp_path: Path) -> None:
    want = fct.topk(rows[:30], rows, 7)
    prepared = fct.prepare_gallery(rows[:130], space=OLD).append(rows[130:])
    assert len(prepared) == 300
    prepared.save(tmp_path / "gallery.shadow")
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    loaded = fct.PreparedGallery.load(tmp_path / "gallery.shadow", mapped)
    assert loaded.space == OLD
    assert isinstance(loaded.shadow, Shadow)
    assert isinstance(loaded.shadow.tiles, np.memmap)
    for gallery in (prepared, loaded, prepared.append(rows[:0], gallery=mapped)):
        got = fct.topk(rows[:30], gallery, 7, query_space=OLD)
        np.testing.assert_array_equal(got.indices, want.indices)
        np.testing.assert_array_equal(got.distances, want.distances)


def narrow(x: Any, dtype: str, scale: Any = None) -> Any:
    if dtype == "float16":
        return x.astype(np.float16)
    if dtype == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
    return fct.ScaledInt8(np.clip(np.rint(x / scale), -127, 127).astype(np.int8), scale)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int8 row", "int8 column", "int8 one and row"])
def test_narrow_galleries_are_appended_saved_and_loaded(dtype: str, metric: str, rows: Any, tmp_path: Path) -> None:
    first, later = slice(0, 130), slice(130, 300)
    scales = {
        "int8": (np.float32(0.03),) * 2,
        "int8 row": tuple(np.linspace(0.02, 0.05, n, dtype=np.float32)[:, None] for n in (130, 170)),
        "int8 column": (np.linspace(0.02, 0.05, 12, dtype=np.float32)[None],) * 2,
        "int8 one and row": (np.float32(0.03), np.linspace(0.02, 0.05, 170, dtype=np.float32)[:, None]),
    }.get(dtype, (None, None))
    parts = [narrow(rows[part], dtype.split()[0], scale) for part, scale in zip((first, later), scales, strict=True)]
    prepared = fct.prepare_gallery(parts[0], metric=metric).append(parts[1])
    from fct.rows import rows_of

    exact = np.concatenate([rows_of(part, "part").float32() for part in parts])
    assert np.array_equal(rows_of(prepared.gallery, "gallery").float32(), exact)
    want = ref.topk(rows[:30], exact, 7, metric)
    prepared.save(tmp_path / "shadow")
    for gallery in (prepared, fct.PreparedGallery.load(tmp_path / "shadow", prepared.gallery)):
        got = fct.topk(torch.from_numpy(rows[:30]) if dtype == "bfloat16" else rows[:30], gallery, 7, metric=metric)
        np.testing.assert_array_equal(np.asarray(got.indices), want[1])
        np.testing.assert_allclose(np.asarray(got.distances), want[0], rtol=1e-6, atol=1e-7)


def test_what_can_not_be_appended(rows: Any) -> None:
    columns = np.linspace(0.02, 0.05, 12, dtype=np.float32)[None]
    prepared = fct.prepare_gallery(narrow(rows[:50], "int8", columns))
    with pytest.raises(ValueError, match="rows: expected the gallery's own scale"):
        prepared.append(narrow(rows[50:], "int8", columns * 2))
    with pytest.raises(
        ValueError, match="rows: expected numpy rows of int8, like the gallery, got numpy rows of float32"
    ):
        prepared.append(rows[50:])
    with pytest.raises(ValueError, match=r"rows: expected \(n, 12\) to match the gallery"):
        fct.prepare_gallery(rows).append(rows[:, :5])


def test_packing_in_slices_changes_nothing(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long packing is several compiled calls, so that Ctrl-C is heard between them."""
    whole = fct.prepare_gallery(rows).shadow
    calls = []
    from fct.ops.search import cpu_search as topk_cpu

    real = _C.shadow_pack

    def counted(*args: Any) -> None:
        calls.append(args[4])
        real(*args)

    monkeypatch.setattr(topk_cpu, "_PACKED_AT_ONCE", 12 * 64 * 2)
    monkeypatch.setattr(_C, "shadow_pack", counted)
    sliced = fct.prepare_gallery(rows).shadow
    assert calls == [128, 128, 44]
    assert isinstance(sliced, Shadow)
    assert isinstance(whole, Shadow)
    np.testing.assert_array_equal(sliced.tiles, whole.tiles)
    np.testing.assert_array_equal(sliced.meta, whole.meta)


def test_memory_of_the_shadow(rng: np.random.Generator) -> None:
    prepared = fct.prepare_gallery(rng.standard_normal((6400, 128), dtype=np.float32))
    assert prepared.memory_ratio == pytest.approx(1 + (128 + 20.25 + 512 / 6400) / 512)
    assert prepared.memory_ratio < 1.3
    bare = fct.prepare_gallery(np.zeros((2, _C.shadow_max_dim + 1), np.float32))
    assert bare.shadow is None
    assert (bare.nbytes, bare.memory_ratio) == (0, 1.0)


def test_a_gallery_of_one_row_is_searched_and_one_of_none_refused() -> None:
    one = np.ones((1, 3), np.float32)
    for gallery in (one, fct.prepare_gallery(one, metric="ip")):
        assert fct.topk(2 * one, gallery, 1, metric="ip").indices.tolist() == [[0]]
    with pytest.raises(ValueError, match=r"gallery: expected at least one row, got \(0, 3\)"):
        fct.topk(one, one[:0], 1)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "header"])
def test_a_damaged_shadow_is_refused(rows: Any, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x"
    fct.prepare_gallery(rows).save(path)
    data = path.read_bytes()
    bad = {"truncated": data[:-200], "foreign": b"PAR1" + data, "header": data.replace(b'"l2"', b'"l3"')}[damage]
    path.write_bytes(bad)
    with pytest.raises(ArtifactError, match="expected"):
        fct.PreparedGallery.load(path, rows)


def test_a_shadow_of_other_rows_is_refused(rows: Any, tmp_path: Path) -> None:
    fct.prepare_gallery(rows).save(tmp_path / "x")
    with pytest.raises(ValueError, match=r"expected the rows that .* was made from, got others"):
        fct.PreparedGallery.load(tmp_path / "x", rows + 1)
    with pytest.raises(ValueError, match=r"gallery: expected \(300, 12\)"):
        fct.PreparedGallery.load(tmp_path / "x", rows[:20])


def test_two_models_are_never_mixed(rows: Any) -> None:
    prepared = fct.prepare_gallery(rows, space=OLD)
    with pytest.raises(fct.SpaceMismatchError, match="queries: expected vectors of 'old'"):
        fct.topk(rows, prepared, 1, query_space=NEW)
    with pytest.raises(fct.SpaceMismatchError):
        fct.topk(rows, rows, 1, query_space=NEW, gallery_space=OLD)
    with pytest.raises(fct.SpaceMismatchError):
        fct.evaluate(rows, prepared, np.zeros(300, int), query_space=NEW)  # type: ignore[arg-type]  # refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k: expected 1 to 300, the rows of the gallery, got 0"),
        ({"k": 301}, r"k: expected 1 to 300.*got 301"),
        ({"k": True}, "k: expected"),
        ({"metric": "cos"}, "metric: expected one of l2, ip, cosine, got 'cos'"),
        ({"precision": "fp7"}, "precision: expected one of"),
        ({"queries": np.ones((2, 5), np.float32)}, r"queries: expected \(n, 12\) to match the gallery"),
        ({"queries": np.full((2, 12), np.nan, np.float32)}, "queries: expected finite values"),
        ({"same_items": True}, "queries: expected .* the gallery's own rows"),
        ({"gallery": np.ones((3, 12))}, "gallery: expected dtype float32"),
    ],
)
def test_bad_input(rows: Any, change: dict[str, Any], message: str) -> None:
    arguments = {"queries": rows[:4], "gallery": rows, "k": 2, **change}
    with pytest.raises(ValueError, match=message):
        fct.topk(**arguments)


def test_own_row_left_out_needs_one_more(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"k: expected 1 to 299, .* without the query's own, got 300"):
        fct.topk(rows, rows, 300, same_items=True)


def test_a_forced_precision_runs_or_says_why(rows: Any) -> None:
    with pytest.raises(BackendError, match="int8 cannot be scanned here: some norms"):
        fct.topk(rows, rows * np.float32(1e14), 1, precision="int8")
    with pytest.raises(BackendError, match="got 'bf16'"):
        fct.topk(rows, rows, 1, precision="bf16")
    with pytest.raises(ValueError, match="metric: expected 'l2', which the gallery was prepared for, got 'ip'"):
        fct.topk(rows, fct.prepare_gallery(rows), 1, metric="ip")


def test_many_queries_of_one_call_have_levels_fitted_and_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Shadow] = []

    def build(*args: Any, **options: Any) -> Shadow:
        built.append(build_shadow(*args, **options))
        return built[-1]

    monkeypatch.setattr(search, "build_shadow", build)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((17_000, 128), dtype=np.float32) * (0.8 ** np.arange(128, dtype=np.float32))
    few = fct.topk(rows[:100], rows, 3, progress=False)
    many = fct.topk(rows[:8192], rows, 3, progress=False)
    assert [shadow.levels is not None for shadow in built] == [False, True]
    np.testing.assert_array_equal(many.indices[:100], few.indices)
    np.testing.assert_array_equal(many.distances[:100], few.distances)
    fct.topk(rng.standard_normal((8192, 32), dtype=np.float32), rng.standard_normal((17_000, 32), dtype=np.float32), 3)
    assert built[-1].levels is None
    assert built[-1].low is None  # halves are for single queries


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("form", ["int4", "int4 records", "int8", "uint8", "int8 with an offset"])
def test_append_takes_every_form_of_codes_that_a_gallery_may_have(form: str, library: str) -> None:
    codes = np.random.default_rng(5).integers(-8, 8, (300, 16)).astype(np.int8)

    def rows(part: slice) -> object:
        if form.startswith("int4"):
            packed = fct.PackedInt4(pack_int4(codes[part]).values, 16)
            return packed.records if form.endswith("records") else packed
        values = codes[part].view(np.uint8) if form == "uint8" else codes[part]
        held = values if library == "numpy" else pytest.importorskip("torch").from_numpy(values.copy())
        return fct.ScaledInt8(held, 0.5, 0.1 if form.endswith("offset") else 0.0)

    grown = fct.prepare_gallery(rows(slice(0, 200)), metric="ip").append(rows(slice(200, 280)))  # type: ignore[arg-type]  # of either library
    grown = grown.append(rows(slice(280, 300)))  # type: ignore[arg-type]  # of either library
    whole = fct.prepare_gallery(rows(slice(None)), metric="ip")  # type: ignore[arg-type]  # of either library
    queries = codes[250:260].astype(np.float32)
    for got, want in zip(
        fct.topk(queries, grown, 5, metric="ip"), fct.topk(queries, whole, 5, metric="ip"), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_the_answer_is_of_the_queries_library() -> None:
    rows = np.eye(3, dtype=np.float32)
    of_numpy = assert_type(fct.topk(rows, fct.prepare_gallery(rows), 1), fct.TopK[Array])
    of_torch = assert_type(fct.topk(torch.eye(3), torch.eye(3), 1), fct.TopK[torch.Tensor])
    assert isinstance(of_numpy.indices, np.ndarray)
    assert isinstance(of_torch.indices, torch.Tensor)
    h = fct.Transformation.random(3, 3, 2)
    assert isinstance(assert_type(fct.transform_batch(rows, rows, h), Array), np.ndarray)
    tensors = assert_type(fct.transform_batch(torch.eye(3), torch.eye(3), h), torch.Tensor)
    assert isinstance(tensors, torch.Tensor)

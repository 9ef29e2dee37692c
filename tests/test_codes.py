"""8-bit codes with a scale and an offset, values beyond float16, arrays that are not what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fct
from fct import ref
from fct.rows import rows_of

N, D = 37, 21


def coded(rng: np.random.Generator, dtype: str, per: str, shape: tuple[int, int] = (N, D)) -> tuple[Any, Any]:
    """(ScaledInt8, what it means in float64), with a scale and an offset for all, a row or a dimension."""
    n, d = shape
    sizes: dict[str, tuple[int, ...]] = {"all": (), "row": (n,), "rows": (n, 1), "dimension": (1, d)}
    scale = (rng.random(sizes[per], np.float32) + np.float32(0.5)) / np.float32(100)
    offset = rng.standard_normal(sizes[per]).astype(np.float32)
    low, high = (-128, 128) if dtype == "int8" else (0, 256)
    values = rng.integers(low, high, shape).astype(dtype)
    across = (x[:, None] if x.ndim == 1 else x for x in (np.float64(scale), np.float64(offset)))
    by, plus = across
    return fct.ScaledInt8(values, scale, offset), values * by + plus


@pytest.mark.parametrize("backend", ["cpu", "torch", "ref"])
@pytest.mark.parametrize("per", ["all", "row", "rows", "dimension"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_h_reads_codes_with_an_offset(rng: np.random.Generator, dtype: str, per: str, backend: str) -> None:
    h = fct.Transformation.random(D, D, 9, inner=30)
    codes, meant = coded(rng, dtype, per)
    other, other_meant = coded(rng, "int8", "all")
    got = fct.transform_batch(codes, other, h, precision="fp32", backend=backend)
    np.testing.assert_allclose(got, ref.transform(meant, other_meant, h), rtol=1e-4, atol=1e-4)
    without = fct.transform_batch(fct.ScaledInt8(codes.values, codes.scale), other, h, precision="fp32")
    assert np.abs(without - got).max() > 0.01


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_zero_point_is_an_offset(rng: np.random.Generator, dtype: str) -> None:
    h = fct.Transformation.random(D, D, 9, inner=30, side_info=False)
    x = rng.standard_normal((N, D), dtype=np.float32)
    scale, zero = np.float32(0.05), 100 if dtype == "uint8" else -20
    info = np.iinfo(dtype)
    values = np.clip(np.rint(x / scale) + zero, info.min, info.max).astype(dtype)
    got = fct.transform_batch(fct.ScaledInt8(values, scale, -zero * scale), None, h, precision="fp32")
    np.testing.assert_allclose(got, ref.transform((values.astype(float) - zero) * scale, None, h), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_search_reads_codes_with_an_offset(rng: np.random.Generator, dtype: str, metric: str) -> None:
    gallery, meant = coded(rng, dtype, "dimension", (300, D))
    queries, meant_queries = coded(rng, dtype, "row")
    found = fct.topk(queries, gallery, 5, metric=metric)
    want = fct.topk(meant_queries.astype(np.float32), meant.astype(np.float32), 5, metric=metric)
    np.testing.assert_allclose(found.distances, want.distances, rtol=1e-5, atol=1e-5)
    assert np.mean(found.indices == want.indices) > 0.99


def test_torch_codes_too(rng: np.random.Generator) -> None:
    codes, meant = coded(rng, "uint8", "row")
    as_torch = fct.ScaledInt8(torch.from_numpy(codes.values), torch.from_numpy(codes.scale), codes.offset)
    np.testing.assert_allclose(rows_of(as_torch, "x").float32(), meant, rtol=1e-5, atol=1e-6)


def test_codes_with_an_offset_are_written(rng: np.random.Generator) -> None:
    h = fct.Transformation.random(D, D, 9, inner=30, side_info=False)
    x = rng.standard_normal((N, D), dtype=np.float32)
    plain = fct.transform_batch(x, None, h, precision="fp32")
    offset = rng.standard_normal((1, 9)).astype(np.float32)
    for backend in ("cpu", "torch", "ref"):
        out = fct.ScaledInt8(np.zeros((N, 9), np.int8), 0.05, offset)
        fct.transform_batch(x, None, h, out=out, precision="fp32", backend=backend)
        want = np.clip(np.rint((plain - offset) / np.float32(0.05)), -127, 127)
        assert np.abs(out.values - want).max() <= 1  # a value in the middle between two codes may round either way
        assert np.mean(out.values == want) > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": np.zeros(3)}, r"old: expected an offset of shape \(\), \(37,\) or \(1, 21\), got \(3,\)"),
        ({"offset": float("nan")}, "old: expected finite offsets, got values from nan"),
        ({"offset": "one"}, "old: expected an offset of floats, got"),
        ({"scale": -1.0}, "old: expected positive finite scales"),
        ({"values": np.zeros((N, D), np.int16)}, "old: expected dtype float32, .*, got int16"),
    ],
)
def test_codes_are_checked(rng: np.random.Generator, change: dict[str, Any], message: str) -> None:
    h = fct.Transformation.random(D, D, 9, inner=30, side_info=False)
    parts: dict[str, Any] = {"values": np.zeros((N, D), np.int8), "scale": 1.0, "offset": 0.0} | change
    with pytest.raises(ValueError, match=message):
        fct.transform_batch(fct.ScaledInt8(**parts), None, h)


def test_uint8_is_no_output() -> None:
    h = fct.Transformation.random(D, D, 9, inner=30, side_info=False)
    x = np.zeros((N, D), np.float32)
    with pytest.raises(ValueError, match="out: expected int8 values to write to, got uint8"):
        fct.transform_batch(x, None, h, out=fct.ScaledInt8(np.zeros((N, 9), np.uint8), 1.0))


@pytest.mark.parametrize("backend", ["cpu", "torch", "ref"])
def test_values_beyond_float16_are_an_error(rng: np.random.Generator, backend: str) -> None:
    h = fct.Transformation.random(D, D, 9, inner=30, side_info=False)
    x = rng.standard_normal((N, D), dtype=np.float32)
    x[[5, 11]] *= 1e6
    with pytest.raises(ValueError, match=r"out: .*float16 holds .*got larger ones in 2 of 37 rows, .* in row 5; use"):
        fct.transform_batch(x, None, h, out=np.zeros((N, 9), np.float16), precision="fp32", backend=backend)
    fct.transform_batch(x[:5], None, h, out=np.zeros((5, 9), np.float16), precision="fp32", backend=backend)


class SaysHalf(np.ndarray[Any, Any]):
    """float32 memory that says it is float16."""

    @property
    def dtype(self) -> Any:
        return np.dtype(np.float16)

    def view(self, *_: Any, **__: Any) -> Any:
        return self


class TorchSaysHalf(torch.Tensor):
    @property
    def dtype(self) -> Any:  # type: ignore[override]  # torch's is an attribute
        return torch.float16


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_an_array_that_lies_about_its_dtype_is_read_as_its_memory_is(rng: np.random.Generator, kind: str) -> None:
    x = rng.standard_normal((N, D), dtype=np.float32)
    h = fct.Transformation.random(D, D, 9, inner=30, side_info=False)
    liar: Any = x.view(SaysHalf) if kind == "numpy" else torch.from_numpy(x).as_subclass(TorchSaysHalf)
    rows = rows_of(liar, "x")
    assert rows.dtype == "float32"
    np.testing.assert_array_equal(rows.float32(), x)
    got = fct.transform_batch(liar, None, h, precision="fp32")
    np.testing.assert_array_equal(np.asarray(got), fct.transform_batch(x, None, h, precision="fp32"))

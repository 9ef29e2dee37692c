"""Rows whose lengths lie where a shadow may be misled."""

from __future__ import annotations

from typing import Any

import numpy as np

import fct
from fct.rows import rows_of

__all__ = ["HOSTILE", "SPECTRA", "hostile_rows", "narrow_gallery", "spectrum"]


def spectrum(rng: np.random.Generator, n: int, d: int, name: str) -> Any:
    """Rows whose lengths lie where the name says."""
    x = rng.standard_normal((n, d))
    turned = np.linalg.qr(rng.standard_normal((d, d)))[0]
    if name == "falling":
        x = (x * 0.9 ** np.arange(d)) @ turned
    elif name == "one direction":
        x = x[:, :1] * turned[:1]
    elif name == "tails of zero":
        x = np.concatenate([x[:, :16], np.zeros((n, d - 16))], axis=1) @ turned
    elif name == "outliers in the last direction":
        x = (x * 0.8 ** np.arange(d)) @ turned
        x[rng.integers(0, n, 9)] += 30 * turned[-1]
    elif name == "duplicates":
        x = (x * 0.9 ** np.arange(d))[rng.integers(0, 60, n)]
    elif name == "sorted by cluster":
        x = np.repeat(3 * rng.standard_normal((20, d)), -(-n // 20), axis=0)[:n] + 0.05 * x
    elif name == "far from the origin":
        x = (x * 0.8 ** np.arange(d)) @ turned + 300
    elif name == "nearly equal":
        x = 1 + 1e-6 * x
    elif name == "tiny":
        x *= 1e-9
    elif name == "mixed lengths":
        x *= 10.0 ** rng.uniform(-8, 8, (n, 1))
    elif name == "zeros":
        x[rng.integers(0, n, n // 2)] = 0
    else:
        assert name == "even"
    return x.astype(np.float32)


SPECTRA = (
    "falling", "one direction", "tails of zero", "outliers in the last direction", "duplicates", "sorted by cluster",
    "far from the origin", "nearly equal", "tiny", "mixed lengths", "zeros", "even",
)  # fmt: skip


def narrow_gallery(x: Any, dtype: str, path: Any) -> tuple[list[fct.PreparedGallery], Any]:
    """(a gallery of these rows in float16 or int8 that was prepared by half and grown, and the same as it was saved;
    the rows that they stand for, in float32)."""
    g: Any = x.astype(np.float16) if dtype == "float16" else np.clip(np.rint(x / 0.03), -127, 127).astype(np.int8)

    def scaled(values: Any) -> Any:
        return values if dtype == "float16" else fct.ScaledInt8(values, 0.03)

    half = len(x) // 2
    prepared = fct.prepare_gallery(scaled(g[:half])).append(scaled(g[half:]))
    prepared.save(path)
    return [prepared, fct.PreparedGallery.load(path, prepared.gallery)], rows_of(scaled(g), "g").float32()


HOSTILE = ("near", "equal", "zero", "huge", "tiny", "outlier", "clustered", "zero query")


def hostile_rows(case: str, rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    """((3, 24), (n, 24)) float32, n over 200: queries and a gallery by which a search's bounds may be misled."""
    q, g = rng.standard_normal((3, 24), dtype=np.float32), rng.standard_normal((n, 24), dtype=np.float32)
    if case == "near":
        g = np.float32(1) + g * np.float32(1e-5)
    elif case == "equal":
        g[:] = g[0]
    elif case == "zero":
        g[::2] = 0
    elif case == "huge":
        g[::7] *= np.float32(1e17)
    elif case == "tiny":
        g *= np.float32(1e-18)
        q *= np.float32(1e-18)
    elif case == "outlier":
        g[:, 3] *= np.float32(1e4)
    elif case == "clustered":
        g[100:200] = q[0] + g[100:200] * np.float32(1e-2)
    else:
        assert case == "zero query"
        q[:] = 0
    return q, g

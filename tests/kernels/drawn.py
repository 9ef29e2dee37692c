"""Rows for property tests: in every dtype and scale layout, at any byte, any distance apart."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from fct.rows import Rows, ScaledInt8, rows_of

# The scale of int8 rows: one for all, one per row, one per dimension.
DTYPES = ("float32", "float16", "bfloat16", "int8", "int8 row", "int8 column")


def placed(x: Any, start: int, gap: int) -> Any:
    """``x`` copied to ``start`` bytes past a page's begin, ``gap`` values between its rows."""
    n, d = x.shape
    size = x.itemsize
    memory = mmap.mmap(-1, start + n * (d + gap) * size)
    view: Any = np.ndarray((n, d), x.dtype, buffer=memory, offset=start, strides=((d + gap) * size, size))
    view[:] = x
    return view


def bfloat16_bits(x: Any) -> Any:
    """float32 to the bits of bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def scales(shape: tuple[int, int], dtype: str, rng: np.random.Generator, *, powers_of_two: bool = False) -> Any:
    """Of the layout that ``dtype`` names; None where it has none."""
    size = {"int8": (1, 1), "int8 row": (shape[0], 1), "int8 column": (1, shape[1])}.get(dtype)
    if size is None:
        return None
    drawn = 2.0 ** rng.integers(-2, 3, size) if powers_of_two else 0.01 + 0.02 * rng.random(size)
    return drawn.astype(np.float32)


def narrow(x: Any, dtype: str, scale: Any = None) -> Any:
    """float32 rows as numpy stores ``dtype``: bfloat16 as its bits."""
    if dtype == "bfloat16":
        return bfloat16_bits(x)
    if scale is not None:
        return np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
    return x.astype(dtype)


def wrapped(values: Any, dtype: str, scale: Any = None) -> Any:
    """What a caller would pass: an array, a torch tensor over the same memory for bfloat16, or ScaledInt8."""
    if dtype == "bfloat16":
        import torch

        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return values if scale is None else ScaledInt8(values, scale)


def drawn_rows(
    x: Any, dtype: str, rng: np.random.Generator, start: int, gap: int, *, powers_of_two: bool = False
) -> Rows:
    """``x`` as checked rows of ``dtype`` that lie at ``start``, ``gap`` apart."""
    scale = scales(x.shape, dtype, rng, powers_of_two=powers_of_two)
    return rows_of(wrapped(placed(narrow(x, dtype, scale), start, gap), dtype, scale), "x")

"""Rows of any array library: what comes in by DLPack goes out as that library's own."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fct
from fct.rows import _inner_contiguous, rows_of


class Lent:
    """An array of a library that numpy and torch know by DLPack alone."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __dlpack__(self, **how: Any) -> Any:
        return self.of.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self.of.__dlpack_device__()


@pytest.fixture
def lender(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    library = ModuleType("lender")
    library.from_dlpack = Lent  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lender", library)
    monkeypatch.setattr(Lent, "__module__", "lender.core.arrays")
    return library


def test_rows_of_another_library_come_back_as_its_own(lender: ModuleType) -> None:
    h = fct.Transformation.random(5, 5, 3, inner=8, side_info=False)
    x = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    rows = rows_of(Lent(x), "old")
    assert (rows.kind, rows.device, rows.dtype) == ("lender", "cpu", "float32")
    assert rows.address == x.ctypes.data  # the library's memory, no copy
    got = fct.transform_batch(Lent(x), None, h)  # type: ignore[call-overload]
    assert type(got) is Lent
    np.testing.assert_array_equal(np.from_dlpack(got), fct.transform_batch(x, None, h))


def test_bfloat16_rows_of_another_library_are_read_by_their_bits(lender: ModuleType) -> None:
    import torch

    x = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)
    rows = rows_of(Lent(x), "old")
    assert (rows.kind, rows.dtype) == ("lender", "bfloat16")
    np.testing.assert_array_equal(rows.float32(), np.arange(12, dtype=np.float32).reshape(4, 3))


def test_bfloat16_is_made_for_tensors() -> None:
    import torch

    h = fct.Transformation.random(5, 5, 3, inner=8, side_info=False)
    x = torch.ones(4, 5, dtype=torch.bfloat16)
    out = torch.zeros(4, 3, dtype=torch.bfloat16)
    assert fct.transform_batch(x, None, h, out=out) is out
    want = fct.transform_batch(x.float(), None, h)
    assert (want.dtype, want.device.type) == (torch.float32, "cpu")
    assert torch.equal(out, want.bfloat16())


@pytest.mark.parametrize("tensors", [False, True])
def test_one_row_alone_is_looked_at_like_many(tensors: bool) -> None:
    import torch

    x = np.ones((1, 5), np.float32)
    x[0, 4] = np.nan
    with pytest.raises(ValueError, match="old: expected finite values, got NaN or infinity in row 0"):
        rows_of(torch.from_numpy(x) if tensors else x, "old")


def test_tensors_are_copied_only_where_rows_are_not_whole() -> None:
    """A tensor's layout decides, whichever device it lies on: those of a GPU stay tensors."""
    import torch

    wide = torch.arange(40.0).reshape(4, 10)
    for taken in (wide, wide[:, 3:7], wide[::2], wide[1:2].expand(1, 10), wide[:, :1], wide[:1].t()[::3]):
        assert _inner_contiguous(taken) is taken
    for torn in (wide.t(), wide[:, ::2], wide[:1].expand(3, 10), wide[:1, :1].expand(3, 1)):
        tidy = _inner_contiguous(torn)
        assert tidy.is_contiguous()
        assert torch.equal(tidy, torn)

"""A gallery and what comes behind it, in one new array of the gallery's kind."""

from __future__ import annotations

import numpy as np

from fct.packed_int4 import PackedInt4
from fct.rows import Rows, ScaledInt8
from fct.types import RowsLike, Values

__all__ = ["together"]


def together(gallery: RowsLike, rows: RowsLike, old: Rows, new: Rows) -> RowsLike:
    """Both in one new array: codes as int8 with their scales, codes that have an offset as float32 rows."""
    if not _is_coded(gallery) and not _is_coded(rows):
        plain: RowsLike = _joined(gallery, rows)
        return plain
    values = _joined(old.values, new.values)
    if old.kind == "torch" and isinstance(values, np.ndarray):
        import torch

        values = torch.from_numpy(values)
    return values if new.scale is None else ScaledInt8(values, _joined_scales(old, new))


def _is_coded(x: RowsLike) -> bool:
    return isinstance(x, (ScaledInt8, PackedInt4)) or (isinstance(x, np.ndarray) and x.dtype.names is not None)


def _joined(a: Values, b: Values) -> Values:
    if isinstance(a, np.ndarray):
        return np.concatenate([a, b])
    import torch

    if a.device != b.device:
        raise ValueError(f"rows: expected an array on {a.device} like the gallery, got one on {b.device}")

    return torch.cat([a, b])


def _joined_scales(a: Rows, b: Rows) -> Values:
    """One scale for both where it is the same, else one for each row."""
    if a.scale.shape == b.scale.shape and len(a.scale) == 1 and bool((a.scale == b.scale).all()):
        return a.scale
    if a.scale.shape[1] > 1 or b.scale.shape[1] > 1:
        raise ValueError("rows: expected the gallery's own scale, since one of the two has a scale per dimension")
    if a.kind_is_numpy:
        return np.concatenate([np.broadcast_to(rows.scale, (rows.n, 1)) for rows in (a, b)])
    import torch

    return torch.cat([rows.scale.expand(rows.n, 1) for rows in (a, b)])

"""h, as written in the paper, with batch norm folded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["chain", "transform"]


def chain(x: Any, layers: Iterable[Any], dtype: Any = np.float64) -> Any:
    """relu(x @ weight.T + bias) for each layer (anything with weight, bias, relu) in turn."""
    x = np.asarray(x, dtype)
    for layer in layers:
        x = x @ np.asarray(layer.weight, dtype).T + np.asarray(layer.bias, dtype)
        if layer.relu:
            x = np.maximum(x, 0)
    return x


def transform(old: Any, side: Any, h: Any, dtype: Any = np.float64) -> Any:
    """(n, d_old), (n, d_side) -> (n, d_new); ``side=None`` puts the old embedding in its place."""
    side = old if side is None else side
    joined = np.concatenate([chain(old, h.old, dtype), chain(side, h.side, dtype)], axis=1)
    out = chain(joined, h.mixer, dtype)
    if h.normalise:
        norm = np.linalg.norm(out, axis=1, keepdims=True)
        out = np.divide(out, norm, out=np.zeros_like(out), where=norm > 0)
    return out

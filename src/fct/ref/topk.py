"""Exact search, in float64: every pair, one stable sort."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["scores", "topk"]


def scores(queries: Any, gallery: Any, metric: str = "l2") -> Any:
    """(n_q, n_g) float64: squared distances, inner products, or cosines (0 where a row is all zero)."""
    q, g = np.asarray(queries, np.float64), np.asarray(gallery, np.float64)
    if metric == "l2":
        return np.stack([((row - g) ** 2).sum(axis=1) for row in q]) if len(q) else np.empty((0, len(g)))
    if metric == "cosine":
        q, g = (x / np.where((n := np.linalg.norm(x, axis=1, keepdims=True)) > 0, n, 1) for x in (q, g))
    return q @ g.T


def topk(queries: Any, gallery: Any, k: int, metric: str = "l2", same_items: bool = False) -> tuple[Any, Any]:
    """((n, k) float32, (n, k) int64): sorted on the score rounded to float32; ties go to the lower index."""
    s = scores(queries, gallery, metric).astype(np.float32)
    cost = s if metric == "l2" else -s
    if same_items:
        cost[np.arange(len(s)), np.arange(len(s))] = np.inf
    order = np.argsort(cost, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(s, order, axis=1), order

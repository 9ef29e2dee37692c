"""The plain oracle of every op: a few readable lines each, in float64. Imports nothing of ours.

Tests and benchmarks hold every backend against this one copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["chain", "evaluate", "scores", "topk", "transform"]


Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Int64s: TypeAlias = npt.NDArray[np.int64]


class HasLayer(Protocol):
    """An affine layer, with a relu behind it or none."""

    @property
    def weight(self) -> npt.ArrayLike: ...
    @property
    def bias(self) -> npt.ArrayLike: ...
    @property
    def relu(self) -> bool: ...


class HasChains(Protocol):
    """What of a transformation makes its output."""

    @property
    def old(self) -> Iterable[HasLayer]: ...
    @property
    def side(self) -> Iterable[HasLayer]: ...
    @property
    def mixer(self) -> Iterable[HasLayer]: ...
    @property
    def skip(self) -> HasLayer | None: ...
    @property
    def uses_side_info(self) -> bool: ...
    @property
    def normalise(self) -> bool: ...
    @property
    def length(self) -> float: ...


def chain(x: npt.ArrayLike, layers: Iterable[HasLayer], dtype: npt.DTypeLike = np.float64) -> Floats:
    """relu(x @ weight.T + bias) for each layer (anything with weight, bias, relu) in turn."""
    out: Floats = np.asarray(x, dtype)
    for layer in layers:
        out = out @ np.asarray(layer.weight, dtype).T + np.asarray(layer.bias, dtype)
        if layer.relu:
            out = np.maximum(out, 0)
    return out


def transform(
    old: npt.ArrayLike, side: npt.ArrayLike | None, h: HasChains, dtype: npt.DTypeLike = np.float64
) -> Floats:
    """(n, d_old), (n, d_side) -> (n, d_new); ``side=None`` puts the old embedding in its place."""
    side = old if side is None else side
    joined = np.concatenate([chain(old, h.old, dtype), chain(side, h.side, dtype)], axis=1)
    out = chain(joined, h.mixer, dtype)
    if h.skip is not None:
        out = out + chain(np.concatenate([old, side], axis=1) if h.uses_side_info else old, [h.skip], dtype)
    if h.normalise:
        norm = np.linalg.norm(out, axis=1, keepdims=True)
        out = h.length * np.divide(out, norm, out=np.zeros_like(out), where=norm > 0)
    return out


def scores(queries: npt.ArrayLike, gallery: npt.ArrayLike, metric: str = "l2") -> Floats:
    """(n_q, n_g) float64: squared distances, inner products, or cosines (0 where a row is all zero)."""
    q, g = np.asarray(queries, np.float64), np.asarray(gallery, np.float64)
    if metric == "l2":
        return np.stack([((row - g) ** 2).sum(axis=1) for row in q]) if len(q) else np.empty((0, len(g)))
    if metric == "cosine":
        q, g = (x / np.where((n := np.linalg.norm(x, axis=1, keepdims=True)) > 0, n, 1) for x in (q, g))
    products: Floats = q @ g.T
    return products


def topk(
    queries: npt.ArrayLike, gallery: npt.ArrayLike, k: int, metric: str = "l2", same_items: bool = False
) -> tuple[Floats, Int64s]:
    """((n, k) float32, (n, k) int64): sorted on the score rounded to float32; ties go to the lower index."""
    s = scores(queries, gallery, metric).astype(np.float32)
    cost = s if metric == "l2" else -s
    if same_items:
        cost[np.arange(len(s)), np.arange(len(s))] = np.inf
    order = np.argsort(cost, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(s, order, axis=1), order


def evaluate(
    queries: npt.ArrayLike,
    gallery: npt.ArrayLike,
    query_labels: npt.ArrayLike,
    gallery_labels: npt.ArrayLike,
    metric: str = "l2",
    same_items: bool = False,
) -> tuple[Int64s, Floats]:
    """Per query: how many rows stand before its first match (-1: no match), and its average precision (NaN).

    CMC top-k is the share of first < k. Rows stand in order of score rounded to float32, ties by lower index; in
    the average precision tied rows count as retrieved together, as scikit-learn's average_precision_score has it.
    """
    cost = scores(queries, gallery, metric).astype(np.float32) * (1 if metric == "l2" else -1)
    first, ap = np.full(len(cost), -1), np.full(len(cost), np.nan)
    here = np.asarray(gallery_labels)
    for i, (row, label) in enumerate(zip(cost, np.asarray(query_labels), strict=True)):
        match = here == label
        if same_items:
            row, match = np.delete(row, i), np.delete(match, i)
        if match.any():
            first[i] = np.argmax(match[np.argsort(row, kind="stable")])
            ap[i] = np.mean([match[row <= c].mean() for c in row[match]])
    return first, ap

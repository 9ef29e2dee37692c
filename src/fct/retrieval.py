"""topk: the exact nearest rows of a gallery."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fct.arrays import Rows, rows_of
from fct.ops.base import check_precision
from fct.ops.topk import topk_blocked
from fct.spaces import EmbeddingSpace, check_metric

__all__ = ["TopK", "topk"]


class TopK(NamedTuple):
    """The k nearest rows of each query, nearest first.

    distances: (n, k) float32; squared l2 ascending, or inner product / cosine descending.
    indices: (n, k) int64, rows of the gallery. Among equal distances the lower index comes first.
    """

    distances: Any
    indices: Any


def check_pair(
    queries: Any,
    gallery: Any,
    metric: str,
    same_items: bool,
    query_space: EmbeddingSpace | None,
    gallery_space: EmbeddingSpace | None,
) -> tuple[Rows, Rows]:
    """Both sides as checked rows of one length, one device and, where the spaces are given, one space."""
    check_metric(metric)
    if query_space is not None and gallery_space is not None:
        gallery_space.require_same(query_space, "queries")
    g = rows_of(gallery, "gallery", d=gallery_space.dim if gallery_space else None, d_why="to match gallery_space")
    q = rows_of(queries, "queries", d=g.d, d_why="to match the gallery")
    if q.device != g.device:
        raise ValueError(f"queries: expected an array on {g.device} like the gallery, got one on {q.device}")
    if same_items and q.n != g.n:
        raise ValueError(
            f"queries: expected ({g.n}, {g.d}), the gallery's own rows, for same_items=True, got ({q.n}, {q.d})"
        )
    return q, g


def topk(
    queries: Any,
    gallery: Any,
    k: int,
    *,
    metric: str = "l2",
    precision: str = "auto",
    same_items: bool = False,
    query_space: EmbeddingSpace | None = None,
    gallery_space: EmbeddingSpace | None = None,
) -> TopK:
    """The exact k nearest gallery rows of each query.

    Args:
        queries: (n, d) float32, float16, bfloat16 or :class:`fct.ScaledInt8`; numpy, torch or DLPack.
        gallery: (m, d), likewise, on the same device.
        k: how many, 1 <= k <= m (m - 1 with ``same_items``).
        metric: "l2" (squared, ascending), "ip" or "cosine" (descending).
        precision: which shadow of the gallery is scanned; the answer is the same for every value.
        same_items: the queries are the gallery's own rows, in order: row i is left out of query i's answer.
        query_space, gallery_space: where both are given, they must be one space.

    Returns:
        TopK(distances, indices) of the queries' kind. The order is exact: by score (summed in float64, rounded to
        float32 once), ties by lower index.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came. SpaceMismatchError: two models' vectors.

    Example:
        >>> import numpy as np, fct
        >>> fct.topk(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), 2).indices.tolist()
        [[0, 1], [1, 0], [2, 0]]
    """
    check_precision(precision)
    q, g = check_pair(queries, gallery, metric, same_items, query_space, gallery_space)
    check_k(k, g.n, same_items)
    if q.n == 0:
        return _as_kind(np.empty((0, k), np.float32), np.empty((0, k), np.int64), q)
    return _as_kind(*topk_blocked(q, g, int(k), metric, same_items), q)


def check_k(k: int, n: int, same_items: bool) -> None:
    most = n - 1 if same_items else n
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= most:
        without = ", without the query's own" if same_items else ""
        raise ValueError(f"k: expected 1 to {most}, the rows of the gallery{without}, got {k!r}")


def _as_kind(distances: Any, indices: Any, like: Rows) -> TopK:
    if like.kind == "numpy":
        return TopK(distances, indices)
    import torch

    from fct.arrays import _as_kind as hand_over

    tensors = (torch.as_tensor(x, device=like.device) for x in (distances, indices))
    return TopK(*(hand_over(t, like.kind) for t in tensors))

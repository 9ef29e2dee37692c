"""CMC and mean average precision, one query at a time, from a full matrix of scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from fct.ref.topk import scores

__all__ = ["evaluate"]


def evaluate(
    queries: Any,
    gallery: Any,
    query_labels: Any,
    gallery_labels: Any,
    metric: str = "l2",
    same_items: bool = False,
) -> tuple[Any, Any]:
    """Per query: how many rows stand before its first match (-1: no match), and its average precision (NaN).

    CMC top-k is the share of first < k. Rows stand in order of score rounded to float32, ties by lower index; in
    the average precision tied rows count as retrieved together, as scikit-learn's average_precision_score has it.
    """
    cost = scores(queries, gallery, metric).astype(np.float32) * (1 if metric == "l2" else -1)
    first, ap = np.full(len(cost), -1), np.full(len(cost), np.nan)
    for i, row in enumerate(cost):
        match = np.asarray(gallery_labels) == query_labels[i]
        if same_items:
            row, match = np.delete(row, i), np.delete(match, i)
        if match.any():
            first[i] = np.argmax(match[np.argsort(row, kind="stable")])
            ap[i] = np.mean([match[row <= c].mean() for c in row[match]])
    return first, ap

"""What pairs can tell: the old space's ceiling by a k-NN oracle, and whether they look like the gallery."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fct.checks import check_number
from fct.rows import rows_of
from fct.search import topk

__all__ = ["ONLY_PAIRS", "neighbour_means", "recalls_at_10", "unlike_pairs"]

ONLY_PAIRS = "Pairs of items rank maps well and decide badly: what counts is what queries find (fct judge)."

Floats = npt.NDArray[np.float32]


def recalls_at_10(queries: Floats, gallery: Floats, truth: Floats, *, gallery_metric: str, metric: str) -> Floats:
    """(n,) share of each row's ten nearest in the new space (fewer where there are fewer) that a ranking finds.

    queries, gallery: (n, d) that are ranked by gallery_metric; truth: (n, d_new), ranked by metric. Row i is never
    its own neighbour.
    """
    k = min(10, len(truth) - 1)
    found = topk(queries, gallery, k, metric=gallery_metric, same_items=True, progress=False).indices
    wanted = topk(truth, truth, k, metric=metric, same_items=True, progress=False).indices
    return np.asarray((found[:, :, None] == wanted[:, None, :]).any(axis=2).mean(axis=1), np.float32)


def neighbour_means(known: Floats, target: Floats, asked: Floats, k: int) -> Floats:
    """(n, d_new): the mean target of each asked row's k nearest known rows: k-NN regression."""
    nearest = topk(asked, known, min(k, len(known)), progress=False).indices
    total = np.zeros((len(asked), target.shape[1]), np.float32)
    for column in nearest.T:
        total += target[column]
    return np.asarray(total / nearest.shape[1], np.float32)


def unlike_pairs(pairs: Floats, gallery: Floats, *, percentile: float = 99.0) -> float:
    """Share of gallery rows whose nearest pair is further than ``percentile`` % of the pairs are from theirs.

    About 0.01 where the pairs are drawn from the gallery, near 1 where they are something else.

    Args:
        pairs: (n, d_old), at least two. gallery: (m, d_old), a sample of the gallery's old vectors.

    Raises:
        ValueError: other dimensions, fewer than two pairs.

    Examples:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
        >>> unlike_pairs(x, x + 100)
        1.0
    """
    if not 0 < check_number(percentile, "percentile", 0) < 100:
        raise ValueError(f"percentile: expected a number between 0 and 100, got {percentile!r}")
    known = rows_of(pairs, "pairs", allow_empty=False).float32()
    rows = rows_of(gallery, "gallery", d=known.shape[1], allow_empty=False).float32()
    if len(known) < 2:
        raise ValueError(f"pairs: expected at least two rows, got {len(known)}")
    own = topk(known, known, 1, same_items=True, progress=False).distances
    far = topk(rows, known, 1, progress=False).distances
    return float(np.mean(far[:, 0] > np.percentile(own, percentile)))

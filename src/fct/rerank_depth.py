"""How much ranking the nearest mapped rows by their true vectors gives back, by how many are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fct.artifact.transformation import Transformation
from fct.checks import check_items, check_kind, check_whole
from fct.rows import rows_of
from fct.search import topk
from fct.transform import transform_batch
from fct.types import RowsLike

__all__ = ["RerankCurve", "rerank_curve"]


@dataclass(frozen=True, slots=True)
class RerankCurve:
    """What :func:`rerank_curve` measured.

    recalls: depth -> recall@k against the new model alone, in [0, 1]; at depth k it is that of the mapped gallery.
    rows, k, metric: how it was measured.
    """

    recalls: dict[int, float]
    rows: int
    k: int
    metric: str

    def __str__(self) -> str:
        head = f"{self.rows:,} rows, recall@{self.k} by the depth that is ranked again, {self.metric}"
        return "\n".join([head, *(f"{depth:>6,}: {recall:.3f}" for depth, recall in self.recalls.items())])


def rerank_curve(
    old: RowsLike,
    side_info: RowsLike | None,
    new: RowsLike,
    transformation: Transformation,
    *,
    depths: Sequence[int] = (10, 20, 50, 100, 200, 500),
    k: int = 10,
    progress: bool = True,
) -> RerankCurve:
    """The recall of a cascade on held-out pairs: every item asks the others, mapped rows answer, and the nearest
    ``depth`` are ranked by their true vectors.

    A larger gallery needs a larger depth for the same recall: measure on as many pairs as there are.

    Args:
        old: (n, d_old). side_info: (n, d_side), or None where h uses none. new: (n, d_new), the same items.
        transformation: h, not fitted on these pairs. depths: how many are ranked again; those of n and more are left
            out.
        k: of recall@k. progress: a bar on stderr.

    Raises:
        ValueError: arrays that do not fit, k or a depth below 1, fewer than k + 2 pairs.

    Examples:
        >>> import fct, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> old, new = (rng.standard_normal((60, d), dtype=np.float32) for d in (8, 4))
        >>> h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
        >>> list(fct.rerank_curve(old, None, new, h, depths=(10, 59), progress=False).recalls.values())[-1]
        1.0
    """
    check_kind(transformation, "transformation", Transformation, "an fct.Transformation")
    check_whole(k, "k", 1)
    rows = rows_of(new, "new", d=transformation.d_new, d_why="to match the transformation").float32()
    if len(rows) < k + 2:
        raise ValueError(f"new: expected at least k + 2 = {k + 2} pairs, got {len(rows)}")
    asked = [check_whole(depth, "depths", 1) for depth in check_items(depths, "depths", "whole numbers")]
    wanted = sorted({k, *(depth for depth in asked if k <= depth < len(rows))})
    mapped = np.asarray(transform_batch(old, side_info, transformation, progress=progress))
    metric = transformation.new_space.metric
    truth = np.asarray(topk(rows, rows, k, metric=metric, same_items=True, progress=progress).indices)
    near = np.asarray(topk(rows, mapped, wanted[-1], metric=metric, same_items=True, progress=progress).indices)
    places = np.full(truth.shape, len(rows))
    for i, (want, found) in enumerate(zip(truth, near, strict=True)):
        place = {row: at for at, row in enumerate(found.tolist())}
        places[i] = [place.get(row, len(rows)) for row in want.tolist()]
    return RerankCurve({depth: float((places < depth).mean()) for depth in wanted}, len(rows), k, metric)

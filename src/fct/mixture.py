"""Mapped and true rows of the same items in one gallery, and what a search over it finds: for measuring alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fct.checks import check_seed, check_whole
from fct.metrics import recall_at_k
from fct.mixed_correction import MixedCorrection, last_coordinate
from fct.rows import rows_of
from fct.search import TopK, topk
from fct.spaces import check_metric
from fct.types import Array, Bools, Floats, Indices, RowsLike

if TYPE_CHECKING:
    import torch

__all__ = ["Mixture", "host", "mixtures"]


class Mixture:
    """Items by the new model and by h, and how a search over a mixture of both does."""

    def __init__(self, new: RowsLike, mapped: RowsLike, metric: str, k: int, seed: int) -> None:
        rows = rows_of(new, "new")
        if rows.n < 2:
            raise ValueError(f"new: expected at least 2 rows, got {rows.n}")
        check_whole(k, "k", 1)
        check_seed(seed)
        self.metric = check_metric(metric)
        self.new = host(rows.float32())
        self.mapped = host(rows_of(mapped, "mapped", n=rows.n, d=rows.d, d_why="to match new").float32())
        self.k = max(1, min(k, rows.n - 1))
        self.order = np.random.default_rng([seed, 19]).permutation(rows.n)
        self.true_distances, self.reference = self._nearest(self.new, self.new)

    def _nearest(self, queries: Floats, gallery: Floats) -> TopK:
        same = len(gallery) > 1
        found = topk(queries, gallery, self.k, metric=self.metric, same_items=same, progress=False)
        return TopK(np.asarray(found.distances), np.asarray(found.indices))

    def mapped_distances(self) -> Floats:
        """(n, k): of the nearest where every row is mapped."""
        return self._nearest(self.new, self.mapped).distances

    def gallery(self, share: float, correction: MixedCorrection | None) -> tuple[Floats, Bools]:
        """(rows, which are true)."""
        true = np.zeros(len(self.new), bool)
        true[self.order[: round(share * len(self.new))]] = True
        # Cosine ignores length, so the coordinate is there; under l2 and ip the queries' zeros make it vanish.
        rows = self.mapped if correction is None else correction.apply(self.mapped)
        rows = np.where(true[:, None], self.new, rows)
        if correction is not None and correction.kind == "coordinate":
            rows = np.concatenate([rows, last_coordinate(self.mapped, true, correction.value)], axis=1)
        return np.ascontiguousarray(rows, np.float32), true

    def queries(self, correction: MixedCorrection | None) -> Floats:
        if correction is None or correction.kind != "coordinate":
            return self.new
        return np.pad(self.new, ((0, 0), (0, 1)))

    def recall(self, share: float, correction: MixedCorrection | None) -> tuple[float, float]:
        """(recall@k, share of true rows among what is found)."""
        rows, true = self.gallery(share, correction)
        found = self._nearest(self.queries(correction), rows).indices
        return recall_at_k(found, self.reference, self.k), float(true[found].mean())

    def recalls(self, share: float, correction: MixedCorrection | None) -> Floats:
        """(n,) each query's recall@k."""
        rows, _ = self.gallery(share, correction)
        found = self._nearest(self.queries(correction), rows).indices
        hits: Floats = (found[:, :, None] == self.reference[:, None, :]).any(axis=2).mean(axis=1)
        return hits


def mixtures(
    new: Floats, mapped: Floats, metric: str, k: int, seed: int, parts: Sequence[Indices] | None = None
) -> list[Mixture]:
    """One gallery of all rows; or one for each of ``parts``, whose items alone meet each other.

    Rows of a cross-fit have to stay apart: what maps one part has learned from the others, which as queries would find
    its rows too near.
    """
    if parts is None:
        return [Mixture(new, mapped, metric, k, seed)]
    k = min(k, min(len(part) for part in parts) - 1)
    return [Mixture(new[part], mapped[part], metric, k, seed) for part in parts]


def host(x: Array | torch.Tensor) -> Floats:
    """The rows where numpy reads them."""
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()

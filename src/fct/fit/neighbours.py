"""How well mapped rows stand for the true ones: recall@k among held-out rows, each asking in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fct.metrics import recall_at_k
from fct.search import topk
from fct.types import Floats, Indices

__all__ = ["NeighbourTest"]


@dataclass(frozen=True, eq=False, slots=True)
class NeighbourTest:
    """Held-out items by the new model, and each one's true neighbours among the others.

    new: (n, d_new) float32. metric: how the new space compares. normalise, length: what h does to its output.
    """

    new: Floats
    metric: str
    normalise: bool
    length: float
    reference: Indices

    @classmethod
    def of(cls, new: Floats, metric: str, *, normalise: bool, length: float = 1.0, k: int = 10) -> NeighbourTest:
        depth = max(1, min(k, len(new) - 1))
        found = topk(new, new, depth, metric=metric, same_items=len(new) > 1, progress=False)
        return cls(new, metric, normalise, length, np.asarray(found.indices))

    @property
    def k(self) -> int:
        return int(self.reference.shape[1])

    def finished(self, raw: Floats) -> Floats:
        """What h would give for its last layer's output ``raw``."""
        if not self.normalise:
            return raw
        norms = np.linalg.norm(raw, axis=1, keepdims=True)
        unit: Floats = np.divide(raw, norms, out=np.zeros_like(raw), where=norms > 0)
        rows: Floats = unit * np.float32(self.length)
        return rows

    def recall(self, gallery: Floats) -> float:
        """Share of the true nearest that a search over ``gallery`` (row for row the same items) finds."""
        found = topk(self.new, gallery, self.k, metric=self.metric, same_items=len(self.new) > 1, progress=False)
        return recall_at_k(np.asarray(found.indices), self.reference, self.k)

"""The last stage: every query model against its gallery, as the rows of one table."""

from __future__ import annotations

from dataclasses import dataclass

from fct.metrics import RetrievalMetrics, evaluate, recall_at_k
from fct.report import Row
from fct.search import topk
from fct.types import Array, Floats, Indices

__all__ = ["BCT_NEW", "BCT_OLD", "NEW", "OLD", "SECONDS", "WITH", "WITHOUT", "Measured", "Spent", "Vectors", "measure"]

WITH, WITHOUT = "new/old, h with side-info", "new/old, h without side-info"
BCT_OLD, BCT_NEW = "BCT new/old", "BCT new/new"
OLD, NEW = "old/old", "new/new"
SECONDS = (
    "from the day the new training data is there to a searchable gallery: training the model that asks, embedding the "
    "pairs, fitting h, and rewriting the gallery, by h from stored vectors or by a network from images"
)


@dataclass(frozen=True, slots=True)
class Vectors:
    """(n, d) float32 queries and (m, d) float32 gallery rows of one model."""

    queries: Floats
    gallery: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds that a way into the new space takes.

    new, bct: training the models. pairs, pairs_without: embedding h's training images, side-information included or
    not. fit, fit_without: fitting h. rewrite, rewrite_without: the gallery by h. again_new, again_bct: the gallery's
    images by a network.
    """

    new: float
    bct: float
    pairs: float
    pairs_without: float
    fit: float
    fit_without: float
    rewrite: float
    rewrite_without: float
    again_new: float
    again_bct: float

    def by_row(self) -> dict[str, float | None]:
        return {
            OLD: None,
            BCT_OLD: self.bct,
            BCT_NEW: self.bct + self.again_bct,
            WITHOUT: self.new + self.pairs_without + self.fit_without + self.rewrite_without,
            WITH: self.new + self.pairs + self.fit + self.rewrite,
            NEW: self.new + self.again_new,
        }


@dataclass(frozen=True, slots=True)
class Measured:
    """rows of the table; by row: (n, k) indices of what was found, and the metrics."""

    rows: tuple[Row, ...]
    found: dict[str, Indices]
    metrics: dict[str, RetrievalMetrics]


def measure(
    old: Vectors,
    bct: Vectors,
    new: Vectors,
    upgraded: Floats,
    upgraded_without: Floats,
    spent: Spent,
    query_labels: Array,
    gallery_labels: Array | None,
    *,
    k: int = 10,
    progress: bool = True,
) -> Measured:
    """One row each for what is there, what FCT gives, and its rivals.

    Args:
        old, bct, new: of the three models.
        upgraded, upgraded_without: the old gallery in the new space, by h with and without side-information.
        query_labels, gallery_labels: classes; None where every item asks for all the others.
        k: of recall, against what the new model finds among its own embeddings.
    """
    systems = {
        OLD: old,
        BCT_OLD: Vectors(bct.queries, old.gallery),
        BCT_NEW: bct,
        WITHOUT: Vectors(new.queries, upgraded_without),
        WITH: Vectors(new.queries, upgraded),
        NEW: new,
    }
    same = gallery_labels is None
    found = {
        name: topk(side.queries, side.gallery, k, same_items=same, progress=progress).indices
        for name, side in systems.items()
    }
    metrics = {
        name: evaluate(
            side.queries, side.gallery, query_labels, gallery_labels, same_items=same, bootstrap=0, progress=progress
        )
        for name, side in systems.items()
    }
    seconds = spent.by_row()
    rows = tuple(
        Row(name, m.cmc1, m.cmc5, m.map, recall_at_k(found[name], found[NEW], k), seconds[name])
        for name, m in metrics.items()
    )
    return Measured(rows, found, metrics)

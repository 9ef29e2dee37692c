"""Galleries in which mapped rows and true rows of the new model stand side by side.

A mapped row is a mean over all that its item may be, and bringing it to unit length inflates an uncertain row's
similarity, so mapped rows crowd true ones out. One number mends it: mapped rows stored a little shorter under inner
product, a little longer under L2. Nothing changes while every row is mapped, and every store can do it but one that
brings rows to unit length itself (cosine): there one more coordinate does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fct.artifact.transformation import Transformation
from fct.checks import (
    check_items,
    check_kind,
    check_seed,
    check_share,
    check_whole,
)
from fct.metrics import evaluate
from fct.mixed_choice import MIXED_SHARES, choose_correction
from fct.mixed_correction import (
    MixedCorrection,
    add_coordinate,
    correction_of,
    mixed_transformation,
)
from fct.mixture import Mixture, host, mixtures
from fct.rows import check_labels, rows_of
from fct.spaces import check_metric
from fct.transform import transform_batch
from fct.types import Floats, Indices, JsonDict, LabelsLike, RowsLike

__all__ = [
    "MIXED_SHARES",
    "MixedCorrection",
    "MixedPoint",
    "MixedReport",
    "add_coordinate",
    "choose_correction",
    "correction_of",
    "evaluate_mixed",
    "mixed_curve",
    "mixed_transformation",
]


@dataclass(frozen=True, slots=True)
class MixedPoint:
    """One share of true rows. Recalls are recall@k against the gallery of true rows alone, in [0, 1].

    found_true, corrected_found_true: share of true rows among what is found; true_share is what it should be.
    map, corrected_map, cmc1, corrected_cmc1: with labels; else None.
    """

    true_share: float
    recall: float
    corrected_recall: float
    found_true: float
    corrected_found_true: float
    map: float | None = None
    corrected_map: float | None = None
    cmc1: float | None = None
    corrected_cmc1: float | None = None


@dataclass(frozen=True, slots=True)
class MixedReport:
    """What :func:`evaluate_mixed` measured.

    correction: what was done to mapped rows. mapped_recall: recall@k with every row mapped, which no correction
    changes. points: one for each share of true rows. rows, k, metric: how it was measured.
    """

    correction: MixedCorrection
    mapped_recall: float
    points: tuple[MixedPoint, ...]
    rows: int
    k: int
    metric: str

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def loss(self) -> float:
        """The most recall that any share loses without the correction."""
        return max(p.corrected_recall - p.recall for p in self.points)

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows, recall@{self.k}, {self.metric}, mapped rows with {self.correction.kind} "
                 f"{self.correction.value:g}; all mapped {self.mapped_recall:.3f}"]  # fmt: skip
        lines += [
            f"{p.true_share:4.0%} true: {p.recall:.3f} as they are, {p.corrected_recall:.3f} corrected "
            f"(true rows {p.found_true:.0%} and {p.corrected_found_true:.0%} of what is found)"
            for p in self.points
        ]
        return "\n".join(lines)


def _shares(shares: Sequence[float]) -> list[float]:
    given = check_items(shares, "shares", "shares of the gallery that are true rows")
    if not given:
        raise ValueError("shares: expected at least one share of the gallery, got none")
    return [check_share(share, "shares", ends=True) for share in given]


def mixed_curve(
    new: Floats,
    mapped: Floats,
    metric: str,
    correction: MixedCorrection,
    *,
    shares: Sequence[float] = MIXED_SHARES,
    labels: LabelsLike | None = None,
    seed: int = 0,
    k: int = 10,
    parts: Sequence[Indices] | None = None,
) -> MixedReport:
    """:func:`evaluate_mixed` on arrays: (n, d) float32 numpy rows of the same items by the new model and by h.

    The correction is taken as it is for a gallery of n rows. parts: of a cross-fit, as :func:`choose_correction` has
    them; the gallery then is as large as the smallest of them, and the figures are means over all queries.
    """
    check_kind(correction, "correction", MixedCorrection, "fct.mixed_gallery.MixedCorrection")
    shares = _shares(shares)
    galleries = mixtures(new, mapped, metric, k, seed, parts)
    rows = min(len(gallery.new) for gallery in galleries)
    correction = correction.at(rows)
    points = []
    for share in shares:
        plain, found = _mean(galleries, share, None)
        better, found_better = _mean(galleries, share, correction)
        figures = {} if labels is None else _by_labels(galleries[0], share, correction, labels)
        points.append(MixedPoint(float(share), plain, better, found, found_better, **figures))
    return MixedReport(correction, _mean(galleries, 0.0, None)[0], tuple(points), rows, galleries[0].k, metric)


def _mean(galleries: Sequence[Mixture], share: float, how: MixedCorrection | None) -> tuple[float, float]:
    """(recall@k, share of true rows among what is found) over all queries."""
    figures = np.array([gallery.recall(share, how) for gallery in galleries])
    recall, found = np.average(figures, axis=0, weights=[len(gallery.new) for gallery in galleries])
    return float(recall), float(found)


def _by_labels(mixture: Mixture, share: float, correction: MixedCorrection, labels: LabelsLike) -> dict[str, float]:
    figures: dict[str, float] = {}
    for prefix, how in (("", None), ("corrected_", correction)):
        rows, _ = mixture.gallery(share, how)
        result = evaluate(
            mixture.queries(how), rows, labels, metric=mixture.metric, same_items=True, bootstrap=0, progress=False
        )
        figures |= {f"{prefix}map": result.map, f"{prefix}cmc1": result.cmc1}
    return figures


def evaluate_mixed(
    old: RowsLike,
    side_info: RowsLike | None,
    new: RowsLike,
    transformation: Transformation,
    *,
    shares: Sequence[float] = MIXED_SHARES,
    correction: MixedCorrection | None = None,
    labels: LabelsLike | None = None,
    metric: str | None = None,
    k: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> MixedReport:
    """How a gallery does that is partly mapped by h and partly re-embedded, with and without the correction.

    Every item asks with its new embedding; at each share a random part of the gallery (its own row left out) are true
    rows and the others mapped ones.

    Args:
        old, side_info: (n, d_old) and (n, d_side) or None: items that h was not fitted on.
        new: (n, d_new) their new embeddings.
        transformation: h.
        shares: of true rows, each in [0, 1].
        correction: None: the one stored in h, as it is for so many rows; where h has none, one chosen on these very
            rows, which flatters it a little.
        labels: (n,) classes; then mAP and CMC top-1 too.
        metric: None: the new space's.
        k: of recall@k. seed: of the random order.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.

    Examples:
        >>> import numpy as np, fct
        >>> x = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
        >>> h = fct.Transformation.random(4, 4, 4, inner=8, side_info=False)
        >>> len(fct.evaluate_mixed(x, None, x, h, shares=[0.5], progress=False).points)
        1
    """
    check_seed(seed)
    check_whole(k, "k", 1)
    shares = _shares(shares)
    mapped = transform_batch(old, side_info, transformation, progress=progress)
    rows = rows_of(mapped, "old")
    why = "to match the transformation"
    true = rows_of(new, "new", d=transformation.d_new, d_why=why, n=rows.n, n_why="to match old")
    if rows.n < 2:
        raise ValueError(f"old: expected at least 2 rows, got {rows.n}")
    values, truth = (host(x.float32()) for x in (rows, true))
    classes = None if labels is None else check_labels(labels, "labels", rows.n)
    how = transformation.new_space.metric if metric is None else check_metric(metric)
    if correction is not None:
        check_kind(correction, "correction", MixedCorrection, "fct.mixed_gallery.MixedCorrection")
    if correction is None:
        kind = "coordinate" if how == "cosine" else "length"
        try:
            correction = correction_of(transformation)
        except ValueError:
            correction = None
        if correction is None or correction.kind != kind:
            correction = choose_correction(truth, values, how, seed=seed, k=k)
    return mixed_curve(truth, values, how, correction, shares=shares, labels=classes, seed=seed, k=k)

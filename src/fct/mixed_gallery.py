"""Galleries in which mapped rows and true rows of the new model stand side by side.

A mapped row is a mean over all that its item may be, and bringing it to unit length inflates an uncertain row's
similarity, so mapped rows crowd true ones out. One number mends it: mapped rows stored a little shorter under inner
product, a little longer under L2. Nothing changes while every row is mapped, and every store can do it but one that
brings rows to unit length itself (cosine): there one more coordinate does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fct.artifact.transformation import Transformation
from fct.checks import (
    check_items,
    check_kind,
    check_seed,
    check_share,
    check_whole,
)
from fct.metrics import evaluate, recall_at_k
from fct.mixed_correction import (
    MixedCorrection,
    add_coordinate,
    correction_of,
    last_coordinate,
    mixed_transformation,
)
from fct.rows import check_labels, rows_of
from fct.search import TopK, topk
from fct.spaces import check_metric
from fct.transform import transform_batch
from fct.types import Array, Bools, Floats, JsonDict, LabelsLike, RowsLike

if TYPE_CHECKING:
    import torch

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

MIXED_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
_CHOSEN_ON = (0.25, 0.5, 0.75)
_RESAMPLES = 40  # for the standard error of what a larger gallery asks for
_SHORTER = (1.0, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5)


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
    return [check_share(share, "shares", ends=True) for share in given]


class _Mixture:
    """Items by the new model and by h, and how a search over a mixture of both does."""

    def __init__(self, new: RowsLike, mapped: RowsLike, metric: str, k: int, seed: int) -> None:
        rows = rows_of(new, "new")
        if rows.n < 2:
            raise ValueError(f"new: expected at least 2 rows, got {rows.n}")
        check_whole(k, "k", 1)
        check_seed(seed)
        self.metric = check_metric(metric)
        self.new = _host(rows.float32())
        self.mapped = _host(rows_of(mapped, "mapped", n=rows.n, d=rows.d, d_why="to match new").float32())
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

    def recalls(self, correction: MixedCorrection) -> Floats:
        """(n,) each query's recall@k, the mean over a quarter, a half and three quarters of true rows."""
        total = np.zeros(len(self.new))
        for share in _CHOSEN_ON:
            rows, _ = self.gallery(share, correction)
            found = self._nearest(self.queries(correction), rows).indices
            total += (found[:, :, None] == self.reference[:, None, :]).any(axis=2).mean(axis=1)
        return total / len(_CHOSEN_ON)


def choose_correction(new: Floats, mapped: Floats, metric: str, *, seed: int = 0, k: int = 10) -> MixedCorrection:
    """The mildest correction within a standard error of the best recall@k, the mean over a quarter, a half and three
    quarters of true rows; and how it fades in larger galleries.

    Args:
        new: (n, d) float32 numpy, held-out items by the new model. mapped: (n, d), the same items by h.
        metric: "ip" (mapped rows get shorter), "l2" (shorter or longer, whichever is better) or "cosine" (one
            coordinate more).
    """
    mixture = _Mixture(new, mapped, metric, k, seed)
    kind = "coordinate" if metric == "cosine" else "length"
    values = list(_SHORTER)
    if metric == "l2":
        values = [1 / v for v in values[:0:-1]] + values
    recalls = {v: mixture.recalls(MixedCorrection(kind, v)) for v in values}
    best = max(recalls.values(), key=lambda recall: float(recall.mean()))

    def enough(recall: Floats) -> bool:
        lost = best - recall
        return bool(lost.mean() <= max(0.002 * best.mean(), lost.std() / np.sqrt(len(lost))))

    value = float(min((v for v, recall in recalls.items() if enough(recall)), key=lambda v: abs(np.log(v))))
    return MixedCorrection(kind, value, len(new), _fade(mixture, value, seed))


def _fade(mixture: _Mixture, value: float, seed: int) -> float:
    """How much milder a correction has to be where the gallery is e times as large.

    The i-th nearest of n rows is about as near as the k-th of n k / i. So how the value that brings the i-th mapped row
    as near as the i-th true one changes with i tells what a larger gallery asks for: the slope over i = 2 ... k, less
    its standard error, so that chance does not weaken a correction.
    """
    ranks = np.arange(2, mixture.k + 1)
    if len(ranks) < 3 or value == 1.0:
        return 0.0
    true, mapped = (x[:, 1:].astype(np.float64) for x in (mixture.true_distances, mixture.mapped_distances()))
    sizes = -np.log(ranks)
    sizes -= sizes.mean()
    queries, rows = (float(np.median((x.astype(np.float64) ** 2).sum(axis=1))) for x in (mixture.new, mixture.mapped))

    def slope(chosen: Any) -> float:
        near, other = (np.median(x[chosen], axis=0) for x in (true, mapped))
        if mixture.metric == "l2":  # |q|^2 - 2 L qm + L^2 |m|^2 = the true distance, solved for L
            inner = (queries + rows - other) / 2
            wanted = (inner + np.sqrt(np.maximum(inner**2 - rows * (queries - near), 0))) / max(rows, 1e-30)
        else:
            wanted = near / np.where(other == 0, 1.0, other)
        if not (wanted > 0).all():
            return 0.0
        return float(np.log(wanted) @ sizes / (sizes @ sizes))

    rng, n = np.random.default_rng([seed, 31]), len(true)
    spread = np.std([slope(rng.integers(0, n, n)) for _ in range(_RESAMPLES)])
    return max(0.0, (slope(slice(None)) if value < 1 else -slope(slice(None))) - float(spread))


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
) -> MixedReport:
    """:func:`evaluate_mixed` on arrays: (n, d) float32 numpy rows of the same items by the new model and by h.

    The correction is taken as it is for a gallery of n rows.
    """
    check_kind(correction, "correction", MixedCorrection, "fct.mixed_gallery.MixedCorrection")
    shares = _shares(shares)
    correction = correction.at(len(new))
    mixture = _Mixture(new, mapped, metric, k, seed)
    points = []
    for share in shares:
        plain, found = mixture.recall(share, None)
        better, found_better = mixture.recall(share, correction)
        figures: dict[str, float] = {}
        if labels is not None:
            for prefix, how in (("", None), ("corrected_", correction)):
                rows, _ = mixture.gallery(share, how)
                result = evaluate(
                    mixture.queries(how), rows, labels, metric=metric, same_items=True, bootstrap=0, progress=False
                )
                figures |= {f"{prefix}map": result.map, f"{prefix}cmc1": result.cmc1}
        points.append(MixedPoint(float(share), plain, better, found, found_better, **figures))
    return MixedReport(correction, mixture.recall(0.0, None)[0], tuple(points), len(new), mixture.k, metric)


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
    values, truth = (_host(x.float32()) for x in (rows, true))
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


def _host(x: Array | torch.Tensor) -> Floats:
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()

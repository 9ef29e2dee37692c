"""Galleries in which mapped rows and true rows of the new model stand side by side.

A mapped row is a mean over all that its item may be, and bringing it to unit length inflates an uncertain row's
similarity, so mapped rows crowd true ones out. One number mends it: mapped rows stored a little shorter under inner
product, a little longer under L2. Nothing changes while every row is mapped, and every store can do it but one that
brings rows to unit length itself (cosine): there one more coordinate does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fct.artifact.transformation import Layer, Transformation
from fct.checks import (
    check_choice,
    check_flag,
    check_items,
    check_kind,
    check_positive,
    check_seed,
    check_share,
    check_whole,
)
from fct.metrics import evaluate, recall_at_k
from fct.rows import check_labels, rows_of
from fct.search import topk
from fct.spaces import check_metric
from fct.transform import transform_batch
from fct.types import Array, Bools, Floats, Indices, JsonDict, LabelsLike, RowsLike

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
_SHORTER = (1.0, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5)


@dataclass(frozen=True, slots=True)
class MixedCorrection:
    """What is done to mapped rows, and to them alone.

    kind: "length": they are stored ``value`` times as long. "coordinate": for a store that brings rows to unit length
        itself: they are stored as [value * row, sqrt(1 - value^2)], true rows and queries with a 0 at the end.
    value: 1.0 changes nothing.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        check_choice(self.kind, "correction.kind", ("length", "coordinate"))
        check_positive(self.value, "correction.value")
        if self.kind == "coordinate" and self.value > 1:
            raise ValueError(f"correction.value: expected a coordinate of at most 1, got {self.value}")

    def apply(self, mapped: Floats) -> Floats:
        """(n, d) float32 mapped rows as they count beside true ones; the added coordinate is left out, since it meets
        zeros in every query."""
        out: Floats = mapped * np.float32(self.value)
        return out


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
        self.reference = self._nearest(self.new)

    def _nearest(self, gallery: Floats) -> Indices:
        same = len(gallery) > 1
        return np.asarray(topk(self.new, gallery, self.k, metric=self.metric, same_items=same, progress=False).indices)

    def gallery(self, share: float, correction: MixedCorrection | None) -> tuple[Floats, Bools]:
        """(rows, which are true)."""
        true = np.zeros(len(self.new), bool)
        true[self.order[: round(share * len(self.new))]] = True
        # Cosine ignores length, so the coordinate is there; under l2 and ip the queries' zeros make it vanish.
        rows = self.mapped if correction is None else correction.apply(self.mapped)
        rows = np.where(true[:, None], self.new, rows)
        if correction is not None and correction.kind == "coordinate":
            rows = np.concatenate([rows, _last_coordinate(self.mapped, true, correction.value)], axis=1)
        return np.ascontiguousarray(rows, np.float32), true

    def queries(self, correction: MixedCorrection | None) -> Floats:
        if correction is None or correction.kind != "coordinate":
            return self.new
        return np.pad(self.new, ((0, 0), (0, 1)))

    def recall(self, share: float, correction: MixedCorrection | None) -> tuple[float, float]:
        """(recall@k, share of true rows among what is found)."""
        rows, true = self.gallery(share, correction)
        found = np.asarray(
            topk(
                self.queries(correction), rows, self.k, metric=self.metric, same_items=len(rows) > 1, progress=False
            ).indices
        )
        return recall_at_k(found, self.reference, self.k), float(true[found].mean())


def _last_coordinate(mapped: Floats, true: Bools, value: float) -> Floats:
    """(n, 1): what brings value * row back to the row's own length; 0 for true rows."""
    norms = np.linalg.norm(mapped, axis=1)
    return np.where(true, 0, norms * np.sqrt(max(0.0, 1 - value**2))).astype(np.float32)[:, None]


def add_coordinate(rows: RowsLike, correction: MixedCorrection, *, mapped: bool) -> Floats:
    """Rows with the one coordinate more that a store needs which brings rows to unit length itself.

    Args:
        rows: (n, d) float32 numpy: mapped rows, or true rows or queries.
        correction: of kind "coordinate".
        mapped: whether h made them.

    Returns:
        (n, d + 1) float32. The cosine of a query and a mapped row is ``value`` times what it was.

    Example:
        >>> import numpy as np
        >>> from fct.mixed_gallery import MixedCorrection, add_coordinate
        >>> add_coordinate(np.array([[0.0, 1.0]], np.float32), MixedCorrection("coordinate", 0.6), mapped=True)
        array([[0. , 0.6, 0.8]], dtype=float32)
    """
    check_kind(correction, "correction", MixedCorrection, "fct.mixed_gallery.MixedCorrection")
    check_flag(mapped, "mapped")
    if correction.kind != "coordinate":
        raise ValueError(f"correction: expected one of kind 'coordinate', got {correction}")
    values = np.asarray(rows_of(rows, "rows").float32())
    last = _last_coordinate(values, np.full(len(values), not mapped), correction.value)
    return np.concatenate([correction.apply(values) if mapped else values, last], axis=1)


def choose_correction(new: Floats, mapped: Floats, metric: str, *, seed: int = 0, k: int = 10) -> MixedCorrection:
    """The mildest correction within 0.2 % of the best recall@k, the mean over a quarter, a half and three
    quarters of true rows.

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
    recalls = [
        float(np.mean([mixture.recall(share, MixedCorrection(kind, v))[0] for share in _CHOSEN_ON])) for v in values
    ]
    enough = [v for v, recall in zip(values, recalls, strict=True) if recall >= 0.998 * max(recalls)]
    return MixedCorrection(kind, float(min(enough, key=lambda v: abs(np.log(v)))))


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
    """:func:`evaluate_mixed` on arrays: (n, d) float32 numpy rows of the same items by the new model and by h."""
    check_kind(correction, "correction", MixedCorrection, "fct.mixed_gallery.MixedCorrection")
    shares = _shares(shares)
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


def correction_of(transformation: Transformation) -> MixedCorrection:
    """The correction that the fit measured and stored in the artifact.

    Raises:
        ValueError: the artifact holds none: it was fitted before there was one, or by "paper" or numbers of its own.
    """
    check_kind(transformation, "transformation", Transformation, "an fct.Transformation")
    stored: Any = transformation.info.get("mixed")
    try:
        return MixedCorrection(str(stored["correction"]["kind"]), float(stored["correction"]["value"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            "transformation: expected one with a measured correction for mixed galleries (config='auto' or 'best' "
            "measures it), got none; fct.mixed_gallery.choose_correction finds one on held-out pairs"
        ) from error


def mixed_transformation(transformation: Transformation, correction: MixedCorrection | None = None) -> Transformation:
    """h that writes mapped rows as they may stand among true ones.

    Args:
        transformation: h. correction: None: the one stored in it.

    Raises:
        ValueError: none is stored, or it is a coordinate more, which h cannot write: the message says what to do.

    Example:
        >>> import fct
        >>> from fct.mixed_gallery import MixedCorrection, mixed_transformation
        >>> h = fct.Transformation.random(8, 4, 16, inner=32, normalise=True)
        >>> mixed_transformation(h, MixedCorrection("length", 0.9)).length
        0.9
    """
    h = check_kind(transformation, "transformation", Transformation, "an fct.Transformation")
    if correction is not None:
        check_kind(correction, "correction", MixedCorrection, "fct.mixed_gallery.MixedCorrection")
    how = correction or correction_of(h)
    value = check_positive(how.value, "correction")
    if how.kind != "length":
        raise ValueError(
            f"mixed: {h.new_space} is compared by cosine, which ignores the length of a row, and a store that brings "
            "rows to unit length undoes it. Tag the new space with metric='ip' and search by inner product (the same "
            "ranking for unit-length queries), or store rows and queries with one coordinate more "
            "(fct.mixed_gallery.add_coordinate)"
        )
    h = h.with_(new_space=replace(h.new_space, mapped_length=h.new_space.mapped_length * value))
    if h.normalise:
        return h.with_(length=h.length * value)
    last = h.mixer[-1]
    skip = None if h.skip is None else Layer(h.skip.weight * value, h.skip.bias * value, relu=False)
    return h.with_(mixer=(*h.mixer[:-1], Layer(last.weight * value, last.bias * value, last.relu)), skip=skip)


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
        correction: None: the one stored in h; where h has none, one chosen on these very rows, which flatters it a
            little.
        labels: (n,) classes; then mAP and CMC top-1 too.
        metric: None: the new space's.
        k: of recall@k. seed: of the random order.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.

    Example:
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

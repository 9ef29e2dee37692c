"""Scores of two embedding spaces: which score of the new one says what a score of the old one said."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fct.checks import check_choice, check_scores, check_seed, check_share, check_whole
from fct.rows import rows_of
from fct.search import topk
from fct.spaces import METRICS
from fct.types import Int64s, RowsLike

__all__ = ["CarriedThreshold", "ScoreMap", "fit_score_map", "neighbour_scores"]

Floats = npt.NDArray[np.float64]
_LEAST = 20  # pairs on either side of the split


@dataclass(frozen=True, slots=True)
class CarriedThreshold:
    """A threshold of the new scores in place of one of the old.

    value: of the new scores. old: of the old ones. pairs: held-out pairs that the old threshold keeps. precision: share
    of what the new one keeps that the old one keeps too; recall: the other way round. NaN where none is kept.
    """

    value: float
    old: float
    pairs: int
    precision: float
    recall: float

    def __str__(self) -> str:
        return (
            f"{self.old:.6g} -> {self.value:.6g}; of {self.pairs:,} held-out pairs that the old threshold keeps "
            f"the new one keeps {100 * self.recall:.1f} %, and {100 * self.precision:.1f} % of what it keeps "
            f"the old one keeps too"
        )


@dataclass(frozen=True, eq=False, slots=True)
class ScoreMap:
    """A rising step function from old scores to new ones, by :func:`fit_score_map`.

    old, new: (m,) float64, ascending: the new score at each old one, a straight line between, level outside.
    error: mean absolute error on held-out pairs; error_of_mean: that of saying the mean new score every time.
    held_old, held_new: (h,) the scores held out. nearest: whether the larger or the smaller score is nearer.
    """

    old: Floats
    new: Floats
    error: float
    error_of_mean: float
    nearest: str
    fitted_old: Floats
    fitted_new: Floats
    held_old: Floats
    held_new: Floats

    def __call__(self, scores: npt.ArrayLike) -> Floats:
        """The new score that is expected at each old one: (n,) float64."""
        return np.asarray(np.interp(check_scores(scores, "scores", "a score each"), self.old, self.new))

    def threshold(self, old: float) -> CarriedThreshold:
        """The threshold that keeps as many of the fitted pairs by the new scores as ``old`` keeps by the old ones.

        Not ``self(old)``: expected scores lie nearer the mean than the scores themselves, so that a high one would keep
        far too many pairs.

        Raises:
            ValueError: fewer than 20 of the fitted pairs lie on either side of ``old``.
        """
        at = float(check_scores([old], "old", "one")[0])
        sign = 1.0 if self.nearest == "larger" else -1.0
        kept = int((sign * self.fitted_old >= sign * at).sum())
        if not _LEAST <= kept <= len(self.fitted_old) - _LEAST:
            low, high = np.sort(self.fitted_old)[[_LEAST - 1, -_LEAST]]
            raise ValueError(
                f"old: expected a threshold between {low:.6g} and {high:.6g}, so that {_LEAST} of the "
                f"{len(self.fitted_old):,} fitted pairs lie on either side, got {at:.6g}, which keeps {kept:,}"
            )
        ordered = np.sort(sign * self.fitted_new)[::-1]
        value = sign * float((ordered[kept - 1] + ordered[kept]) / 2)
        before, after = sign * self.held_old >= sign * at, sign * self.held_new >= sign * value
        both = int((before & after).sum())
        return CarriedThreshold(
            value,
            at,
            int(before.sum()),
            both / n if (n := int(after.sum())) else float("nan"),
            both / m if (m := int(before.sum())) else float("nan"),
        )


def fit_score_map(
    old_scores: npt.ArrayLike,
    new_scores: npt.ArrayLike,
    *,
    nearest: str = "larger",
    held_out: float = 0.3,
    seed: int = 0,
) -> ScoreMap:
    """Isotonic regression of new scores on old ones, over the same pairs of items.

    Args:
        old_scores, new_scores: (n,) finite numbers, n >= 100: how near the two items of a pair are by the old model,
            and in the space that will be searched (of mapped rows, if those are). :func:`neighbour_scores` makes both.
        nearest: "larger" (inner products, cosines) or "smaller" (distances), in both spaces.
        held_out: share of the pairs that the errors are measured on.
        seed: of the split.

    Returns:
        ScoreMap: call it with old scores; ``.threshold(0.92)`` carries a threshold over.

    Raises:
        ValueError: other shapes, NaN or infinity, fewer than 100 pairs, scores that are all alike.

    Source: Barlow et al., "Statistical Inference under Order Restrictions", 1972 (pool adjacent violators).

    Examples:
        >>> import numpy as np, fct
        >>> old = np.linspace(0, 1, 1000)
        >>> scores = fct.fit_score_map(old, old**2)
        >>> round(float(scores([0.5])[0]), 2), round(scores.threshold(0.5).value, 2)
        (0.25, 0.25)
    """
    check_choice(nearest, "nearest", ("larger", "smaller"))
    check_seed(seed)
    check_share(held_out, "held_out")
    old, new = (
        check_scores(x, name, "a pair's score each")
        for x, name in ((old_scores, "old_scores"), (new_scores, "new_scores"))
    )
    if len(old) != len(new):
        raise ValueError(f"new_scores: expected ({len(old)},), the old scores' pairs, got ({len(new)},)")
    if len(old) < 100:
        raise ValueError(f"old_scores: expected at least 100 pairs, got {len(old)}")
    for name, values in (("old_scores", old), ("new_scores", new)):
        if values.min() == values.max():
            raise ValueError(f"{name}: expected different scores, got {values[0]:.6g} every time")
    order = np.random.default_rng([seed, 43]).permutation(len(old))
    cut = min(max(round(held_out * len(old)), _LEAST), len(old) - 2 * _LEAST)
    held, fitted = order[:cut], order[cut:]
    x, y = _rising(old[fitted], new[fitted])
    found = np.interp(old[held], x, y)
    error, plain = (float(np.abs(new[held] - said).mean()) for said in (found, new[fitted].mean()))
    return ScoreMap(x, y, error, plain, nearest, old[fitted], new[fitted], old[held], new[held])


def neighbour_scores(
    old: RowsLike,
    new: RowsLike,
    *,
    metric: str = "cosine",
    new_metric: str | None = None,
    k: int = 10,
    progress: bool = True,
) -> tuple[Floats, Floats]:
    """Scores of the pairs of items that are near in either space, once each: what thresholds are about.

    Args:
        old, new: (n, d_old) and (n, d_new), the same items; new as they will be searched (mapped rows, if those are).
        metric, new_metric: "l2", "ip" or "cosine" of each space; new_metric None: as metric. With "l2" the scores are
            squared distances.
        k: each item's nearest k in the old space and its nearest k in the new one are taken. progress: show a bar.

    Returns:
        (old scores, new scores), (pairs,) float64 each.

    Raises:
        ValueError: arrays that do not fit, an unknown metric, distances on one side and similarities on the other.

    Examples:
        >>> import numpy as np, fct
        >>> x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
        >>> old, new = fct.neighbour_scores(x, 2 * x, k=3)
        >>> len(old) == len(new) and bool(np.allclose(old, new, atol=1e-6))
        True
    """
    new_metric = metric if new_metric is None else new_metric
    for name, value in (("metric", metric), ("new_metric", new_metric)):
        check_choice(value, name, METRICS)
    if (metric == "l2") != (new_metric == "l2"):
        raise ValueError(f"new_metric: expected distances in both spaces or in neither, got {metric} and {new_metric}")
    check_whole(k, "k", 1)
    first = rows_of(old, "old").float32()
    second = rows_of(new, "new", n=len(first), n_why="to match old").float32()
    check_whole(k, "k", 1, max(1, len(first) - 1))
    near = [
        topk(x, x, k, metric=by, same_items=True, progress=progress).indices
        for x, by in ((first, metric), (second, new_metric))
    ]
    rows = np.repeat(np.arange(len(first)), 2 * k)
    ends = np.sort(np.stack([rows, np.concatenate(near, axis=1).ravel()], axis=1), axis=1)
    pairs = np.unique(ends[ends[:, 0] >= 0], axis=0)
    return _scored(first, pairs, metric), _scored(second, pairs, new_metric)


def _scored(rows: Floats, pairs: Int64s, metric: str) -> Floats:
    found = np.empty(len(pairs))
    for begin in range(0, len(pairs), 65_536):
        a, b = (rows[pairs[begin : begin + 65_536, end]].astype(np.float64) for end in (0, 1))
        if metric == "l2":
            scores = ((a - b) ** 2).sum(axis=1)
        else:
            scores = (a * b).sum(axis=1)
        if metric == "cosine":
            scores /= np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-300)
        found[begin : begin + len(scores)] = scores
    return found


def _rising(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The rising function nearest to y over x, in least squares, by its steps' ends: pool adjacent violators."""
    at, member = np.unique(x, return_inverse=True)
    weight = np.bincount(member.ravel()).astype(np.float64)
    mean = np.bincount(member.ravel(), weights=y) / weight
    values, weights, first = np.empty(len(at)), np.empty(len(at)), np.empty(len(at), np.int64)
    top = -1
    for i in range(len(at)):
        top += 1
        values[top], weights[top], first[top] = mean[i], weight[i], i
        while top and values[top - 1] >= values[top]:
            total = weights[top - 1] + weights[top]
            values[top - 1] = (values[top - 1] * weights[top - 1] + values[top] * weights[top]) / total
            weights[top - 1] = total
            top -= 1
    begins = first[: top + 1]
    ends = np.append(begins[1:], len(at)) - 1
    single = begins == ends
    steps = np.stack([begins, ends], axis=1)
    kept = np.stack([np.ones(len(single), dtype=bool), ~single], axis=1)
    return at[steps[kept]], np.repeat(values[: top + 1], 2).reshape(-1, 2)[kept]

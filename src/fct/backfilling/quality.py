"""The quality gate on held-out pairs, and how scores move from the old space to the new one."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fct.artifact.transformation import Transformation
from fct.checks import check_path, shown
from fct.metrics import evaluate, gap_closed, recall_at_k
from fct.search import topk
from fct.transform import transform_batch

__all__ = ["Quality", "ScoreShift", "check_quality", "map_threshold", "score_shift"]

_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Quality:
    """Expected retrieval quality on held-out pairs.

    recall_at_10: overlap of new/mapped's top 10 with new/new's. gap_closed: share of the gap between old/old's and
    new/new's mAP, None without labels. pairs: how many.
    """

    pairs: int
    recall_at_10: float
    gap_closed: float | None
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreShift:
    """Scores of a stored row's nearest other row, before and after, at the same quantiles.

    metric_old, metric_new: of the spaces ("l2" is squared: lower is nearer). rows: of the sample the quantiles are
    over; scores of nearest neighbours get nearer as a gallery grows, in both columns alike.
    """

    metric_old: str
    metric_new: str
    rows: int
    quantiles: tuple[float, ...]
    old: tuple[float, ...]
    new: tuple[float, ...]

    def threshold(self, old: float) -> float:
        """The new threshold that as large a share of nearest rows passes as passed ``old``."""
        return map_threshold(self.old, self.new, old, flipped=(self.metric_old == "l2") != (self.metric_new == "l2"))


def map_threshold(old_scores: Any, new_scores: Any, threshold: float, *, flipped: bool = False) -> float:
    """The value that stands among ``new_scores`` at the quantile at which ``threshold`` stands among ``old_scores``.

    flipped: one of the two is a distance and the other a similarity.

    Example:
        >>> map_threshold([0.0, 1.0, 2.0], [10.0, 20.0, 30.0], 0.5)
        15.0
    """
    old = np.sort(np.asarray(old_scores, np.float64))
    new = np.sort(np.asarray(new_scores, np.float64))
    share = np.interp(threshold, old, np.linspace(0, 1, len(old)))
    return float(np.interp(1 - share if flipped else share, np.linspace(0, 1, len(new)), new))


def _pairs(pairs: Any, h: Transformation) -> dict[str, Any]:
    if isinstance(pairs, (str, os.PathLike)):
        path = check_path(pairs, "pairs", "the path of an .npz")
        if not path.is_file():
            raise FileNotFoundError(f"pairs: expected an .npz file, found none at {path}")
        try:
            with np.load(path, allow_pickle=False) as file:
                pairs = {name: file[name] for name in file.files}
        except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"pairs: expected a whole .npz of arrays, {path} is not: {error}") from error
    if not isinstance(pairs, Mapping):
        raise TypeError(f"pairs: expected the path of an .npz or a mapping of arrays, got {shown(pairs)}")
    need = {"old", "new"} | ({"side"} if h.uses_side_info else set())
    if not need <= set(pairs):
        raise ValueError(f"pairs: expected {', '.join(sorted(need))}, got {', '.join(sorted(pairs))}")
    if len({len(pairs[name]) for name in need}) != 1 or len(pairs["old"]) < 12:
        raise ValueError("pairs: expected as many rows of each, at least 12")
    return dict(pairs)


def check_quality(
    h: Transformation, pairs: Any, min_gap_closed: float | None, min_recall: float | None
) -> Quality | None:
    """Measures h on held-out pairs and compares with the limits; ``refusals`` says which it misses. None where there
    are neither pairs nor limits."""
    for limit, name in ((min_gap_closed, "min_gap_closed"), (min_recall, "min_recall")):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float, np.floating))):
            raise ValueError(f"{name}: expected a share or None, got {shown(limit)}")
    if pairs is None:
        if min_gap_closed is not None or min_recall is not None:
            raise ValueError("pairs: expected held-out pairs to check min_gap_closed or min_recall on, got None")
        return None
    data = _pairs(pairs, h)
    old, new = np.asarray(data["old"], np.float32), np.asarray(data["new"], np.float32)
    mapped = transform_batch(old, data.get("side") if h.uses_side_info else None, h, progress=False)
    metric = h.new_space.metric
    best = topk(new, new, 10, metric=metric, same_items=True, progress=False).indices
    recall = recall_at_k(topk(new, mapped, 10, metric=metric, same_items=True, progress=False).indices, best, 10)
    closed = None
    if "labels" in data:
        labels = data["labels"]
        scores = [
            evaluate(q, g, labels, metric=m, same_items=True, bootstrap=0, progress=False).map
            for q, g, m in ((new, mapped, metric), (old, old, h.old_space.metric), (new, new, metric))
        ]
        closed = gap_closed(*scores)
    refusals = []
    if min_recall is not None and not recall >= min_recall:
        refusals.append(f"quality gate: recall@10 is {recall:.3f} on {len(old)} pairs, below {min_recall}")
    if min_gap_closed is not None:
        if closed is None:
            raise ValueError("pairs: expected labels as well, which min_gap_closed is measured with")
        if not closed >= min_gap_closed:
            refusals.append(
                f"quality gate: {closed:.3f} of the mAP gap is closed on {len(old)} pairs, below {min_gap_closed}"
            )
    return Quality(len(old), recall, closed, tuple(refusals))


def score_shift(mapper: Any, sample: Any) -> ScoreShift | None:
    """Quantiles of nearest-neighbour scores among the sample's rows, in the old and in the new space."""
    from fct.gallery.vectors import vector_block

    job = mapper.job
    olds, news = [], []
    for batch, side in sample:
        mapped, rejects = mapper(batch, side, 0)
        keep = np.ones(batch.num_rows, bool)
        keep[[r["row"] for r in rejects]] = False
        import pyarrow as pa

        column = batch.column(job.vector).filter(pa.array(keep))
        olds.append(vector_block(column, job.old_space.dim, job.binary_dtype).values)
        news.append(vector_block(mapped.column(job.vector), job.new_space.dim, job.dtype).values)
    old, new = np.concatenate(olds)[:2048], np.concatenate(news)[:2048]
    if len(old) < 3:
        return None
    found = []
    for rows, space in ((old, job.old_space), (new, job.new_space)):
        nearest = topk(rows, rows, 1, metric=space.metric, same_items=True, progress=False).distances[:, 0]
        found.append(tuple(float(x) for x in np.quantile(nearest, _QUANTILES)))
    return ScoreShift(job.old_space.metric, job.new_space.metric, len(old), _QUANTILES, found[0], found[1])

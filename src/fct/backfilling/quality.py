"""The quality gate on held-out pairs, and how scores move from the old space to the new one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from fct.artifact.transformation import Transformation
from fct.backfilling.coding import decoded
from fct.backfilling.job import Job
from fct.backfilling.row_mapper import RowMapper
from fct.checks import shown
from fct.gallery.named_pairs import load_pairs
from fct.gallery.vectors import vector_block
from fct.metrics import evaluate, gap_closed, recall_at_k
from fct.options.groups import Gate, JobOptions
from fct.rows import rows_of
from fct.search import topk
from fct.transform import transform_finite
from fct.types import Array, JsonDict

if TYPE_CHECKING:
    import numpy.typing as npt


__all__ = [
    "Quality",
    "ScoreShift",
    "Writing",
    "before_and_after",
    "check_quality",
    "held_out_pairs",
    "map_threshold",
    "score_shift",
]

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


def map_threshold(
    old_scores: npt.ArrayLike, new_scores: npt.ArrayLike, threshold: float, *, flipped: bool = False
) -> float:
    """The value that stands among ``new_scores`` at the quantile at which ``threshold`` stands among ``old_scores``.

    flipped: one of the two is a distance and the other a similarity.

    Examples:
        >>> map_threshold([0.0, 1.0, 2.0], [10.0, 20.0, 30.0], 0.5)
        15.0
    """
    old = np.sort(np.asarray(old_scores, np.float64))
    new = np.sort(np.asarray(new_scores, np.float64))
    share = np.interp(threshold, old, np.linspace(0, 1, len(old)))
    return float(np.interp(1 - share if flipped else share, np.linspace(0, 1, len(new)), new))


def held_out_pairs(gate: Gate, h: Transformation) -> JsonDict | None:
    """The gate's pairs, looked at before anything else is opened; None where there are neither pairs nor limits."""
    if gate.pairs is None:
        if gate.min_gap_closed is not None or gate.min_recall is not None:
            raise ValueError("pairs: expected held-out pairs to check min_gap_closed or min_recall on, got None")
        return None
    data = _pairs(gate.pairs, h)
    if gate.min_gap_closed is not None and "labels" not in data:
        raise ValueError("pairs: expected labels as well, which min_gap_closed is measured with")
    return data


def _pairs(pairs: object, h: Transformation) -> JsonDict:
    if isinstance(pairs, (str, os.PathLike)):
        pairs = load_pairs(pairs)
    if not isinstance(pairs, Mapping):
        raise TypeError(f"pairs: expected the path of an .npz or a gallery, or a mapping of arrays, got {shown(pairs)}")
    need = {"old", "new"} | ({"side"} if h.uses_side_info else set())
    if not need <= set(pairs):
        raise ValueError(f"pairs: expected {', '.join(sorted(need))}, got {', '.join(sorted(pairs))}")
    if len({len(pairs[name]) for name in need}) != 1 or len(pairs["old"]) < 12:
        raise ValueError("pairs: expected as many rows of each, at least 12")
    return dict(pairs)


@dataclass(frozen=True, slots=True)
class Writing:
    """How a job's rows are made, and so what its quality is measured on."""

    precision: str
    dtype: str
    backend: str | None
    device: str
    threads: int | None

    @classmethod
    def of_job(cls, job: Job, device: str, threads: int | None) -> Writing:
        """As the job will map and store its rows."""
        return cls(job.precision, job.dtype, job.backend, device, threads)

    @classmethod
    def asked_for(cls, options: JobOptions) -> Writing:
        """As the options say, for a job that cannot be made."""
        run, dtype = options.execution, options.output.dtype
        return cls(run.precision, "float32" if dtype == "auto" else dtype, run.backend, run.device, run.threads)

    def map(self, old: Array, side: Array | None, h: Transformation) -> Array:
        """(n, d_new) float32: the values that the new gallery would hold."""
        for rows, name in ((old, "pairs: old"), (side, "pairs: side")):
            if rows is not None:
                rows_of(rows, name)
        out = np.empty((len(old), h.d_new), self.dtype)
        with np.errstate(over="ignore"):
            transform_finite(
                old, side, h, out=out, precision=self.precision, device=self.device, backend=self.backend,
                threads=self.threads,
            )  # fmt: skip
        return out.astype(np.float32)


def check_quality(h: Transformation, gate: Gate, data: JsonDict | None, writing: Writing) -> Quality | None:
    """Measures h on held-out pairs and compares with the limits; ``refusals`` says which it misses. None where there
    are neither pairs nor limits.

    data: the :func:`held_out_pairs`. writing: as the job will map and store the gallery's rows; the pairs are mapped
    alike.
    """
    if data is None:
        return None
    old, new = np.asarray(data["old"], np.float32), np.asarray(data["new"], np.float32)
    mapped = writing.map(old, np.asarray(data["side"], np.float32) if h.uses_side_info else None, h)
    lost = int((~np.isfinite(mapped).all(axis=1)).sum())
    if lost:  # the backfill would set such rows aside, and a gallery without them is not what the limits are about
        why = f"quality gate: h's output is not finite in {writing.dtype} for {lost} of {len(old)} pairs"
        return Quality(len(old), float("nan"), None, (why,))
    metric = h.new_space.metric
    best = topk(new, new, 10, metric=metric, same_items=True, progress=False).indices
    recall = recall_at_k(topk(new, mapped, 10, metric=metric, same_items=True, progress=False).indices, best, 10)
    closed = None
    if "labels" in data:
        scores = [
            evaluate(q, g, data["labels"], metric=m, same_items=True, bootstrap=0, progress=False).map
            for q, g, m in ((new, mapped, metric), (old, old, h.old_space.metric), (new, new, metric))
        ]
        closed = gap_closed(*scores)
    return Quality(len(old), recall, closed, _missed(gate, len(old), recall, closed))


def _missed(gate: Gate, pairs: int, recall: float, closed: float | None) -> tuple[str, ...]:
    missed = []
    if gate.min_recall is not None and not recall >= gate.min_recall:
        missed.append(f"quality gate: recall@10 is {recall:.3f} on {pairs} pairs, below {gate.min_recall}")
    if gate.min_gap_closed is not None and closed is not None and not closed >= gate.min_gap_closed:
        missed.append(
            f"quality gate: {closed:.3f} of the mAP gap is closed on {pairs} pairs, below {gate.min_gap_closed}"
        )
    return tuple(missed)


def score_shift(mapper: RowMapper, sample: Sequence[tuple[pa.RecordBatch, pa.RecordBatch | None]]) -> ScoreShift | None:
    """Quantiles of nearest-neighbour scores among the sample's rows, in the old and in the new space."""
    job = mapper.job
    found = [before_and_after(mapper, batch, side) for batch, side in sample]
    old, new = (np.concatenate([rows[i] for rows in found])[:2048] for i in (0, 1))
    if len(old) < 3:
        return None
    scores = []
    for rows, space in ((old, job.old_space), (new, job.new_space)):
        nearest = topk(rows, rows, 1, metric=space.metric, same_items=True, progress=False).distances[:, 0]
        scores.append(tuple(float(x) for x in np.quantile(nearest, _QUANTILES)))
    return ScoreShift(job.old_space.metric, job.new_space.metric, len(old), _QUANTILES, scores[0], scores[1])


def before_and_after(
    mapper: RowMapper, batch: pa.RecordBatch, side: pa.RecordBatch | None
) -> tuple[Array, Array, Array]:
    """((m, d_old) float32, vectors that 8-bit codes stand for; (m, d_new) float32, what a backfill would store of them;
    (m,) which rows of the batch these are: those that would not be rejected)."""
    job = mapper.job
    mapped, rejects = mapper(batch, side, 0)
    keep = np.ones(batch.num_rows, bool)
    keep[[reject["row"] for reject in rejects]] = False
    kept = batch.filter(pa.array(keep))
    old, _ = decoded(job, vector_block(kept.column(job.vector), job.old_space.dim, job.binary_dtype), kept)
    new = vector_block(mapped.column(job.vector), job.new_space.dim, job.dtype).values
    return np.array(old, np.float32), np.array(new, np.float32), np.flatnonzero(keep)

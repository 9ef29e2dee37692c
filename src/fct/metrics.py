"""CMC, mean average precision, recall@k, share of the gap closed, negative flips, the backfilling curve; all exact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fct.checks import check_items, check_seed, check_share, check_whole
from fct.ops.processors import threads_of
from fct.ops.search.cpu_search import ranks_cpu
from fct.ops.search.gpu_search import ranks_gpu
from fct.progress import LongCall, Report
from fct.rows import check_labels
from fct.search import check_pair
from fct.spaces import EmbeddingSpace
from fct.types import Array, Bools, Floats, Indices, Int64s, JsonDict, LabelsLike, RowsLike

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch


__all__ = [
    "BackfillingCurve",
    "RetrievalMetrics",
    "backfilling_curve",
    "evaluate",
    "gap_closed",
    "negative_flip_rate",
    "recall_at_k",
]


@dataclass(frozen=True, slots=True)
class RetrievalMetrics:
    """What :func:`evaluate` measured. Shares are in [0, 1].

    cmc1, cmc5: share of queries whose 1 (5) nearest hold one of the query's class; cmc[k] for every k asked for.
    map: mean over queries of the average precision over the full ranking.
    queries: how many were counted; queries_without_match: how many had no row of their class and were left out.
    intervals: bootstrap confidence intervals over queries, (low, high) by name: "map", "cmc1", "cmc5", ...
    first_match: (n,) int64, rows ranked before the query's first match, -1 without match.
    average_precision: (n,) float64, NaN without match.
    """

    cmc1: float
    cmc5: float
    map: float
    cmc: Mapping[int, float]
    queries: int
    queries_without_match: int
    intervals: Mapping[str, tuple[float, float]]
    metric: str
    first_match: Int64s = field(repr=False, compare=False)
    average_precision: Floats = field(repr=False, compare=False)

    def to_dict(self) -> JsonDict:
        """The figures as plain values for JSON, without the per-query arrays."""
        return {
            "cmc1": self.cmc1,
            "cmc5": self.cmc5,
            "map": self.map,
            "cmc": {str(k): v for k, v in self.cmc.items()},
            "queries": self.queries,
            "queries_without_match": self.queries_without_match,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "metric": self.metric,
        }


def evaluate(
    queries: RowsLike,
    gallery: RowsLike,
    query_labels: LabelsLike,
    gallery_labels: LabelsLike | None = None,
    *,
    metric: str = "l2",
    same_items: bool = False,
    ks: Sequence[int] = (1, 5),
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    query_space: EmbeddingSpace | None = None,
    gallery_space: EmbeddingSpace | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> RetrievalMetrics:
    """CMC and mean average precision of every query over the whole gallery, exact.

    Args:
        queries: (n, d) float32, float16, bfloat16 or :class:`fct.ScaledInt8`; numpy, torch or DLPack.
        gallery: (m, d), likewise, on the same device; or a prepared gallery.
        query_labels: (n,) integers or strings.
        gallery_labels: (m,); None where the gallery has the queries' labels row for row.
        metric: "l2", "ip" or "cosine".
        same_items: the gallery's rows are the queries' own items, in order: row i is left out for query i.
        ks: the k of CMC top-k; 1 and 5 are always there.
        bootstrap: resamples of the queries for the confidence intervals; 0 for none.
        confidence: of the intervals, between 0 and 1.
        seed: of the resampling.
        query_space, gallery_space: where both are given, they must be one space.
        threads: CPU threads; by default FCT_NUM_THREADS or all.
        progress: show a bar on stderr, where that is a terminal and a call on the CPU lasts more than two seconds.

    Returns:
        RetrievalMetrics. Queries without a match in the gallery are counted and left out of every mean; with none
        left the means are NaN.

        CMC ranks by score, ties by lower index. In the average precision tied rows are retrieved together, so that
        it is scikit-learn's ``average_precision_score`` of each query, whatever the order of the gallery.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came. SpaceMismatchError: two models' vectors.

    Examples:
        >>> import numpy as np, fct
        >>> x = np.array([[0.0], [0.1], [5.0], [5.1]], np.float32)
        >>> fct.evaluate(x, x, [0, 0, 1, 1], same_items=True).cmc1
        1.0
    """
    if isinstance(ks, str) or not isinstance(ks, Iterable):
        raise ValueError(f"ks: expected positive whole numbers, got {ks!r}")
    wanted = sorted({1, 5, *(check_whole(k, "ks", 1) for k in ks)})
    if not isinstance(confidence, (float, np.floating)) or not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence!r}")
    check_whole(bootstrap, "bootstrap", 0)
    check_seed(seed)
    workers = threads_of(threads)
    with LongCall(progress) as call:
        reading = call.stage("reading the gallery")
        q, g = check_pair(queries, gallery, metric, same_items, query_space, gallery_space, reading)
        codes = _codes(*_checked_labels(query_labels, gallery_labels, q.n, g.n))
        if q.device == "cpu":
            ranking = call.stage("ranking")
            first, ap = ranks_cpu(q, g, *codes, metric, same_items, threads=workers, report=ranking)
        else:
            first, ap = ranks_gpu(q, g, *codes, metric, same_items)
        return _summary(first, ap, wanted, metric, bootstrap, confidence, seed, call.stage("resampling"))


def _checked_labels(
    query_labels: LabelsLike, gallery_labels: LabelsLike | None, queries: int, rows: int
) -> tuple[Array, Array]:
    q_labels = check_labels(query_labels, "query_labels", queries)
    if gallery_labels is not None:
        return q_labels, check_labels(gallery_labels, "gallery_labels", rows)
    if queries != rows:
        raise ValueError(
            f"gallery_labels: expected ({rows},), one label per row of the gallery; None stands for the queries' "
            f"labels, of which there are {queries}"
        )
    return q_labels, q_labels


def _codes(q_labels: Array, g_labels: Array) -> tuple[Int64s, Int64s]:
    """Both label lists as integers of one coding, so that numbers and strings are compared alike and fast."""
    if (q_labels.dtype.kind in "US") != (g_labels.dtype.kind in "US"):
        raise ValueError(
            f"gallery_labels: expected labels of the queries' kind ({q_labels.dtype}), got {g_labels.dtype}"
        )
    if np.result_type(q_labels, g_labels).kind == "f":  # uint64 beside signed ones: doubles would merge large labels
        q_labels, g_labels = q_labels.astype(object), g_labels.astype(object)
    codes = np.unique(np.concatenate([q_labels, g_labels]), return_inverse=True)[1].astype(np.int64).ravel()
    return codes[: len(q_labels)], codes[len(q_labels) :]


def _summary(
    first: Int64s,
    ap: Floats,
    ks: Sequence[int],
    metric: str,
    bootstrap: int,
    confidence: float,
    seed: int,
    report: Report | None,
) -> RetrievalMetrics:
    counted = first >= 0
    n = int(counted.sum())
    cmc = {k: float(np.mean(first[counted] < k)) if n else float("nan") for k in ks}
    mean_ap = float(np.mean(ap[counted])) if n else float("nan")
    intervals: dict[str, tuple[float, float]] = {}
    if bootstrap and n:
        rng = np.random.default_rng(seed)
        tails = [50 * (1 - confidence), 50 * (1 + confidence)]
        values = ap[counted]
        means = []
        for done in range(bootstrap):
            means.append(float(np.mean(values[rng.integers(0, n, n)])))
            if report is not None:
                report((done + 1) / bootstrap)
        low, high = np.percentile(means, tails)
        intervals["map"] = (float(low), float(high))
        for k, share in cmc.items():  # a resample of n hits and misses holds Binomial(n, share) hits
            low, high = np.percentile(rng.binomial(n, share, bootstrap) / n, tails)
            intervals[f"cmc{k}"] = (float(low), float(high))
    return RetrievalMetrics(
        cmc1=cmc[1],
        cmc5=cmc[5],
        map=mean_ap,
        cmc=cmc,
        queries=n,
        queries_without_match=len(first) - n,
        intervals=intervals,
        metric=metric,
        first_match=first,
        average_precision=ap,
    )


def _index_rows(x: npt.ArrayLike | torch.Tensor, name: str, k: int) -> Indices:
    array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.shape[1] < k:
        raise ValueError(f"{name}: expected (n, at least {k}) integer indices, got {array.dtype} of {array.shape}")
    return array[:, :k]


def recall_at_k(
    indices: npt.ArrayLike | torch.Tensor, reference_indices: npt.ArrayLike | torch.Tensor, k: int = 10
) -> float:
    """Share of the reference's first k rows that stand among the first k of ``indices``, averaged over queries.

    Args:
        indices, reference_indices: (n, >= k) integers, of :func:`fct.topk` say; order within the k does not matter.

    Raises:
        ValueError: other shapes or dtypes, no rows, or an index twice in a row.

    Examples:
        >>> recall_at_k([[3, 1], [5, 6]], [[1, 2], [6, 5]], 2)
        0.75
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k: expected a positive whole number, got {k!r}")
    found, wanted = _index_rows(indices, "indices", k), _index_rows(reference_indices, "reference_indices", k)
    if found.shape[0] != wanted.shape[0] or not found.shape[0]:
        raise ValueError(
            f"indices: expected as many rows as reference_indices ({wanted.shape[0]}), at least one, "
            f"got {found.shape[0]}"
        )
    for name, rows in (("indices", found), ("reference_indices", wanted)):
        ordered = np.sort(rows, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(f"{name}: expected each index once per row, got one twice")
    both = np.sort(np.concatenate([found, wanted], axis=1), axis=1)
    hits = int((both[:, 1:] == both[:, :-1]).sum())  # no index is twice in either list, so a pair is a hit
    return hits / int(wanted.size)


def gap_closed(x: float, low: float, high: float) -> float:
    """Share of the gap between old/old (``low``) and new/new (``high``) that ``x`` closes: BCT's update gain.

    Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, equation 7. 0 is no better than
    the old system, 1 as good as re-embedding; below 0 and above 1 are possible. NaN where there is no gap.

    Examples:
        >>> gap_closed(0.75, 0.5, 1.0)
        0.5
    """
    return (x - low) / (high - low) if high != low else float("nan")


def negative_flip_rate(
    before: RetrievalMetrics | npt.ArrayLike | torch.Tensor,
    after: RetrievalMetrics | npt.ArrayLike | torch.Tensor,
    *,
    k: int = 1,
) -> float:
    """Share of queries that were right before an upgrade and are wrong after it.

    Yan et al., "Positive-Congruent Training", CVPR 2021.

    Args:
        before, after: RetrievalMetrics of the same queries (right: a match among the first k), or (n,) booleans.
            Queries without a match in either are left out.

    Examples:
        >>> negative_flip_rate([True, True, False, True], [True, False, True, True])
        0.25
    """
    right = []
    counted: Bools | bool = True
    for name, x in (("before", before), ("after", after)):
        if isinstance(x, RetrievalMetrics):
            counted = counted & (x.first_match >= 0)
            right.append((x.first_match >= 0) & (x.first_match < k))
        else:
            array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
            if array.ndim != 1 or array.dtype != np.bool_:
                raise ValueError(f"{name}: expected RetrievalMetrics or (n,) booleans, got {array.dtype} {array.shape}")
            right.append(array)
    if right[0].shape != right[1].shape:
        raise ValueError(f"after: expected ({len(right[0])},) like before, got ({len(right[1])},)")
    flipped = right[0] & ~right[1]
    counted = np.broadcast_to(counted, flipped.shape)
    return float(np.mean(flipped[counted])) if counted.any() else float("nan")


@dataclass(frozen=True, slots=True)
class BackfillingCurve:
    """Metrics as a function of the backfilled share of the gallery.

    shares: (s,) of the gallery's rows that are new; metrics: one RetrievalMetrics per share.
    """

    shares: tuple[float, ...]
    metrics: tuple[RetrievalMetrics, ...]

    def __getattr__(self, name: str) -> tuple[float, ...]:
        if name in ("cmc1", "cmc5", "map"):
            return tuple(getattr(m, name) for m in self.metrics)
        raise AttributeError(name)


def backfilling_curve(
    queries: RowsLike,
    old_gallery: RowsLike,
    new_gallery: RowsLike,
    query_labels: LabelsLike,
    gallery_labels: LabelsLike | None = None,
    *,
    shares: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    seed: int = 0,
    metric: str = "l2",
    same_items: bool = False,
    ks: Sequence[int] = (1, 5),
    progress: bool = True,
) -> BackfillingCurve:
    """How retrieval changes while the gallery is backfilled row by row in random order.

    At share s the gallery holds round(s * m) rows of ``new_gallery``, the others still of ``old_gallery``: the mixed
    gallery that a running system searches (Ramanujan et al., CVPR 2022, section 4; the random order is theirs).

    Args:
        queries: (n, d) in the new space.
        old_gallery: (m, d), what stands there before: comparable with the queries (h(old), or BCT's old rows).
        new_gallery: (m, d), what replaces it.
        shares: ascending or not, each in [0, 1].
        seed: of the random order.
        Others: as :func:`evaluate`.
    """
    from fct.rows import rows_of

    old, new = rows_of(old_gallery, "old_gallery"), rows_of(new_gallery, "new_gallery")
    if (old.n, old.d) != (new.n, new.d):
        raise ValueError(f"new_gallery: expected {(old.n, old.d)} like old_gallery, got {(new.n, new.d)}")
    check_seed(seed)
    given = check_items(shares, "shares", "shares of the gallery that are new")
    shares = [check_share(share, "shares", ends=True) for share in given]
    order = np.random.default_rng(seed).permutation(old.n)
    old_values, new_values = old.float32(), new.float32()
    results = []
    for share in shares:
        mixed = old_values.copy() if isinstance(old_values, np.ndarray) else old_values.clone()
        part = order[: round(share * old.n)]
        mixed[part] = new_values[part]
        results.append(
            evaluate(
                queries,
                mixed,
                query_labels,
                gallery_labels,
                metric=metric,
                same_items=same_items,
                ks=ks,
                bootstrap=0,
                progress=progress,
            )
        )
    return BackfillingCurve(tuple(float(s) for s in shares), tuple(results))

"""nDCG@k, MRR and recall@k of rankings against judgements, as trec_eval defines them, and their paired bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from fct.checks import check_items, check_mapping, check_scores, check_seed, check_share, check_whole, shown

__all__ = ["QueryMeasures", "measure_rankings", "paired_interval"]

Floats = npt.NDArray[np.float64]
MOST_RESAMPLES = 10_000_000
MEASURES = ("ndcg", "mrr", "recall")


@dataclass(frozen=True, slots=True)
class QueryMeasures:
    """Measures of each query, in [0, 1]; the means are :meth:`mean`.

    ndcg: discounted gain of the k first, over that of the best order. mrr: 1 / rank of the first relevant among the k
    first, 0 where there is none. recall: share of the relevant items among the k first. Each (n,) float64.
    """

    k: int
    ndcg: Floats
    mrr: Floats
    recall: Floats

    def mean(self, name: str = "ndcg") -> float:
        """Mean over queries of "ndcg", "mrr" or "recall"; NaN without a query."""
        values: Floats = getattr(self, name)
        return float(values.mean()) if len(values) else float("nan")


def measure_rankings(
    rankings: Sequence[Sequence[str]], relevant: Sequence[Mapping[str, int]], *, k: int = 10
) -> QueryMeasures:
    """Measures of rankings against what is relevant.

    Args:
        rankings: for each query the ids of the items found, best first; at least k of them where the gallery has k.
        relevant: for each query the relevant items and their grades, above 0; none may be empty.
        k: how many of the first count.

    Returns:
        QueryMeasures. The gain of an item is its grade and the discount 1 / log2(rank + 1), as in trec_eval's ndcg_cut
        and in ranx's ndcg; the ideal counts every relevant item, in the gallery or not.

    Raises:
        ValueError: lists of different lengths, a query without a relevant item, an item found twice.

    Source: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", ACM TOIS 20(4), 2002.

    Examples:
        >>> from fct.judging import measure_rankings
        >>> found = measure_rankings([["a", "b", "c"]], [{"b": 1}])
        >>> found.mean("mrr"), round(found.mean("ndcg"), 3)
        (0.5, 0.631)
    """
    k = check_whole(k, "k", 1, 1_000_000)
    lists = check_items(rankings, "rankings", "a list of ids for each query")
    maps = check_items(relevant, "relevant", "a mapping of ids to grades for each query")
    if len(lists) != len(maps):
        raise ValueError(f"relevant: expected one entry for each of {len(lists)} rankings, got {len(maps)}")
    discount = 1 / np.log2(np.arange(2, k + 2))
    rows = np.zeros((len(lists), 3))
    for i, (ranking, given) in enumerate(zip(lists, maps, strict=True)):
        check_mapping(given, "relevant", "a mapping of ids to grades for each query")
        wanted = cast("Mapping[object, int]", given)
        if not wanted or not all(isinstance(g, (int, np.integer)) and g > 0 for g in wanted.values()):
            raise ValueError(f"relevant: expected items with grades above 0 for query {i}, got {shown(dict(wanted))}")
        first = check_items(ranking, "rankings", "a list of ids for each query")[:k]
        if len(set(first)) < len(first):
            raise ValueError(f"rankings: expected each item once, query {i} has some twice")
        gains = np.array([wanted.get(item, 0) for item in first], dtype=np.float64)
        best = np.sort(np.fromiter(wanted.values(), np.float64))[::-1][:k]
        hits = np.flatnonzero(gains)
        rows[i, 0] = gains @ discount[: len(gains)] / (best @ discount[: len(best)])
        rows[i, 1] = 1 / (hits[0] + 1) if len(hits) else 0.0
        rows[i, 2] = len(hits) / len(wanted)
    return QueryMeasures(k, *np.ascontiguousarray(rows.T))


def paired_interval(
    values: npt.ArrayLike, others: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of mean(values - others) over the same queries, resampled in pairs.

    Raises:
        ValueError: arrays of different lengths, empty, or not of finite numbers.

    Examples:
        >>> import numpy as np
        >>> from fct.judging import paired_interval
        >>> paired_interval(np.ones(30), np.zeros(30))
        (1.0, 1.0)
    """
    kinds = "biuf"
    values, others = (
        check_scores(x, name, "one a query", kinds=kinds) for x, name in ((values, "values"), (others, "others"))
    )
    if values.shape != others.shape or not len(values):
        raise ValueError(f"others: expected {values.shape}, as values, at least one, got {others.shape}")
    check_share(confidence, "confidence")
    check_whole(resamples, "resamples", 1, MOST_RESAMPLES)
    rng = np.random.default_rng(check_seed(seed))
    difference, n = values - others, len(values)
    # Multinomial counts are the resamples; in blocks, so that memory stays small with many queries.
    means = np.empty(resamples)
    block = max(1, 4_000_000 // n)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        means[start : start + count] = rng.multinomial(n, np.full(n, 1 / n), size=count) @ difference / n
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)

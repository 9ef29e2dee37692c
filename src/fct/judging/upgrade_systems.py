"""The systems between which an upgrade is decided, each answering the same judged queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fct.checks import (
    check_choice,
    check_flag,
    check_items,
    check_kind,
    check_mapping,
    check_seed,
    check_share,
    check_whole,
    shown,
)
from fct.judging.judgements import Judgements, id_text
from fct.judging.ranking_measures import MOST_RESAMPLES, QueryMeasures, measure_rankings, paired_interval
from fct.judging.upgrade_verdict import Difference, SystemResult, UpgradeVerdict, decide
from fct.rows import rows_of
from fct.search import topk
from fct.spaces import METRICS

__all__ = ["UpgradeQueries", "judge_upgrade"]

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
TrueVectors = Callable[[Rows], Floats]
_ALPHAS = np.linspace(0.1, 0.9, 9)
_LEAST_OF_A_SLICE = 10
_CANDIDATES = ("mapped", "mapped + rerank", "fused")


@dataclass(frozen=True, eq=False)
class UpgradeQueries:
    """Queries of your own, embedded by both models.

    ids: (n,), as the judgements name them. old: (n, d_old). new: (n, d_new).
    slices: "language" -> (n,) values; gains are reported for each value that ten queries have.

    Raises:
        ValueError: columns of different lengths, an id given twice.
    """

    ids: Sequence[object]
    old: Floats
    new: Floats
    slices: Mapping[str, Sequence[object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _ids(self.ids, "queries.ids"))
        n = len(self.ids)
        check_mapping(self.slices, "queries.slices", 'a mapping of names to values, {"language": [...]}')
        for name in ("old", "new"):
            object.__setattr__(self, name, rows_of(getattr(self, name), f"queries.{name}", n=n).float32())
        slices = {
            name: check_items(values, f"queries.slices[{name!r}]", f"{n} values, one a query")
            for name, values in self.slices.items()
        }
        for name, values in slices.items():
            if len(values) != n:
                raise ValueError(f"queries.slices[{name!r}]: expected {n} values, got {len(values)}")
        object.__setattr__(self, "slices", slices)

    def take(self, rows: Sequence[int]) -> UpgradeQueries:
        slices = {name: [values[row] for row in rows] for name, values in self.slices.items()}
        return UpgradeQueries([self.ids[row] for row in rows], self.old[rows], self.new[rows], slices)


def judge_upgrade(
    queries: UpgradeQueries,
    judgements: Judgements,
    item_ids: Sequence[object],
    gallery_old: Floats,
    mapped: Floats,
    *,
    true_vectors: Floats | TrueVectors | None = None,
    old_metric: str = "cosine",
    new_metric: str = "cosine",
    candidate: str = "mapped",
    fused: bool = True,
    depth: int = 200,
    k: int = 10,
    margin: float = 0.0,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> UpgradeVerdict:
    """Compares what runs today with what would, on queries and judgements of your own: go, no-go or inconclusive.

    Overlap between documents (recall@10 of mapped against true vectors) ranks one h against another well, and decides
    badly: what counts is what queries find.

    Args:
        queries: embedded by both models. judgements: their relevant items.
        item_ids: (m,) of the gallery's rows. gallery_old: (m, d_old). mapped: (m, d_new), h's output.
        true_vectors: the new model's own vectors: (m, d_new), or a function from (j,) row numbers to (j, d_new); for
            "mapped + rerank", and where all are given for "new/new", the ceiling.
        old_metric, new_metric: of each space: "l2", "ip" or "cosine".
        candidate: the system that would go into service: "mapped", "mapped + rerank" or "fused".
        fused: measure a search over both spaces at once, too: nine searches.
        depth: how many of the nearest mapped rows are ranked again by their true vectors.
        k: of nDCG@k, MRR@k and recall@k. margin: the loss of nDCG, in [0, 1], that you would accept for other gains.
        confidence, resamples, seed: of the paired bootstrap over queries.

    Returns:
        UpgradeVerdict. "fused" searches old and mapped vectors at once. The weight of the new one is chosen on the
        other half of the queries, so that no query is measured with a weight that it helped to choose.

    Raises:
        ValueError: arrays that do not fit, ids given twice, a candidate that cannot be measured, no judged query.

    Examples:
        >>> import numpy as np
        >>> from fct.judging import Judgements, UpgradeQueries, judge_upgrade
        >>> rng = np.random.default_rng(0)
        >>> new = rng.standard_normal((40, 8)).astype(np.float32)
        >>> old = rng.standard_normal((40, 4)).astype(np.float32)
        >>> ids = [f"d{i}" for i in range(40)]
        >>> queries = UpgradeQueries(ids, rng.standard_normal((40, 4)).astype(np.float32), new + 0.01)
        >>> judge_upgrade(queries, Judgements.of(ids, ids, [1] * 40), ids, old, new).word
        'go'
    """
    check_kind(queries, "queries", UpgradeQueries, "fct.UpgradeQueries")
    check_kind(judgements, "judgements", Judgements, "fct.Judgements")
    check_choice(old_metric, "old_metric", METRICS)
    check_choice(new_metric, "new_metric", METRICS)
    check_choice(candidate, "candidate", _CANDIDATES)
    check_flag(fused, "fused")
    check_whole(k, "k", 1)
    check_whole(depth, "depth", k)
    check_share(margin, "margin", ends=True)
    check_share(confidence, "confidence")
    check_whole(resamples, "resamples", 1, MOST_RESAMPLES)
    check_seed(seed)
    gallery = _Gallery.checked(item_ids, gallery_old, mapped, queries, true_vectors, (old_metric, new_metric))
    counted, without_judgement, without_relevant = _judged(queries, judgements)
    asked = queries.take(counted)
    given = set(queries.ids)
    found = gallery.answers(asked, judgements, k, depth=depth, fused=fused, seed=seed)
    if candidate not in found:
        able = [name for name in found if name in _CANDIDATES]
        raise ValueError(f"candidate: expected one of {', '.join(able)}, got {candidate!r}")
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    results = tuple(_result(name, *found[name], found["old/old"][0], asked, options) for name in found)
    by_name = {result.name: result for result in results}
    word, reason = decide(by_name[candidate], by_name.get("new/new"), margin)
    return UpgradeVerdict(
        word,
        reason,
        candidate,
        results,
        queries=len(counted),
        without_judgement=without_judgement,
        without_relevant=without_relevant,
        unknown_queries=tuple(query for query in judgements.queries if query not in given),
        unknown_items=judgements.unknown_items(gallery.ids),
    )


@dataclass(frozen=True, eq=False)
class _Gallery:
    """The rows that every system searches. true: the new model's own vectors of all, or what gives some of them."""

    ids: list[str]
    old: Floats
    new: Floats
    true: Floats | TrueVectors | None
    old_metric: str
    new_metric: str

    @classmethod
    def checked(
        cls, ids: Sequence[object], old: Floats, mapped: Floats, queries: UpgradeQueries,
        true: Floats | TrueVectors | None, metrics: tuple[str, str],
    ) -> _Gallery:  # fmt: skip
        items = _ids(ids, "item_ids")
        n, why = len(items), "to match item_ids"
        d_old, d_new = queries.old.shape[1], queries.new.shape[1]
        olds = rows_of(
            old, "gallery_old", n=n, n_why=why, d=d_old, d_why="to match queries.old", allow_empty=False
        ).float32()
        news = rows_of(mapped, "mapped", n=n, n_why=why, d=d_new, d_why="to match queries.new").float32()
        if true is not None and not callable(true):
            true = rows_of(true, "true_vectors", n=n, n_why=why, d=d_new, d_why="to match mapped").float32()
        return cls(items, olds, news, true, *metrics)

    def answers(
        self, asked: UpgradeQueries, judgements: Judgements, k: int, *, depth: int, fused: bool, seed: int
    ) -> dict[str, tuple[QueryMeasures, str]]:
        """What each system that can be measured finds: its name -> (measures, a note)."""
        relevant = [judgements.relevant(str(query)) for query in asked.ids]

        def measured(rows: Rows) -> QueryMeasures:
            return measure_rankings([[self.ids[row] for row in ranking if row >= 0] for ranking in rows], relevant, k=k)

        found = {
            "old/old": (measured(_nearest(asked.old, self.old, k, self.old_metric)), ""),
            "mapped": (measured(_nearest(asked.new, self.new, k, self.new_metric)), ""),
        }
        if self.true is not None:
            rows = _reranked(asked.new, self.new, self.true, depth, k, self.new_metric)
            found["mapped + rerank"] = (measured(rows), f"depth {min(depth, len(self.ids))}")
        if fused:
            both = _Fused(self.old, self.new, self.old_metric, self.new_metric)
            tried = [measured(both.search(asked.old, asked.new, alpha, k)) for alpha in _ALPHAS]
            found["fused"] = _cross_fitted(tried, seed)
        if self.true is not None and not callable(self.true):
            found["new/new"] = (measured(_nearest(asked.new, self.true, k, self.new_metric)), "")
        return found


def _ids(ids: Sequence[object], name: str) -> list[str]:
    out = []
    for row, one in enumerate(check_items(ids, name, "ids, one a row")):
        text = id_text(one)
        if text is None:
            raise ValueError(f"{name}: expected an id for each row, got {shown(one)} in row {row}")
        out.append(text)
    if len(set(out)) < len(out):
        seen: set[str] = set()
        twice = next(i for i in out if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise ValueError(f"{name}: expected each id once, got {twice!r} twice")
    return out


def _judged(queries: UpgradeQueries, judgements: Judgements) -> tuple[list[int], int, int]:
    """(rows of the queries that count, how many nobody judged, how many have nothing relevant)."""
    counted, nobody, nothing = [], 0, 0
    for row, query in enumerate(queries.ids):
        if str(query) not in judgements.grades:
            nobody += 1
        elif judgements.relevant(str(query)):
            counted.append(row)
        else:
            nothing += 1
    if not counted:
        raise ValueError(
            f"judgements: expected a relevant item for at least one of {len(queries.ids)} queries, got none: {nobody} "
            f"were not judged, {nothing} have no relevant item; are the ids those of the queries?"
        )
    return counted, nobody, nothing


def _nearest(queries: Floats, gallery: Floats, k: int, metric: str) -> Rows:
    return np.asarray(topk(queries, gallery, min(k, len(gallery)), metric=metric, progress=False).indices)


def _reranked(
    queries: Floats, mapped: Floats, true_vectors: Floats | TrueVectors, depth: int, k: int, metric: str
) -> Rows:
    """The k nearest by true vectors among the ``depth`` nearest by mapped ones."""
    near = _nearest(queries, mapped, depth, metric)
    out = np.full((len(queries), min(k, near.shape[1])), -1, np.int64)
    for i, rows in enumerate(near):
        rows = np.sort(rows)  # so that ties go to the lower row, as everywhere
        vectors = true_vectors(rows) if callable(true_vectors) else true_vectors[rows]
        vectors = rows_of(vectors, "true_vectors", n=len(rows), d=mapped.shape[1], d_why="to match mapped").float32()
        out[i] = rows[_nearest(queries[i : i + 1], vectors, k, metric)[0]]
    return out


class _Fused:
    """One search over (1 - alpha) of the old score and alpha of the new, exact, as an inner product.

    A squared distance is a constant of the query less 2 q.g - |g|^2, so that the length of such a row is one further
    coordinate, which the query weights by minus the space's share.
    """

    def __init__(self, old: Floats, new: Floats, old_metric: str, new_metric: str) -> None:
        self._metrics = (old_metric, new_metric)
        self._gallery = np.concatenate([*_stored(old, old_metric), *_stored(new, new_metric)], axis=1)

    def search(self, old: Floats, new: Floats, alpha: float, k: int) -> Rows:
        asked = [*_asked(old, self._metrics[0], 1 - alpha), *_asked(new, self._metrics[1], alpha)]
        return _nearest(np.concatenate(asked, axis=1), self._gallery, k, "ip")


def _stored(rows: Floats, metric: str) -> list[Floats]:
    if metric == "l2":
        return [rows, (rows.astype(np.float64) ** 2).sum(1, keepdims=True).astype(np.float32)]
    return [_unit(rows) if metric == "cosine" else rows]


def _asked(rows: Floats, metric: str, share: float) -> list[Floats]:
    weight = np.float32(share)
    if metric == "l2":
        return [2 * weight * rows, np.full((len(rows), 1), -weight)]
    return [weight * (_unit(rows) if metric == "cosine" else rows)]


def _unit(rows: Floats) -> Floats:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    out: Floats = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return out


def _cross_fitted(tried: Sequence[QueryMeasures], seed: int) -> tuple[QueryMeasures, str]:
    """Each half of the queries with the weight that is best for the other half."""
    ndcg = np.stack([measures.ndcg for measures in tried])
    n = ndcg.shape[1]
    first = np.zeros(n, dtype=bool)
    first[np.random.default_rng(seed).permutation(n)[: n // 2]] = True
    best = [len(tried) - 1 - int(np.argmax(ndcg[::-1, half].mean(1))) if half.any() else -1 for half in (first, ~first)]
    pick = np.where(first, best[1], best[0])
    rows = {name: np.stack([getattr(m, name) for m in tried])[pick, np.arange(n)] for name in ("ndcg", "mrr", "recall")}
    weights = sorted({f"{_ALPHAS[i]:.1f}" for i in best})
    return QueryMeasures(tried[0].k, **rows), f"weight of the new {' and '.join(weights)}"


def _result(
    name: str, measures: QueryMeasures, note: str, old: QueryMeasures, queries: UpgradeQueries, how: Mapping[str, float]
) -> SystemResult:
    if name == "old/old":
        return SystemResult(name, measures)

    def gain(rows: npt.NDArray[np.bool_]) -> Difference:
        a, b = measures.ndcg[rows], old.ndcg[rows]
        low, high = paired_interval(
            a, b, confidence=how["confidence"], resamples=int(how["resamples"]), seed=int(how["seed"])
        )
        return Difference(int(rows.sum()), float((a - b).mean()), low, high)

    slices = {}
    for what, values in queries.slices.items():
        column = np.array([str(value) for value in values])
        for value in np.unique(column):
            if (rows := column == value).sum() >= _LEAST_OF_A_SLICE:
                slices[f"{what}={value}"] = gain(rows)
    return SystemResult(name, measures, gain(np.ones(len(measures.ndcg), dtype=bool)), slices, note)

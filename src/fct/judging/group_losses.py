"""Who loses by an upgrade: per class, group or slice before and after, with what chance alone would show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from fct.checks import check_choice, check_scores, check_whole
from fct.metrics import RetrievalMetrics
from fct.rows import check_labels
from fct.terminal import printable
from fct.types import JsonDict

__all__ = ["SHOWN", "GroupChange", "GroupLosses", "who_loses"]

Floats = npt.NDArray[np.float64]
SHOWN = 20
"""Groups that are printed; the others are counted, and in :meth:`GroupLosses.to_dict`."""


@dataclass(frozen=True, slots=True)
class GroupChange:
    """One group before and after. Means of the measure over its queries.

    negative_flips, positive_flips: shares of the group's queries that score less, and more, after than before.
    interval: of the change, so wide that all groups' together hold with 95 %; None where the group has too few queries.
    """

    name: str
    queries: int
    before: float
    after: float
    negative_flips: float
    positive_flips: float
    interval: tuple[float, float] | None

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def loses(self) -> bool:
        """Whether chance alone is no explanation."""
        return self.interval is not None and self.interval[1] < 0


@dataclass(frozen=True, slots=True)
class GroupLosses:
    """What :func:`who_loses` found: the groups, the greatest loss first.

    gap_before, gap_after: the mean over all queries minus the worst group's mean, among groups of enough queries; None
        where there is none. left_out: queries that have no value before or after.
    """

    measure: str
    groups: tuple[GroupChange, ...]
    overall: GroupChange
    gap_before: float | None
    gap_after: float | None
    left_out: int

    @property
    def losers(self) -> tuple[GroupChange, ...]:
        """The groups that lose beyond what chance explains."""
        return tuple(group for group in self.groups if group.loses)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        rows = [{**asdict(g), "change": g.change, "loses": g.loses} for g in (self.overall, *self.groups)]
        return {
            "measure": self.measure,
            "overall": rows[0],
            "groups": rows[1:],
            "gap_before": self.gap_before,
            "gap_after": self.gap_after,
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        head = f"{self.measure} %, before -> after; {self.overall.queries:,} queries in {len(self.groups)} groups"
        lines = [head, *(_line(group) for group in (self.overall, *self.groups[:SHOWN]))]
        if len(self.groups) > SHOWN:
            lines.append(f"... and {len(self.groups) - SHOWN:,} more groups, which lose less or gain")
        if self.gap_before is not None and self.gap_after is not None:
            lines.append(
                f"worst group behind the mean: {100 * self.gap_before:.1f} -> {100 * self.gap_after:.1f} points"
            )
        if self.left_out:
            lines.append(f"{self.left_out:,} more queries have no match before or after and were left out")
        return "\n".join(lines)


def who_loses(
    before: RetrievalMetrics | Sequence[float] | npt.NDArray[np.generic],
    after: RetrievalMetrics | Sequence[float] | npt.NDArray[np.generic],
    groups: Sequence[object] | npt.NDArray[np.generic],
    *,
    measure: str = "cmc",
    k: int = 1,
    least: int = 10,
) -> GroupLosses:
    """Each group's quality before and after an upgrade, its negative flips, and the worst group's gap.

    Args:
        before, after: of :func:`fct.evaluate` for the same queries in the same order; or (n,) numbers or booleans, a
            query's score each, the more the better (its recall@10, its nDCG): no labels are needed for those. NaN is no
            value.
        groups: (n,) the query's class, language, shop, ...: whole numbers or text.
        measure: of RetrievalMetrics: "cmc" (whether a match is among the first k) or "map" (the average precision).
        k: of "cmc".
        least: groups of fewer queries have no interval and do not count for the gap; they are listed all the same.

    Returns:
        GroupLosses. A negative flip is a query that scores less after than before; with "cmc" one that was right and is
        wrong (Yan et al., "Positive-Congruent Training", CVPR 2021). The intervals are paired, and wide enough for as
        many groups as there are (Bonferroni): where no group loses none is called a loser, 19 times in 20.

    Raises:
        ValueError: other lengths, no query with a value. TypeError: one side RetrievalMetrics, the other not.

    Examples:
        >>> import fct
        >>> found = fct.who_loses([1, 1, 1, 0], [1, 1, 0, 1], ["a", "a", "b", "b"])
        >>> [(g.name, g.before, g.after, g.negative_flips) for g in found.groups]
        [('b', 0.5, 0.5, 0.5), ('a', 1.0, 1.0, 0.0)]
    """
    check_choice(measure, "measure", ("cmc", "map"))
    check_whole(k, "k", 1)
    check_whole(least, "least", 2)
    if isinstance(before, RetrievalMetrics) != isinstance(after, RetrievalMetrics):
        kind = type(after if isinstance(before, RetrievalMetrics) else before).__name__
        raise TypeError(f"before, after: expected RetrievalMetrics twice or scores twice, got {kind} beside the other")
    name = "score" if not isinstance(before, RetrievalMetrics) else "mAP" if measure == "map" else f"CMC top-{k}"
    first, second = _scores(before, "before", measure, k), _scores(after, "after", measure, k)
    if len(first) != len(second):
        raise ValueError(f"after: expected {len(first)} queries, as before, got {len(second)}")
    labels = check_labels(groups, "groups", len(first))
    counted = ~(np.isnan(first) | np.isnan(second))
    if not counted.any():
        raise ValueError("before, after: expected a query with a value in both, got none")
    first, second, labels = first[counted], second[counted], labels[counted]
    names, member = np.unique(labels, return_inverse=True)
    member = member.ravel()
    sizes = np.bincount(member)
    level = 0.05 / max(1, int((sizes >= least).sum()))
    unit = float(np.abs(second - first).max()) or 1.0

    def change(title: str, rows: npt.NDArray[np.bool_], share: float) -> GroupChange:
        a, b = first[rows], second[rows]
        interval = _interval(b - a, unit, share) if len(a) >= least else None
        return GroupChange(
            title, len(a), float(a.mean()), float(b.mean()), float((b < a).mean()), float((b > a).mean()), interval
        )

    found = [change(_text(title), member == i, level) for i, title in enumerate(names.tolist())]
    overall = change("all", np.ones(len(first), dtype=bool), 0.05)
    large = [group for group in found if group.queries >= least]
    return GroupLosses(
        name,
        tuple(sorted(found, key=lambda g: (g.change, -g.negative_flips, g.name))),
        overall,
        overall.before - min(g.before for g in large) if large else None,
        overall.after - min(g.after for g in large) if large else None,
        int((~counted).sum()),
    )


def _text(title: object) -> str:
    return title.decode("utf-8", "replace") if isinstance(title, bytes) else str(title)


def _scores(given: object, name: str, measure: str, k: int) -> Floats:
    if isinstance(given, RetrievalMetrics):
        if measure == "map":
            return np.asarray(given.average_precision, np.float64)
        return np.where(given.first_match < 0, np.nan, given.first_match < k)
    return check_scores(given, name, "a score each", kinds="biuf", gaps=True)


def _interval(gains: Floats, unit: float, share: float) -> tuple[float, float]:
    """Of the mean gain; ``share`` is what chance may put outside. unit: the largest gain or loss of any query.

    Two queries are added, one that gains and one that loses a unit: without them a group whose queries all change alike
    would have an interval of no width. Source: Agresti and Min, "Simple improved confidence intervals for comparing
    matched proportions", Statistics in Medicine 2005.
    """
    seen = np.concatenate([gains, [unit, -unit]])
    reach = NormalDist().inv_cdf(1 - share / 2) * float(seen.std(ddof=1)) / len(seen) ** 0.5
    return float(seen.mean() - reach), float(seen.mean() + reach)


def _line(g: GroupChange) -> str:
    span = "" if g.interval is None else f" ({100 * g.interval[0]:+.1f} to {100 * g.interval[1]:+.1f})"
    word = ", loses" if g.loses else ""
    return (
        f"{printable(g.name)}: {100 * g.before:.1f} -> {100 * g.after:.1f}, {100 * g.change:+.1f}{span}, "
        f"{100 * g.negative_flips:.1f} % negative flips, {g.queries:,} queries{word}"
    )

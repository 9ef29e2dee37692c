"""One sentence: is the upgrade worth making?"""

from __future__ import annotations

from dataclasses import dataclass

from fct.report.table import ResultTable
from fct.types import JsonDict

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """migrate: whether to. sentence: why, for people."""

    migrate: bool
    sentence: str

    def to_dict(self) -> JsonDict:
        return {"migrate": self.migrate, "sentence": self.sentence}


def judge(table: ResultTable, candidate: str, *, lead: tuple[float, float] | None = None) -> Verdict:
    """Whether searching the mapped gallery with the new model beats what runs today.

    It has to win on CMC top-1 and on mAP: mAP alone flatters a smooth map.

    Args:
        table: with the rows floor (old/old), ceiling (new/new) and ``candidate``.
        candidate: the row that would go into service.
        lead: a confidence interval of the candidate's mAP minus old/old's, over queries; one that reaches down to
            zero means that the gain cannot be told from chance.

    Examples:
        >>> from fct.report import ResultTable, Row, judge
        >>> rows = [Row("old/old", .5, .7, .4, .1), Row("new/old", .4, .6, .3, .1), Row("new/new", .9, .95, .8, 1.)]
        >>> judge(ResultTable(rows), "new/old").migrate
        False
    """
    old, new, row = table.row(table.floor), table.row(table.ceiling), table.row(candidate)
    top1 = f"CMC top-1 {100 * old.cmc1:.1f} → {100 * row.cmc1:.1f}"
    mean = f"mAP {100 * old.map:.1f} → {100 * row.map:.1f}"
    if row.cmc1 <= old.cmc1 or row.map <= old.map:
        worse = [text for text, bad in ((top1, row.cmc1 <= old.cmc1), (mean, row.map <= old.map)) if bad]
        return Verdict(
            False, f"Do not migrate: {candidate} does not beat {table.floor}, what you have today ({', '.join(worse)})."
        )
    if lead is not None and lead[0] <= 0:
        return Verdict(
            False,
            f"Do not migrate: the gain of {candidate} over {table.floor} cannot be told from chance "
            f"({mean}, between {100 * lead[0]:+.1f} and {100 * lead[1]:+.1f} points).",
        )
    shares = [
        f"{100 * share:.0f} % of the {name} gap"
        for name, share in (("top-1", table.gap_closed(candidate, "cmc1")), ("mAP", table.gap_closed(candidate, "map")))
        if share is not None
    ]
    closes = f" and closes {' and '.join(shares)} to {table.ceiling}" if shares else ""
    rest = (
        f"; recomputing every embedding from the images would give {100 * new.cmc1:.1f} and {100 * new.map:.1f}"
        if new.cmc1 > row.cmc1 or new.map > row.map
        else ""
    )
    return Verdict(True, f"Migrate: {candidate} beats {table.floor} ({top1}, {mean}){closes}{rest}.")

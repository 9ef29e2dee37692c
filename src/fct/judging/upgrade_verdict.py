"""One of three words, go, no-go or inconclusive, from systems that answered the same queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fct.judging.ranking_measures import MEASURES, QueryMeasures

__all__ = ["LEAST_QUERIES", "Difference", "SystemResult", "UpgradeVerdict", "Word", "decide"]

Word = Literal["go", "no-go", "inconclusive"]
LEAST_QUERIES = 30  # with fewer, a bootstrap interval is too narrow to be believed


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean nDCG of a system minus old/old's over the same queries, and its bootstrap interval."""

    queries: int
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


@dataclass(frozen=True, slots=True)
class SystemResult:
    """How one system answered: its measures by query, and what it gains over old/old, in all and by slice.

    gain: None for old/old itself. slices: "name=value" -> the gain among those queries. note: what was chosen for it.
    """

    name: str
    measures: QueryMeasures = field(repr=False)
    gain: Difference | None = None
    slices: Mapping[str, Difference] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True)
class UpgradeVerdict:
    """What :func:`fct.judging.judge_upgrade` found.

    word: "go", "no-go" or "inconclusive"; reason: why, in a sentence or two. candidate: the system it is about.
    results: every system that could be measured. queries: how many were counted.
    without_judgement, without_relevant: queries left out, since nobody judged them or nothing was relevant.
    unknown_queries: judged, but not among the queries given. unknown_items: judged relevant, but not in the gallery; no
    system can find them, and they count against all alike.
    """

    word: Word
    reason: str
    candidate: str
    results: tuple[SystemResult, ...]
    queries: int
    without_judgement: int = 0
    without_relevant: int = 0
    unknown_queries: tuple[str, ...] = ()
    unknown_items: tuple[str, ...] = ()

    def result(self, name: str) -> SystemResult:
        """The system called ``name``. Raises KeyError, naming those that there are."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"name: expected one of {', '.join(r.name for r in self.results)}, got {name!r}")

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, without the figures of each query."""
        return {
            "word": self.word,
            "reason": self.reason,
            "candidate": self.candidate,
            "queries": self.queries,
            "left_out": {
                "without_judgement": self.without_judgement,
                "without_relevant": self.without_relevant,
                "unknown_queries": len(self.unknown_queries),
                "unknown_items": len(self.unknown_items),
            },
            "systems": [
                {
                    "name": r.name,
                    **{f"{name}@{r.measures.k}": r.measures.mean(name) for name in MEASURES},
                    "gain": None if r.gain is None else _plain(r.gain),
                    "slices": {name: _plain(gain) for name, gain in r.slices.items()},
                    "note": r.note,
                }
                for r in self.results
            ],
        }

    def __str__(self) -> str:
        """The verdict and its table, as Markdown."""
        k = self.results[0].measures.k if self.results else 10
        lines = [
            f"**{self.word}**: {self.reason}",
            "",
            f"| query/gallery | nDCG@{k} | MRR@{k} | recall@{k} | nDCG against old/old |",
            "|---|--:|--:|--:|--:|",
        ]
        for r in self.results:
            figures = " | ".join(f"{100 * r.measures.mean(name):.1f}" for name in MEASURES)
            note = f" ({r.note})" if r.note else ""
            lines.append(f"| {r.name}{note} | {figures} | {r.gain if r.gain is not None else '–'} |")
        return "\n".join([*lines, "", self._counted()])

    def _counted(self) -> str:
        parts = [f"{self.queries} queries"]
        if self.without_judgement:
            parts.append(f"{self.without_judgement} left out that nobody judged")
        if self.without_relevant:
            parts.append(f"{self.without_relevant} left out without a relevant item")
        for ids, what in ((self.unknown_queries, "judged queries"), (self.unknown_items, "relevant items")):
            if ids:
                parts.append(f"{len(ids)} {what} not given ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})")
        return "; ".join(parts) + "."


def _plain(gain: Difference) -> dict[str, float]:
    return {"queries": gain.queries, "mean": gain.mean, "low": gain.low, "high": gain.high}


def decide(candidate: SystemResult, ceiling: SystemResult | None, margin: float) -> tuple[Word, str]:
    """(word, reason) for a system that would replace old/old, when a loss of ``margin`` of nDCG would be accepted."""
    gain = candidate.gain
    if gain is None:
        raise ValueError(f"candidate: expected a system that replaces old/old, got {candidate.name}")
    k = candidate.measures.k
    accepted = f", where a loss of {100 * margin:g} would be accepted" if margin else ""
    text = f"nDCG@{k} of {candidate.name} against old/old: {gain} over {gain.queries} queries{accepted}"
    if gain.queries < LEAST_QUERIES:
        few = f"fewer than {LEAST_QUERIES} judged queries ({gain.queries}) decide nothing"
        return "inconclusive", f"{few}. {text}."
    if gain.low > -margin:
        word: Word = "go"
    elif gain.high < -margin:
        word = "no-go"
    else:
        return "inconclusive", f"{text}: the interval holds both a gain and a loss; judge more queries."
    lose = sorted(name for name, part in candidate.slices.items() if part.high < -margin)
    if word == "go" and lose:
        text += f"; but worse for {', '.join(lose[:5])}{' and more' if len(lose) > 5 else ''}"
    if ceiling is not None and ceiling.gain is not None:
        text += f"; re-embedding everything: {ceiling.gain}"
    return word, text + "."

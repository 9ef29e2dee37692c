"""Is an upgrade worth making: relevance judgements, measures, the systems compared, and one of three words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fct.judging.judgements import Judgements, read_qrels
from fct.judging.ranking_measures import QueryMeasures, measure_rankings, paired_interval
from fct.judging.upgrade_systems import UpgradeQueries, judge_upgrade
from fct.judging.upgrade_verdict import SystemResult, UpgradeVerdict

if TYPE_CHECKING:
    from fct.judging.alternatives import Alternative, Comparison, compare_alternatives

__all__ = [
    "Alternative",
    "Comparison",
    "Judgements",
    "QueryMeasures",
    "SystemResult",
    "UpgradeQueries",
    "UpgradeVerdict",
    "compare_alternatives",
    "judge_upgrade",
    "measure_rankings",
    "paired_interval",
    "read_qrels",
]


def __getattr__(name: str) -> object:
    """What fits maps needs torch, which a worker that judges a gate does without."""
    if name in ("Alternative", "Comparison", "compare_alternatives"):
        from fct.judging import alternatives

        return getattr(alternatives, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

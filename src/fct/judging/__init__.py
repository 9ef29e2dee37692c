"""Is an upgrade worth making: relevance judgements, measures, the systems compared, and one of three words."""

from fct.judging.alternatives import Alternative, Comparison, compare_alternatives
from fct.judging.judgements import Judgements, read_qrels
from fct.judging.ranking_measures import QueryMeasures, measure_rankings, paired_interval
from fct.judging.upgrade_systems import UpgradeQueries, judge_upgrade
from fct.judging.upgrade_verdict import SystemResult, UpgradeVerdict

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

"""Forward Compatible Training: upgrade an embedding model without reading an image again.

The public API, and nothing else. Names load on first use, so that ``import fct`` costs no torch, no Triton and
no CUDA context; see ``docs/`` for guides.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fct.errors import (
    ArtifactError,
    BackendError,
    BackfillError,
    DeviceLostError,
    FctError,
    FctWarning,
    InUseError,
    MissingExtraError,
    QualityGateError,
    RejectLimitError,
    SpaceMismatchError,
    StoreError,
)
from fct.moved_modules import install as _install

if TYPE_CHECKING:
    from fct.arrow_mapper import ArrowMapper
    from fct.artifact.transformation import Transformation
    from fct.backfilling.plan import BackfillPlan, plan_backfill
    from fct.backfilling.run import BackfillReport, backfill
    from fct.backfilling.upgrading import UpgradingGallery
    from fct.backfilling.verify import VerifyReport, verify_gallery
    from fct.fit.layer_side_info import side_info_from
    from fct.fit.side_info import train_side_info
    from fct.fit.transformation_fit import fit_transformation
    from fct.info import build_info
    from fct.inspection import GalleryInspection, inspect_gallery
    from fct.judging.alternatives import Comparison, compare_alternatives
    from fct.judging.group_losses import GroupLosses, who_loses
    from fct.judging.judgements import Judgements, read_qrels
    from fct.judging.score_map import ScoreMap, fit_score_map, neighbour_scores
    from fct.judging.upgrade_systems import UpgradeQueries, judge_upgrade
    from fct.judging.upgrade_verdict import UpgradeVerdict
    from fct.metrics import RetrievalMetrics, evaluate
    from fct.mixed_gallery import evaluate_mixed
    from fct.packed_int4 import PackedInt4
    from fct.rerank_depth import RerankCurve, rerank_curve
    from fct.rows import ScaledInt8
    from fct.search import PreparedGallery, TopK, prepare_gallery, topk
    from fct.spaces import EmbeddingSpace
    from fct.transform import transform_batch

_install()

__version__ = "0.2.0"

# name -> the module that defines it
_PUBLIC = {
    "ArrowMapper": "fct.arrow_mapper",
    "BackfillPlan": "fct.backfilling.plan",
    "BackfillReport": "fct.backfilling.run",
    "UpgradingGallery": "fct.backfilling.upgrading",
    "VerifyReport": "fct.backfilling.verify",
    "backfill": "fct.backfilling.run",
    "plan_backfill": "fct.backfilling.plan",
    "verify_gallery": "fct.backfilling.verify",
    "EmbeddingSpace": "fct.spaces",
    "PackedInt4": "fct.packed_int4",
    "ScaledInt8": "fct.rows",
    "PreparedGallery": "fct.search",
    "RetrievalMetrics": "fct.metrics",
    "TopK": "fct.search",
    "Transformation": "fct.artifact.transformation",
    "Comparison": "fct.judging.alternatives",
    "compare_alternatives": "fct.judging.alternatives",
    "GroupLosses": "fct.judging.group_losses",
    "who_loses": "fct.judging.group_losses",
    "Judgements": "fct.judging.judgements",
    "ScoreMap": "fct.judging.score_map",
    "fit_score_map": "fct.judging.score_map",
    "neighbour_scores": "fct.judging.score_map",
    "UpgradeQueries": "fct.judging.upgrade_systems",
    "UpgradeVerdict": "fct.judging.upgrade_verdict",
    "GalleryInspection": "fct.inspection",
    "build_info": "fct.info",
    "inspect_gallery": "fct.inspection",
    "evaluate": "fct.metrics",
    "evaluate_mixed": "fct.mixed_gallery",
    "judge_upgrade": "fct.judging.upgrade_systems",
    "read_qrels": "fct.judging.judgements",
    "RerankCurve": "fct.rerank_depth",
    "rerank_curve": "fct.rerank_depth",
    "fit_transformation": "fct.fit.transformation_fit",
    "prepare_gallery": "fct.search",
    "side_info_from": "fct.fit.layer_side_info",
    "train_side_info": "fct.fit.side_info",
    "topk": "fct.search",
    "transform_batch": "fct.transform",
}

__all__ = [
    "ArrowMapper",
    "ArtifactError",
    "BackendError",
    "BackfillError",
    "BackfillPlan",
    "BackfillReport",
    "Comparison",
    "DeviceLostError",
    "EmbeddingSpace",
    "FctError",
    "FctWarning",
    "GalleryInspection",
    "GroupLosses",
    "InUseError",
    "Judgements",
    "MissingExtraError",
    "PackedInt4",
    "PreparedGallery",
    "QualityGateError",
    "RejectLimitError",
    "RerankCurve",
    "RetrievalMetrics",
    "ScaledInt8",
    "ScoreMap",
    "SpaceMismatchError",
    "StoreError",
    "TopK",
    "Transformation",
    "UpgradeQueries",
    "UpgradeVerdict",
    "UpgradingGallery",
    "VerifyReport",
    "backfill",
    "build_info",
    "compare_alternatives",
    "evaluate",
    "evaluate_mixed",
    "fit_score_map",
    "fit_transformation",
    "inspect_gallery",
    "judge_upgrade",
    "neighbour_scores",
    "plan_backfill",
    "prepare_gallery",
    "read_qrels",
    "rerank_curve",
    "side_info_from",
    "topk",
    "train_side_info",
    "transform_batch",
    "verify_gallery",
    "who_loses",
]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'fct' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(module), name)
    except ImportError as error:
        from fct.extras import explained

        raise explained(error, name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])

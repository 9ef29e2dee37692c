"""One warning, in one place: mapped rows meet the new model's own uncorrected, and what that was measured to cost."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fct.errors import FctWarning
from fct.spaces import EmbeddingSpace

if TYPE_CHECKING:
    from fct.artifact.transformation import Transformation

__all__ = ["warn_other_metric", "warn_uncorrected"]


def warn_uncorrected(transformation: Transformation | None, what: str, *, stacklevel: int = 3) -> bool:
    """Warns, with the measured loss, that mapped rows of ``what`` stand among true ones as h made them.

    Args:
        transformation: h, whose artifact holds the measurement; None where nobody has it.
        what: is searched, or written. stacklevel: as :func:`warnings.warn` has it, from here.

    Returns:
        False where the artifact's measurement says that nothing is lost: then nothing is said.

    Warns:
        FctWarning.
    """
    loss = _loss(transformation)
    if loss is None:
        return False
    text = f"{what}: mapped rows stand among true ones uncorrected, and crowd them out: {loss}"
    warnings.warn(text, FctWarning, stacklevel=stacklevel)
    return True


def warn_other_metric(
    space: EmbeddingSpace, metric: str, what: str, *, transformation: Transformation | None = None, stacklevel: int = 3
) -> bool:
    """Warns that a mixed space is compared as if it were plain: by a metric that its correction is not for.

    Args:
        space: as the gallery says it. metric: by which its rows are, or will be, compared. Others as
            :func:`warn_uncorrected` has them.

    Returns:
        False for a plain space, and for the space's own metric.

    Warns:
        FctWarning.
    """
    if space.mapped_length == 1.0 or metric == space.metric:
        return False
    undone = "which ignores the length of a row" if metric == "cosine" else "for which that length was not measured"
    loss = _loss(transformation)
    text = (
        f"{what}: mapped rows of {space.model_id!r} are {space.mapped_length:g} times as long as its own, so that they "
        f"may stand among them under {space.metric}; they are compared by {metric}, {undone}: use {space.metric}"
    )
    warnings.warn(f"{text}. As it is: {loss}" if loss else text, FctWarning, stacklevel=stacklevel)
    return True


def _loss(transformation: Transformation | None) -> str | None:
    """What the artifact measured, in words; None where it says that nothing is lost."""
    stored: Any = None if transformation is None else transformation.info.get("mixed")
    if not isinstance(stored, Mapping) or not stored.get("points"):
        return "how much that costs was not measured when h was fitted; fct.evaluate_mixed tells"
    worst = max(stored["points"], key=lambda p: float(p["corrected_recall"]) - float(p["recall"]))
    if worst["corrected_recall"] <= worst["recall"]:
        return None
    coordinate = (stored.get("correction") or {}).get("kind") == "coordinate"
    how = (
        "with one coordinate more (fct.mixed_gallery.add_coordinate), or under inner product"
        if coordinate
        else "with mapped rows written by --mixed (mixed=True)"
    )
    return (
        f"with {worst['true_share']:.0%} true rows recall@{stored['k']} is {worst['recall']:.3f} so, and "
        f"{worst['corrected_recall']:.3f} {how}"
    )

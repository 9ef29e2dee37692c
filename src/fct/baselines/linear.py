"""Linear maps from the old space to the new: orthogonal Procrustes and ridge regression."""

from __future__ import annotations

import numpy as np

from fct.artifact.transformation import Transformation
from fct.fit.linear_artifact import linear_transformation
from fct.fit.linear_map import LinearMap, nearest_rotation
from fct.fit.pairs import check_pairs
from fct.spaces import EmbeddingSpace
from fct.types import Floats, RowsLike

__all__ = ["fit_procrustes", "fit_ridge"]


def fit_procrustes(
    old: RowsLike, new: RowsLike, *, old_space: EmbeddingSpace | None = None, new_space: EmbeddingSpace | None = None
) -> Transformation:
    """The rotation (with mean shift) nearest to old -> new in least squares.

    Args:
        old, new: (n, d_old) and (n, d_new) rows of the same items. Where the dims differ the map is the nearest one
            with orthonormal rows or columns.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966,
    doi:10.1007/BF02289451.

    Examples:
        >>> import numpy as np
        >>> from fct.baselines import fit_procrustes
        >>> x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
        >>> fit_procrustes(x, x[:, ::-1].copy()).d_new
        4
    """
    x, y, mean_x, mean_y = _centred(old, new)
    return _linear(nearest_rotation(y.T @ x), mean_x, mean_y, "procrustes", old_space, new_space)


def fit_ridge(
    old: RowsLike,
    new: RowsLike,
    *,
    strength: float = 1e-3,
    old_space: EmbeddingSpace | None = None,
    new_space: EmbeddingSpace | None = None,
) -> Transformation:
    """The affine map of least squares with an L2 penalty of ``strength`` times the mean variance of old.

    Args: as :func:`fit_procrustes`; strength >= 0.

    Examples:
        >>> import numpy as np
        >>> from fct.baselines import fit_ridge
        >>> x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
        >>> fit_ridge(x, x @ np.ones((4, 2), np.float32)).d_new
        2
    """
    if not strength >= 0:
        raise ValueError(f"strength: expected a number of at least 0, got {strength!r}")
    x, y, mean_x, mean_y = _centred(old, new)
    gram = x.T @ x
    penalty = strength * np.trace(gram) / len(gram)
    weight = np.linalg.lstsq(gram + penalty * np.eye(len(gram)), x.T @ y, rcond=None)[0].T
    return _linear(weight, mean_x, mean_y, "ridge", old_space, new_space)


def _centred(old: RowsLike, new: RowsLike) -> tuple[Floats, Floats, Floats, Floats]:
    rows, _, target = check_pairs(old, None, new).loaded()
    x, y = rows.astype(np.float64), target.astype(np.float64)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    return x - mean_x, y - mean_y, mean_x, mean_y


def _linear(
    weight: Floats,
    mean_x: Floats,
    mean_y: Floats,
    name: str,
    old_space: EmbeddingSpace | None,
    new_space: EmbeddingSpace | None,
) -> Transformation:
    """y = weight (x - mean_x) + mean_y in h's form."""
    d_new, d_old = weight.shape
    return linear_transformation(
        LinearMap(name, weight, mean_y - weight @ mean_x),
        d_old=d_old,
        old_space=old_space or EmbeddingSpace("old", d_old),
        new_space=new_space or EmbeddingSpace("new", d_new),
        normalise=new_space is not None and new_space.normalised,
        info={"baseline": name},
    )

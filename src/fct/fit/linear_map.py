"""Linear maps from the old space to the new in closed form: ridge over a path of penalties, and Procrustes.

They are the floor that a fitted h has to reach, and the linear part of some.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fct.fit.pairs import Pairs
from fct.types import Floats

__all__ = ["PENALTIES", "LinearMap", "RidgePath", "inputs_of", "nearest_rotation", "procrustes_map"]

# Times the mean variance of a standardised input, which is 1.
PENALTIES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
_MOST_ROWS = 200_000  # more rows move a linear map no further
_CHUNK = 4_096


@dataclass(frozen=True, eq=False, slots=True)
class LinearMap:
    """``x @ weight.T + bias``; x is [old, side] side by side, or old alone.

    name: "ridge" or "procrustes", with what was chosen. weight: (d_new, d_in) float64. bias: (d_new,) float64.
    """

    name: str
    weight: Floats
    bias: Floats

    def __call__(self, old: Floats, side: Floats | None) -> Floats:
        """(n, d_new) float32 of (n, d_old) and (n, d_side) float32, or None."""
        out = old @ self.weight[:, : old.shape[1]].T.astype(np.float32)
        if side is not None and self.weight.shape[1] > old.shape[1]:
            out += side @ self.weight[:, old.shape[1] :].T.astype(np.float32)
        mapped: Floats = out + self.bias.astype(np.float32)
        return mapped


def inputs_of(old: Floats, side: Floats | None) -> Floats:
    """[old, side] side by side; old alone where side is None."""
    return old if side is None else np.concatenate([old, side], axis=1)


class RidgePath:
    """Ridge regression of new on standardised [old, side] for every penalty, from one eigendecomposition.

    The sums are float64 and taken chunk by chunk: the pairs need not fit in memory.
    """

    def __init__(self, pairs: Pairs, seed: int) -> None:
        sample = pairs.sample(_MOST_ROWS, seed)
        d_old, d_side, d_new = sample.dims
        d = d_old + (d_side if sample.side is not None else 0)
        gram, cross = np.zeros((d, d)), np.zeros((d, d_new))
        sums, targets, n = np.zeros(d), np.zeros(d_new), len(sample)
        shift: Floats | None = None
        for begin in range(0, n, _CHUNK):
            old, side, new = sample.take(slice(begin, begin + _CHUNK))
            x = inputs_of(old, side).astype(np.float64)
            if shift is None:  # near the mean, so that the sums lose no digits to it
                shift = x.mean(axis=0)
            x -= shift
            y = new.astype(np.float64)
            gram += x.T @ x
            cross += x.T @ y
            sums += x.sum(axis=0)
            targets += y.sum(axis=0)
        mean, self._target = sums / n, targets / n
        gram = gram / n - np.outer(mean, mean)
        cross = cross / n - np.outer(mean, self._target)
        assert shift is not None  # there are pairs
        self._mean = mean + shift
        deviation = np.sqrt(np.maximum(gram.diagonal(), 0))
        # What is constant has no scale of its own. Each array is its own judge: old and side may have other units.
        widest = np.concatenate([np.full(len(x), x.max(initial=0)) for x in np.split(deviation, [d_old])])
        self._scale = np.where(deviation > 1e-3 * widest, deviation, np.where(widest > 0, widest, 1.0))
        gram /= np.outer(self._scale, self._scale)
        cross /= self._scale[:, None]
        self._values, self._vectors = np.linalg.eigh(gram)
        self._values = np.maximum(self._values, 0)
        self._rotated = self._vectors.T @ cross

    def at(self, penalty: float) -> LinearMap:
        """The map of least squares plus ``penalty`` times the squared weights."""
        inner = self._rotated / (self._values + max(penalty, 1e-12))[:, None]
        weight = ((self._vectors @ inner) / self._scale[:, None]).T
        return LinearMap(f"ridge (penalty {penalty:g})", weight, self._target - weight @ self._mean)


def nearest_rotation(cross: Floats) -> Floats:
    """The matrix with orthonormal rows or columns nearest to ``cross`` (d_new, d_old).

    Large ones in float32: a rotation is good to more digits than a float32 embedding has.
    """
    wide = min(cross.shape) > 1024
    u, _, vt = np.linalg.svd(cross.astype(np.float32) if wide else cross, full_matrices=False)
    rotation: Floats = (u @ vt).astype(np.float64)
    return rotation


def procrustes_map(pairs: Pairs, seed: int) -> LinearMap:
    """The rotation (with mean shift) nearest to old -> new in least squares; side-information is not read.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966,
    doi:10.1007/BF02289451.
    """
    sample = pairs.sample(_MOST_ROWS, seed)
    d_old, _, d_new = sample.dims
    n = len(sample)
    mean_x, mean_y, cross = np.zeros(d_old), np.zeros(d_new), np.zeros((d_new, d_old))
    for begin in range(0, n, _CHUNK):
        old, _, new = sample.take(slice(begin, begin + _CHUNK))
        mean_x += old.sum(axis=0, dtype=np.float64)
        mean_y += new.sum(axis=0, dtype=np.float64)
    mean_x, mean_y = mean_x / n, mean_y / n
    for begin in range(0, n, _CHUNK):
        old, _, new = sample.take(slice(begin, begin + _CHUNK))
        cross += (new - mean_y).T @ (old - mean_x)
    weight = nearest_rotation(cross)
    return LinearMap("procrustes", weight, mean_y - weight @ mean_x)

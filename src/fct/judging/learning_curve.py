"""How many pairs: what a method reaches on parts of them, and what a power law says of more."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fct.checks import check_items, check_seed, check_whole, shown

__all__ = ["CurvePoint", "extrapolate"]

Floats = npt.NDArray[np.float64]
_LEAST_ERROR = 1e-6  # a logarithm of nothing missed is none


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """recall in [0, 1] at ``pairs`` pairs; measured, or extrapolated with its standard error."""

    pairs: int
    recall: float
    error: float
    measured: bool


def extrapolate(
    pairs: Sequence[int],
    recalls: Sequence[Floats],
    *,
    factors: Sequence[int] = (2, 4),
    resamples: int = 500,
    seed: int = 0,
) -> tuple[CurvePoint, ...]:
    """The curve's measured points, and those at ``factors`` times the most pairs.

    1 - recall is taken to fall as a power of the number of pairs, a straight line in logarithms. The error of an
    extrapolated point is the bootstrap's over queries, and the line's own misfit, added in squares.

    Args:
        pairs: ascending, at least two different ones. recalls: for each the (n,) recalls of the same queries.
        factors: whole numbers above 1. resamples, seed: of the bootstrap.

    Raises:
        ValueError: fewer than two sizes, or recalls of different queries.

    Examples:
        >>> import numpy as np
        >>> curve = extrapolate([100, 400], [np.full(5, 0.2), np.full(5, 0.6)], factors=[4])
        >>> round(curve[-1].recall, 3)
        0.8
    """
    check_whole(resamples, "resamples", 1, 1_000_000)
    check_seed(seed)
    pairs = [check_whole(n, "pairs", 1) for n in check_items(pairs, "pairs", "at least two numbers, ascending")]
    if len(pairs) < 2 or any(a >= b for a, b in itertools.pairwise(pairs)):
        raise ValueError(f"pairs: expected at least two numbers, ascending, got {pairs}")
    factors = [check_whole(n, "factors", 2) for n in check_items(factors, "factors", "whole numbers")]
    try:
        table = np.asarray(recalls, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"recalls: expected ({len(pairs)}, queries), got {shown(recalls)}") from error
    if table.ndim != 2 or len(table) != len(pairs) or not table.shape[1]:
        raise ValueError(f"recalls: expected ({len(pairs)}, queries), got {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("recalls: expected finite values, got NaN or infinity")
    at = np.log(np.asarray(pairs, np.float64))
    wanted = [pairs[-1] * factor for factor in factors]
    ahead = np.log(np.asarray(wanted, np.float64))
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, table.shape[1], (resamples, table.shape[1]))
    drawn = np.stack([table[:, draw].mean(axis=1) for draw in draws], axis=1)
    means = table.mean(axis=1, keepdims=True)
    centre = _ahead(at, means, ahead)[:, 0]
    spread = _ahead(at, drawn, ahead).std(axis=1)
    misfit = float(np.sqrt(np.mean((_ahead(at, means, at) - means) ** 2)))
    found = [
        CurvePoint(n, float(mean), float(error), True)
        for n, mean, error in zip(pairs, means[:, 0], drawn.std(axis=1), strict=True)
    ]
    found += [
        CurvePoint(n, float(value), float(np.hypot(error, misfit)), False)
        for n, value, error in zip(wanted, centre, spread, strict=True)
    ]
    return tuple(found)


def _ahead(at: Floats, recalls: Floats, ahead: Floats) -> Floats:
    """(len(ahead), columns): each column's power law, read at other sizes."""
    missed = np.log(np.maximum(1 - recalls, _LEAST_ERROR))
    slope, base = np.polyfit(at, missed, 1)
    return np.asarray(np.clip(1 - np.exp(np.outer(ahead, slope) + base), 0, 1), np.float64)

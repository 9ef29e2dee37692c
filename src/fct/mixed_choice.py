"""Which correction mapped rows get that will stand among true ones, chosen on held-out rows and held to its promise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fct.mixed_correction import MixedCorrection
from fct.mixture import Mixture, mixtures
from fct.types import Floats, Indices

__all__ = ["MIXED_SHARES", "choose_correction"]

MIXED_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
_CHOSEN_ON = (0.25, 0.5, 0.75)
_OF_THE_SLOPE = 0.75  # at many true rows a larger gallery asks for less of it (docs/history.md)
_SHORTER = (1.0, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5)


def choose_correction(
    new: Floats,
    mapped: Floats,
    metric: str,
    *,
    seed: int = 0,
    k: int = 10,
    parts: Sequence[Indices] | None = None,
) -> MixedCorrection:
    """The mildest correction within a standard error of the best recall@k, the mean over a quarter, a half and three
    quarters of true rows; and how it fades in larger galleries.

    It is never one that finds less, at any of ``MIXED_SHARES``, than the gallery did while every row was mapped: such
    a one gives way to the next nearer to 1.

    Args:
        new: (n, d) float32 numpy, held-out items by the new model. mapped: (n, d), the same items by h.
        metric: "ip" (mapped rows get shorter), "l2" (shorter or longer, whichever is better) or "cosine" (one
            coordinate more).
        parts: row numbers of each part of a cross-fit: only rows of one part meet, since what mapped them has learned
            from the other parts. None: all meet.
    """
    galleries = mixtures(new, mapped, metric, k, seed, parts)
    kind = "coordinate" if metric == "cosine" else "length"
    values = list(_SHORTER)
    if metric == "l2":
        values = [1 / v for v in values[:0:-1]] + values
    recalls = {v: _recalls(galleries, _CHOSEN_ON, MixedCorrection(kind, v)).mean(axis=0) for v in values}
    best = max(recalls.values(), key=lambda recall: float(recall.mean()))

    def enough(recall: Floats) -> bool:
        lost = best - recall
        return bool(lost.mean() <= max(0.002 * best.mean(), lost.std() / np.sqrt(len(lost))))

    value = float(min((v for v, recall in recalls.items() if enough(recall)), key=lambda v: abs(np.log(v))))
    value = _kept_promise(galleries, kind, value, values)
    rows = min(len(gallery.new) for gallery in galleries)
    return MixedCorrection(kind, value, rows, _fade(galleries, value))


def _recalls(galleries: Sequence[Mixture], shares: Sequence[float], correction: MixedCorrection | None) -> Floats:
    """(shares, n) each query's recall@k."""
    return np.array([np.concatenate([g.recalls(share, correction) for g in galleries]) for share in shares])


def _kept_promise(galleries: Sequence[Mixture], kind: str, value: float, values: Sequence[float]) -> float:
    """``value``, or the nearest to it on the way to 1 with which no share of true rows finds less than none at all.

    Where even 1 does not keep that, what breaks it least.
    """
    before = float(_recalls(galleries, [0.0], None).mean())
    milder = [v for v in values if (v - 1) * (value - 1) >= 0 and abs(np.log(v)) <= abs(np.log(value))]
    margins = {}
    for v in sorted(milder, key=lambda v: -abs(np.log(v))):
        found = _recalls(galleries, MIXED_SHARES, MixedCorrection(kind, v)).mean(axis=1)
        margins[v] = float(found.min()) - before
        if margins[v] >= 0:
            return float(v)
    return float(max(margins, key=lambda v: margins[v]))


def _fade(galleries: Sequence[Mixture], value: float) -> float:
    """How much milder a correction has to be where the gallery is e times as large.

    The i-th nearest of n rows is about as near as the k-th of n k / i, so the ranks tell how the k-th true row and the
    k-th mapped one come nearer as a gallery grows: true ones do faster, since a mapped row stays as far as h errs. The
    lengths that bring one as near as the other, here and where rank 1 sees, give a slope.
    """
    k, metric = galleries[0].k, galleries[0].metric
    if k < 3 or value == 1.0:
        return 0.0
    true = np.concatenate([g.true_distances for g in galleries]).astype(np.float64)
    mapped = np.concatenate([g.mapped_distances() for g in galleries]).astype(np.float64)
    queries, rows = (
        float(np.median(np.concatenate([(x.astype(np.float64) ** 2).sum(axis=1) for x in parts])))
        for parts in ([g.new for g in galleries], [g.mapped for g in galleries])
    )
    if metric == "l2":  # as inner products, which change with a length
        true, mapped = queries - true / 2, (queries + rows - mapped) / 2
    growth = np.log((k - 0.3) / (np.arange(1, k + 1) - 0.3))  # the median's rank, in logarithms of the gallery's rows

    mapped = np.where(mapped == 0, 1e-30, mapped)
    ratio, inner = (  # the medians' course, at the gallery's own rows and where rank 1 sees
        np.polyval(np.polyfit(growth, np.median(x, axis=0), 1), growth[[-1, 0]]) for x in (true / mapped, mapped)
    )
    wanted = ratio
    if metric == "l2":  # |q|^2 - 2 L qm + L^2 |m|^2 = the true distance, solved for L
        room = np.maximum(inner**2 - rows * (2 * ratio * inner - queries), 0)
        wanted = (inner + np.sqrt(room)) / max(rows, 1e-30)
    if not (wanted > 0).all():
        return 0.0
    slope = float(np.log(wanted[1] / wanted[0]) / growth[0])
    return max(0.0, _OF_THE_SLOPE * (slope if value < 1 else -slope))

"""The length of mapped rows that will stand among true ones, chosen on held-out pairs when h is fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from fct.fit.neighbours import NeighbourTest
from fct.mixed_gallery import choose_correction, mixed_curve
from fct.types import Floats, Indices, JsonDict

__all__ = ["calibrate_length"]

_MOST_ROWS = 4_096


def calibrate_length(
    test: NeighbourTest,
    raw: Floats,
    seed: int,
    tell: Callable[[str], None],
    *,
    parts: Sequence[Indices] | None = None,
) -> JsonDict | None:
    """What goes into the artifact: the correction and its curve, as plain values; None with fewer than 20 rows.

    Half of the rows choose the correction and the other half measure it, so that the curve is honest.

    Args:
        parts: of a cross-fit: row numbers of each part that one training left out. Rows of two parts never meet: h of
            the one has learned from the other, finds it too near, and would ask for too strong a correction.
    """
    if len(raw) < 20:
        return None
    new, mapped = test.new, test.finished(raw)
    if parts is None:
        parts = [np.random.default_rng([seed, 23]).permutation(len(raw))[: 2 * _MOST_ROWS]]
    few = sum(map(len, parts)) < 2_000  # too few for two halves: the curve then is of the rows that chose
    if few:
        first = second = list(parts)
    elif len(parts) == 1:
        first, second = [parts[0][::2]], [parts[0][1::2]]
    else:
        first, second = list(parts[::2]), list(parts[1::2])
    correction = choose_correction(new, mapped, test.metric, seed=seed, parts=first)
    report = mixed_curve(new, mapped, test.metric, correction, seed=seed, parts=second)
    half = report.points[2]
    tell(
        f"mixed galleries ({test.metric}): mapped rows with {correction.kind} {correction.value:.3g} among "
        f"{correction.rows:,} rows, {correction.at(1_000_000).value:.3g} among a million: recall@10 at half true rows "
        f"{half.recall:.3f} -> {half.corrected_recall:.3f}"
    )
    return {**report.to_dict(), "correction": asdict(correction), "chosen_on_the_same_rows": few}

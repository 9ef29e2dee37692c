"""The length of mapped rows that will stand among true ones, chosen on held-out pairs when h is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from fct.fit.neighbours import NeighbourTest
from fct.mixed_gallery import choose_correction, mixed_curve
from fct.types import Floats, JsonDict

__all__ = ["calibrate_length"]

_MOST_ROWS = 4_096


def calibrate_length(test: NeighbourTest, raw: Floats, seed: int, tell: Callable[[str], None]) -> JsonDict | None:
    """What goes into the artifact: the correction and its curve, as plain values; None with fewer than 20 rows.

    Half of the rows choose the correction and the other half measure it, so that the curve is honest.
    """
    if len(raw) < 20:
        return None
    rows = np.random.default_rng([seed, 23]).permutation(len(raw))[: 2 * _MOST_ROWS]
    new, mapped = test.new, test.finished(raw)
    few = len(rows) < 2_000  # too few for two halves: the curve then is of the rows that chose
    first, second = (rows, rows) if few else (rows[::2], rows[1::2])
    correction = choose_correction(new[first], mapped[first], test.metric, seed=seed)
    report = mixed_curve(new[second], mapped[second], test.metric, correction, seed=seed)
    half = report.points[2]
    tell(
        f"mixed galleries ({test.metric}): mapped rows with {correction.kind} {correction.value:.3g} among "
        f"{correction.rows:,} rows, {correction.at(1_000_000).value:.3g} among a million: recall@10 at half true rows "
        f"{half.recall:.3f} -> {half.corrected_recall:.3f}"
    )
    return {**report.to_dict(), "correction": asdict(correction), "chosen_on_the_same_rows": few}

"""What a faster precision was measured to do to retrieval, and how much of that ``precision="auto"`` may accept."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PrecisionEffect", "Tolerance"]


@dataclass(frozen=True)
class PrecisionEffect:
    """How a precision changes retrieval, against fp32, on the validation pairs of the fit.

    top10_kept: mean share of a query's fp32 top-10 that is still in its top-10.
    map_change: mAP minus fp32's mAP (labels: the query's own item where the fit had none).
    cmc1_change: CMC top-1 minus fp32's.
    """

    top10_kept: float
    map_change: float
    cmc1_change: float


@dataclass(frozen=True)
class Tolerance:
    """What ``precision="auto"`` may cost: at most 0.1 point of mAP, and 99 % of the top-10 kept, unless told."""

    map_drop: float = 0.001
    top10_kept: float = 0.99

    def allows(self, effect: PrecisionEffect) -> bool:
        return effect.map_change >= -self.map_drop and effect.top10_kept >= self.top10_kept

"""What one item costs by h and by re-embedding: operations, rates, and what they come to for a billion items."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fct.types import Array

__all__ = ["Costs", "model_flop"]

_RESNET50_GFLOP = 8.2  # 4.1 GMAC an image of 224 x 224 (He et al., CVPR 2016)
_BILLION = 1e9


def model_flop(model: torch.nn.Module, image: Array) -> int:
    """FLOP of one image (1, 1, h, w) through the convolutions and linear layers: two for each multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.as_tensor(image, dtype=torch.float32))
    return int(counter.get_total_flops())


@dataclass(frozen=True, slots=True)
class Costs:
    """What one item costs by h and by re-embedding. h_flop, model_flop: FLOP an item; the rates: items a second."""

    h_flop: int
    model_flop: int
    h_rate: float
    backfill_rate: float
    model_rate: float

    def facts(self) -> dict[str, float]:
        return {
            "h, MFLOP an item": round(self.h_flop / 1e6, 3),
            "new model, MFLOP an item": round(self.model_flop / 1e6, 3),
            "h alone, rows a second": round(self.h_rate),
        }

    def sentences(self) -> tuple[str, str]:
        speed = self.model_flop * self.model_rate
        large = _RESNET50_GFLOP * 1e9 / speed * _BILLION
        hours = [_BILLION / rate / 3600 for rate in (self.backfill_rate, self.model_rate)]
        return (
            f"One item: {self.h_flop / 1e6:,.2f} MFLOP by h, {self.h_rate:,.0f} rows a second measured "
            f"({self.backfill_rate:,.0f} with reading and writing); {self.model_flop / 1e6:,.2f} MFLOP by the new "
            f"model, {self.model_rate:,.0f} images a second measured, decoding not counted.",
            f"A billion items, by arithmetic from these rates on this machine: {hours[0]:,.1f} hours by h, "
            f"{hours[1]:,.1f} hours by this toy model, {large / 86400:,.0f} days by a ResNet-50 (4.1 GMAC = "
            f"{_RESNET50_GFLOP} GFLOP an image) at the {speed / 1e9:,.0f} GFLOP/s that the toy model reached here.",
        )

"""Peaks of GPUs as their data sheets give them."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["GPUS", "Gpu", "published_peak"]


@dataclass(frozen=True)
class Gpu:
    """Published peaks: dense tensor-core TFLOP/s in bfloat16 with float32 sums, GB/s of memory, L2 bytes.

    others: the same for the other operands, fp32 as TF32 operands.
    """

    name: str
    target: str
    tflops: float
    gbytes: float
    l2_bytes: int
    processors: int
    others: dict[str, float]

    def peak(self, precision: str) -> float | None:
        """TFLOP/s of the precision's tensor-core instructions; None where the GPU has none."""
        return self.tflops if precision in ("bf16", "fp16") else self.others.get(precision)


# NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM, L4) and the Ada architecture paper (RTX 4090), no sparsity.
GPUS = (
    Gpu("A100", "sm_80", 312.0, 2039, 40 << 20, 108, {"fp32": 156.0, "int8": 624.0}),
    Gpu("H100", "sm_90", 989.4, 3350, 50 << 20, 132, {"fp32": 494.7, "int8": 1978.9, "fp8": 1978.9}),
    Gpu("H200", "sm_90", 989.4, 4800, 50 << 20, 132, {"fp32": 494.7, "int8": 1978.9, "fp8": 1978.9}),
    Gpu("L4", "sm_89", 121.0, 300, 48 << 20, 58, {"fp32": 60.5, "int8": 242.5, "fp8": 242.5}),
    Gpu("RTX 4090", "sm_89", 165.2, 1008, 72 << 20, 128, {"fp32": 82.6, "int8": 660.6, "fp8": 330.3}),
)


def published_peak(model: str, precision: str) -> float | None:
    """TFLOP/s that the data sheet of the GPU called ``model`` gives for the precision; None where none is at hand.

    Examples:
        >>> from fct.bench.data_sheets import published_peak
        >>> published_peak("NVIDIA H100 80GB HBM3", "fp8"), published_peak("NVIDIA L40S", "bf16")
        (1978.9, None)
    """
    for gpu in GPUS:
        if re.search(rf"\b{gpu.name}\b", model) and "PCIe" not in model and "Laptop" not in model:
            return gpu.peak(precision)
    return None

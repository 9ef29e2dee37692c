"""What a backend is. Each says why it can not run a request; none falls back by itself."""

from __future__ import annotations

from typing import Any, Protocol

from fct.arrays import Rows
from fct.transformation import Transformation

__all__ = ["GPU_PRECISIONS", "PRECISIONS", "TransformBackend", "check_precision"]

# Fastest last; "auto" is resolved before a backend sees a request.
PRECISIONS = ("fp32", "bf16", "int8")
GPU_PRECISIONS = ("fp16", "fp8")  # on a GPU besides


def check_precision(precision: str, *, gpu: bool = False) -> str:
    """``precision`` itself; raises ValueError unless it is "auto", one of PRECISIONS, or with gpu of GPU_PRECISIONS."""
    known = (*PRECISIONS, *GPU_PRECISIONS) if gpu else PRECISIONS
    if precision not in (*known, "auto"):
        raise ValueError(f"precision: expected one of auto, {', '.join(known)}, got {precision!r}")
    return precision


class TransformBackend(Protocol):
    """Runs h over rows. ``pack`` is called once per (h, precision, device) and its result kept with h."""

    name: str

    def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
        """Every reason why this backend can not run h at this precision on this device; empty when it can."""
        ...

    def fastest_first(self, device: str) -> tuple[str, ...]:
        """The precisions this backend runs on the device, fastest first."""
        ...

    def pack(self, h: Transformation, precision: str, device: str) -> Any:
        """Weights in the backend's own layout."""
        ...

    def run(self, packed: Any, old: Rows, side: Rows, out: Rows, *, threads: int) -> None:
        """Fills ``out`` (n, d_new). n may be 0. Rows are checked; all lie on the packed device."""
        ...

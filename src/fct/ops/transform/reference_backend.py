"""The oracle as a backend: slow, readable, float64; what everything else is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from fct import ref
from fct.artifact.transformation import Transformation
from fct.progress import Report
from fct.rows import Rows
from fct.types import Floats

__all__ = ["RefTransform", "store"]

_CHUNK = 4096


def store(values: Floats, out: Rows) -> None:
    """Writes float values into a CPU block, rounded to its dtype."""
    if out.dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        out.values[...] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # ties to even
    elif out.dtype == "int8":
        values = values if out.offset is None else values - out.offset
        out.values[...] = np.clip(np.rint(values / out.scale), -127, 127).astype(np.int8)
    else:
        with np.errstate(over="ignore"):  # what float16 does not hold is infinite, for the caller to find
            out.values[...] = values


class RefTransform:
    name = "ref"

    def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
        why = [] if device == "cpu" else [f"runs on cpu only, got {device}"]
        return why + ([] if precision == "fp32" else [f"has no {precision}"])

    def fastest_first(self, device: str) -> tuple[str, ...]:
        return ("fp32",)

    def pack(self, h: Transformation, precision: str, device: str) -> Any:
        return h.with_()  # a copy, which does not keep h alive

    def run(self, packed: Any, old: Rows, side: Rows, out: Rows, *, threads: int, report: Report | None = None) -> None:
        for start in range(0, out.n, _CHUNK):
            part = slice(start, start + _CHUNK)
            store(ref.transform(old[part].float32(), side[part].float32(), packed), out[part])
            if report is not None:
                report(min(1.0, (start + _CHUNK) / out.n))

"""The fused C++ kernels: all layers of a block of rows while their activations stay in cache (csrc/cpu/transform.h)."""

from __future__ import annotations

import threading
from typing import Any

from fct import _C
from fct.artifact.layers import SKIP
from fct.artifact.transformation import Transformation
from fct.native_codes import PRECISION_CODES
from fct.ops.backend import PRECISIONS
from fct.ops.isa import isa
from fct.ops.numerics.quantise import LayerPlan, layer_plans, why_not_int8
from fct.progress import Report
from fct.rows import Rows
from fct.types import Array

__all__ = ["CpuTransform", "Packed"]


def _layer(plan: LayerPlan) -> tuple[int, int, int, int, int, int, int, bool, int]:
    def address(array: Array | None) -> int:
        return 0 if array is None else _C.array_address(array)

    d_out, d_in = plan.weight.shape
    parts = (plan.weight, plan.scale, plan.bias, plan.in_mul, plan.in_add)
    weight, scale, bias, in_mul, in_add = (address(part) for part in parts)
    return weight, scale, bias, in_mul, in_add, d_in, d_out, plan.relu, PRECISION_CODES[plan.precision]


class Packed:
    """h's weights in the kernels' layout for one instruction-set level."""

    def __init__(self, h: Transformation, precision: str, level: int) -> None:
        fine = "bf16" if level >= _C.isa_names.index("avx512-bf16") else "fp32"  # what the level is fast in
        plans = layer_plans(h, precision, fine=fine)  # alive until they are packed
        self.handle = _C.PackedTransform(
            [_layer(p) for p in plans["old"]],
            [_layer(p) for p in plans["side"]],
            [_layer(p) for p in plans["mixer"]],
            [_layer(p) for p in plans[SKIP]],
            not h.uses_side_info,
            h.length if h.normalise else 0.0,
            level,
        )

    def run(self, old: Rows, side: Rows, out: Rows, *, threads: int, report: Report | None = None) -> None:
        self.handle.run(_codes(old), _codes(side), _codes(out), out.n, threads, report)


def _rows(rows: Rows) -> tuple[int, int, int, int, int, int, int]:
    return rows.address, rows.dtype_code, rows.d, rows.row_stride, *_per(rows.scale)


def _codes(rows: Rows) -> tuple[int, int, int, int, int, int, int, int, int, int]:
    return *_rows(rows), *_per(rows.offset)


def _per(values: Array | None) -> tuple[int, int, int]:
    """(address, step from row to row, from column to column) of a scale or an offset; zeros for none."""
    if values is None:
        return 0, 0, 0
    rows, columns = values.shape
    return _C.array_address(values), int(rows > 1), int(columns > 1)


class CpuTransform:
    """fp32, bf16 and int8 on x86-64 (AVX-512 with or without VNNI and BF16, AVX2, SSE2) and AArch64 (NEON).

    FCT_ISA=portable|avx2|avx512|avx512-vnni|avx512-bf16 forces a lower level than the processor's. Every precision
    runs on every level, but only those a level has instructions for are offered to ``precision="auto"``.
    """

    name = "cpu"

    def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
        why = [] if device == "cpu" else [f"runs on cpu only, got {device}"]
        why += [] if precision in PRECISIONS else [f"has no {precision}"]
        return why + (why_not_int8(h) if precision == "int8" else [])

    def fastest_first(self, device: str) -> tuple[str, ...]:
        level = isa()
        if level >= _C.isa_names.index("avx512-bf16"):
            return ("int8", "bf16", "fp32")
        if level >= _C.isa_names.index("avx512-vnni"):
            return ("int8", "fp32")
        return ("fp32",)

    def pack(self, h: Transformation, precision: str, device: str) -> Any:
        return _ByLevel(h, precision)

    def run(self, packed: Any, old: Rows, side: Rows, out: Rows, *, threads: int, report: Report | None = None) -> None:
        packed.at(isa()).run(old, side, out, threads=threads, report=report)


class _ByLevel:
    """h packed for the level in use, and for others once they are: tests and measurements change it."""

    def __init__(self, h: Transformation, precision: str) -> None:
        self._layers, self._precision, self._lock = h.with_(), precision, threading.Lock()  # keeps no h alive
        self._packed = {isa(): Packed(self._layers, precision, isa())}

    def at(self, level: int) -> Packed:
        found = self._packed.get(level)
        if found is None:
            with self._lock:
                if level not in self._packed:
                    self._packed[level] = Packed(self._layers, self._precision, level)
                found = self._packed[level]
        return found

"""Which precision each layer runs in, and int8's scales: per output channel for weights, per input channel for
activations.

An int8 layer computes ``sum_k q_w[n, k] * q_x[k] * s[n] + b[n]`` with ``q_x[k] = round(x[k] * mul[k] + add[k])`` in
[0, 255]. Dividing by ``mul`` is moved into the weights before they are rounded, which is exact, so activations have a
scale per channel at no cost: the layer before multiplies its output channels by ``mul`` together with its own scale.
How much of a channel's range is moved is a trade between the activations' rounding and the weights' (SmoothQuant,
Xiao et al., arXiv:2211.10438, section 4, whose alpha is :data:`ALPHA`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fct.artifact.layers import BRANCHES, SKIP, Layer
from fct.artifact.transformation import Transformation
from fct.types import Array, Floats

__all__ = [
    "ALPHA",
    "EXACT_SHARE",
    "FINE_SHARE",
    "FP32_SHARE",
    "MOST_INT16",
    "LayerPlan",
    "exact_first",
    "exact_first_on_gpu",
    "fine_layers",
    "int8_plan",
    "int16_plan",
    "layer_plans",
    "why_not_int8",
]

ALPHA = 0.75
# Rounding the rows themselves costs more than all later roundings together (docs/performance.md), and the layers that
# read them are the smallest: 1.1 % of the work in the paper's h, 20 to 40 % where h is small. So below "fp32" what
# reads the rows stays as good as in fp32 while it is at most EXACT_SHARE of the operations, on every backend; and in
# "int8" the branches' next ones stay in bf16, in this order, while the branches' layers so far are at most FINE_SHARE
# (on a GPU always). A small h in bf16 takes 1.3 times as long for it, still 0.7 of fp32's time, and without it is
# outside the default tolerance.
EXACT_SHARE = 0.5
FINE_SHARE = 0.15
# In "int8" on a CPU what reads the rows is fp32 up to this share only, and int16 beyond: rows in steps of 1/2,047 of
# their calibrated half range, with as much room again for rows outside it. They cost half the time of int8's own steps
# more; on the h of docs/text-embeddings.md int8 with such rows keeps 99.5 % of the ten nearest.
FP32_SHARE = 0.02
MOST_INT16 = 4095  # csrc's kMostInt16
# int32 sums cannot overflow below 2^31 / (255 * 127) inputs.
_MOST_INPUTS = 66311


@dataclass(frozen=True)
class LayerPlan:
    """A layer as the kernels take it: float32 weight for fp32 and bf16, int8 or int16 with scales for those."""

    weight: Array
    bias: Array
    relu: bool
    precision: str
    scale: Array | None = None
    in_mul: Array | None = None
    in_add: Array | None = None


def why_not_int8(h: Transformation) -> list[str]:
    """Why h cannot run in int8; empty when it can."""
    layers = dict(h.layers())
    missing = [name for name in layers if name not in h.calibration]
    why = []
    if missing:
        why.append(
            f"has no activation ranges for {', '.join(missing)}: int8 needs them; "
            "see fct.fit.precision_choice.calibrate"
        )
    wide = [name for name, layer in layers.items() if layer.d_in > _MOST_INPUTS]
    if wide:
        why.append(f"{', '.join(wide)}: expected at most {_MOST_INPUTS:,} inputs, whose products fit int32")
    return why


def exact_first(h: Transformation) -> bool:
    """Whether the layers that read the rows do so without rounding them, in every precision."""
    return _share(h, 0) <= EXACT_SHARE


def exact_first_on_gpu(h: Transformation, precision: str) -> bool:
    """Whether a GPU's kernels read rows and multiply first weights as high and low parts. With 8-bit mixers always: a
    CPU's int8, whose effect on retrieval the artifact holds, never reads them in steps as coarse as bfloat16's."""
    return precision in ("int8", "fp8") or (precision != "fp32" and exact_first(h))


def _share(h: Transformation, step: int) -> float:
    """Of all operations, those of :func:`_step`."""
    layers = dict(h.layers())
    return float(sum(2 * layers[name].weight.size for name in _step(h, step)) / h.flop_per_row)


def _step(h: Transformation, step: int) -> list[str]:
    """Both branches' layers number ``step``; the first step is all that reads the rows, the skip too."""
    skip = [SKIP] if step == 0 and h.skip is not None else []
    return [f"{branch}.{step}" for branch in ("old", "side") if step < len(getattr(h, branch))] + skip


def fine_layers(h: Transformation, precision: str, *, fine: str = "bf16") -> dict[str, str]:
    """Name -> precision of the layers that "bf16" and "int8" leave in a finer one; ``fine``: bf16, or its stand-in."""
    found: dict[str, str] = {}
    share = 0.0
    for i in range(max(len(h.old), len(h.side)) if precision in ("bf16", "int8") else 0):
        step = _step(h, i)
        share += _share(h, i)
        if i == 0 and precision == "int8" and share > FP32_SHARE:
            found |= dict.fromkeys(step, "int16")
        elif i == 0 and exact_first(h):
            found |= dict.fromkeys(step, "fp32")
        elif precision == "int8" and share <= FINE_SHARE:
            found |= dict.fromkeys(step, fine)
        else:
            break
    return found


def layer_plans(h: Transformation, precision: str, *, fine: str = "bf16") -> dict[str, list[LayerPlan]]:
    """The layers of each branch, and of the skip, as the kernels take them; for ``fine`` see :func:`fine_layers`."""
    plans: dict[str, list[LayerPlan]] = {branch: [] for branch in (*BRANCHES, SKIP)}
    kept = fine_layers(h, precision, fine=fine)
    for name, layer in h.layers():
        of_layer = kept.get(name, precision)
        if of_layer == "int8":
            plan = int8_plan(layer, h.calibration[name])
        elif of_layer == "int16":
            parts = (h.d_old, h.d_side) if name == SKIP and h.uses_side_info else None
            plan = int16_plan(layer, _ranges_of_rows(h, name), parts)
        else:
            plan = LayerPlan(layer.weight, layer.bias, layer.relu, of_layer)
        plans[name.partition(".")[0]].append(plan)
    return plans


def _ranges_of_rows(h: Transformation, name: str) -> Array:
    """Calibrated ranges of what a first layer or the skip reads; the same rows have the same ranges for all of them."""
    old = h.calibration["old.0"]
    if not h.uses_side_info:
        return old
    if name == SKIP:
        return np.concatenate([old, h.calibration["side.0"]], axis=1)
    return old if name == "old.0" else h.calibration[name]


def int16_plan(layer: Layer, ranges: Floats | None, parts: tuple[int, ...] | None = None) -> LayerPlan:
    """A layer on rows in int16: q_x = round(x * mul + add) in [-4095, 4095], the calibrated range in its middle half.

    parts: widths of the arrays that the layer reads side by side; None: one. Each is quantised by its own ranges alone,
    as the branch does that reads it too, however much wider the other's are.

    Weights have what bits int32 sums leave them: sum_k |q_w[n, k]| * 4095 < 2^31 for every output n.
    """
    low, high = np.asarray(ranges, np.float64)
    half = np.maximum((high - low) / 2, 1e-30)
    ends = np.cumsum(parts or (len(half),))[:-1]
    # A dimension that calibration saw nearly constant may wake.
    half = np.concatenate([np.maximum(part, part.max() * 1e-2) for part in np.split(half, ends)])
    mul = (MOST_INT16 // 2 / half).astype(np.float32)
    add = (-(low + high) / 2 * mul).astype(np.float32)
    moved = layer.weight.astype(np.float64) / mul
    room = 2**31 / MOST_INT16 - moved.shape[1]  # rounding adds up to a half for each input
    scale = np.maximum(np.abs(moved).max(axis=1) / 32767, np.abs(moved).sum(axis=1) / room)
    scale = np.maximum(scale, 1e-30).astype(np.float32)
    quantised = np.rint(moved / scale[:, None])
    bias = layer.bias - (quantised * scale[:, None].astype(np.float64)) @ add
    return LayerPlan(
        np.ascontiguousarray(quantised.astype(np.int16)),
        np.ascontiguousarray(bias, np.float32),
        layer.relu,
        "int16",
        scale,
        mul,
        add,
    )


def int8_plan(layer: Layer, ranges: Floats | None) -> LayerPlan:
    """A layer's weights and scales in int8. ranges: (2, d_in), lowest and highest calibrated input."""
    low, high = np.asarray(ranges, np.float64)
    weight = layer.weight.astype(np.float64)
    behind_relu = bool((low >= 0).all())
    if behind_relu:
        low = np.zeros_like(low)
    span = np.maximum(high - low, 1e-30)
    span = np.maximum(span, span.max() * 1e-2)  # a channel that calibration saw nearly dead may wake
    reach = np.maximum(np.abs(weight).max(axis=0), 1e-30)
    # Channel k's step: alpha of its own range, and the rest as the common one, in proportion to what its weights allow.
    step = span**ALPHA / reach ** (1 - ALPHA)
    step *= (span / step).max() / 255
    mul = 1.0 / step
    add = np.zeros_like(low) if behind_relu else -low * mul
    moved = weight * step
    scale = np.maximum(np.abs(moved).max(axis=1), 1e-30) / 127
    quantised = np.rint(moved / scale[:, None])
    bias = layer.bias - (quantised * scale[:, None]) @ add
    return LayerPlan(
        np.ascontiguousarray(quantised.astype(np.int8)),
        np.ascontiguousarray(bias, np.float32),
        layer.relu,
        "int8",
        np.ascontiguousarray(scale, np.float32),
        np.ascontiguousarray(mul, np.float32),
        np.ascontiguousarray(add, np.float32),
    )

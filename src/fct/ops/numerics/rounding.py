"""How far rounding alone may put h's rows from the float64 reference: a variance calculation, not a chosen number.

Every rounded number carries an independent error that is uniform over its rounding step (variance step^2 / 12). Errors
pass a layer through its squared weights; ReLU lets them through as far as the unit is likely to be awake. The largest
of a few hundred thousand such sums stays under :data:`SIGMAS` standard deviations; a wrong tile, a missed row or a lost
carry does not.
Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 2.8 (rounding errors as independent
random variables).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fct.artifact.layers import SKIP, Layer
from fct.artifact.transformation import Transformation
from fct.ops.numerics.quantise import MOST_INT16, LayerPlan, exact_first_on_gpu, int8_plan, layer_plans
from fct.types import Floats

__all__ = ["SIGMAS", "deviation", "rounding_variance"]

SIGMAS = 8.0
# Bits of the significand after the first. fp32 may be three TF32 products, which drop what lies below 2^-21. "exact":
# the first layers of the lower precisions, which may be three products of two bfloat16 parts: those keep 16 bits of an
# operand, and the fourth product that is left out costs as much again.
_BITS = {"fp32": 20, "exact": 15, "fp16": 10, "bf16": 7, "fp8": 3}
_FP8_STEP = 2.0**-9  # of e4m3 below its smallest normal number


def deviation(
    got: Floats, want: Floats, old: Floats, side: Floats, h: Transformation, precision: str, backend: str
) -> float:
    """Largest difference in standard deviations of what rounding explains; infinite where anything is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.isfinite(got).all():
        return float("inf")
    sigma = np.sqrt(rounding_variance(old, side, h, precision, backend))
    return float((np.abs(got - want) / np.maximum(sigma, 1e-30)).max())


def _rounded(x: Floats, precision: str) -> Floats:
    """Variance of rounding every element to the precision's significand."""
    _, exponent = np.frexp(x)  # |x| in [2^(e-1), 2^e)
    return np.where(x == 0, 0.0, np.ldexp(1.0, exponent - 1 - _BITS[precision]) ** 2 / 12)


def rounding_variance(old: Floats, side: Floats, h: Transformation, precision: str, backend: str) -> Floats:
    """(n, d_new) float64: what the roundings of one backend add up to, element by element.

    old, side: (n, d_old) and (n, d_side). backend: "triton" quantises the mixer alone, every other what
    :func:`fct.ops.numerics.quantise.layer_plans` says; "cuda" may round a first layer's bias, and makes one float32
    sum of the last layer and the skip.

    Examples:
        >>> import numpy as np, fct
        >>> from fct.ops.numerics.rounding import rounding_variance
        >>> h, x = fct.Transformation.random(4, 4, 4, inner=8), np.ones((2, 4), np.float32)
        >>> finer, coarser = (rounding_variance(x, x, h, p, "torch") for p in ("fp32", "bf16"))
        >>> bool((finer < coarser).all())
        True
    """
    made = _Made.by(h, precision, backend)
    parts = [made.chain(b, np.asarray(x, np.float64), np.zeros(np.shape(x))) for b, x in (("old", old), ("side", side))]
    z, variance = made.chain("mixer", *(np.concatenate(p, axis=1) for p in zip(*parts, strict=True)))
    if h.skip is not None:
        rows = np.concatenate([old, side], axis=1) if h.uses_side_info else old
        added, of_skip = made.chain(SKIP, np.asarray(rows, np.float64), np.zeros(np.shape(rows)))
        z, variance = z + added, variance + of_skip + (2.0**-24 * z) ** 2
    if h.normalise:
        length2 = np.maximum((z**2).sum(axis=1, keepdims=True), 1e-60)
        along = (variance * z**2).sum(axis=1, keepdims=True) * z**2 / length2**3
        variance = h.length**2 * (variance / length2 + along + (4 * 2.0**-24) ** 2)
    return variance


@dataclass(frozen=True, slots=True)
class _Made:
    """How one backend computes h at one precision. exact: first layers at the precision of :data:`_BITS`'s "exact"."""

    h: Transformation
    precision: str
    backend: str
    plans: Mapping[str, Sequence[LayerPlan]]
    exact: bool

    @classmethod
    def by(cls, h: Transformation, precision: str, backend: str) -> _Made:
        plans: dict[str, list[LayerPlan]] = {}
        if precision == "int8" and backend == "triton":
            plans["mixer"] = [int8_plan(layer, h.calibration[f"mixer.{i}"]) for i, layer in enumerate(h.mixer)]
        elif precision == "int8":
            plans = layer_plans(h, precision)
        return cls(h, precision, backend, plans, exact_first_on_gpu(h, precision))  # a CPU's 8 bits have their own plan

    def layer(self, branch: str, i: int) -> tuple[str, LayerPlan | None]:
        """(in which numbers a layer is computed, its plan)."""
        plan = self.plans[branch][i] if branch in self.plans else None
        if plan is not None and plan.precision != "fp32":
            return plan.precision, plan
        if self.exact and i == 0 and branch != "mixer":
            return "exact", plan
        if plan is not None:
            return plan.precision, plan
        return "bf16" if self.precision in ("int8", "fp8") and branch != "mixer" else self.precision, None

    def chain(self, branch: str, x: Floats, variance: Floats) -> tuple[Floats, Floats]:
        """A branch's output of x, and its variance; ``variance`` is that of x."""
        h = self.h
        depth = h.mixer[-1].d_in + (0 if h.skip is None else h.skip.d_in)  # of the last layer and the skip as one
        layers = getattr(h, branch) if branch != SKIP else (h.skip,)
        for i, layer in enumerate(layers):
            weight, bias = layer.weight.astype(np.float64), layer.bias.astype(np.float64)
            computed, plan = self.layer(branch, i)
            if computed in ("int8", "int16"):
                assert plan is not None
                of_x, of_w = _integer(plan, x)
            elif computed == "fp8":
                of_x, of_w = _fp8(layer, h.calibration[SKIP if branch == SKIP else f"{branch}.{i}"], x)
            else:
                of_x, of_w = _rounded(x, computed), _rounded(weight, computed)
            into = variance + of_x
            z = x @ weight.T + bias
            terms = (x**2) @ (weight**2).T + bias**2
            whole = self.backend == "cuda" and (branch == SKIP or (branch == "mixer" and i + 1 == len(layers)))
            count = depth if whole else weight.shape[1]
            sums = (count + 1) * 2.0**-48 * terms  # every partial sum in float32
            variance = into @ (weight**2).T + (x**2) @ of_w.T + sums
            if computed not in ("int8", "int16", "fp8") and not whole:  # libraries round the bias and the result too
                of_bias = "bf16" if (computed, self.backend) == ("exact", "cuda") else computed
                variance = variance + _rounded(bias, of_bias) + _rounded(z, computed)
            x = np.maximum(z, 0) if layer.relu else z
            if layer.relu:
                variance = variance * _normal_cdf(z / np.sqrt(np.maximum(variance, 1e-60)))
        return x, variance


def _normal_cdf(x: Floats) -> Floats:
    """Of the standard normal distribution, to 1e-3: 0.5 at 0, which is what ReLU lets through there."""
    share: Floats = 1 / (1 + np.exp(np.clip(-1.702 * x, -60, 60)))
    return share


def _integer(plan: LayerPlan, x: Floats) -> tuple[Floats, Floats]:
    """Variances of the operands as numerics.quantise plans them: of (n, d_in) activations, of (d_out, d_in) weights."""
    assert plan.scale is not None
    assert plan.in_mul is not None
    assert plan.in_add is not None
    step = 1 / plan.in_mul.astype(np.float64)
    zero = -plan.in_add.astype(np.float64) * step
    least, most = (0, 255) if plan.precision == "int8" else (-MOST_INT16, MOST_INT16)
    over = np.maximum(np.maximum(zero + least * step - x, x - (zero + most * step)), 0) ** 2  # what is clipped
    of_w = (plan.scale.astype(np.float64)[:, None] / step) ** 2 / 12
    return step**2 / 12 + over, np.broadcast_to(of_w, plan.weight.shape)


def _fp8(layer: Layer, ranges: Floats | None, x: Floats) -> tuple[Floats, Floats]:
    """The same as fct.ops.transform.triton_weights packs them in FP8."""
    from fct.ops.transform.triton_weights import FP8_LARGEST, fp8_steps

    step = fp8_steps(ranges)
    weight = layer.weight.astype(np.float64)
    rows = np.maximum(np.abs(weight * step).max(axis=1, keepdims=True), 1e-30) / FP8_LARGEST
    over = np.maximum(np.abs(x) - step * FP8_LARGEST, 0) ** 2
    least = _FP8_STEP**2 / 12
    of_w = np.maximum(_rounded(weight * step / rows, "fp8"), least) * (rows / step) ** 2
    return np.maximum(_rounded(x / step, "fp8"), least) * step**2 + over, of_w

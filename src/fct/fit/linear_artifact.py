"""A linear map as an artifact, alone or folded into a fitted h's linear path."""

from __future__ import annotations

import numpy as np

from fct.artifact.transformation import Layer, Transformation
from fct.fit.linear_map import LinearMap
from fct.spaces import EmbeddingSpace
from fct.types import Floats, JsonDict

__all__ = ["blend_linear", "linear_transformation"]


def linear_transformation(
    linear: LinearMap,
    *,
    d_old: int,
    old_space: EmbeddingSpace,
    new_space: EmbeddingSpace,
    side_model: str | None = None,
    d_side: int | None = None,
    normalise: bool = False,
    length: float = 1.0,
    info: JsonDict | None = None,
) -> Transformation:
    """``linear`` in h's form: the skip does the work, the branches are one zero each.

    d_side: columns of the side-information where side_model names one; a map of old alone ignores them.
    """
    d_in = d_old + (d_side or 0 if side_model is not None else 0)
    d_new = len(linear.bias)
    none = np.zeros(1)
    return Transformation(
        old=(Layer(np.zeros((1, d_old)), none),),
        side=(Layer(np.zeros((1, (d_side or d_old) if side_model is not None else d_old)), none),),
        mixer=(Layer(np.zeros((d_new, 2)), linear.bias, relu=False),),
        skip=Layer(_over_all_inputs(linear.weight, d_in), np.zeros(d_new), relu=False),
        old_space=old_space,
        new_space=new_space,
        side_model=side_model,
        normalise=normalise,
        length=length,
        info=info or {},
    )


def blend_linear(h: Transformation, linear: LinearMap, share: float) -> Transformation:
    """``share`` times h plus ``1 - share`` times the linear map, before normalising: the same layers, other weights."""
    weight = (1 - share) * _over_all_inputs(linear.weight, h.d_in)
    bias = np.zeros(h.d_new)
    if h.skip is not None:
        weight = weight + share * h.skip.weight.astype(np.float64)
        bias = bias + share * h.skip.bias.astype(np.float64)
    last = h.mixer[-1]
    end = Layer(
        last.weight.astype(np.float64) * share, last.bias.astype(np.float64) * share + (1 - share) * linear.bias, False
    )
    return h.with_(mixer=(*h.mixer[:-1], end), skip=Layer(weight, bias, relu=False), calibration={}, precisions={})


def _over_all_inputs(weight: Floats, d_in: int) -> Floats:
    """The weight with zeros for the inputs that it does not read."""
    return np.pad(weight, ((0, 0), (0, d_in - weight.shape[1])))

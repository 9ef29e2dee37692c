"""The layers that a transformation is made of, and the plain network they form, whatever its spaces are called."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fct.types import Floats

__all__ = [
    "BRANCHES",
    "SKIP",
    "Layer",
    "Network",
    "check_chain",
    "check_skip",
    "fold_norm",
    "fold_scaling",
]

BRANCHES = ("old", "side", "mixer")
SKIP = "skip"
"""The skip's name among the layers."""


@dataclass(frozen=True, eq=False)
class Layer:
    """``relu(x @ weight.T + bias)``, or without the ReLU.

    weight: (d_out, d_in) float32, C-contiguous. bias: (d_out,) float32.
    """

    weight: Floats
    bias: Floats
    relu: bool = True

    def __post_init__(self) -> None:
        weight = np.ascontiguousarray(self.weight, dtype=np.float32)
        bias = np.ascontiguousarray(self.bias, dtype=np.float32)
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError(f"weight: expected (d_out, d_in), got shape {weight.shape}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected ({weight.shape[0]},) to match the weight, got shape {bias.shape}")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError("weight, bias: expected finite values, got NaN or infinity")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", bias)

    @property
    def d_in(self) -> int:
        return int(self.weight.shape[1])

    @property
    def d_out(self) -> int:
        return int(self.weight.shape[0])


class Network(Protocol):
    """What a reader of the layers needs to know; :class:`fct.Transformation` is one."""

    @property
    def old(self) -> tuple[Layer, ...]: ...
    @property
    def side(self) -> tuple[Layer, ...]: ...
    @property
    def mixer(self) -> tuple[Layer, ...]: ...
    @property
    def skip(self) -> Layer | None: ...
    @property
    def normalise(self) -> bool: ...
    @property
    def length(self) -> float: ...
    @property
    def uses_side_info(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...


def check_chain(layers: Iterable[Layer], name: str) -> tuple[Layer, ...]:
    """The layers as a tuple; raises ValueError where there is none or one does not fit the one before it, TypeError for
    anything else."""
    chain = tuple(layers) if isinstance(layers, (tuple, list)) else (layers,)
    for layer in chain:
        if not isinstance(layer, Layer):
            raise TypeError(f"{name}: expected a tuple of Layer, got {type(layer).__name__}")
    if not chain:
        raise ValueError(f"{name}: expected at least one layer, got none")
    for i, (a, b) in enumerate(itertools.pairwise(chain)):
        if a.d_out != b.d_in:
            raise ValueError(f"{name}.{i + 1}: expected {a.d_out} inputs to match {name}.{i}, got {b.d_in}")
    return chain


def check_skip(skip: Layer | None, d_in: int, d_out: int) -> None:
    """Raises unless ``skip`` is None or a linear layer from what goes into h to what comes out."""
    if skip is None:
        return
    if not isinstance(skip, Layer):
        raise TypeError(f"skip: expected a Layer or None, got {type(skip).__name__}")
    if skip.relu:
        raise ValueError("skip: expected a linear layer, got one with a ReLU")
    if (skip.d_out, skip.d_in) != (d_out, d_in):
        raise ValueError(
            f"skip: expected a weight of shape ({d_out}, {d_in}), from the old embedding and the side-information "
            f"side by side to the output, got ({skip.d_out}, {skip.d_in})"
        )


def fold_norm(weight: Floats, norm: Mapping[str, Floats], eps: float) -> tuple[Floats, Floats]:
    """Batch norm folded into the linear layer before it: float64 (weight, bias).

    weight: (d_out, d_in), no bias. norm: "weight", "bias", "running_mean", "running_var", (d_out,) each.
    """
    mean, var = np.asarray(norm["running_mean"], np.float64), np.asarray(norm["running_var"], np.float64)
    gain = np.asarray(norm["weight"], np.float64) / np.sqrt(var + eps)
    return np.asarray(weight, np.float64) * gain[:, None], np.asarray(norm["bias"], np.float64) - mean * gain


def fold_scaling(weight: Floats, bias: Floats, mean: Floats, scale: Floats) -> tuple[Floats, Floats]:
    """A layer that expects (x - mean) / scale, as one that takes x: float64 (weight, bias)."""
    scaled = np.asarray(weight, np.float64) / np.asarray(scale, np.float64)
    return scaled, np.asarray(bias, np.float64) - scaled @ np.broadcast_to(mean, scaled.shape[1:]).astype(np.float64)

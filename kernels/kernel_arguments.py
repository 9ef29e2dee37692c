"""What the kernels take, by name: pointers that go together, and the sizes that are known when one is compiled.

Triton passes a named tuple as its elements; ``values`` and ``type`` are names of Triton's own tuple, so no field has
them. In a kernel's signature, names in capitals are compile-time constants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = [
    "Arithmetic",
    "Branch",
    "BranchShape",
    "FirstShapes",
    "Gallery",
    "Layer",
    "LayerShape",
    "Operand",
    "RowLayer",
    "RowLayerShape",
    "Shadow",
]


class Gallery(NamedTuple):
    """Stored rows, read or written. scale: float32, of the layout that a kernel's SCALE names, or None."""

    data: torch.Tensor
    scale: torch.Tensor | None
    stride: int  # elements from row to row


class Operand(NamedTuple):
    """Rows that the next layer multiplies, where a kernel writes them. mul, add: float32 for each channel, what 8-bit
    operands are quantised by (FP8 knows no add), else None."""

    data: torch.Tensor
    stride: int
    mul: torch.Tensor | None
    add: torch.Tensor | None


class Layer(NamedTuple):
    """What a layer has besides the weights. scale: float32 for each output, of 8-bit weights, else None."""

    stride: int  # elements of a weight row
    scale: torch.Tensor | None
    bias: torch.Tensor


class Branch(NamedTuple):
    """The rows that a branch reads, and its two layers: weights (outputs, pitch) of the operand's dtype."""

    rows: Gallery
    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor


class BranchShape(NamedTuple):
    """d inputs -> hidden -> n. part: columns of a first weight row, or of one of its three parts; pitch: of a second
    weight row."""

    d: int
    part: int
    hidden: int
    pitch: int
    n: int
    scale: int  # SCALE_NONE, ...: how the rows' scale lies
    relu1: bool
    relu2: bool


class RowLayer(NamedTuple):
    """Rows, and the layer that reads them: weights (outputs, pitch) of the operand's dtype; bias: None adds none."""

    rows: Gallery
    weight: torch.Tensor
    bias: torch.Tensor | None


class RowLayerShape(NamedTuple):
    """d inputs -> n outputs; 0: there is no such layer. part, scale: as BranchShape has them."""

    d: int
    part: int
    n: int
    scale: int
    relu: bool


class FirstShapes(NamedTuple):
    """Of the layers that ``first_layers`` runs."""

    old: RowLayerShape
    side: RowLayerShape
    skip_old: RowLayerShape
    skip_side: RowLayerShape
    before_side: int  # columns of the old branch's output


class LayerShape(NamedTuple):
    """k inputs -> n outputs."""

    k: int
    n: int
    relu: bool


class Arithmetic(NamedTuple):
    """How products are made. compute: Triton's dtype of what the branches multiply; exact: rows and first weights in
    two parts; precision: of float32 operands ("tf32x3" or "ieee"); upcast: for the interpreter."""

    compute: object
    exact: bool
    precision: str
    upcast: bool


class Shadow(NamedTuple):
    """Low-precision rows of a search, bfloat16 or int8, and four float32 that bound each row's rounding."""

    data: torch.Tensor
    stride: int  # elements from row to row
    meta: torch.Tensor

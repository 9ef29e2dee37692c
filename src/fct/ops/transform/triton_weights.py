"""h's weights as the Triton kernels take them.

int8 and FP8 take calibrated activation ranges from the artifact. The rest of the branches computes in bfloat16
and hands over quantised operands; the mixer multiplies in int8 or FP8 with one weight scale per output channel and one
activation scale per input channel, part of which is moved into the weights (SmoothQuant, arXiv:2211.10438), so that
channels of unlike range share one accumulator. int8's scales are the CPU kernels' own
(:mod:`fct.ops.numerics.quantise`), whose effect on retrieval the artifact holds; what is 0 to 255 there is stored as
-128 to 127 here. FP8 takes alpha = 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fct.artifact.transformation import Layer, Transformation
from fct.ops.device.state import Device
from fct.ops.numerics.quantise import exact_first_on_gpu, int8_plan
from fct.rows import BYTES_OF
from fct.types import Array, Floats

if TYPE_CHECKING:
    import torch


__all__ = [
    "BYTES",
    "COMPUTE",
    "FP8_LARGEST",
    "MIXER",
    "WIDEST_ROW",
    "PackedLayer",
    "PackedTransform",
    "fp8_steps",
    "pack",
    "pitch",
]

COMPUTE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "bfloat16", "fp8": "bfloat16"}
MIXER = {**COMPUTE, "int8": "int8", "fp8": "float8_e4m3fn"}
FP8_LARGEST = 448.0
BYTES = BYTES_OF | {"float8_e4m3fn": 1}
WIDEST_ROW = 256  # columns of one tile: what branches and a normalising final can hold


@dataclass(frozen=True)
class PackedLayer:
    """One layer on the device. weight: (d_out, pitch) of the operand dtype; scale, inverse: None unless quantised;
    shift: None but in int8.

    part: 0, or the columns of one of three parts, [high, high, low], of a layer that reads rows without rounding them.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor | None  # (d_out,) float32: what brings the accumulator back
    inverse: torch.Tensor | None  # (d_in,) float32: what the producer of this layer's input multiplies by
    shift: torch.Tensor | None  # (d_in,) float32: and adds
    d_in: int
    d_out: int
    relu: bool
    part: int = 0

    @property
    def depth(self) -> int:
        """Columns of this layer's product."""
        return 3 * self.part or self.d_in


@dataclass(frozen=True)
class PackedTransform:
    """h in the kernels' layout, on one device, at one precision."""

    old: tuple[PackedLayer, ...]
    side: tuple[PackedLayer, ...]
    mixer: tuple[PackedLayer, ...]
    precision: str
    length: float  # of an output row; 0: as it comes
    device: Device
    skip: tuple[PackedLayer, ...] = ()  # what the skip multiplies old rows by, and side-information

    @property
    def fused(self) -> bool:
        """Whether ``branches`` covers both branches."""
        return all(len(b) == 2 and b[1].d_out <= WIDEST_ROW for b in (self.old, self.side))

    @property
    def by_layers(self) -> dict[str, tuple[PackedLayer, ...]]:
        """The branches that neither ``branches`` nor ``first_layers`` covers, by name."""
        return {n: b for n, b in (("old", self.old), ("side", self.side)) if len(b) > 1 and not self.fused}

    @property
    def exact(self) -> bool:
        """Whether rows are read without rounding them."""
        return self.old[0].part > 0

    @property
    def footprints(self) -> list[tuple[int, int, int]]:
        """Of each layer of the mixer: bytes of a row in, of a row out, of the weights. The skip's output waits beside
        them all; the rows that it reads, taken as float32, are there still when another launch reads them."""
        into = [pitch(x.d_in, self.precision, mixer=True) for x in self.mixer]
        out = [*into[1:], 4 * self.mixer[-1].d_out]
        waits = 4 * self.mixer[-1].d_out if self.skip else 0
        found = [(a + waits, b, a * x.d_out) for a, b, x in zip(into, out, self.mixer, strict=True)]
        if self.skip and max(len(self.old), len(self.side)) > 1:
            found.append((4 * sum(x.d_in for x in self.skip), waits + into[0], 0))
        return found

    @property
    def bytes_per_row(self) -> int:
        """Activations between launches, for one row."""
        d_new = self.mixer[-1].d_out
        total = 4 * d_new * ((self.length > 0 and d_new > WIDEST_ROW) + bool(self.skip))
        total += sum(pitch(x.d_in, self.precision, mixer=True) for x in self.mixer)
        return total + sum(pitch(x.depth, self.precision, mixer=False) for b in self.by_layers.values() for x in b)


def pitch(width: int, precision: str, *, mixer: bool) -> int:
    """Bytes of one row of an operand: padded to 128-byte lines."""
    size = BYTES[(MIXER if mixer else COMPUTE)[precision]]
    return -(-width * size // 128) * 128


def pack(h: Transformation, precision: str, device: Device) -> PackedTransform:
    """h in the kernels' layout."""
    exact = exact_first_on_gpu(h, precision)

    def plain(layer: Layer) -> PackedLayer:
        return _pack_layer(layer, None, precision, device, mixer=False)

    def reading(layer: Layer) -> PackedLayer:
        return _pack_exact(layer, device) if exact else plain(layer)

    def branch(layers: tuple[Layer, ...]) -> tuple[PackedLayer, ...]:
        return reading(layers[0]), *map(plain, layers[1:])

    mixer = tuple(
        _pack_layer(layer, h.calibration.get(f"mixer.{i}"), precision, device, mixer=True)
        for i, layer in enumerate(h.mixer)
    )
    skip: tuple[PackedLayer, ...] = ()
    if h.skip is not None:
        parts = np.split(h.skip.weight, [h.d_old], axis=1)[: 2 if h.uses_side_info else 1]
        skip = tuple(reading(Layer(part, h.skip.bias, False)) for part in parts)  # of which the first adds the bias
    return PackedTransform(
        branch(h.old), branch(h.side), mixer, precision, h.length if h.normalise else 0.0, device, skip
    )


def fp8_steps(ranges: Floats | None) -> Floats:
    """(d_in,) float64: what one unit of an FP8 input channel stands for; ranges: (2, d_in), calibrated."""
    top = np.abs(np.asarray(ranges, np.float64)).max(axis=0)
    top = np.maximum(top, max(float(top.max()), 1e-30) * 1e-4)
    steps: Floats = np.sqrt(top * top.max()) / FP8_LARGEST  # never clips: sqrt(top * max) >= top
    return steps


def _pack_layer(layer: Layer, ranges: Floats | None, precision: str, device: Device, *, mixer: bool) -> PackedLayer:
    dtype = (MIXER if mixer else COMPUTE)[precision]
    wide = pitch(layer.d_in, precision, mixer=mixer) // BYTES[dtype]
    weight, bias = np.zeros((layer.d_out, wide), np.float32), layer.bias
    weight[:, : layer.d_in] = layer.weight
    scale = inverse = shift = None
    if mixer and precision == "int8":
        plan = int8_plan(layer, ranges)
        assert plan.scale is not None
        assert plan.in_add is not None
        weight[:, : layer.d_in] = plan.weight
        scale, inverse, shift = plan.scale, plan.in_mul, plan.in_add - np.float32(128)
        bias = plan.bias + 128.0 * plan.scale.astype(np.float64) * plan.weight.sum(axis=1, dtype=np.int64)
    elif mixer and precision == "fp8":
        step = fp8_steps(ranges)
        weight[:, : layer.d_in] = layer.weight * step
        scale = np.maximum(np.abs(weight).max(axis=1), 1e-30) / FP8_LARGEST
        weight /= scale[:, None]
        inverse = 1 / step

    def upload(x: Array | None) -> torch.Tensor | None:
        return None if x is None else device.upload(np.asarray(x, np.float32))

    return PackedLayer(
        device.upload(weight, dtype), device.upload(np.asarray(bias, np.float32)), upload(scale), upload(inverse),
        upload(shift), layer.d_in, layer.d_out, layer.relu,
    )  # fmt: skip


def _pack_exact(layer: Layer, device: Device) -> PackedLayer:
    import torch

    part = pitch(layer.d_in, "bf16", mixer=False) // BYTES["bfloat16"]
    weight = torch.zeros(layer.d_out, 3, part, dtype=torch.bfloat16)
    whole = torch.from_numpy(layer.weight)
    high = whole.to(torch.bfloat16)
    weight[:, :2, : layer.d_in] = high[:, None]
    weight[:, 2, : layer.d_in] = (whole - high.float()).to(torch.bfloat16)
    return PackedLayer(
        device.upload(weight.flatten(1)), device.upload(layer.bias), None, None, None, layer.d_in, layer.d_out,
        layer.relu, part,
    )  # fmt: skip

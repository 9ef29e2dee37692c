"""h by Triton kernels: ``branches``, ``linear`` and ``final``, chunk by chunk, the activations staying in L2.

Below fp32, the layers that read the rows multiply bfloat16 parts, high and low, three times
(kernels/transform_kernels.py), where :func:`fct.ops.numerics.quantise.exact_first` says so: rounded rows would cost
more than all roundings that follow.

int8 and FP8 take calibrated activation ranges from the artifact. The rest of the branches computes in bfloat16
and hands over quantised operands; the mixer multiplies in int8 or FP8 with one weight scale per output channel and one
activation scale per input channel, part of which is moved into the weights (SmoothQuant, arXiv:2211.10438), so that
channels of unlike range share one accumulator. int8's scales are the CPU kernels' own
(:mod:`fct.ops.numerics.quantise`), whose effect on retrieval the artifact holds; what is 0 to 255 there is stored as
-128 to 127 here. FP8 takes alpha = 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fct.artifact.transformation import Layer, Transformation
from fct.errors import BackendError
from fct.extras import why_missing
from fct.ops.backend import why_not_plain
from fct.ops.device.state import MIN_CHUNK, Device, chunk_rows, device_of, why_no_gpu
from fct.ops.numerics.quantise import exact_first, int8_plan
from fct.progress import Report
from fct.rows import BYTES_OF, Rows
from fct.types import Array, Floats, JsonDict

if TYPE_CHECKING:
    import torch

    from fct.kernels.tile_choices import Tile


__all__ = ["PackedTransform", "TritonTransform", "scale_mode"]

COMPUTE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "bfloat16", "fp8": "bfloat16"}
MIXER = {**COMPUTE, "int8": "int8", "fp8": "float8_e4m3fn"}
_QUANTISED = ("int8", "fp8")
FP8_LARGEST = 448.0
_SIZES = BYTES_OF | {"float8_e4m3fn": 1}
_WIDEST_ROW = 256  # columns of one tile: what branches and a normalising final can hold
_GRAPH_FROM = 4  # chunks from which recording a graph pays for itself


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
    normalise: bool
    device: Device
    one: torch.Tensor  # a float32 1, for pointers that no configuration reads

    @property
    def fused(self) -> bool:
        """Whether ``branches`` covers both branches; else ``ingest`` and ``linear`` do."""
        return all(len(b) == 2 and b[1].d_out <= _WIDEST_ROW for b in (self.old, self.side))

    @property
    def exact(self) -> bool:
        """Whether rows are read without rounding them."""
        return self.old[0].part > 0

    @property
    def footprints(self) -> list[tuple[int, int, int]]:
        """Of each layer of the mixer: bytes of a row in, of a row out, of the weights."""
        into = [_pitch(x.d_in, self.precision, mixer=True) for x in self.mixer]
        out = [*into[1:], 4 * self.mixer[-1].d_out]
        return [(a, b, a * x.d_out) for a, b, x in zip(into, out, self.mixer, strict=True)]

    @property
    def bytes_per_row(self) -> int:
        """Activations between launches, for one row."""
        total = 4 * self.mixer[-1].d_out if self.normalise and self.mixer[-1].d_out > _WIDEST_ROW else 0
        total += sum(_pitch(x.d_in, self.precision, mixer=True) for x in self.mixer)
        if not self.fused:
            total += sum(_pitch(x.depth, self.precision, mixer=False) for x in (*self.old, *self.side))
        return total


def _pitch(width: int, precision: str, *, mixer: bool) -> int:
    """Bytes of one row of an operand: padded to 128-byte lines."""
    size = _SIZES[(MIXER if mixer else COMPUTE)[precision]]
    return -(-width * size // 128) * 128


class TritonTransform:
    name = "triton"

    def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
        if device.partition(":")[0] != "cuda":
            return [f"runs on cuda only, got {device}"]
        why = [] if precision in COMPUTE else [f"has no {precision}"]
        why += why_not_plain(h)
        why += why_no_gpu(device)
        if missing := why_missing("triton"):
            return [*why, *missing]
        if precision in _QUANTISED:
            missing = [f"mixer.{i}" for i in range(len(h.mixer)) if f"mixer.{i}" not in h.calibration]
            if missing:
                why.append(f"{precision} needs calibrated activation ranges, this transformation has none for "
                           + ", ".join(missing))  # fmt: skip
        if not why:
            why += _target_lacks(precision, device_of(device).target)
        return why

    def fastest_first(self, device: str) -> tuple[str, ...]:
        return ("fp8", "int8", "bf16", "fp16", "fp32")

    def pack(self, h: Transformation, precision: str, device: str) -> PackedTransform:
        place = device_of(device)
        exact = precision != "fp32" and exact_first(h)

        def plain(layer: Layer) -> PackedLayer:
            return _pack_layer(layer, None, precision, place, mixer=False)

        def branch(layers: tuple[Layer, ...]) -> tuple[PackedLayer, ...]:
            first = _pack_exact(layers[0], place) if exact else plain(layers[0])
            return first, *map(plain, layers[1:])

        mixer = tuple(
            _pack_layer(layer, h.calibration.get(f"mixer.{i}"), precision, place, mixer=True)
            for i, layer in enumerate(h.mixer)
        )
        return PackedTransform(
            branch(h.old), branch(h.side), mixer, precision, h.normalise, place,
            place.upload(np.ones(1, np.float32)),
        )  # fmt: skip

    def run(
        self, packed: PackedTransform, old: Rows, side: Rows, out: Rows, *, threads: int, report: Report | None = None
    ) -> None:
        run_chunks(packed, old, side, out)


def _target_lacks(precision: str, target: str) -> list[str]:
    if precision == "fp8" and (target.startswith("gfx") or int(target.removeprefix("sm_")) < 89):
        return [f"has fp8 (e4m3) from sm_89 on, this device is {target}"]
    return []


def fp8_steps(ranges: Floats | None) -> Floats:
    """(d_in,) float64: what one unit of an FP8 input channel stands for; ranges: (2, d_in), calibrated."""
    top = np.abs(np.asarray(ranges, np.float64)).max(axis=0)
    top = np.maximum(top, max(float(top.max()), 1e-30) * 1e-4)
    steps: Floats = np.sqrt(top * top.max()) / FP8_LARGEST  # never clips: sqrt(top * max) >= top
    return steps


def _pack_layer(layer: Layer, ranges: Floats | None, precision: str, device: Device, *, mixer: bool) -> PackedLayer:
    dtype = (MIXER if mixer else COMPUTE)[precision]
    pitch = _pitch(layer.d_in, precision, mixer=mixer) // _SIZES[dtype]
    weight, bias = np.zeros((layer.d_out, pitch), np.float32), layer.bias
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

    part = _pitch(layer.d_in, "bf16", mixer=False) // _SIZES["bfloat16"]
    weight = torch.zeros(layer.d_out, 3, part, dtype=torch.bfloat16)
    whole = torch.from_numpy(layer.weight)
    high = whole.to(torch.bfloat16)
    weight[:, :2, : layer.d_in] = high[:, None]
    weight[:, 2, : layer.d_in] = (whole - high.float()).to(torch.bfloat16)
    return PackedLayer(
        device.upload(weight.flatten(1)), device.upload(layer.bias), None, None, None, layer.d_in, layer.d_out,
        layer.relu, part,
    )  # fmt: skip


def run_chunks(packed: PackedTransform, old: Rows, side: Rows, out: Rows, *, chunk: int | None = None) -> None:
    """Queues h on the caller's stream, without waiting for it. Out of memory halves the chunk, down to MIN_CHUNK."""
    n = out.n
    if n == 0:
        return
    device = packed.device
    most = min(chunk or _chunk_of(packed), n)

    def attempt(rows: int) -> None:
        with device.errors(f"the transformation of {n} rows"):
            _Chunks(packed, old, side, out, rows).run()

    device.with_fewer(attempt, most, least=MIN_CHUNK, what="chunks", bytes_each=packed.bytes_per_row)


def _chunk_of(packed: PackedTransform) -> int:
    from fct.kernels.tile_choices import tiles

    widest = max(x.d_out for x in packed.mixer)
    tile = tiles("linear", packed.precision, packed.device.target, width=widest)[0]
    return chunk_rows(
        packed.footprints, widest, l2_bytes=packed.device.l2_bytes, processors=packed.device.processors,
        tile_rows=max(tile.m, 128), tile_columns=tile.n,
    )  # fmt: skip


class _Chunks:
    """One call: scratch for a chunk, and the launches that take the chunk at ``row0`` through h."""

    def __init__(self, packed: PackedTransform, old: Rows, side: Rows, out: Rows, chunk: int) -> None:
        from fct.kernels import transform_kernels as kernels

        self.k, self.p, self.device = kernels, packed, packed.device
        self.old, self.side, self.out, self.chunk = old, side, out, chunk
        self.row0 = self.device.empty((1,), "int64")
        self.joined = self._scratch(packed.mixer[0].d_in, mixer=True)
        self.inner = [self._scratch(layer.d_in, mixer=True) for layer in packed.mixer[1:]]
        self.outer: dict[str, list[torch.Tensor]] = {"old": [], "side": []}
        if not packed.fused:
            for name in self.outer:
                self.outer[name] = [
                    self._scratch(layer.depth, mixer=False, dtype="bfloat16" if layer.part else None)
                    for layer in getattr(packed, name)
                ]
        last = packed.mixer[-1]
        self.wide = packed.normalise and last.d_out > _WIDEST_ROW
        self.unnormalised = self.device.empty((chunk, last.d_out), "float32") if self.wide else None

    def _scratch(self, width: int, *, mixer: bool, dtype: str | None = None) -> torch.Tensor:
        dtype = dtype or (MIXER if mixer else COMPUTE)[self.p.precision]
        pitch = _pitch(width, self.p.precision, mixer=mixer) // _SIZES[dtype]
        return self.device.empty((self.chunk, pitch), dtype)

    def run(self) -> None:
        n, chunk = self.out.n, self.chunk
        self.device.set_counter(self.row0, 0)
        whole = n // chunk
        step: Callable[[], None] | None = None
        for i in range(whole):
            # the first chunk is launched directly: it compiles the kernels, which a capture must not
            if i == 1 and whole >= _GRAPH_FROM:
                step = self.device.capture(lambda: self._chunk(chunk))
            step() if step is not None else self._chunk(chunk)
        if n % chunk:
            self._chunk(n % chunk)

    def _chunk(self, rows: int) -> None:
        if self.p.fused:
            self._branches(rows)
        else:
            self._branch_by_layers(rows, "old", self.old, self.joined)
            self._branch_by_layers(rows, "side", self.side, self.joined[:, self.p.old[-1].d_out :])
        a = self.joined
        for layer, to, following in zip(self.p.mixer, self.inner, self.p.mixer[1:], strict=False):
            self._linear(rows, a, layer, to, (following.inverse, following.shift), self.p.precision)
            a = to
        self._final(rows, a)
        self.device.add_to_counter(self.row0, rows)

    # ---- launches ----
    def _launch(self, name: str, grid: tuple[int, ...], tile: Tile, arguments: dict[str, object]) -> None:
        try:
            self.device.launch(getattr(self.k, name), grid, arguments, warps=tile.warps, stages=tile.stages)
        except Exception as error:
            if self.device.is_out_of_memory(error) or self.device.is_lost(error) or isinstance(error, BackendError):
                raise
            raise BackendError(
                f"{name}: the launch over {arguments['n_rows']} rows, grid {grid}, {tile}, failed on "
                f"{self.device.name} ({self.device.model}): {error}"
            ) from error

    def _tile(self, kernel: str, precision: str, width: int) -> Tile:
        from fct.kernels.tile_choices import tiles

        return tiles(kernel, precision, self.device.target, width=width)[0]

    def _product(self) -> JsonDict:
        """How float32 operands are multiplied: three TF32 products on tensor cores; plain where there are none."""
        exact = "ieee" if self.device.target.startswith("gfx") else "tf32x3"
        return {"PRECISION": exact if self.p.precision == "fp32" else "ieee", "UPCAST": self.device.interpreted}

    def _branches(self, rows: int) -> None:
        import triton.language as tl

        p = self.p
        tile = self._tile("branches", p.precision, max(p.old[1].d_out, p.side[1].d_out))
        first = p.mixer[0]
        arguments: dict[str, object] = {
            "row0_ptr": self.row0, "n_rows": rows, "out_ptr": self.joined, "stride_out": self.joined.stride(0),
            "next_ptr": self._or_one(first.inverse), "shift_ptr": self._or_one(first.shift),
            "COMPUTE": getattr(tl, COMPUTE[p.precision]), "EXACT": p.exact, "BM": tile.m,
            "BK": tile.k, "BH": tile.hidden, "BN": tile.n, **self._product(),
        }  # fmt: skip
        for name, layers, x in (("old", p.old, self.old), ("side", p.side, self.side)):
            one, two = layers
            big = name.upper()
            arguments |= {
                f"{name}_ptr": x.values, f"{name}_scale_ptr": self._or_one(x.scale), f"stride_{name}": x.row_stride,
                f"{name}_w1": one.weight, f"{name}_b1": one.bias, f"{name}_w2": two.weight, f"{name}_b2": two.bias,
                f"{big}_D": one.d_in, f"{big}_PART": one.part or one.weight.shape[1], f"{big}_H": one.d_out,
                f"{big}_PITCH2": two.weight.shape[1], f"{big}_N": two.d_out, f"{big}_SCALE": scale_mode(x),
                f"{big}_RELU1": one.relu, f"{big}_RELU2": two.relu,
            }  # fmt: skip
        self._launch("branches", (-(-rows // tile.m), 2), tile, arguments)

    def _branch_by_layers(self, rows: int, name: str, x: Rows, to: torch.Tensor) -> None:
        from fct.kernels.tile_choices import Tile

        layers, scratch = getattr(self.p, name), self.outer[name]
        tile = Tile(32, 128, 0, 4, 1)
        part = layers[0].part
        self._launch("ingest", (-(-rows // tile.m), -(-(part or x.d) // tile.n)), tile, {
            "row0_ptr": self.row0, "n_rows": rows, "x_ptr": x.values, "scale_ptr": self._or_one(x.scale),
            "stride_x": x.row_stride, "out_ptr": scratch[0], "stride_out": scratch[0].stride(0), "PART": part,
            "D": x.d, "SCALE": scale_mode(x), "EXACT": part > 0, "BM": tile.m, "BN": tile.n,
            "UPCAST": self.device.interpreted,
        })  # fmt: skip
        compute = "fp32" if self.p.precision == "fp32" else "bf16"
        for layer, a, b in zip(layers, scratch, [*scratch[1:], to], strict=True):
            first = self.p.mixer[0]
            following: tuple[torch.Tensor | None, ...] = (first.inverse, first.shift) if b is to else (None, None)
            if name == "side":
                following = tuple(x if x is None else x[self.p.old[-1].d_out :] for x in following)
            self._linear(rows, a, layer, b, following, compute)

    def _operands(self, rows: int, a: torch.Tensor, layer: PackedLayer, tile: Tile) -> tuple[dict[str, object], bool]:
        """(arguments, TMA): both operands, behind descriptors where the tile asks for them."""
        arguments: dict[str, object] = {
            "n_rows": rows, "stride_a": a.stride(0), "stride_w": layer.weight.stride(0),
            "scale_ptr": self._or_one(layer.scale), "bias_ptr": layer.bias, "N": layer.d_out, "K": layer.depth,
            "RELU": layer.relu, "SCALED": layer.scale is not None, "BM": tile.m, "BN": tile.n, "BK": tile.k,
            "INT8": str(layer.weight.dtype) == "torch.int8", "TMA": tile.tma, **self._product(),
        }  # fmt: skip
        if tile.tma:
            from triton.tools.tensor_descriptor import TensorDescriptor

            arguments["a_ptr"] = TensorDescriptor(a, [rows, layer.depth], [a.stride(0), 1], [tile.m, tile.k])
            arguments["w_ptr"] = TensorDescriptor(
                layer.weight, [layer.d_out, layer.depth], [layer.weight.stride(0), 1], [tile.n, tile.k]
            )
        else:
            arguments |= {"a_ptr": a, "w_ptr": layer.weight}
        return arguments, tile.tma

    def _linear(
        self,
        rows: int,
        a: torch.Tensor,
        layer: PackedLayer,
        to: torch.Tensor,
        following: tuple[torch.Tensor | None, ...],
        precision: str,
    ) -> None:
        """following: the next layer's inverse and shift, or nothing."""
        tile = self._tile("linear", precision, layer.d_out)
        arguments, _ = self._operands(rows, a, layer, tile)
        inverse, shift = map(self._or_one, following)
        arguments |= {"next_ptr": inverse, "shift_ptr": shift, "out_ptr": to, "stride_out": to.stride(0), "GROUP": 8}
        count = -(-rows // tile.m) * -(-layer.d_out // tile.n)
        self._launch("linear", (min(count, self.device.processors),), tile, arguments)

    def _final(self, rows: int, a: torch.Tensor) -> None:
        from fct.kernels.tile_choices import Tile

        layer, out = self.p.mixer[-1], self.out
        tile = self._tile("final", self.p.precision, layer.d_out)
        arguments, _ = self._operands(rows, a, layer, tile)
        mode = scale_mode(out)
        target = {
            "row0_ptr": self.row0, "out_ptr": out.values, "out_scale_ptr": self._or_one(out.scale),
            "stride_out": out.row_stride, "OUT_SCALE": mode,
        }  # fmt: skip
        grid = (-(-rows // tile.m), -(-layer.d_out // tile.n))
        if not self.wide:
            self._launch("final", grid, tile, arguments | target | {"NORMALISE": self.p.normalise})
            return
        scratch = {
            "row0_ptr": self._zero(), "out_ptr": self.unnormalised, "out_scale_ptr": self.p.one,
            "stride_out": layer.d_out, "OUT_SCALE": 0,
        }  # fmt: skip
        self._launch("final", grid, tile, arguments | scratch | {"NORMALISE": False})
        width = 1 << (layer.d_out - 1).bit_length()
        tile = Tile(max(1, 4096 // width), width, 0, 8, 1)
        self._launch("normalise", (-(-rows // tile.m),), tile, {
            "n_rows": rows, "y_ptr": self.unnormalised, "stride_y": layer.d_out, "N": layer.d_out, "BM": tile.m,
            "BN": tile.n, "UPCAST": self.device.interpreted, **target,
        })  # fmt: skip

    def _zero(self) -> torch.Tensor:
        if not hasattr(self, "_nought"):
            self._nought = self.device.upload(np.zeros(1, np.int64))
        return self._nought

    def _or_one(self, pointer: torch.Tensor | None) -> torch.Tensor:
        return self.p.one if pointer is None else pointer


def scale_mode(rows: Rows) -> int:
    """The kernels' SCALE_NONE, SCALE_ONE, SCALE_ROW or SCALE_DIM."""
    if rows.scale is None:
        return 0
    n, d = rows.scale.shape
    return 1 if (n, d) == (1, 1) else 2 if d == 1 else 3

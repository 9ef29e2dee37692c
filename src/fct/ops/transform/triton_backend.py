"""h by Triton kernels, chunk by chunk, the activations staying in L2.

``branches`` runs both branches where they have two layers, ``first_layers`` a branch of one layer and the skip, whose
output ``final`` adds; ``linear`` runs the mixer. What is left, deep or wide branches, is ``ingest`` and ``linear``.

Below fp32, the layers that read the rows multiply bfloat16 parts, high and low, three times
(kernels/transform_kernels.py), where :func:`fct.ops.numerics.quantise.exact_first_on_gpu` says so: rounded rows would
cost more than all roundings that follow.

"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fct.artifact.transformation import Transformation
from fct.errors import BackendError
from fct.extras import why_missing
from fct.ops.device.state import MIN_CHUNK, chunk_rows, device_of, why_no_gpu
from fct.ops.transform.triton_weights import (
    BYTES,
    COMPUTE,
    MIXER,
    WIDEST_ROW,
    PackedLayer,
    PackedTransform,
    pack,
    pitch,
)
from fct.progress import Report
from fct.rows import Rows

if TYPE_CHECKING:
    import torch

    from fct.kernels.kernel_arguments import (
        Arithmetic,
        Branch,
        BranchShape,
        Gallery,
        Operand,
        RowLayer,
        RowLayerShape,
    )
    from fct.kernels.tile_choices import Tile


__all__ = ["PackedTransform", "TritonTransform", "scale_mode"]

_QUANTISED = ("int8", "fp8")
_GRAPH_FROM = 4  # chunks from which recording a graph pays for itself


class TritonTransform:
    name = "triton"

    def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
        if device.partition(":")[0] != "cuda":
            return [f"runs on cuda only, got {device}"]
        why = [] if precision in COMPUTE else [f"has no {precision}"]
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
        return pack(h, precision, device_of(device))

    def run(
        self, packed: PackedTransform, old: Rows, side: Rows, out: Rows, *, threads: int, report: Report | None = None
    ) -> None:
        run_chunks(packed, old, side, out)


def _target_lacks(precision: str, target: str) -> list[str]:
    if precision == "fp8" and (target.startswith("gfx") or int(target.removeprefix("sm_")) < 89):
        return [f"has fp8 (e4m3) from sm_89 on, this device is {target}"]
    return []


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
        self.outer = {
            name: [self._scratch(x.depth, mixer=False, dtype="bfloat16" if x.part else None) for x in layers]
            for name, layers in packed.by_layers.items()
        }
        last = packed.mixer[-1]
        self.added = self.device.empty((chunk, last.d_out), "float32") if packed.skip else None
        self.unnormalised: tuple[torch.Tensor, torch.Tensor] | None = None  # rows too wide for one tile, and a zero
        if packed.length > 0 and last.d_out > WIDEST_ROW:
            self.unnormalised = self.device.empty((chunk, last.d_out), "float32"), self.device.empty((1,), "int64")
            self.device.set_counter(self.unnormalised[1], 0)

    def _scratch(self, width: int, *, mixer: bool, dtype: str | None = None) -> torch.Tensor:
        dtype = dtype or (MIXER if mixer else COMPUTE)[self.p.precision]
        wide = pitch(width, self.p.precision, mixer=mixer) // BYTES[dtype]
        return self.device.empty((self.chunk, wide), dtype)

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
        if self.p.skip or 1 in (len(self.p.old), len(self.p.side)):
            self._first_layers(rows)
        if self.p.fused:
            self._branches(rows)
        for name in self.p.by_layers:
            side = name == "side"
            self._branch_by_layers(
                rows, name, self.side if side else self.old, self.joined[:, self.p.old[-1].d_out if side else 0 :]
            )
        a = self.joined
        for layer, to, following in zip(self.p.mixer, self.inner, self.p.mixer[1:], strict=False):
            self._linear(rows, a, layer, _operand(to, following), self.p.precision)
            a = to
        self._final(rows, a)
        self.device.add_to_counter(self.row0, rows)

    # ---- launches ----
    def _launch(self, name: str, grid: tuple[int, ...], arguments: dict[str, object], tile: Tile) -> None:
        try:
            self.device.launch(
                getattr(self.k, name), grid, arguments | {"TILE": tile}, warps=tile.warps, stages=tile.stages
            )
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

    def _arithmetic(self, operand: str) -> Arithmetic:
        """Of products whose operands have this dtype. float32: three TF32 products on tensor cores; plain where there
        are none."""
        import triton.language as tl

        from fct.kernels.kernel_arguments import Arithmetic

        exact = "ieee" if self.device.target.startswith("gfx") else "tf32x3"
        compute = getattr(tl, {"float8_e4m3fn": "float8e4nv"}.get(operand, operand))
        precision = exact if self.p.precision == "fp32" else "ieee"
        return Arithmetic(compute, self.p.exact, precision, self.device.interpreted)

    def _branches(self, rows: int) -> None:
        p = self.p
        tile = self._tile("branches", p.precision, max(p.old[1].d_out, p.side[1].d_out))
        (old, of_old), (side, of_side) = _branch(self.old, *p.old), _branch(self.side, *p.side)
        self._launch("branches", (-(-rows // tile.m), 2), {
            "row0": self.row0, "n_rows": rows, "joined": _operand(self.joined, p.mixer[0]), "old": old, "side": side,
            "OLD": of_old, "SIDE": of_side, "HOW": self._arithmetic(COMPUTE[p.precision]),
        }, tile)  # fmt: skip

    def _first_layers(self, rows: int) -> None:
        from fct.kernels.kernel_arguments import FirstShapes

        p = self.p
        single = [layers[0] if len(layers) == 1 else None for layers in (p.old, p.side)]
        skip = [*p.skip, None, None][:2]
        (old, of_old), (side, of_side), (skip_old, of_skip), (skip_side, of_more) = (
            _row_layer(x, layer) for x, layer in zip((self.old, self.side) * 2, (*single, *skip), strict=True)
        )
        shapes = FirstShapes(of_old, of_side, of_skip, of_more, p.old[-1].d_out)
        tile = self._tile("first_layers", p.precision, max(of_old.n, of_side.n, of_skip.n))
        columns = sum(-(-shape.n // tile.n) for shape in (of_old, of_side, of_skip))
        self._launch("first_layers", (columns, -(-rows // tile.m)), {
            "row0": self.row0, "n_rows": rows, "joined": _operand(self.joined, p.mixer[0]),
            "added": None if self.added is None else _operand(self.added, None), "old": old, "side": side,
            "skip_old": skip_old, "skip_side": skip_side, "SHAPES": shapes,
            "HOW": self._arithmetic(COMPUTE[p.precision]),
        }, tile)  # fmt: skip

    def _branch_by_layers(self, rows: int, name: str, x: Rows, to: torch.Tensor) -> None:
        from fct.kernels.tile_choices import Tile

        layers, scratch = getattr(self.p, name), self.outer[name]
        tile = Tile(32, 128, 0, 4, 1)
        part = layers[0].part
        self._launch("ingest", (-(-rows // tile.m), -(-(part or x.d) // tile.n)), {
            "row0": self.row0, "n_rows": rows, "rows": _gallery(x), "out": _operand(scratch[0], None), "D": x.d,
            "PART": part, "SCALE": scale_mode(x), "UPCAST": self.device.interpreted,
        }, tile)  # fmt: skip
        compute = "fp32" if self.p.precision == "fp32" else "bf16"
        begin = self.p.old[-1].d_out if name == "side" else 0
        for layer, a, b in zip(layers, scratch, [*scratch[1:], to], strict=True):
            self._linear(rows, a, layer, _operand(b, self.p.mixer[0] if b is to else None, begin), compute)

    def _operands(self, rows: int, a: torch.Tensor, layer: PackedLayer, tile: Tile) -> dict[str, object]:
        """What ``linear`` and ``final`` read: both operands, behind descriptors where the tile asks for them."""
        from fct.kernels.kernel_arguments import Layer as LayerArguments
        from fct.kernels.kernel_arguments import LayerShape

        arguments: dict[str, object] = {
            "n_rows": rows, "a": a, "a_stride": a.stride(0), "w": layer.weight,
            "layer": LayerArguments(layer.weight.stride(0), layer.scale, layer.bias),
            "SHAPE": LayerShape(layer.depth, layer.d_out, layer.relu),
            "HOW": self._arithmetic(str(layer.weight.dtype).removeprefix("torch.")),
        }  # fmt: skip
        if tile.tma:
            from triton.tools.tensor_descriptor import TensorDescriptor

            arguments["a"] = TensorDescriptor(a, [rows, layer.depth], [a.stride(0), 1], [tile.m, tile.k])
            arguments["w"] = TensorDescriptor(
                layer.weight, [layer.d_out, layer.depth], [layer.weight.stride(0), 1], [tile.n, tile.k]
            )
        return arguments

    def _linear(self, rows: int, a: torch.Tensor, layer: PackedLayer, out: Operand, precision: str) -> None:
        tile = self._tile("linear", precision, layer.d_out)
        arguments = self._operands(rows, a, layer, tile) | {"out": out, "GROUP": 8}
        count = -(-rows // tile.m) * -(-layer.d_out // tile.n)
        self._launch("linear", (min(count, self.device.processors),), arguments, tile)

    def _final(self, rows: int, a: torch.Tensor) -> None:
        from fct.kernels.kernel_arguments import Gallery
        from fct.kernels.tile_choices import Tile

        layer = self.p.mixer[-1]
        tile = self._tile("final", self.p.precision, layer.d_out)
        arguments = self._operands(rows, a, layer, tile)
        arguments["added"] = None if self.added is None else _operand(self.added, None)
        target = {
            "row0": self.row0, "out": _gallery(self.out), "LENGTH": self.p.length, "SCALE": scale_mode(self.out),
        }  # fmt: skip
        grid = (-(-rows // tile.m), -(-layer.d_out // tile.n))
        if self.unnormalised is None:
            self._launch("final", grid, arguments | target, tile)
            return
        rows_of_scratch, zero = self.unnormalised
        scratch = {"row0": zero, "out": Gallery(rows_of_scratch, None, layer.d_out), "LENGTH": 0.0, "SCALE": 0}
        self._launch("final", grid, arguments | scratch, tile)
        width = 1 << (layer.d_out - 1).bit_length()
        tile = Tile(max(1, 4096 // width), width, 0, 8, 1)
        self._launch("normalise", (-(-rows // tile.m),), {
            "n_rows": rows, "y": rows_of_scratch, "y_stride": layer.d_out, "N": layer.d_out,
            "UPCAST": self.device.interpreted, **target,
        }, tile)  # fmt: skip


def _branch(x: Rows, first: PackedLayer, second: PackedLayer) -> tuple[Branch, BranchShape]:
    from fct.kernels.kernel_arguments import Branch, BranchShape

    part, pitch = first.part or first.weight.shape[1], second.weight.shape[1]
    return Branch(_gallery(x), first.weight, first.bias, second.weight, second.bias), BranchShape(
        first.d_in, part, first.d_out, pitch, second.d_out, scale_mode(x), first.relu, second.relu
    )


def _row_layer(x: Rows, layer: PackedLayer | None) -> tuple[RowLayer | None, RowLayerShape]:
    from fct.kernels.kernel_arguments import RowLayer, RowLayerShape

    if layer is None:
        return None, RowLayerShape(0, 0, 0, 0, False)
    part = layer.part or layer.weight.shape[1]
    shape = RowLayerShape(layer.d_in, part, layer.d_out, scale_mode(x), layer.relu)
    return RowLayer(_gallery(x), layer.weight, layer.bias), shape


def _gallery(x: Rows) -> Gallery:
    from fct.kernels.kernel_arguments import Gallery

    return Gallery(x.values, x.scale, x.row_stride)


def _operand(values: torch.Tensor, following: PackedLayer | None, begin: int = 0) -> Operand:
    """Where a layer's output goes, from column ``begin`` of what ``following`` reads on; None: nothing quantises it."""
    from fct.kernels.kernel_arguments import Operand

    if following is None or following.inverse is None:
        return Operand(values, values.stride(0), None, None)
    add = following.shift
    return Operand(values, values.stride(0), following.inverse[begin:], None if add is None else add[begin:])


def scale_mode(rows: Rows) -> int:
    """The kernels' SCALE_NONE, SCALE_ONE, SCALE_ROW or SCALE_DIM."""
    if rows.scale is None:
        return 0
    n, d = rows.scale.shape
    return 1 if (n, d) == (1, 1) else 2 if d == 1 else 3

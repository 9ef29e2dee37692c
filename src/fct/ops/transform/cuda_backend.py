"""h by the compiled CUDA kernels, in bf16: one launch for up to 256 rows, cuBLASLt's products for more.

The layers that read the rows multiply bfloat16 parts, high and low, three times, where
:func:`fct.ops.numerics.quantise.exact_first` says so. The skip is more depth of the last layer: rows lie behind the
activations that this one reads, and the skip's weights behind its own, so that the sum is made in its float32
accumulator. The layouts are in csrc/cuda/transform.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fct.artifact.layers import BRANCHES, Layer
from fct.artifact.transformation import Transformation
from fct.ops.device.cuda_runtime import CudaRuntime, RowsAt, rows_at
from fct.ops.device.state import chunk_rows
from fct.ops.numerics.quantise import exact_first
from fct.progress import Report
from fct.rows import Rows
from fct.types import JsonDict

if TYPE_CHECKING:
    import torch


__all__ = ["CudaTransform"]

SMALL_ROWS = 256  # csrc/cuda/transform.cuh: kMaxSmallRows
_WORKSPACE = 32 << 20
_ALIGNED = 16  # bytes from which cuBLASLt's kernels read and write whole vectors


class Network(Protocol):
    """The bindings' CudaNetwork: h with its buffers, on one stream."""

    def small(
        self, old: RowsAt, side: RowsAt, out: RowsAt, barrier: int, blocks: int, device: int, stream: int
    ) -> None: ...
    def large(
        self, old: RowsAt, side: RowsAt, out: RowsAt, workspace: int, workspace_bytes: int, device: int, stream: int
    ) -> None: ...


@dataclass(frozen=True)
class _PackedLayer:
    weight: torch.Tensor  # (d_out, depth) bf16, depth a multiple of 64, zero where nothing is multiplied
    bias: torch.Tensor  # (d_out,) fp32
    bias_bf16: torch.Tensor
    relu: bool

    @property
    def depth(self) -> int:
        return int(self.weight.shape[1])

    @property
    def d_out(self) -> int:
        return int(self.weight.shape[0])


@dataclass(frozen=True)
class _Packed:
    chains: dict[str, list[_PackedLayer]]
    length: float  # of the output's rows; 0: they stay as they come
    split: bool  # rows and the weights that read them as high and low parts, see csrc/cuda/transform.cuh
    uses_side: bool  # else the side branch reads the old rows
    side_at: int  # column where the side branch's output begins, behind the old one's
    skip_at: int | None  # column where the rows begin in what the last layer reads
    chunk: int  # rows of a large batch whose activations stay in L2
    device: str
    scratch: dict[tuple[int, int], _Scratch]  # by (stream, rows): two streams never share activations


@dataclass(frozen=True)
class _Scratch:
    network: Network
    buffers: dict[str, torch.Tensor]  # which the network holds by their addresses


class CudaTransform:
    """h in bf16, the rows not rounded: one launch for up to 256 rows, cuBLASLt's products for more."""

    name = "cuda"

    def __init__(self, runtime: CudaRuntime | None = None) -> None:
        self.runtime = runtime or CudaRuntime()

    def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
        why = [] if precision == "bf16" else [f"has no {precision}"]
        layers = sum(len(getattr(h, b)) for b in BRANCHES)
        phases = max(len(h.old), len(h.side)) + len(h.mixer)
        if layers > 16 or phases > 12:
            why.append(f"expected at most 16 layers in 12 steps, got {layers} in {phases}")
        if device == "cpu":
            return [*why, "runs on cuda only, got cpu"]
        return why + self.runtime.check_device(device)

    def fastest_first(self, device: str) -> tuple[str, ...]:
        return ("bf16",)

    # ---- weights ----
    def pack(self, h: Transformation, precision: str, device: str) -> _Packed:
        import torch

        split = exact_first(h)
        chains = {
            b: [self._layer([self._of_rows(torch.from_numpy(x.weight), split and i == 0)], x, device)
                for i, x in enumerate(getattr(h, b))]
            for b in ("old", "side")
        }  # fmt: skip
        blocks = [[torch.from_numpy(layer.weight)] for layer in h.mixer]
        old, side = blocks[0][0].tensor_split([h.old[-1].d_out], dim=1)
        old = _padded(old, _ALIGNED // 2)
        blocks[0] = [torch.cat([old, side], 1)]
        last, skip_at = h.mixer[-1], None
        if h.skip is not None:
            skip_at = self._width(blocks[-1][0].shape[1])
            of_skip = torch.from_numpy(h.skip.weight).tensor_split([h.d_old], dim=1)
            blocks[-1] += [self._of_rows(weight, split) for weight in of_skip]
            bias = last.bias.astype(np.float64) + h.skip.bias
            last = Layer(last.weight, bias.astype(np.float32), last.relu)
        chains["mixer"] = [
            self._layer(parts, x, device) for parts, x in zip(blocks, (*h.mixer[:-1], last), strict=True)
        ]
        return _Packed(
            chains, h.length if h.normalise else 0.0, split, h.uses_side_info, int(old.shape[1]), skip_at,
            self._chunk(chains["mixer"], skip_at, device), device, {},
        )  # fmt: skip

    def _width(self, d: int) -> int:
        """d rounded up to what the kernels read at a time."""
        return int(self.runtime.lib.cuda_layer_row_elements(d))

    def _of_rows(self, weight: torch.Tensor, split: bool) -> torch.Tensor:
        """A weight (d_out, d_in) that multiplies rows as they are converted: itself, or [high | high | low]."""
        import torch

        high = weight.to(torch.bfloat16).float()
        return torch.cat([_padded(x, self._width(1)) for x in ((high, high, weight - high) if split else (weight,))], 1)

    def _layer(self, blocks: list[torch.Tensor], layer: Layer, device: str) -> _PackedLayer:
        import torch

        weight = torch.cat([_padded(x, self._width(1)) for x in blocks], 1)
        bias = torch.from_numpy(layer.bias)
        return _PackedLayer(
            weight.to(device, torch.bfloat16), bias.to(device), bias.to(device, torch.bfloat16), layer.relu
        )

    def _chunk(self, mixer: list[_PackedLayer], skip_at: int | None, device: str) -> int:
        """By the rule of Triton's path. Which tiles cuBLASLt takes it does not say; 128 x 256 is usual for its size.

        Rows that the skip reads at the end have to stay until then.
        """
        place = self.runtime.properties(self.runtime.device_and_stream(device)[0])
        kept = 0 if skip_at is None else mixer[-1].depth - skip_at
        into = [layer.depth for layer in mixer]
        into[-1] -= kept
        out = [*into[1:], 2 * mixer[-1].d_out]  # in elements of two bytes; the last layer's have four
        rows = chunk_rows(
            [(2 * (a + kept), 2 * b, 2 * layer.weight.numel()) for a, b, layer in zip(into, out, mixer, strict=True)],
            max(layer.d_out for layer in mixer), l2_bytes=place["l2_bytes"], processors=place["multiprocessors"],
        )  # fmt: skip
        return max(rows, 2 * SMALL_ROWS)

    # ---- rows ----
    def run(
        self, packed: _Packed, old: Rows, side: Rows, out: Rows, *, threads: int, report: Report | None = None
    ) -> None:
        if out.n == 0:
            return
        device, stream = self.runtime.device_and_stream(packed.device)
        large = out.n > SMALL_ROWS and not self.large_why_not()
        step = packed.chunk if large else SMALL_ROWS
        scratch = self._scratch(packed, step, stream)
        for start in range(0, out.n, step):
            part = slice(start, start + step)
            rows = rows_at(old[part]), rows_at(side[part]), rows_at(out[part])
            if large:
                workspace = scratch.buffers["workspace"]
                scratch.network.large(*rows, workspace.data_ptr(), workspace.numel(), device, stream)
            else:
                blocks = self.runtime.properties(device)["multiprocessors"]
                scratch.network.small(*rows, scratch.buffers["barrier"].data_ptr(), blocks, device, stream)

    def large_why_not(self) -> str:
        """Why cuBLASLt is not at hand, in which case large batches go through the small kernel in pieces."""
        return str(self.runtime.lib.cuda_blaslt_why_not(_blaslt_paths()))

    def _scratch(self, packed: _Packed, rows: int, stream: int) -> _Scratch:
        key = (stream, rows)
        if key not in packed.scratch:
            buffers = self._buffers(packed, rows)
            layers = _plan(packed, buffers, bias_bf16=rows > SMALL_ROWS)
            old, side, last = (buffers[name] for name in ("old", "side", "last"))
            network = self.runtime.lib.CudaNetwork(
                old_bf16=old.data_ptr(), old_pitch=old.stride(0),
                side_bf16=side.data_ptr() if packed.uses_side else 0, side_pitch=side.stride(0),
                split=packed.split, last=last.data_ptr(), last_pitch=last.stride(0), length=packed.length,
                layers=layers,
            )  # fmt: skip
            packed.scratch[key] = _Scratch(network, buffers)
        return packed.scratch[key]

    def _buffers(self, packed: _Packed, rows: int) -> dict[str, torch.Tensor]:
        """What each layer reads, by the layer's name; "old" and "side", the rows; "last", the last layer's output."""
        import torch

        def zeros(width: int) -> torch.Tensor:
            return torch.zeros(rows, width, dtype=torch.bfloat16, device=packed.device)

        c = packed.chains
        found = {f"mixer.{i}": zeros(layer.depth) for i, layer in enumerate(c["mixer"])}
        widths = [c["old"][0].depth, c["side"][0].depth if packed.uses_side else 0]
        begin = packed.skip_at
        whole = zeros(sum(widths)) if begin is None else found[f"mixer.{len(c['mixer']) - 1}"][:, begin:]
        found["old"], found["side"] = whole[:, : widths[0]], whole[:, widths[0] :]
        if not packed.uses_side:
            found["side"] = found["old"]
        for branch in ("old", "side"):
            found[f"{branch}.0"] = found[branch]
            found |= {f"{branch}.{i}": zeros(layer.depth) for i, layer in enumerate(c[branch]) if i}
        d_new = c["mixer"][-1].d_out
        pitch = d_new + -d_new % (_ALIGNED // 4)
        found["last"] = torch.zeros(rows, pitch, dtype=torch.float32, device=packed.device)
        if rows > SMALL_ROWS:
            found["workspace"] = torch.empty(_WORKSPACE, dtype=torch.uint8, device=packed.device)
        else:
            found["barrier"] = torch.zeros(2, dtype=torch.int32, device=packed.device)
        return found


def _padded(weight: torch.Tensor, step: int) -> torch.Tensor:
    """The weight (d_out, d_in) with columns of zeros up to a multiple of ``step``."""
    import torch

    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % step))


def _plan(packed: _Packed, buffers: dict[str, torch.Tensor], *, bias_bf16: bool) -> list[JsonDict]:
    """Every layer with its buffers, in the order and phases in which they can run."""
    chains = packed.chains
    branch_phases = max(len(chains["old"]), len(chains["side"]))
    plan: list[JsonDict] = []
    for branch in BRANCHES:
        chain = chains[branch]
        first = branch_phases if branch == "mixer" else branch_phases - len(chain)
        for i, layer in enumerate(chain):
            ends = i + 1 == len(chain)
            last = ends and branch == "mixer"
            x = buffers[f"{branch}.{i}"]
            y = buffers["last" if last else "mixer.0" if ends else f"{branch}.{i + 1}"]
            column = packed.side_at if ends and branch == "side" else 0
            bias = layer.bias_bf16 if bias_bf16 and not last else layer.bias
            plan.append({
                "x": x.data_ptr(), "x_pitch": x.stride(0), "weight": layer.weight.data_ptr(), "d_in": layer.depth,
                "d_out": layer.d_out, "bias": bias.data_ptr(), "relu": layer.relu,
                "y": y.data_ptr() + column * y.element_size(), "y_pitch": y.stride(0), "last": last,
                "phase": first + i,
            })  # fmt: skip
    return sorted(plan, key=lambda layer: layer["phase"])


@cache
def _blaslt_paths() -> list[str]:
    """cuBLASLt as the packages that torch brings along have it."""
    spec = find_spec("nvidia")
    found: list[str] = []
    for root in (spec.submodule_search_locations or []) if spec else []:
        for folder in ("cu13", "cublas"):
            found += [str(p) for p in sorted(Path(root, folder, "lib").glob("libcublasLt.so.*"))]
    return found

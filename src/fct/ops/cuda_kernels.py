"""The compiled CUDA kernels: h for torch tensors on an NVIDIA GPU, and certified-exact top-k.

Everything is queued on the caller's current stream; nothing here synchronises, and every buffer comes from torch's
allocator. A :class:`CudaRuntime` says where kernels and streams come from, so that the same code runs, in tests, on
the kernels' emulated build over CPU tensors.

Sources: certified rescoring follows the error-bound filter of exact quantised search (see docs/retrieval.md); the
layouts are in csrc/cuda/topk.cuh and csrc/cuda/transform.cuh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fct import _C
from fct.artifact.transformation import BRANCHES, Layer, Transformation
from fct.native_codes import METRIC_CODES, SHADOW_CODES
from fct.ops.backend import GpuShadow, drop_own_rows, why_not_plain
from fct.ops.device.state import chunk_rows
from fct.ops.numerics.quantise import exact_first
from fct.progress import Report
from fct.rows import Rows
from fct.types import JsonDict

if TYPE_CHECKING:
    import torch


__all__ = ["CudaRuntime", "CudaSearch", "CudaTransform"]

SMALL_ROWS = 256  # csrc/cuda/transform.cuh: kMaxSmallRows
_WORKSPACE = 32 << 20
_PART = 1 << 30  # gallery rows of one search call; the kernels' row numbers have 32 bits
_MAX_K = 2048


class CudaRuntime:
    """The compiled kernels and torch's CUDA streams."""

    lib: ModuleType = _C

    def why_not(self) -> list[str]:
        """Why no CUDA kernel can run here; empty when one can."""
        if _C.cuda_why_not:
            return [_C.cuda_why_not]
        reason = self.lib.cuda_why_not_here()
        return [reason] if reason else []

    def where(self, device: str) -> tuple[int, int]:
        """(device number, the caller's current stream on it)."""
        import torch

        stream = torch.cuda.current_stream(torch.device(device))
        return int(stream.device_index), int(stream.cuda_stream)

    def properties(self, index: int) -> JsonDict:
        """name, capability, multiprocessors, shared_memory (bytes a block may have), l2_bytes."""
        return _properties(self.lib, index)

    def check_device(self, device: str) -> list[str]:
        """Reasons against one device: none of that number, lost, forked after CUDA, older than what was built, ..."""
        from fct.ops.device.state import why_no_gpu

        return self.why_not() or why_no_gpu(device)


@cache
def _properties(lib: ModuleType, index: int) -> JsonDict:
    return dict(lib.cuda_device(index))


def _at(rows: Rows) -> tuple[int, int, int, int, int, int, int, int]:
    """Rows as the kernels take them."""
    scale = rows.scale
    address, by_row, by_dim = 0, 0, 0
    if scale is not None:
        address = int(scale.data_ptr())
        by_row = int(scale.shape[0] > 1)
        by_dim = int(scale.shape[1] > 1)
    return rows.address, rows.dtype_code, rows.n, rows.d, rows.row_stride, address, by_row, by_dim


# ---- the transformation ----
@dataclass(frozen=True)
class _PackedLayer:
    weight: torch.Tensor  # (d_out, pitch) bf16, zero beyond d_in
    bias: torch.Tensor  # (d_out,) fp32
    bias_bf16: torch.Tensor
    d_in: int  # of split rows, the three parts' length
    d_out: int
    relu: bool


@dataclass(frozen=True)
class _Packed:
    chains: dict[str, list[_PackedLayer]]
    normalise: bool
    split: bool  # rows and first weights as high and low parts, see csrc/cuda/transform.cuh
    chunk: int  # rows of a large batch whose activations stay in L2
    device: str
    scratch: dict[tuple[int, int], JsonDict]  # by (stream, rows): two streams never share activations


class CudaTransform:
    """h in bf16, the rows not rounded: one launch for up to 256 rows, cuBLASLt's products for more."""

    name = "cuda"

    def __init__(self, runtime: CudaRuntime | None = None) -> None:
        self.runtime = runtime or CudaRuntime()

    def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
        why = [] if precision == "bf16" else [f"has no {precision}"]
        why += why_not_plain(h)
        layers = sum(len(getattr(h, b)) for b in BRANCHES)
        phases = max(len(h.old), len(h.side)) + len(h.mixer)
        if layers > 16 or phases > 12:
            why.append(f"expected at most 16 layers in 12 steps, got {layers} in {phases}")
        if device == "cpu":
            return [*why, "runs on cuda only, got cpu"]
        return why + self.runtime.check_device(device)

    def fastest_first(self, device: str) -> tuple[str, ...]:
        return ("bf16",)

    def pack(self, h: Transformation, precision: str, device: str) -> _Packed:
        import torch

        def pack(layer: Layer, *, split: bool = False) -> _PackedLayer:
            part = self.runtime.lib.cuda_layer_row_elements(layer.d_in)
            padded = torch.zeros(layer.d_out, 3 if split else 1, part, dtype=torch.bfloat16)
            whole = torch.from_numpy(layer.weight)
            padded[..., : layer.d_in] = whole[:, None]
            if split:
                padded[:, 2, : layer.d_in] = whole - padded[:, 0, : layer.d_in].float()
            bias = torch.from_numpy(layer.bias)
            return _PackedLayer(
                padded.flatten(1).to(device), bias.to(device), bias.to(device, torch.bfloat16),
                3 * part if split else layer.d_in, layer.d_out, layer.relu,
            )  # fmt: skip

        split = exact_first(h)
        chains = {
            b: [pack(x, split=split and b != "mixer" and i == 0) for i, x in enumerate(getattr(h, b))] for b in BRANCHES
        }
        return _Packed(chains, h.normalise, split, self._chunk(chains["mixer"], device), device, {})

    def _chunk(self, mixer: list[_PackedLayer], device: str) -> int:
        """By the rule of Triton's path. Which tiles cuBLASLt takes it does not say; 128 x 256 is usual for its size."""
        place = self.runtime.properties(self.runtime.where(device)[0])
        into = [2 * int(layer.weight.shape[1]) for layer in mixer]
        out = [*into[1:], 4 * mixer[-1].d_out]
        rows = chunk_rows(
            [(a, b, a * layer.d_out) for a, b, layer in zip(into, out, mixer, strict=True)],
            max(layer.d_out for layer in mixer), l2_bytes=place["l2_bytes"], processors=place["multiprocessors"],
        )  # fmt: skip
        return max(rows, 2 * SMALL_ROWS)

    def run(
        self, packed: _Packed, old: Rows, side: Rows, out: Rows, *, threads: int, report: Report | None = None
    ) -> None:
        if out.n == 0:
            return
        where = self.runtime.where(packed.device)
        if out.n > SMALL_ROWS and not self.large_why_not():
            for start in range(0, out.n, packed.chunk):
                part = slice(start, start + packed.chunk)
                self._large(packed, old[part], side[part], out[part], where)
            return
        for start in range(0, out.n, SMALL_ROWS):
            part = slice(start, start + SMALL_ROWS)
            self._small(packed, old[part], side[part], out[part], where)

    def large_why_not(self) -> str:
        """Why cuBLASLt is not at hand, in which case large batches go through the small kernel in pieces."""
        return str(self.runtime.lib.cuda_blaslt_why_not(_blaslt_paths()))

    def _scratch(self, packed: _Packed, rows: int, stream: int) -> JsonDict:
        key = (stream, rows)
        if key not in packed.scratch:
            import torch

            width = self.runtime.lib.cuda_layer_row_elements

            def zeros(d: int) -> torch.Tensor:
                return torch.zeros(rows, width(d), dtype=torch.bfloat16, device=packed.device)

            c = packed.chains
            buffers = {"old": zeros(c["old"][0].d_in), "side": zeros(c["side"][0].d_in)}
            for branch in BRANCHES:
                for i, layer in enumerate(c[branch][:-1]):
                    buffers[f"{branch}.{i}"] = zeros(layer.d_out)
            buffers["joined"] = zeros(c["mixer"][0].d_in)
            last = c["mixer"][-1].d_out
            buffers["last"] = torch.zeros(rows, last, dtype=torch.float32, device=packed.device)
            buffers["barrier"] = torch.zeros(2, dtype=torch.int32, device=packed.device)
            if rows > SMALL_ROWS:
                buffers["workspace"] = torch.empty(_WORKSPACE, dtype=torch.uint8, device=packed.device)
            packed.scratch[key] = buffers
        return packed.scratch[key]

    def _plan(self, packed: _Packed, s: JsonDict, bias_bf16: bool) -> list[JsonDict]:
        """Every layer with its buffers, in the order and phases in which they can run."""
        chains = packed.chains
        branch_phases = max(len(chains["old"]), len(chains["side"]))
        plan: list[JsonDict] = []
        for branch in BRANCHES:
            x = s["joined"] if branch == "mixer" else s[branch]
            chain = chains[branch]
            first = branch_phases if branch == "mixer" else branch_phases - len(chain)
            for i, layer in enumerate(chain):
                ends = i + 1 == len(chain)
                last = ends and branch == "mixer"
                y = s["last"] if last else s["joined"] if ends else s[f"{branch}.{i}"]
                offset = chains["old"][-1].d_out * y.element_size() if ends and branch == "side" else 0
                bias = layer.bias_bf16 if bias_bf16 and not last else layer.bias
                plan.append(
                    {
                        "x": x.data_ptr(),
                        "x_pitch": x.stride(0),
                        "weight": layer.weight.data_ptr(),
                        "d_in": layer.d_in,
                        "d_out": layer.d_out,
                        "bias": bias.data_ptr(),
                        "relu": layer.relu,
                        "y": y.data_ptr() + offset,
                        "y_pitch": y.stride(0),
                        "last": last,
                        "phase": first + i,
                    }
                )
                x = y
        return sorted(plan, key=lambda layer: layer["phase"])

    def _small(self, packed: _Packed, old: Rows, side: Rows, out: Rows, where: tuple[int, int]) -> None:
        s = self._scratch(packed, SMALL_ROWS, where[1])
        self.runtime.lib.cuda_transform_small(
            *where,
            old=_at(old),
            side=_at(side),
            out=_at(out),
            old_bf16=s["old"].data_ptr(),
            side_bf16=s["side"].data_ptr(),
            last=s["last"].data_ptr(),
            barrier=s["barrier"].data_ptr(),
            normalise=packed.normalise,
            split=packed.split,
            blocks=self.runtime.properties(where[0])["multiprocessors"],
            layers=self._plan(packed, s, bias_bf16=False),
        )

    def _large(self, packed: _Packed, old: Rows, side: Rows, out: Rows, where: tuple[int, int]) -> None:
        lib = self.runtime.lib
        s = self._scratch(packed, packed.chunk, where[1])
        for rows, to in ((old, s["old"]), (side, s["side"])):
            lib.cuda_convert_rows(_at(rows), to.data_ptr(), to.stride(0), packed.split, *where)
        for layer in self._plan(packed, s, bias_bf16=True):
            lib.cuda_blaslt_layer(out.n, s["workspace"].data_ptr(), _WORKSPACE, *where, **layer)
        lib.cuda_finish_rows(s["last"].data_ptr(), _at(out), packed.normalise, *where)


@cache
def _blaslt_paths() -> list[str]:
    """cuBLASLt as the packages that torch brings along have it."""
    spec = find_spec("nvidia")
    found: list[str] = []
    for root in (spec.submodule_search_locations or []) if spec else []:
        for folder in ("cu13", "cublas"):
            found += [str(p) for p in sorted(Path(root, folder, "lib").glob("libcublasLt.so.*"))]
    return found


# ---- top-k ----
class CudaSearch:
    """Certified-exact top-k on a GPU; the answer is that of :func:`fct.topk` on a CPU."""

    name = "cuda"

    def __init__(self, runtime: CudaRuntime | None = None, *, part: int = _PART) -> None:
        self.runtime = runtime or CudaRuntime()
        self.part = part

    def why_not(self, k: int, metric: str, device: str) -> list[str]:
        """Every reason why this search cannot run on this device; empty when it can."""
        why = [] if k <= _MAX_K else [f"expected k up to {_MAX_K}, got {k}"]
        if metric not in METRIC_CODES:
            why.append(f"has no metric {metric!r}")
        return why + (["runs on cuda only, got cpu"] if device == "cpu" else self.runtime.check_device(device))

    def prepare(self, gallery: Rows, metric: str, kind: str = "bf16") -> GpuShadow:
        """The gallery's shadow: "bf16" or "int8" rows and four floats a row that bound what the rounding lost.

        gallery: (n, d) on the device, n >= 1. Takes n * (2 d or d, rounded up to 128, + 16) bytes.
        """
        shadow, meta = self._shadow(gallery, metric, kind, is_query=False)
        return GpuShadow(self.name, gallery, metric, kind, shadow, meta)

    def _shadow(self, rows: Rows, metric: str, kind: str, *, is_query: bool) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        lib = self.runtime.lib
        pitch = lib.cuda_shadow_row_bytes(rows.d, SHADOW_CODES[kind])
        shadow = torch.empty(rows.n, pitch, dtype=torch.uint8, device=rows.values.device)
        meta = torch.empty(rows.n, 4, dtype=torch.float32, device=rows.values.device)
        lib.cuda_make_shadow(
            _at(rows),
            METRIC_CODES[metric],
            SHADOW_CODES[kind],
            is_query,
            shadow.data_ptr(),
            meta.data_ptr(),
            *self.runtime.where(rows.device),
        )
        return shadow, meta

    def search(
        self, queries: Rows, gallery: GpuShadow, k: int, *, same_items: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """((n, k) float32 distances, (n, k) int64 rows) of the k best, ties by lower row; tensors on the device.

        1 <= k <= 2048. ``same_items`` leaves row i out of query i's answer and needs k <= 2047.
        """
        if same_items:
            return drop_own_rows(*self.search(queries, gallery, k + 1))
        import torch

        device = queries.values.device
        distances = torch.empty(queries.n, k, dtype=torch.float32, device=device)
        indices = torch.empty(queries.n, k, dtype=torch.int64, device=device)
        if queries.n == 0:
            return distances, indices
        at_once = self._queries_at_once(queries.device, gallery, k)
        for start in range(0, queries.n, at_once):
            part = slice(start, start + at_once)
            self._chunk(queries[part], gallery, k, distances[part], indices[part])
        return distances, indices

    def _queries_at_once(self, device: str, gallery: GpuShadow, k: int) -> int:
        properties = self.runtime.properties(self.runtime.where(device)[0])
        return int(
            self.runtime.lib.cuda_search_queries(
                d=gallery.rows.d,
                kind=SHADOW_CODES[gallery.kind],
                k=k,
                multiprocessors=properties["multiprocessors"],
                shared_memory=properties["shared_memory"],
            )
        )

    def _chunk(self, queries: Rows, gallery: GpuShadow, k: int, distances: torch.Tensor, indices: torch.Tensor) -> None:
        import torch

        lib = self.runtime.lib
        where = self.runtime.where(queries.device)
        shadow, meta = self._shadow(queries, gallery.metric, gallery.kind, is_query=True)
        parts = math.ceil(gallery.rows.n / self.part)
        at_once = max(2, min(parts, 8192 // k))  # results that one merge takes
        out_d = torch.empty(at_once, queries.n, k, dtype=torch.float32, device=distances.device)
        out_i = torch.empty(at_once, queries.n, k, dtype=torch.int64, device=distances.device)
        scratch = None
        filled = 0
        for number in range(parts):
            part = slice(number * self.part, min((number + 1) * self.part, gallery.rows.n))
            d, i = (distances, indices) if parts == 1 else (out_d[filled], out_i[filled])
            self_args = self._args(queries, shadow, meta, gallery, part, k, where[0])
            size = lib.cuda_search_size(distances=0, indices=0, scratch=0, **self_args)["scratch"]
            if scratch is None or scratch.numel() < size:
                scratch = torch.empty(size, dtype=torch.uint8, device=distances.device)
            lib.cuda_search(
                *where, distances=d.data_ptr(), indices=i.data_ptr(), scratch=scratch.data_ptr(), **self_args
            )
            filled += 1
            if parts > 1 and (filled == at_once or number + 1 == parts):
                lib.cuda_merge_parts(
                    out_d.data_ptr(),
                    out_i.data_ptr(),
                    filled,
                    queries.n,
                    k,
                    METRIC_CODES[gallery.metric],
                    distances.data_ptr(),
                    indices.data_ptr(),
                    *where,
                )
                out_d[0].copy_(distances)  # the best so far stand in front of the parts still to come
                out_i[0].copy_(indices)
                filled = 1

    def _args(
        self,
        queries: Rows,
        shadow: torch.Tensor,
        meta: torch.Tensor,
        gallery: GpuShadow,
        part: slice,
        k: int,
        index: int,
    ) -> JsonDict:
        properties = self.runtime.properties(index)
        return {
            "queries": _at(queries),
            "gallery": _at(gallery.rows[part]),
            "metric": METRIC_CODES[gallery.metric],
            "kind": SHADOW_CODES[gallery.kind],
            "k": k,
            "base": part.start,
            "query_shadow": shadow.data_ptr(),
            "query_meta": meta.data_ptr(),
            "gallery_shadow": gallery.shadow[part].data_ptr(),
            "gallery_meta": gallery.meta[part].data_ptr(),
            "multiprocessors": properties["multiprocessors"],
            "shared_memory": properties["shared_memory"],
        }

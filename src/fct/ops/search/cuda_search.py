"""Certified-exact top-k by the compiled CUDA kernels, for torch tensors on an NVIDIA GPU.

Sources: certified rescoring follows the error-bound filter of exact quantised search (see KERNELS.md); the
layouts are in csrc/cuda/topk.cuh.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fct.native_codes import METRIC_CODES, SHADOW_CODES
from fct.ops.backend import GpuShadow, drop_own_rows
from fct.ops.device.cuda_runtime import CudaRuntime, rows_at
from fct.rows import Rows
from fct.types import JsonDict

if TYPE_CHECKING:
    import torch


__all__ = ["CudaSearch"]

_PART = 1 << 30  # gallery rows of one search call; the kernels' row numbers have 32 bits
_MAX_K = 2048


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
            rows_at(rows),
            METRIC_CODES[metric],
            SHADOW_CODES[kind],
            is_query,
            shadow.data_ptr(),
            meta.data_ptr(),
            *self.runtime.device_and_stream(rows.device),
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
        properties = self.runtime.properties(self.runtime.device_and_stream(device)[0])
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
        where = self.runtime.device_and_stream(queries.device)
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
            "queries": rows_at(queries),
            "gallery": rows_at(gallery.rows[part]),
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

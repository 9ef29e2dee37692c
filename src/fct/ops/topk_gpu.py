"""Search on a GPU: the CUDA kernels where they can run and proved themselves there, else blocked torch products."""

from __future__ import annotations

from typing import Any

from fct.arrays import Rows
from fct.errors import BackendError
from fct.ops.cuda import CudaSearch
from fct.ops.dispatch import forced_backend
from fct.ops.topk import topk_blocked

__all__ = ["cuda_search", "topk_gpu", "why_not_cuda"]


def cuda_search() -> CudaSearch:
    """The CUDA kernels' search."""
    return CudaSearch()


def why_not_cuda(search: CudaSearch, k: int, metric: str, device: str, kind: str) -> list[str]:
    """Every reason against the CUDA search, the self-proof's verdict last; empty when it can run."""
    why = search.why_not(k, metric, device)
    if not why:
        from fct.ops.selfproof import prove_search

        verdict = prove_search(search, metric, kind, device)
        why = [f"refused by the self-proof: {verdict}"] if verdict else []
    return why


def topk_gpu(q: Rows, g: Rows, k: int, metric: str, precision: str, same_items: bool) -> tuple[Any, Any]:
    """((n, k) float32, (n, k) int64) tensors on the rows' device.

    ``precision`` is the scan's: "auto" and "bf16" or "int8" go over a shadow, "fp32" scores every row with torch.
    ``FCT_BACKEND=cuda`` or ``torch`` forces one. Where "auto" has no memory for the shadow, torch takes over.
    Raises BackendError for a forced search that can not run, with the reasons.
    """
    forced = forced_backend(None)
    demanded = forced == "cuda" or precision in ("bf16", "int8")
    if precision not in ("auto", "fp32", "bf16", "int8") or (forced == "torch" and precision not in ("auto", "fp32")):
        raise BackendError(f"precision: expected auto or fp32 on {q.device}, got {precision!r}")
    if forced == "cuda" and precision == "fp32":
        raise BackendError("precision: expected auto, bf16 or int8 with FCT_BACKEND=cuda, got 'fp32'")
    if forced == "torch" or precision == "fp32":
        return topk_blocked(q, g, k, metric, same_items)
    kind = "int8" if precision == "int8" else "bf16"
    search = cuda_search()
    why = why_not_cuda(search, k + same_items, metric, q.device, kind)
    if why and demanded:
        raise BackendError(f"the cuda search can not run on {q.device}: " + "; ".join(why))
    if not why:
        import torch

        try:
            return search.search(q, search.prepare(g, metric, kind), k, same_items=same_items)
        except torch.OutOfMemoryError:
            if demanded:
                raise
    return topk_blocked(q, g, k, metric, same_items)

"""Where the compiled CUDA kernels come from, on what stream they run, and what device that is.

Everything is queued on the caller's current stream; nothing synchronises, and every buffer comes from torch's
allocator. A :class:`CudaRuntime` is what tests stand in for: the same code runs on the kernels' emulated build over
CPU tensors.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

from fct import _C
from fct.rows import Rows
from fct.types import JsonDict

__all__ = ["CudaRuntime", "RowsAt", "rows_at"]

RowsAt = tuple[int, int, int, int, int, int, int, int]
"""Rows as the kernels take them: address, dtype, n, d, stride, the scale's address and its steps by row and by dim."""


class CudaRuntime:
    """The compiled kernels and torch's CUDA streams."""

    lib: ModuleType = _C

    def why_not(self) -> list[str]:
        """Why no CUDA kernel can run here; empty when one can."""
        if _C.cuda_why_not:
            return [_C.cuda_why_not]
        reason = self.lib.cuda_why_not_here()
        return [reason] if reason else []

    def device_and_stream(self, device: str) -> tuple[int, int]:
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


def rows_at(rows: Rows) -> RowsAt:
    """Where rows lie, for a kernel."""
    scale = rows.scale
    address, by_row, by_dim = 0, 0, 0
    if scale is not None:
        address = int(scale.data_ptr())
        by_row = int(scale.shape[0] > 1)
        by_dim = int(scale.shape[1] > 1)
    return rows.address, rows.dtype_code, rows.n, rows.d, rows.row_stride, address, by_row, by_dim

"""Plain torch: folded linear layers in chunks. The path that is always there, and the peer of our kernels.

In bf16 the layers that read the rows stay in float32 where :func:`fct.ops.numerics.quantise.exact_first` says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from fct.artifact.layers import BRANCHES, SKIP
from fct.artifact.transformation import Transformation
from fct.extras import why_missing
from fct.ops.numerics.quantise import fine_layers
from fct.ops.transform.reference_backend import store
from fct.progress import Report
from fct.rows import Rows

if TYPE_CHECKING:
    import torch


__all__ = ["TorchTransform"]

_CHUNK = 4096
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


Chain: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor, bool]]"  # (weight, bias, relu) of each layer


class TorchTransform:
    name = "torch"

    def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
        why = [] if precision in _DTYPES else [f"has no {precision}"]
        if missing := why_missing("torch"):
            return [*why, *missing]
        if device != "cpu":
            from fct.ops.device.state import why_no_cuda

            why += why_no_cuda(device)
        return why

    def fastest_first(self, device: str) -> tuple[str, ...]:
        return ("bf16", "fp32")

    def pack(self, h: Transformation, precision: str, device: str) -> Any:
        import torch

        kept = fine_layers(h, precision)
        chains: dict[str, Chain] = {branch: [] for branch in (*BRANCHES, SKIP)}
        for name, layer in h.layers():
            dtype = getattr(torch, _DTYPES[kept.get(name, precision)])
            weight, bias = (torch.from_numpy(x).to(device, dtype) for x in (layer.weight, layer.bias))
            chains[name.partition(".")[0]].append((weight, bias, layer.relu))
        return chains, h.uses_side_info, h.length if h.normalise else None

    def run(self, packed: Any, old: Rows, side: Rows, out: Rows, *, threads: int, report: Report | None = None) -> None:
        import torch

        chains, uses_side_info, length = packed

        def tensor(rows: Rows) -> torch.Tensor:
            values = rows.float32()
            return torch.from_numpy(values) if rows.kind_is_numpy else values

        def chain(x: torch.Tensor, layers: Chain) -> torch.Tensor:
            for weight, bias, relu in layers:
                x = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
                if relu:
                    x = x.relu_()
            return x

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                for start in range(0, out.n, _CHUNK):
                    part = slice(start, start + _CHUNK)
                    rows = tensor(old[part]), tensor(side[part])
                    x = torch.cat([chain(rows[0], chains["old"]), chain(rows[1], chains["side"])], 1)
                    y = chain(x, chains["mixer"]).float()
                    if chains[SKIP]:
                        y = y + chain(torch.cat(rows, 1) if uses_side_info else rows[0], chains[SKIP])
                    if length is not None:
                        y = torch.nn.functional.normalize(y, dim=1) * length
                    block = out[part]
                    if block.kind_is_numpy:
                        store(y.numpy(), block)
                    elif block.dtype == "int8":
                        y = y if block.offset is None else y - block.offset
                        block.values.copy_((y / block.scale).round_().clamp_(-127, 127))
                    else:
                        block.values.copy_(y)
                    if report is not None and out.kind_is_numpy:
                        report(min(1.0, (start + _CHUNK) / out.n))
        finally:
            torch.set_num_threads(before)

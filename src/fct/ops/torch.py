"""Plain torch: folded linear layers in chunks. The path that is always there, and the peer of our kernels."""

from __future__ import annotations

from typing import Any

from fct.arrays import Rows
from fct.ops.ref import store
from fct.transformation import BRANCHES, Transformation

__all__ = ["TorchTransform"]

_CHUNK = 4096
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class TorchTransform:
    name = "torch"

    def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
        why = [] if precision in _DTYPES else [f"has no {precision}"]
        if device != "cpu":
            from fct.ops.device import why_no_cuda

            why += why_no_cuda(device)
        return why

    def fastest_first(self, device: str) -> tuple[str, ...]:
        return ("bf16", "fp32")

    def pack(self, h: Transformation, precision: str, device: str) -> Any:
        import torch

        dtype = getattr(torch, _DTYPES[precision])
        chains = {
            branch: [
                (
                    torch.from_numpy(layer.weight).to(device, dtype),
                    torch.from_numpy(layer.bias).to(device, dtype),
                    layer.relu,
                )
                for layer in getattr(h, branch)
            ]
            for branch in BRANCHES
        }
        return chains, h.normalise, dtype

    def run(self, packed: Any, old: Rows, side: Rows, out: Rows, *, threads: int) -> None:
        import torch

        chains, normalise, dtype = packed

        def tensor(rows: Rows) -> Any:
            values = rows.float32()
            return (torch.from_numpy(values) if rows.kind_is_numpy else values).to(dtype)

        def chain(x: Any, layers: Any) -> Any:
            for weight, bias, relu in layers:
                x = torch.nn.functional.linear(x, weight, bias)
                if relu:
                    x = x.relu_()
            return x

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                for start in range(0, out.n, _CHUNK):
                    part = slice(start, start + _CHUNK)
                    x = torch.cat(
                        [chain(tensor(old[part]), chains["old"]), chain(tensor(side[part]), chains["side"])],
                        1,
                    )
                    y = chain(x, chains["mixer"]).float()
                    if normalise:
                        y = torch.nn.functional.normalize(y, dim=1)
                    block = out[part]
                    if block.kind_is_numpy:
                        store(y.numpy(), block)
                    elif block.dtype == "int8":
                        block.values.copy_((y / block.scale).round_().clamp_(-127, 127))
                    else:
                        block.values.copy_(y)
        finally:
            torch.set_num_threads(before)

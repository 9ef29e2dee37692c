"""Galleries larger than the GPU: blocks of rows go through pinned memory, copy and compute overlapped.

Two sets of buffers and three streams: while one block computes, the next is copied in and the one before copied out.
A block counts as done only when its output has arrived in host memory and the device has said so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fct.ops.device.state import Device, device_of
from fct.rows import Rows
from fct.types import Array

if TYPE_CHECKING:
    import torch


__all__ = ["MIN_BLOCK", "block_rows", "stream_transform"]

MIN_BLOCK = 256
_SETS = 2
_TORCH = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int8": "int8"}


def block_rows(n: int, bytes_per_row: int, device: Device) -> int:
    """Rows of a block: 64 MiB of inputs and outputs, a quarter of the free memory at most."""
    room = min(64 << 20, device.free_memory() // (4 * _SETS))
    return max(1, min(n, max(MIN_BLOCK, room // bytes_per_row)))


@dataclass
class _Buffer:
    host: torch.Tensor
    on_device: torch.Tensor
    host_scale: Any  # tensors, or None
    place_scale: Any
    rows: Rows  # on the host


class _Set:
    """One of the two sets: pinned and device buffers of each array, and the events that guard them."""

    def __init__(self, device: Device, arrays: dict[str, Rows], block: int) -> None:
        self.buffers: dict[str, _Buffer] = {}
        for name, rows in arrays.items():
            kind = _TORCH[rows.dtype]
            host, place = device.pinned((block, rows.d), kind), device.empty((block, rows.d), kind)
            scale = place_scale = None
            if rows.scale is not None:
                by_row = rows.scale.shape[0] == rows.n and rows.scale.shape[1] == 1 and rows.n != 1
                shape = (block, 1) if by_row else rows.scale.shape
                scale, place_scale = device.pinned(shape, "float32"), device.empty(shape, "float32")
                if not by_row:
                    place_scale.copy_(_tensor(rows.scale))
                    scale = None
            self.buffers[name] = _Buffer(host, place, scale, place_scale, rows)
        self.finished: Any = None  # event: the output is in pinned memory
        self.part: slice | None = None

    def on_device(self, name: str, n: int, device: Device) -> Rows:
        import torch

        b = self.buffers[name]
        values = b.on_device[:n]
        if b.rows.dtype == "bfloat16":
            values = values.view(torch.bfloat16)
        scale = b.place_scale if b.host_scale is None else b.place_scale[:n]
        return Rows(values, b.rows.dtype, scale, device.name, "torch")


def stream_transform(
    run: Callable[[Rows, Rows, Rows], None],
    old: Rows,
    side: Rows,
    out: Rows,
    *,
    device: str,
    block: int | None = None,
    on_done: Callable[[slice], None] | None = None,
) -> None:
    """Maps rows in host memory through a device, block by block.

    Args:
        run: queues the transformation of (old, side, out) blocks on the current stream of the device.
        old, side, out: (n, ...) on the CPU; ``side is old`` copies the rows once.
        block: rows at a time; by default what fits. Halved, down to MIN_BLOCK, when the device is out of memory.
        on_done: called with each block's rows once they lie in ``out`` and the device reported no error.

    Raises:
        BackendError: out of memory even with MIN_BLOCK rows. DeviceLostError: the device failed; rows that
            ``on_done`` saw are whole, nothing is known of the others.
    """
    n = out.n
    if n == 0:
        return
    place = device_of(device)
    arrays = {"old": old, "out": out} if side is old else {"old": old, "side": side, "out": out}
    size = sum(rows.d * rows.itemsize for rows in arrays.values())
    block = min(n, block or block_rows(n, size, place))
    start = 0

    def done(part: slice) -> None:
        nonlocal start
        start = part.stop
        if on_done is not None:
            on_done(part)

    def attempt(rows: int) -> None:
        with place.errors(f"rows {start} to {n}, of which {start} were finished"):
            _stream(run, arrays, n, start, rows, place, done)

    place.with_fewer(attempt, block, least=MIN_BLOCK, what="blocks", bytes_each=size)


def _stream(
    run: Callable[[Rows, Rows, Rows], None],
    arrays: dict[str, Rows],
    n: int,
    start: int,
    block: int,
    device: Device,
    done: Callable[[slice], None],
) -> None:
    sets = [_Set(device, arrays, block) for _ in range(_SETS)]
    into, compute, back = (device.new_stream() for _ in range(3))
    inputs = [name for name in arrays if name != "out"]
    try:
        for i, first in enumerate(range(start, n, block)):
            s = sets[i % _SETS]
            _collect(s, device, done)
            part = slice(first, min(first + block, n))
            count = part.stop - part.start
            with device.on(into):
                for name in inputs:
                    _load(s.buffers[name], part, count, device)
                if arrays["out"].scale is not None:
                    _load_scale(s.buffers["out"], part, count, device)
                loaded = device.record()
            with device.on(compute):
                device.wait(loaded)
                old, out = s.on_device("old", count, device), s.on_device("out", count, device)
                run(old, s.on_device("side", count, device) if "side" in arrays else old, out)
                computed = device.record()
            with device.on(back):
                device.wait(computed)
                buffer = s.buffers["out"]
                device.copy(buffer.host[:count], buffer.on_device[:count])
                s.finished, s.part = device.record(), part
        for s in sorted((s for s in sets if s.part is not None), key=lambda s: s.part.start if s.part else 0):
            _collect(s, device, done)
    except BaseException:
        _settle(sets, device)
        raise


def _collect(s: _Set, device: Device, done: Callable[[slice], None]) -> None:
    """Waits for the set's block and moves its output from pinned memory to where it belongs."""
    if s.part is None:
        return
    device.finish(s.finished)
    buffer, part = s.buffers["out"], s.part
    s.part = None
    buffer.rows.values[part] = buffer.host[: part.stop - part.start].numpy()
    done(part)


def _settle(sets: list[_Set], device: Device) -> None:
    """Before buffers are dropped, whatever still writes to them ends; a second error adds nothing to the first."""
    for s in sets:
        if s.part is not None:
            try:
                device.finish(s.finished)
            except Exception:
                return


def _load(buffer: _Buffer, part: slice, count: int, device: Device) -> None:
    np.copyto(buffer.host[:count].numpy(), buffer.rows.values[part])
    device.copy(buffer.on_device[:count], buffer.host[:count])
    _load_scale(buffer, part, count, device)


def _load_scale(buffer: _Buffer, part: slice, count: int, device: Device) -> None:
    if buffer.host_scale is not None:
        np.copyto(buffer.host_scale[:count].numpy(), buffer.rows.scale[part])
        device.copy(buffer.place_scale[:count], buffer.host_scale[:count])


def _tensor(array: Array) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))

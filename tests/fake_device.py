"""A GPU made of CPU tensors and Triton's interpreter, so that every line of the GPU path but the silicon runs.

Work is queued per stream and carried out late, in a random order that the streams and events allow: a missing wait
gives wrong numbers. Allocations lie between guard words and start out poisoned. Memory runs out at ``memory`` bytes;
``fail_at`` makes the n-th launch die the way an illegal access does.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fct.arrays import Rows
from fct.ops.device import Device

GUARD = 256  # bytes before and after each allocation
POISON = 0xA5  # int8 -91, bfloat16 -2.9e-16, float32 -2.9e-16; overwritten by NaN where the dtype has one


class OutOfMemory(RuntimeError):
    pass


class _Stream:
    def __init__(self) -> None:
        self.queue: list[Callable[[], bool]] = []  # each returns whether it is done; a wait may not be yet


class FakeDevice(Device):
    interpreted = True

    def __init__(
        self,
        target: str = "sm_90",
        *,
        processors: int = 5,
        l2_bytes: int = 1 << 20,
        memory: int = 1 << 30,
        seed: int = 0,
    ) -> None:
        self.name, self.index, self.model, self.target = "cuda:0", 0, f"fake {target}", target
        self.processors, self.l2_bytes, self.memory = processors, l2_bytes, memory
        self.random = random.Random(seed)
        self.main = _Stream()
        self.streams = [self.main]
        self.current = self.main
        self.buffers: list[tuple[torch.Tensor, int]] = []
        self.launches: list[str] = []
        self.largest = 0
        self.fail_at: int | None = None
        self.captured = 0
        self.recording: list[Callable[[], bool]] | None = None

    driver = "driver fake"

    def install(self, patch: Any, cache: Path) -> None:
        """Stands in as the GPU of every module that asks for one, with no verdicts from before."""
        from fct.ops import device, selfproof, streaming, triton

        for module in (triton, streaming, device):
            patch.setattr(module, "device_of", lambda name: self)
        for module in (triton, device):
            patch.setattr(module, "why_no_gpu", lambda name: [])
        patch.setattr(device, "_lost", set())
        patch.setattr(selfproof, "_known", {})
        patch.setenv("FCT_CACHE", str(cache))

    # ---- memory ----
    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        kind = getattr(torch, dtype)
        size = kind.itemsize
        for s in shape:
            size *= s
        if size > self.memory:
            raise OutOfMemory(f"tried to allocate {size} bytes")
        self.largest = max(self.largest, size)
        whole = torch.full((size + 2 * GUARD + 64,), POISON, dtype=torch.uint8)
        start = GUARD + (-(whole.data_ptr() + GUARD)) % 64
        whole = whole[start - GUARD : start + size + GUARD]
        self.buffers.append((whole, size))
        out = whole[GUARD : GUARD + size].view(kind).view(tuple(shape))
        if kind.is_floating_point:
            out.fill_(float("nan"))
        return out

    def upload(self, array: Any, dtype: str | None = None) -> Any:
        tensor = torch.as_tensor(array)
        out = self.empty(tensor.shape, dtype or str(tensor.dtype).removeprefix("torch."))
        return out.copy_(tensor)

    def download(self, tensor: Any) -> Any:
        self.drain()
        return tensor.clone().numpy()

    def pinned(self, shape: Sequence[int], dtype: str) -> Any:
        return self.empty(shape, dtype)

    def free_memory(self) -> int:
        return self.memory

    def release(self) -> None:
        pass

    def check_guards(self) -> None:
        """Raises where anything wrote outside its allocation."""
        for whole, size in self.buffers:
            assert bool((whole[:GUARD] == POISON).all()), "a write before a buffer"
            assert bool((whole[GUARD + size :] == POISON).all()), "a write behind a buffer"

    # ---- work ----
    def _push(self, work: Callable[[], Any]) -> None:
        def once() -> bool:
            work()
            return True

        (self.current.queue if self.recording is None else self.recording).append(once)

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], *, warps: int, stages: int
    ) -> None:
        name = kernel.fn.__name__
        self.launches.append(name)
        if self.fail_at is not None and len(self.launches) >= self.fail_at:
            self._push(self._die)
            return
        self._push(lambda: kernel[grid](**arguments, num_warps=warps, num_stages=stages))

    def _die(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def copy(self, to: Any, source: Any) -> None:
        self._push(lambda: to.copy_(source))

    def set_counter(self, counter: Any, value: int) -> None:
        self._push(lambda: counter.fill_(value))

    def add_to_counter(self, counter: Any, value: int) -> None:
        self._push(lambda: counter.add_(value))

    # ---- streams ----
    def new_stream(self) -> Any:
        self.streams.append(_Stream())
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def record(self) -> Any:
        event = {"done": False}
        self._push(lambda: event.update(done=True))
        return event

    def wait(self, event: Any) -> None:
        self.current.queue.append(lambda: event["done"])

    def finish(self, event: Any) -> None:
        self._run(lambda: event["done"])

    def drain(self) -> None:
        """All streams to their end."""
        self._run(lambda: not any(s.queue for s in self.streams))

    def _run(self, enough: Callable[[], bool]) -> None:
        while not enough():
            for stream in self.random.sample(
                [s for s in self.streams if s.queue], k=sum(bool(s.queue) for s in self.streams)
            ):
                if stream.queue[0]():
                    stream.queue.pop(0)
                    break
            else:
                raise AssertionError("the streams wait for each other")

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        self.recording = []
        try:
            work()
        finally:
            graph, self.recording = self.recording, None
        self.captured += 1
        return lambda: self.current.queue.extend(graph)

    # ---- errors ----
    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, OutOfMemory)

    # ---- for tests ----
    def rows(self, x: Any, scale: Any = None, *, pitch: int | None = None) -> Rows:
        """A gallery on this device: x (n, d) float32 array or tensor of any dtype, with ``pitch`` elements a row."""
        x = torch.as_tensor(x)
        n, d = x.shape
        dtype = str(x.dtype).removeprefix("torch.")
        values = self.empty((n, pitch or d), dtype)[:, :d]
        values.copy_(x)
        return Rows(values, dtype, None if scale is None else self.upload(scale, "float32"), self.name, "torch")

    def out(self, n: int, d: int, dtype: str = "float32", scale: Any = None) -> Rows:
        """A poisoned destination."""
        values = self.empty((n, d), dtype)
        return Rows(values, dtype, None if scale is None else self.upload(scale, "float32"), self.name, "torch")

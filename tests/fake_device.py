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

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import ReduceOps

from fct.ops.device.state import Device
from fct.rows import Rows

GUARD = 256  # bytes before and after each allocation
POISON = 0xA5  # int8 -91, bfloat16 -2.9e-16, float32 -2.9e-16; overwritten by NaN where the dtype has one


class OutOfMemory(RuntimeError):
    pass


class GpuTensor(torch.Tensor):
    """A tensor that says it lies on a stand-in, and whose operations come behind what is queued on the current stream
    there, as torch's do. Operands on two devices are refused."""

    fake: FakeDevice

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # torch's is an attribute
        return torch.device(self.fake.name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {}, None)

    def cpu(self) -> torch.Tensor:  # type: ignore[override]  # without its options
        self.fake.catch_up()
        return self.as_subclass(torch.Tensor).clone()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()


def _carried_out(func: Any, args: Any, kwargs: Any, place: FakeDevice | None) -> Any:
    """``func`` on the memory behind the tensors; tensors that come out lie where the operands lie, or on ``place``."""
    found = {x.fake.name: x.fake for x in _leaves((args, kwargs)) if isinstance(x, GpuTensor)}
    if len(found) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {' and '.join(sorted(found))}")
    place = next(iter(found.values()), place)
    if place is not None and getattr(func, "__name__", "") not in _NO_WORK:
        if place.lost:
            place.die()
        place.catch_up()
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*args, **kwargs)

    def lies_there(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            x = x.as_subclass(GpuTensor)
            x.fake = place
        elif isinstance(x, tuple) and hasattr(x, "_fields"):
            return x if place is None else _Named(x, [lies_there(y) for y in x])
        elif isinstance(x, (tuple, list)):
            return type(x)(lies_there(y) for y in x)
        return x

    return out if place is None else lies_there(out)


class _Named(tuple[Any, ...]):
    """torch's named results (values, indices), with other tensors in them."""

    def __new__(cls, like: Any, values: list[Any]) -> Any:
        made = super().__new__(cls, values)
        names = [n for n in ("values", "indices", "eigenvalues") if hasattr(like, n)]
        made.__dict__.update(zip(names, values, strict=False))
        return made


_NO_WORK = {"__get__", "stride", "data_ptr", "size", "numel", "dim", "element_size", "view", "storage_offset",
            "as_strided", "untyped_storage", "is_floating_point", "new_empty", "empty", "detach", "as_subclass",
            "__len__", "is_contiguous", "__getitem__"}  # fmt: skip


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, (tuple, list)):
        for y in x:
            yield from _leaves(y)
    elif isinstance(x, dict):
        yield from _leaves(list(x.values()))
    else:
        yield x


class _Torch(torch.overrides.TorchFunctionMode):
    """While it is entered, torch makes and moves tensors to the stand-ins as if they were devices of its own."""

    def __init__(self, devices: dict[str, FakeDevice]) -> None:
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        wanted = kwargs.get("device")
        if wanted is None and name == "to" and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            wanted, args = args[1], (args[0], *(a for a in args[2:] if a is not None))
            args = args[:1] if args[1:] and isinstance(args[1], bool) else args  # what is left of (dtype, non_blocking)
        kwargs.pop("device", None)
        if wanted is None or torch.device(wanted).type != "cuda":
            if wanted is not None:
                kwargs["device"] = wanted
            return _carried_out(func, args, kwargs, None)
        wanted = torch.device(wanted)
        place = self.devices[f"cuda:{wanted.index or 0}"]
        moved = [x for x in _leaves((args, kwargs)) if isinstance(x, GpuTensor)]
        if name in ("to", "as_tensor") and moved and moved[0].fake is not place:
            args = (moved[0].cpu(), *args[1:])
        return _carried_out(func, args, kwargs, place)


class _Stream:
    def __init__(self) -> None:
        self.queue: list[Callable[[], bool]] = []  # each returns whether it is done; a wait may not be yet


def _with_fast_xor(apply: Any) -> Any:
    """The interpreter reduces by xor, of which tl.sort is made, element by element in Python: minutes for a tile."""
    from triton.language.standard import _xor_combine

    def faster(self: Any, operands: Any) -> Any:
        if self.combine_fn is not _xor_combine or self.axis is None:
            return apply(self, operands)
        x = operands[0]
        return [self.to_tensor(np.bitwise_xor.reduce(x.handle.data, self.axis, keepdims=self.keep_dims), x.dtype)]

    return faster


ReduceOps.apply_impl = _with_fast_xor(ReduceOps.apply_impl)


def _once_a_launch(patch: Any) -> Any:
    """The interpreter replaces the members of triton.language anew for every call of tl.max, tl.sort, ...: most of a
    search's time. Here once a launch for each module that the functions see."""
    done: set[frozenset[str]] = set()

    def patch_once(fn: Any) -> Any:
        seen = frozenset(name for name, value in fn.__globals__.items() if value is tl or value is tl.core)
        if seen in done:
            return interpreter._LangPatchScope()
        outermost = not done
        done.add(seen)
        scope = patch(fn)
        if outermost:  # the launch's own: what it restores has to be replaced again
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        return scope

    return patch_once


interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


class FakeDevice(Device):
    interpreted = True
    second: FakeDevice  # of a machine that has two

    def __init__(
        self,
        target: str = "sm_90",
        *,
        index: int = 0,
        processors: int = 5,
        l2_bytes: int = 1 << 20,
        memory: int = 1 << 30,
        seed: int = 0,
    ) -> None:
        self.name, self.index, self.model, self.target = f"cuda:{index}", index, f"fake {target}", target
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
        self.lost = self.working = False

    driver = "driver fake"

    def install(self, patch: Any, cache: Path, *others: FakeDevice) -> None:
        """Stands in, with the others, as the GPU of every module that asks for one, with no verdicts from before."""
        from fct.ops import proof as selfproof
        from fct.ops.device import state as device
        from fct.ops.device import streaming
        from fct.ops.transform import triton_backend as triton

        known = {d.name: d for d in (self, *others)}

        def why_not(name: str) -> list[str]:
            return [f"{name} failed earlier in this process; start a new one"] if name in device._lost else []

        for module in (triton, streaming, device):
            patch.setattr(module, "device_of", lambda name: known["cuda:0" if name == "cuda" else name])
        for module in (triton, device):
            patch.setattr(module, "why_no_gpu", why_not)
        patch.setattr(device, "why_no_cuda", why_not)
        patch.setattr(device, "_lost", set())
        patch.setattr(selfproof, "_known", {})
        patch.setenv("FCT_CACHE", str(cache))

    def torch(self, *others: FakeDevice) -> Any:
        """A context in which torch's own calls take this device and the others for CUDA devices."""
        return _Torch({d.name: d for d in (self, *others)})

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
        out = out.as_subclass(GpuTensor)
        out.fake = self
        return out

    def upload(self, array: Any, dtype: str | None = None) -> Any:
        tensor = torch.as_tensor(array)
        out = self.empty(tensor.shape, dtype or str(tensor.dtype).removeprefix("torch."))
        plain(out).copy_(tensor)
        return out

    def download(self, tensor: Any) -> Any:
        self.drain()
        return plain(tensor).clone().numpy()

    def pinned(self, shape: Sequence[int], dtype: str) -> Any:
        return plain(self.empty(shape, dtype))

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
            self._push(self.die)
            return
        memory = {k: _in_memory(v) for k, v in arguments.items()}
        self._push(lambda: kernel[grid](**memory, num_warps=warps, num_stages=stages))

    def die(self) -> None:
        self.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def copy(self, to: Any, source: Any) -> None:
        self._push(lambda: plain(to).copy_(plain(source)))

    def set_counter(self, counter: Any, value: int) -> None:
        self._push(lambda: plain(counter).fill_(value))

    def add_to_counter(self, counter: Any, value: int) -> None:
        self._push(lambda: plain(counter).add_(value))

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

    def catch_up(self) -> None:
        """What is queued on the current stream, and whatever that waits for."""
        stream = self.current
        if stream.queue and not self.working:
            self._run(lambda: not stream.queue)

    def _run(self, enough: Callable[[], bool]) -> None:
        before, self.working = self.working, True
        try:
            self._steps(enough)
        finally:
            self.working = before

    def _steps(self, enough: Callable[[], bool]) -> None:
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
        plain(values).copy_(x)
        return Rows(values, dtype, None if scale is None else self.upload(scale, "float32"), self.name, "torch")

    def out(self, n: int, d: int, dtype: str = "float32", scale: Any = None) -> Rows:
        """A poisoned destination."""
        values = self.empty((n, d), dtype)
        return Rows(values, dtype, None if scale is None else self.upload(scale, "float32"), self.name, "torch")


def _in_memory(x: Any) -> Any:
    """:func:`plain` of every element of a tuple of arguments."""
    return type(x)(*map(_in_memory, x)) if isinstance(x, tuple) and hasattr(x, "_fields") else plain(x)


def plain(x: Any) -> Any:
    """The memory of a tensor on a stand-in, as a CPU tensor; anything else as it is."""
    if isinstance(x, GpuTensor):
        with torch._C.DisableTorchFunctionSubclass():
            return x.as_subclass(torch.Tensor)
    return x

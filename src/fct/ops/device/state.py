"""What the GPU path asks of a device: memory, launches, streams, errors. One class, so that tests can stand in for it.

Nothing here initialises CUDA before the first tensor lives there.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from fct.errors import BackendError, DeviceLostError
from fct.extras import why_missing
from fct.types import Array

if TYPE_CHECKING:
    import torch


__all__ = [
    "MIN_CHUNK",
    "Device",
    "check_not_lost",
    "chunk_rows",
    "device_of",
    "numbered",
    "why_no_cuda",
    "why_no_gpu",
]

MIN_CHUNK = 128
_lost: set[str] = set()
# After these a context answers no call any more. torch's messages begin "CUDA error: ", ours name CUDA's own constant.
_FATAL = re.compile(
    r"CUDA error|HIP error|illegal memory access|unspecified launch failure|cudaError(IllegalAddress|LaunchFailure|"
    r"LaunchTimeout|Assert|IllegalInstruction|MisalignedAddress|InvalidAddressSpace|InvalidPc|HardwareStackError|"
    r"ECCUncorrectable|NvlinkUncorrectable|Contained|DevicesUnavailable|SystemNotReady|Unknown)\b"
)


def check_not_lost(device: str) -> None:
    """Raises DeviceLostError where the device failed earlier in this process."""
    if device in _lost:
        raise DeviceLostError(f"{device} failed earlier in this process; start a new one")


def why_no_gpu(device: str) -> list[str]:
    """Every reason why our kernels cannot use ``device`` ("cuda" or "cuda:1") in this process; empty when they can."""
    why = why_no_cuda(device)
    if why:
        return why
    import torch

    index = int(device.partition(":")[2] or 0)
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        major, minor = torch.cuda.get_device_capability(index)
        return [f"needs compute capability 8.0 or later, {device} has {major}.{minor}"]
    return []


def why_no_cuda(device: str) -> list[str]:
    """The same for torch itself, whatever the device's age."""
    if missing := why_missing("torch"):
        return missing
    import torch

    if device.partition(":")[0] != "cuda":
        return [f"runs on cuda only, got {device}"]
    if device in _lost:
        return [f"{device} failed earlier in this process; start a new one"]
    if torch.version.cuda is None and torch.version.hip is None:
        return [f"torch {torch.__version__} was built without CUDA"]
    if torch.cuda._is_in_bad_fork():
        return ["this process was forked after CUDA was initialised; start workers with the spawn method"]
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return [f"CUDA does not start: {str(error).splitlines()[0]}"]  # names a driver that is too old, and its version
    count = torch.cuda.device_count()
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        return [f"expected one of {count} CUDA devices, got {device}"]
    return []


def chunk_rows(
    layers: Sequence[tuple[int, int, int]], widest: int, *, l2_bytes: int, processors: int, tile_rows: int = 128,
    tile_columns: int = 256,
) -> int:  # fmt: skip
    """Rows per chunk: every layer's operands inside 60 % of L2, and the widest layer's tiles in whole waves.

    layers: bytes of a row that goes in, of a row that comes out, and of the weights. Weights that leave less than half
    of that room are read again for each chunk; the rest of L2 is for rows that stream by. tools.gpu_traffic
    derives what this costs in memory traffic.
    """
    room = 0.6 * l2_bytes
    fits = min(max(room - weights, room / 2) / (into + out) for into, out, weights in layers)
    most = max(1, int(fits) // tile_rows)
    columns = -(-widest // tile_columns)

    def filled(units: int) -> float:
        tiles = units * columns
        return tiles / (-(-tiles // processors) * processors)

    best = max(range(max(1, most // 2), most + 1), key=lambda units: (round(filled(units), 3), units))
    return max(MIN_CHUNK, best * tile_rows)


def numbered(device: str) -> str:
    """ "cuda" with the number of the device that is current now, since what is kept for a name is kept for good."""
    if device != "cuda":
        return device
    if why_missing("torch"):  # why_no_cuda has the words for it
        return "cuda:0"
    import torch

    try:
        return f"cuda:{torch.cuda.current_device()}"
    except (RuntimeError, AssertionError):  # why_no_cuda has the words for it
        return "cuda:0"


@functools.cache
def device_of(name: str) -> Device:
    """The device called "cuda", "cuda:0", ..."""
    return Device(name)


class Kernel(Protocol):
    """A Triton kernel: given its grid, what launches it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...


class Device:
    """A CUDA (or ROCm) device through torch: its streams and its allocator are the caller's own."""

    interpreted = False

    def __init__(self, name: str) -> None:
        import torch

        self.name = name
        self.index = int(name.partition(":")[2] or torch.cuda.current_device())
        facts = torch.cuda.get_device_properties(self.index)
        self.model = str(facts.name)
        if torch.version.hip is not None:
            self.target = str(facts.gcnArchName).partition(":")[0]
        else:
            self.target = f"sm_{facts.major}{facts.minor}"
        self.processors = int(facts.multi_processor_count)
        self.l2_bytes = int(getattr(facts, "L2_cache_size", 0)) or 4 << 20
        self.memory = int(facts.total_memory)

    @functools.cached_property
    def driver(self) -> str:
        import torch

        version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
        return f"driver {version}, torch {torch.__version__}"

    # ---- memory ----
    def empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        import torch

        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=self.name)

    def upload(self, array: Array | torch.Tensor, dtype: str | None = None) -> torch.Tensor:
        """A copy of a host array on the device."""
        import torch

        tensor = torch.as_tensor(array)
        return tensor.to(device=self.name, dtype=getattr(torch, dtype) if dtype else None)

    def download(self, tensor: torch.Tensor) -> Array:
        """The values on the host, as numpy; waits for the work that makes them."""
        return tensor.cpu().numpy()

    def pinned(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        import torch

        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), pin_memory=True)

    def free_memory(self) -> int:
        import torch

        return int(torch.cuda.mem_get_info(self.index)[0])

    def release(self) -> None:
        """Gives cached blocks back, after an allocation failed."""
        import torch

        torch.cuda.empty_cache()

    # ---- work, on the current stream ----
    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        arguments: Mapping[str, object],
        *,
        warps: int,
        stages: int,
    ) -> None:
        import torch

        if 0 in grid:
            return
        with torch.cuda.device(self.index):
            kernel[grid](**arguments, num_warps=warps, num_stages=stages)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def set_counter(self, counter: torch.Tensor, value: int) -> None:
        counter.fill_(value)

    def add_to_counter(self, counter: torch.Tensor, value: int) -> None:
        counter.add_(value)

    # ---- streams ----
    def new_stream(self) -> torch.cuda.Stream:
        import torch

        return torch.cuda.Stream(device=self.index)

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        import torch

        with torch.cuda.stream(stream):
            yield

    def record(self) -> torch.cuda.Event:
        """An event after everything queued so far on the current stream."""
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.index))
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        """The current stream goes no further before the event."""
        import torch

        torch.cuda.current_stream(self.index).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        """The host waits for the event; an error of the device shows here."""
        event.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """``work`` recorded as a graph, to be replayed on the current stream; None where that is not possible now."""
        import torch

        if torch.cuda.is_current_stream_capturing():
            return None
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device=self.index)
        side.wait_stream(torch.cuda.current_stream(self.index))
        with torch.cuda.stream(side):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.index).wait_stream(side)
        return graph.replay  # type: ignore[no-any-return,unused-ignore]

    # ---- errors ----
    def is_out_of_memory(self, error: BaseException) -> bool:
        import torch

        text = str(error)  # pinned memory and CUDA itself run out with an error of no class of its own
        return isinstance(error, torch.cuda.OutOfMemoryError) or (
            "CUDA error: out of memory" in text or "cudaErrorMemoryAllocation" in text
        )

    def with_fewer(
        self, attempt: Callable[[int], None], rows: int, *, least: int, what: str, bytes_each: int | None = None
    ) -> None:
        """``attempt(rows)``, with half as many rows each time the device is out of memory.

        ``attempt`` goes on where it was cut off. Raises BackendError, of ``what`` of how many rows, where ``least`` are
        too many; with bytes_each None, the device's own error.
        """
        while True:
            try:
                return attempt(rows)
            except DeviceLostError:
                raise
            except Exception as error:
                cause = error.__cause__ if isinstance(error, BackendError) and error.__cause__ is not None else error
                if not self.is_out_of_memory(cause):
                    raise
                if rows <= least and bytes_each is None:
                    raise
                if rows <= least:
                    raise BackendError(
                        f"{self.name} ({self.model}): out of memory even with {what} of {rows} rows ({bytes_each:,} "
                        "bytes each)"
                    ) from error
                self.release()
                rows = max(least, rows // 2)

    def is_lost(self, error: BaseException) -> bool:
        """Whether the error leaves the device's context unusable."""
        import torch

        kinds = tuple(k for k in (getattr(torch, "AcceleratorError", None),) if k)
        return isinstance(error, kinds) or _FATAL.search(str(error)) is not None

    @contextlib.contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turns a failure of the device into a DeviceLostError that says during what; everything else passes."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            if isinstance(error, BackendError) or self.is_out_of_memory(error) or not self.is_lost(error):
                raise
            _lost.add(self.name)
            raise DeviceLostError(f"{self.name} ({self.model}) failed during {what}: {error}") from error

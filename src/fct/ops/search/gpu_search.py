"""Search on a GPU: CUDA kernels, else Triton's, where they can run and proved themselves there; else torch products.

Where ``fct doctor`` has timed them on the device, the fastest for that many queries is asked first.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from fct.errors import BackendError
from fct.ops.backend import GpuShadow, SearchBackend, drop_own_rows
from fct.ops.device import state as devices
from fct.ops.registry import forced_backend, pick_search, search_backends
from fct.ops.search.float64 import ranks_on_device, topk_blocked
from fct.rows import Rows
from fct.types import Floats, Int64s

if TYPE_CHECKING:
    import torch

    from fct.ops.device.state import Device


__all__ = [
    "WORTH_A_SHADOW",
    "extend_gpu",
    "prepare_gpu",
    "ranks_gpu",
    "topk_gpu",
]

# Queries from which packing a shadow for one search costs less than it saves.
WORTH_A_SHADOW = 16


def prepare_gpu(g: Rows, metric: str, precision: str = "auto") -> GpuShadow | None:
    """The shadow that :func:`topk_gpu` scans; None where this device scores every row."""
    if g.n == 0:
        return None
    search, kind = pick_search(1, metric, g.device, precision)
    if search is None:
        return None
    with _out_of_memory(g, f"for the {kind} shadow of {g.n} rows of {g.d}; search the rows themselves, or fewer"):
        return search.prepare(g, metric, kind)


def extend_gpu(shadow: GpuShadow, grown: Rows) -> GpuShadow:
    """The shadow of a gallery that has grown: only rows shadow.n.. are packed."""
    if grown.n == shadow.n:
        return shadow
    import torch

    search = next(s for s in search_backends() if s.name == shadow.backend)
    with _out_of_memory(grown, f"for the {shadow.kind} shadow of {grown.n} rows of {grown.d} beside the one before"):
        new = search.prepare(grown[slice(shadow.n, grown.n)], shadow.metric, shadow.kind)
        packed = torch.cat([shadow.shadow, new.shadow])
        meta = torch.cat([shadow.meta, new.meta])
    usable = shadow.usable and new.usable
    return GpuShadow(shadow.backend, grown, shadow.metric, shadow.kind, packed, meta, usable)


def topk_gpu(
    q: Rows, g: Rows, k: int, metric: str, precision: str, same_items: bool, prepared: GpuShadow | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """((n, k) float32, (n, k) int64) tensors on the rows' device; k >= 1, q.n >= 1.

    Without a prepared gallery, "auto" packs a shadow from 16 queries on; for fewer it costs more than it saves. Out of
    memory halves the queries of one call; where "auto" has none for the shadow, torch takes over.
    Raises BackendError as :func:`pick_search` does, or out of memory. DeviceLostError: the device failed.
    """
    search, kind = pick_search(k + same_items, metric, g.device, precision, queries=q.n, prepared=prepared)
    demanded = forced_backend(None) is not None or precision in ("bf16", "int8")
    if search is not None and prepared is None and not demanded and q.n < WORTH_A_SHADOW:
        search = None
    place = devices.device_of(g.device)
    with place.errors(f"the search of {q.n} queries among {g.n} rows"):
        if search is not None:
            try:
                shadow = search.prepare(g, metric, kind) if prepared is None else prepared
                found = _in_parts(search, q, shadow, k + same_items, place)
                return drop_own_rows(*found) if same_items else found
            except Exception as error:
                if not place.is_out_of_memory(error):
                    raise
                place.release()
                if demanded:
                    raise BackendError(
                        f"{g.device} ({place.model}): out of memory for a search of one query at a time among {g.n} "
                        f"rows of {g.d} over a {kind} shadow"
                    ) from error
        with _out_of_memory(g, f"for blocked products of {q.n} queries and {g.n} rows of {g.d}"):
            return topk_blocked(q, g, k, metric, same_items)


def ranks_gpu(
    q: Rows, g: Rows, query_labels: Int64s, gallery_labels: Int64s, metric: str, same_items: bool
) -> tuple[Int64s, Floats]:
    """As :func:`fct.ops.search.float64.ranks_on_device`, counted on the device."""
    devices.check_not_lost(g.device)
    place = devices.device_of(g.device)
    with (
        place.errors(f"the ranks of {q.n} queries among {g.n} rows"),
        _out_of_memory(g, f"for the ranks of one query among {g.n} rows of {g.d}"),
    ):
        return ranks_on_device(q, g, query_labels, gallery_labels, metric, same_items)


def _in_parts(
    search: SearchBackend, q: Rows, shadow: GpuShadow, k: int, device: Device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The search, with fewer queries a call where the device is out of memory; raises that error at one query."""
    import torch

    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    start = 0

    def attempt(step: int) -> None:
        nonlocal start
        while start < q.n:
            found.append(search.search(q[slice(start, min(start + step, q.n))], shadow, k))
            start += step

    device.with_fewer(attempt, q.n, least=1, what="calls")
    return found[0] if len(found) == 1 else tuple(torch.cat([f[i] for f in found]) for i in (0, 1))  # type: ignore[return-value]


class _out_of_memory:
    """Turns the device's lack of memory into a BackendError that says for what."""

    def __init__(self, rows: Rows, what: str) -> None:
        self.rows, self.what = rows, what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        place = devices.device_of(self.rows.device)
        if error is not None and place.is_out_of_memory(error):
            place.release()
            raise BackendError(f"{self.rows.device} ({place.model}): out of memory {self.what}") from error

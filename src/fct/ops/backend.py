"""What a backend is. Each says why it cannot run a request; none falls back by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fct.artifact.transformation import Transformation
from fct.checks import check_choice
from fct.progress import Report
from fct.rows import Rows

if TYPE_CHECKING:
    import torch


__all__ = [
    "GPU_PRECISIONS",
    "PRECISIONS",
    "GpuShadow",
    "SearchBackend",
    "TransformBackend",
    "check_precision",
    "drop_own_rows",
]

# Fastest last; "auto" is resolved before a backend sees a request.
PRECISIONS = ("fp32", "bf16", "int8")
GPU_PRECISIONS = ("fp16", "fp8")  # on a GPU besides


def check_precision(precision: str, *, gpu: bool = False) -> str:
    """``precision`` itself; raises ValueError unless it is "auto", one of PRECISIONS, or with gpu of GPU_PRECISIONS."""
    known = (*PRECISIONS, *GPU_PRECISIONS) if gpu else PRECISIONS
    return check_choice(precision, "precision", ("auto", *known))


class TransformBackend(Protocol):
    """Runs h over rows. ``pack`` is called once per (h, precision, device) and its result kept with h."""

    name: str

    def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
        """Every reason why this backend cannot run h at this precision on this device; empty when it can."""
        ...

    def fastest_first(self, device: str) -> tuple[str, ...]:
        """The precisions this backend runs on the device, fastest first."""
        ...

    def pack(self, h: Transformation, precision: str, device: str) -> Any:
        """Weights in the backend's own layout."""
        ...

    def run(self, packed: Any, old: Rows, side: Rows, out: Rows, *, threads: int, report: Report | None = None) -> None:
        """Fills ``out`` (n, d_new). n may be 0. Rows are checked; all lie on the packed device.

        report: told the share that is done, where the call lasts as long as the work. A backend that only queues work
        on a GPU's stream reports nothing.
        """
        ...


@dataclass(frozen=True)
class GpuShadow:
    """A gallery on a GPU and its low-precision shadow, as the search called ``backend`` packed it.

    shadow: (n, bytes) rows of ``kind``, "bf16" or "int8". meta: (n, 4) float32, what bounds their rounding. usable:
    False where a norm is beyond what float32 products bear, so that every row has to be scored.
    """

    backend: str
    rows: Rows
    metric: str
    kind: str
    shadow: torch.Tensor
    meta: torch.Tensor
    usable: bool = True

    @property
    def n(self) -> int:
        return self.rows.n

    @property
    def nbytes(self) -> int:
        return sum(int(x.numel()) * int(x.element_size()) for x in (self.shadow, self.meta))


class SearchBackend(Protocol):
    """Certified-exact top-k of torch tensors on a GPU."""

    name: str

    def why_not(self, k: int, metric: str, device: str) -> list[str]:
        """Every reason why this search cannot run on this device; empty when it can."""
        ...

    def prepare(self, gallery: Rows, metric: str, kind: str = "bf16") -> GpuShadow:
        """The shadow that ``search`` scans; n >= 1."""
        ...

    def search(
        self, queries: Rows, gallery: GpuShadow, k: int, *, same_items: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """((n, k) float32 distances, (n, k) int64 rows), ties by lower row; tensors on the device."""
        ...


def drop_own_rows(distances: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, k + 1) tensors -> (n, k): query i's own row i left out, or the last where it is not among them."""
    import torch

    own = indices == (torch.ones_like(indices[:, :1]).cumsum(0) - 1)
    order = own.to(torch.uint8).sort(dim=1, stable=True).indices[:, :-1]
    return distances.gather(1, order), indices.gather(1, order)

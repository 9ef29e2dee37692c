"""Which backend runs a request, a transformation or a search: asked in order of speed, on the tensors' own device.

The first that has no reason against it and, on a GPU, proved itself there; a forced one runs or raises with every
reason.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

from fct.artifact.transformation import Transformation
from fct.errors import BackendError
from fct.ops.backend import PRECISIONS, GpuShadow, SearchBackend, TransformBackend, check_precision
from fct.ops.device import state as devices
from fct.ops.device.amx import torch_is_faster
from fct.ops.processors import default_threads as default_threads
from fct.ops.proof import fastest_first, prove, prove_search

__all__ = [
    "forced_backend",
    "pick_search",
    "pick_transform",
    "search_backends",
    "transform_backends",
    "why_not_search",
]

Candidate = TypeVar("Candidate")

_SEARCH_PRECISIONS = ("auto", "fp32", "bf16", "int8")
_SEARCH_CHOICES = ("cuda", "triton", "torch")
_PROVE_ON_DEVICE = ("cuda", "triton")  # kernels of ours that no GPU ran before the user's


@functools.cache
def transform_backends() -> tuple[TransformBackend, ...]:
    """Every transform backend, the one to be asked first in front."""
    from fct.ops.transform.cpu_backend import CpuTransform
    from fct.ops.transform.cuda_backend import CudaTransform
    from fct.ops.transform.reference_backend import RefTransform
    from fct.ops.transform.torch_backend import TorchTransform
    from fct.ops.transform.triton_backend import TritonTransform

    return CpuTransform(), CudaTransform(), TritonTransform(), TorchTransform(), RefTransform()


def forced_backend(backend: str | None) -> str | None:
    """The caller's choice, else FCT_BACKEND, else None."""
    return backend or os.environ.get("FCT_BACKEND") or None


def pick_transform(
    h: Transformation, precision: str, device: str, backend: str | None = None, *, rows: int | None = None
) -> tuple[TransformBackend, str]:
    """(backend, precision): the first backend with no reason against it.

    ``precision="auto"`` takes the fastest that the backend runs there and h's stored measurements allow. On a GPU that
    ``fct doctor`` has timed, the fastest backend and precision for ``rows`` rows (None: many) come first.
    Raises BackendError with every backend's reasons when none can.
    """
    if backend is not None and not isinstance(backend, str):
        raise ValueError(f"backend: expected the name of one or None, got {backend!r}")
    check_precision(precision, gpu=True)
    forced = forced_backend(backend)
    backends: Iterable[TransformBackend] = transform_backends()
    if forced is not None:
        known = [b.name for b in backends]
        backends = [b for b in backends if b.name == forced]
        if not backends:
            raise ValueError(f"backend: expected one of {', '.join(known)}, got {forced!r}")
    asked = ((b, p) for b in backends for p in _precisions(b, h, precision, device))
    if device.partition(":")[0] == "cuda":
        devices.check_not_lost(device)
        if not devices.why_no_gpu(device):
            pairs = {f"{b.name} {p}": (b, p) for b, p in asked}
            asked = (pairs[name] for name in fastest_first("transform", device, list(pairs), rows))

    def why_not(pair: tuple[TransformBackend, str]) -> list[str]:
        candidate, p = pair
        why = candidate.why_not(h, p, device)
        if not why and candidate.name in _PROVE_ON_DEVICE:
            verdict = prove(candidate, h, p, device)
            why = [f"refused by the self-proof: {verdict}"] if verdict else []
        return why

    chosen, reasons = _first_that_runs(asked, why_not, lambda pair: f"{pair[0].name} ({pair[1]})")
    if not chosen:
        raise BackendError(f"no backend can run this transformation on {device}: " + "; ".join(reasons))
    candidate, p = chosen[0]
    if forced is None and candidate.name == "cpu" and _bf16_will_do(h, precision):
        torch = next(b for b in transform_backends() if b.name == "torch")
        if torch_is_faster(candidate, h, p, torch):
            return torch, "bf16"
    return candidate, p


def _precisions(backend: TransformBackend, h: Transformation, precision: str, device: str) -> list[str]:
    """What the backend is asked for: the precision, or for "auto" those that h allows, else fp32."""
    if precision != "auto":
        return [precision]
    return [p for p in backend.fastest_first(device) if h.allows(p)] or [PRECISIONS[0]]


def _bf16_will_do(h: Transformation, precision: str) -> bool:
    return precision == "bf16" or (precision == "auto" and h.allows("bf16"))


def _first_that_runs(
    candidates: Iterable[Candidate], why_not: Callable[[Candidate], list[str]], called: Callable[[Candidate], str]
) -> tuple[list[Candidate], list[str]]:
    """([the first without a reason against it], or nothing; the reasons against those before it, by name)."""
    reasons: list[str] = []
    for candidate in candidates:
        why = why_not(candidate)
        if not why:
            return [candidate], reasons
        reasons += [f"{called(candidate)}: {reason}" for reason in why]
    return [], reasons


# ---- search on a GPU ----
def search_backends() -> list[SearchBackend]:
    """Every search with a shadow, the one to be asked first in front."""
    from fct.ops.search.cuda_search import CudaSearch
    from fct.ops.search.triton_search import TritonSearch

    return [CudaSearch(), TritonSearch()]


def why_not_search(search: SearchBackend, k: int, metric: str, device: str, kind: str) -> list[str]:
    """Every reason against this search, the self-proof's verdict last; empty when it can run."""
    why = search.why_not(k, metric, device)
    if not why:
        place = devices.device_of(device)
        with place.errors(f"the self-proof of the {search.name} search"):
            try:
                verdict = prove_search(search, metric, kind, device)
            except Exception as error:
                if not place.is_out_of_memory(error):
                    raise
                place.release()
                return [f"{device} ({place.model}) is out of memory for its self-proof"]  # not remembered
        why = [f"refused by the self-proof: {verdict}"] if verdict else []
    return why


def _check_search_demands(device: str, precision: str, forced: str | None, prepared: GpuShadow | None) -> None:
    """Raises BackendError where precision, FCT_BACKEND and what prepared the gallery contradict each other."""
    if precision not in _SEARCH_PRECISIONS:
        raise BackendError(
            f"precision: expected {', '.join(_SEARCH_PRECISIONS)} for a search on {device}, got {precision!r}"
        )
    if forced not in (None, *_SEARCH_CHOICES):
        raise BackendError(
            f"FCT_BACKEND: expected {', '.join(_SEARCH_CHOICES)} for a search on {device}, got {forced!r}"
        )
    if forced == "torch" and precision not in ("auto", "fp32"):
        raise BackendError(f"precision: expected auto or fp32 with FCT_BACKEND=torch, got {precision!r}")
    if forced in ("cuda", "triton") and precision == "fp32":
        raise BackendError(f"precision: expected auto, bf16 or int8 with FCT_BACKEND={forced}, got 'fp32'")
    if prepared is not None and precision in ("bf16", "int8") and precision != prepared.kind:
        raise BackendError(
            f"precision: expected auto, fp32 or {prepared.kind}, which this gallery was prepared for, got {precision!r}"
        )
    if prepared is not None and forced in ("cuda", "triton") and forced != prepared.backend:
        raise BackendError(f"FCT_BACKEND: expected {prepared.backend}, which prepared this gallery, got {forced!r}")


def pick_search(
    k: int, metric: str, device: str, precision: str, *, queries: int | None = None, prepared: GpuShadow | None = None
) -> tuple[SearchBackend | None, str]:
    """(search, kind of its shadow); None stands for blocked torch products, which score every row.

    ``precision``: "bf16" and "int8" demand a shadow of that kind, "fp32" demands none, "auto" takes bf16. A prepared
    gallery is searched by what prepared it. ``FCT_BACKEND`` forces "cuda", "triton" or "torch".
    Raises BackendError, with every reason, for a demand that cannot be met.
    """
    devices.check_not_lost(device)
    forced = forced_backend(None)
    _check_search_demands(device, precision, forced, prepared)
    kind = prepared.kind if prepared is not None else "int8" if precision == "int8" else "bf16"
    if forced == "torch" or precision == "fp32":
        return None, kind
    candidates: list[SearchBackend | None] = [*search_backends()]
    if prepared is not None:
        candidates = [s for s in candidates if s is not None and s.name == prepared.backend]
    elif forced is not None:
        candidates = [s for s in candidates if s is not None and s.name == forced]
    else:
        if precision == "auto":
            candidates.append(None)
        names = {("torch fp32" if s is None else f"{s.name} {kind}"): s for s in candidates}
        candidates = [names[name] for name in fastest_first("search", device, list(names), queries)]

    def why_not(search: SearchBackend | None) -> list[str]:
        return [] if search is None else why_not_search(search, k, metric, device, kind)

    chosen, reasons = _first_that_runs(candidates, why_not, lambda search: "torch" if search is None else search.name)
    if chosen:
        return chosen[0], kind
    if forced is not None or precision != "auto":
        raise BackendError(f"no search over a {kind} shadow can run on {device}: " + "; ".join(reasons))
    return None, kind

"""Which backend runs a request: asked in order of speed, on the tensors' own device; a forced one runs or raises."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable

from fct.artifact.transformation import Transformation
from fct.errors import BackendError
from fct.ops.backend import PRECISIONS, TransformBackend, check_precision
from fct.ops.device import state as devices
from fct.ops.device.amx import torch_is_faster
from fct.ops.processors import default_threads as default_threads
from fct.ops.proof import fastest_first, prove

__all__ = ["forced_backend", "pick_transform", "transform_backends"]

_PROVE_ON_DEVICE = ("cuda", "triton")  # kernels of ours that no GPU ran before the user's


@functools.cache
def transform_backends() -> tuple[TransformBackend, ...]:
    """Every transform backend, the one to be asked first in front."""
    from fct.ops.cuda_kernels import CudaTransform
    from fct.ops.transform.cpu_backend import CpuTransform
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
    reasons: list[str] = []
    for candidate, p in asked:
        why = candidate.why_not(h, p, device)
        if not why and candidate.name in _PROVE_ON_DEVICE:
            verdict = prove(candidate, h, p, device)
            why = [f"refused by the self-proof: {verdict}"] if verdict else []
        if not why and forced is None and candidate.name == "cpu" and _bf16_will_do(h, precision):
            torch = next(b for b in transform_backends() if b.name == "torch")
            if torch_is_faster(candidate, h, p, torch):
                return torch, "bf16"
        if not why:
            return candidate, p
        reasons += [f"{candidate.name} ({p}): {reason}" for reason in why]
    raise BackendError(f"no backend can run this transformation on {device}: " + "; ".join(reasons))


def _precisions(backend: TransformBackend, h: Transformation, precision: str, device: str) -> list[str]:
    """What the backend is asked for: the precision, or for "auto" those that h allows, else fp32."""
    if precision != "auto":
        return [precision]
    return [p for p in backend.fastest_first(device) if h.allows(p)] or [PRECISIONS[0]]


def _bf16_will_do(h: Transformation, precision: str) -> bool:
    return precision == "bf16" or (precision == "auto" and h.allows("bf16"))

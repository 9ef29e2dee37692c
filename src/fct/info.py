"""build_info: which backends were built, which run here, and why not."""

from __future__ import annotations

import platform
import sys
from typing import Any

__all__ = ["build_info"]


def build_info() -> dict[str, Any]:
    """What was built and what runs on this machine.

    Returns:
        A dict of plain values: "version", "python", "platform", "backends" (name -> {"runs": bool, "why_not":
        [str, ...]} for the paper's h on this machine's devices), "cuda_build" ("" or why it was not built).

    Example:
        >>> import fct
        >>> "torch" in fct.build_info()["backends"]
        True
    """
    import fct
    from fct import _C
    from fct.ops.dispatch import default_threads, transform_backends

    h = fct.Transformation.random(8, 8, 8, inner=8)
    backends = {}
    for backend in transform_backends():
        device = "cuda" if backend.name in ("triton", "cuda") else "cpu"
        why = backend.why_not(h, backend.fastest_first(device)[-1] if backend.fastest_first(device) else "fp32", device)
        backends[backend.name] = {"device": device, "runs": not why, "why_not": why}
    return {
        "version": fct.__version__,
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": default_threads(),
        "cuda_build": _C.cuda_why_not,
        "backends": backends,
    }

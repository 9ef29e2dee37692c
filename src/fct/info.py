"""build_info: which backends were built, which run here, and why not."""

from __future__ import annotations

import platform
import sys

from fct.types import JsonDict

__all__ = ["build_info"]


def build_info() -> JsonDict:
    """What was built and what runs on this machine.

    Returns:
        A dict of plain values: "version", "python", "platform", "threads" (how many a call takes by default) and
        "threads_from" (why as many), "backends" (name -> {"runs": bool, "why_not":
        [str, ...]} for the paper's h on this machine's devices), "searches" (likewise for fct.topk; "proved": what
        the self-proof found on the GPU so far, "metric kind" -> "" where right, else what was wrong), "cuda_build" (""
        or why it was not built), "verdicts" (the file of the self-proof's verdicts and of what fct doctor timed).

    Examples:
        >>> import fct
        >>> "torch" in fct.build_info()["backends"]
        True
    """
    import fct
    from fct import _C
    from fct.ops.processors import threads_and_why
    from fct.ops.proof import verdict_file
    from fct.ops.registry import transform_backends

    threads, threads_from = threads_and_why()
    h = fct.Transformation.random(8, 8, 8, inner=8)
    backends = {}
    for backend in transform_backends():
        device = "cuda" if backend.name in ("triton", "cuda") else "cpu"
        why = backend.why_not(h, backend.fastest_first(device)[-1] if backend.fastest_first(device) else "fp32", device)
        backends[backend.name] = {"device": device, "runs": not why, "why_not": why}
    return {
        "searches": _searches(),
        "verdicts": str(verdict_file()),
        "version": fct.__version__,
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "threads_from": threads_from,
        "cuda_build": _C.cuda_why_not,
        "backends": backends,
    }


def _searches() -> dict[str, JsonDict]:
    from fct.ops.device.state import why_no_cuda
    from fct.ops.proof import search_verdict
    from fct.ops.registry import search_backends
    from fct.spaces import METRICS

    found: dict[str, JsonDict] = {"cpu": {"device": "cpu", "runs": True, "why_not": [], "proved": {}}}
    for search in search_backends():
        why = search.why_not(1, "l2", "cuda:0")
        proved: dict[str, str] = {}
        for metric in METRICS if not why else ():
            for kind in ("bf16", "int8"):
                verdict = search_verdict(search.name, metric, kind, "cuda:0")
                if verdict is not None:
                    proved[f"{metric} {kind}"] = verdict
        found[search.name] = {"device": "cuda", "runs": not why, "why_not": why, "proved": proved}
    why = why_no_cuda("cuda:0")
    found["torch"] = {"device": "cuda", "runs": not why, "why_not": why, "proved": {}}
    return found

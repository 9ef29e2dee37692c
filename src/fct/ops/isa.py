"""The instruction-set level of the CPU kernels, chosen once a process: FCT_ISA, or the best that the processor has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from fct import _C

__all__ = ["isa", "using_isa"]

_chosen: int | None = None


def isa() -> int:
    """The level in use, an index of ``_C.isa_names``; FCT_ISA is read at the first call."""
    global _chosen
    if _chosen is None:
        _chosen = _level(os.environ.get("FCT_ISA") or None)
    return _chosen


@contextlib.contextmanager
def using_isa(name: str | None) -> Iterator[None]:
    """Another level for the time of a ``with``, for the whole process: for tests and measurements.

    name: one of ``_C.isa_names`` that this processor has; None: what FCT_ISA says now.

    Examples:
        >>> from fct.ops.isa import isa, using_isa
        >>> with using_isa("portable"):
        ...     isa()
        0
    """
    global _chosen
    before = _chosen
    _chosen = _level(name or os.environ.get("FCT_ISA") or None)
    try:
        yield
    finally:
        _chosen = before


def _level(wanted: str | None) -> int:
    here = _C.isa_names[: _C.detected_isa() + 1]
    if wanted is None:
        return len(here) - 1
    if wanted not in here:
        raise ValueError(f"FCT_ISA: expected one of {', '.join(here)} here, got {wanted!r}")
    return here.index(wanted)

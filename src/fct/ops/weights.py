"""Packed weights: made once for each h, backend, precision and device, kept as long as h lives, safe under threads."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from fct.artifact.transformation import Transformation
from fct.ops.backend import TransformBackend

__all__ = ["packed", "packed_names"]

Key = tuple[str, str, str]  # backend, precision, device


class _Kept:
    """What one h has been packed to, and the lock under which it is packed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_key: dict[Key, Any] = {}


_lock = threading.Lock()
_kept: weakref.WeakKeyDictionary[Transformation, _Kept] = weakref.WeakKeyDictionary()


def packed(backend: TransformBackend, h: Transformation, precision: str, device: str) -> Any:
    """The backend's packed weights of h, made on first use; threads that ask at the same time wait for the one."""
    kept = _kept.get(h)
    if kept is None:
        with _lock:
            kept = _kept.setdefault(h, _Kept())
    key = (backend.name, precision, device)
    found = kept.by_key.get(key)
    if found is None:
        with kept.lock:
            found = kept.by_key.get(key)
            if found is None:
                found = kept.by_key[key] = backend.pack(h, precision, device)
    return found


def packed_names(h: Transformation) -> tuple[Key, ...]:
    """(backend, precision, device) of what is kept for h in this process."""
    kept = _kept.get(h)
    return () if kept is None else tuple(kept.by_key)

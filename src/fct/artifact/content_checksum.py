"""A checksum over everything that a file of named tensors holds: each value, and the header that goes with them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from fct.atomic_files import new_checksum
from fct.types import Array

__all__ = ["CHECKSUM", "content_checksum"]

CHECKSUM = "xxh64"  # its name in a header, which it does not cover


def content_checksum(header: Mapping[str, object], tensors: Mapping[str, Array]) -> str:
    """XXH64 of both, as 16 hex digits. header: what JSON can hold."""
    plain = json.loads(json.dumps(header))  # names that are numbers are text in a file
    digest = new_checksum()

    def add(data: Array) -> None:
        if data.nbytes:
            digest.update(int(data.ctypes.data), data.nbytes)

    def add_text(text: str) -> None:
        add(np.frombuffer(text.encode(), np.uint8))

    add_text(json.dumps({k: v for k, v in plain.items() if k != CHECKSUM}, sort_keys=True))
    for name in sorted(tensors):
        add_text(f"{name}:{tensors[name].dtype}:{tensors[name].shape}")
        add(np.ascontiguousarray(tensors[name]))
    return f"{digest.digest():016x}"

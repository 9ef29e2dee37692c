"""Validation pairs that h would also be fitted on: what is measured on them says nothing of other rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from fct.errors import FctWarning
from fct.fit.pairs import Pairs

__all__ = ["require_apart"]

_CHUNK = 8_192


def require_apart(train: Pairs, held: Pairs) -> Pairs:
    """``held`` itself; warns of its rows whose inputs (old, side_info) stand among the training pairs too.

    Raises:
        ValueError: all of them do.
    """
    asked = set(_inputs(held))
    both = {key for key in _inputs(train) if key in asked}
    shared = sum(key in both for key in _inputs(held)) if both else 0
    if not shared:
        return held
    what = "old vector" if held.side is None else "old vector and side_info"
    line = (
        f"validation: expected rows apart from the training pairs, got {shared:,} of {len(held):,} whose {what} stand "
        "there too"
    )
    if shared == len(held):
        raise ValueError(f"{line}; hold other items out, or give a share of the pairs (validation=0.05)")
    warnings.warn(
        f"{line}: the figures flatter h, whose shape and epoch are chosen by them; leave these rows out of one of both",
        FctWarning,
        stacklevel=4,
    )
    return held


def _inputs(pairs: Pairs) -> Iterator[int]:
    """A 64-bit hash of each row's inputs: others have the same one by chance in one of 2^64 comparisons."""
    for begin in range(0, len(pairs), _CHUNK):
        old, side, _ = pairs.take(slice(begin, begin + _CHUNK))
        rows = (old if side is None else np.concatenate([old, side], axis=1)) + np.float32(0)  # -0.0 is 0.0
        yield from (hash(row.tobytes()) for row in rows)

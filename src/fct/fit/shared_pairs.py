"""Validation pairs that h would also be fitted on: what is measured on them says nothing of other rows."""

from __future__ import annotations

import warnings

import numpy as np

from fct.errors import FctWarning
from fct.fit.pairs import Pairs
from fct.fit.repeated_pairs import row_hashes

__all__ = ["require_apart"]


def require_apart(train: Pairs, held: Pairs) -> Pairs:
    """``held`` itself; warns of its rows whose inputs (old, side_info) stand among the training pairs too.

    Raises:
        ValueError: all of them do.
    """
    shared = int(np.isin(row_hashes(held, 0)[0], row_hashes(train, 0)[0]).sum())
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

"""Pairs that stand in the set more than once, and pairs that contradict each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fct.fit.pairs import Pairs
from fct.types import Array

__all__ = ["RepeatedPairs", "find_repeated", "row_hashes"]

_CHUNK = 8_192


@dataclass(frozen=True, eq=False, slots=True)
class RepeatedPairs:
    """first: positions of the pairs, each different pair once. repeated: how many more stood there.
    conflicting: pairs whose inputs stand there with another new embedding too."""

    first: Array
    repeated: int
    conflicting: int


def row_hashes(pairs: Pairs, seed: int) -> tuple[Array, Array]:
    """(n,) uint64 each, of the rows' bits: of what goes into h, and of the whole pairs.

    Equal rows have equal ones, in every set of such pairs; others by chance once in 2^64 / n^2.
    """
    inputs, wholes = np.empty(len(pairs), np.uint64), np.empty(len(pairs), np.uint64)
    rng = np.random.default_rng([seed, 17])
    factors: list[Array | None] = [None, None, None]
    for begin in range(0, len(pairs), _CHUNK):
        parts = pairs.take(slice(begin, begin + _CHUNK))
        sums = []
        for i, rows in enumerate(parts):
            if rows is None:
                continue
            factor = factors[i]
            if factor is None:
                factor = factors[i] = rng.integers(1, 2**63, rows.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
                    1
                )
            bits = (rows + np.float32(0)).view(np.uint32).astype(np.uint64)  # -0.0 is 0.0
            bits ^= bits >> np.uint64(15)
            sums.append((bits * factor).sum(axis=1, dtype=np.uint64))
        span = slice(begin, begin + len(parts[0]))
        inputs[span] = sums[0] if len(sums) == 2 else sums[0] + sums[1] * np.uint64(0x9E3779B97F4A7C15)
        wholes[span] = inputs[span] + sums[-1] * np.uint64(0xD1B54A32D192ED03)
    return inputs, wholes


def find_repeated(pairs: Pairs, seed: int) -> RepeatedPairs:
    """Compares :func:`row_hashes`."""
    inputs, wholes = row_hashes(pairs, seed)
    first = np.sort(np.unique(wholes, return_index=True)[1])
    _, where, counts = np.unique(inputs[first], return_inverse=True, return_counts=True)
    return RepeatedPairs(first, len(pairs) - len(first), int((counts[where] > 1).sum()))

"""Checks of plain arguments; arrays have their own gate, :mod:`fct.arrays`."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["check_flag", "check_number", "check_seed", "check_whole"]


def check_flag(value: Any, name: str) -> bool:
    """``value`` as a bool; raises ValueError unless it is one (or numpy's)."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def check_whole(value: Any, name: str, least: int, most: int | None = None) -> int:
    """``value`` as an int; raises ValueError unless it is a whole number (or numpy's) in the range; True is none."""
    fits = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not fits or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected a whole number {span}, got {value!r}")
    return int(value)


def check_number(value: Any, name: str, least: float) -> float:
    """``value`` as a float; raises ValueError unless it is a finite number of at least ``least``."""
    fits = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not fits or not np.isfinite(float(value)) or value < least:
        raise ValueError(f"{name}: expected a finite number of at least {least:g}, got {value!r}")
    return float(value)


def check_seed(seed: Any, name: str = "seed") -> int:
    """``seed`` as an int; raises ValueError unless both numpy and torch take it."""
    return check_whole(seed, name, 0, 2**63 - 1)

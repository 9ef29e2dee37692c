"""Checks of plain arguments; arrays have their own gate, :mod:`fct.rows`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "check_choice",
    "check_flag",
    "check_items",
    "check_kind",
    "check_mapping",
    "check_number",
    "check_path",
    "check_positive",
    "check_scores",
    "check_seed",
    "check_share",
    "check_text",
    "check_whole",
    "shown",
]


def shown(value: object) -> str:
    """``value`` as it may stand in a message: its repr, on one line and not longer than that."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of thousands of digits, or somebody's own repr
        return f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else f"{text[:76]} ..."


def check_choice(value: object, name: str, choices: Sequence[str]) -> str:
    """``value`` itself; raises ValueError unless it is one of the strings in ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")
    return value


def check_text(value: object, name: str, what: str) -> str:
    """``value`` itself; raises TypeError unless it is a string. what: "the name of a column", for the message."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected {what}, got {shown(value)}")
    return value


def check_path(value: object, name: str, what: str = "a path") -> Path:
    """``value`` as a Path; raises TypeError unless it is a string or os.PathLike, ValueError for an empty one.

    Bytes are no path here: they would be compared with names that are strings.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected {what}, got {shown(value)}")
    if not text or "\0" in text:
        raise ValueError(f"{name}: expected {what}, got {shown(value)}")
    return Path(text)


T = TypeVar("T")
Scores: TypeAlias = npt.NDArray[np.float64]


def check_kind(value: object, name: str, kind: type[T], what: str) -> T:
    """``value`` itself; raises TypeError unless it is a ``kind``. what: "an fct.Transformation", for the message."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
    return value


def check_mapping(value: T, name: str, what: str) -> T:
    """``value`` itself; raises TypeError unless it is a mapping. what: "a mapping of grades", for the message."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
    return value


def check_items(value: object, name: str, what: str) -> list[object]:
    """``value``'s items; raises TypeError unless it is a sequence or an array, and no text. what: for the message."""
    if isinstance(value, (str, bytes, Mapping, set, frozenset)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected {what}, got {shown(value)}")
    try:
        return list(value)
    except TypeError as error:  # an array without a dimension
        raise TypeError(f"{name}: expected {what}, got {shown(value)}") from error


def check_scores(values: object, name: str, what: str, *, kinds: str = "iuf", gaps: bool = False) -> Scores:
    """(n,) float64 of numbers, numpy's or torch's; raises ValueError for anything else, a mask and what is not finite.

    what: "a score each", for the message. kinds: of numpy's dtypes. gaps: NaN is fine.
    """
    host = getattr(values, "detach", lambda: values)()
    try:
        array = np.asarray(host.cpu() if hasattr(host, "cpu") else host)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected (n,) numbers, {what}, got {shown(values)}") from error
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(f"{name}: expected numbers without a mask, got {np.count_nonzero(values.mask)} masked")
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise ValueError(f"{name}: expected (n,) numbers, {what}, got {array.dtype} of shape {array.shape}")
    numbers: Scores = array.astype(np.float64)
    if np.isinf(numbers).any() or (not gaps and np.isnan(numbers).any()):
        raise ValueError(f"{name}: expected finite numbers{', or NaN for none' if gaps else ''}, got some that are not")
    return numbers


def check_flag(value: object, name: str) -> bool:
    """``value`` as a bool; raises ValueError unless it is one (or numpy's)."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


def check_whole(value: object, name: str, least: int, most: int | None = None) -> int:
    """``value`` as an int; raises ValueError unless it is a whole number (or numpy's) in the range; True is none."""
    if (
        not isinstance(value, (int, np.integer))
        or isinstance(value, bool)
        or value < least
        or (most is not None and value > most)
    ):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected a whole number {span}, got {shown(value)}")
    return int(value)


def _is_number(value: object) -> TypeGuard[float]:
    """A number (or numpy's) that a float can hold, NaN and infinities among them; True is none."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        return False
    return not isinstance(value, int) or abs(value) <= sys.float_info.max


def check_number(value: object, name: str, least: float) -> float:
    """``value`` as a float; raises ValueError unless it is a finite number of at least ``least``."""
    if not _is_number(value) or not np.isfinite(float(value)) or value < least:
        raise ValueError(f"{name}: expected a finite number of at least {least:g}, got {shown(value)}")
    return float(value)


def check_positive(value: object, name: str, what: str = "a positive number") -> float:
    """``value`` as a float; raises ValueError unless it is a finite number above 0. what: for the message."""
    if not _is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected {what}, got {shown(value)}")
    return float(value)


def check_share(value: object, name: str, *, ends: bool = False) -> float:
    """``value`` as a float; raises ValueError unless it is a number between 0 and 1. ends: 0 and 1 are fine too."""
    if not _is_number(value) or not (0 <= value <= 1 if ends else 0 < value < 1):
        raise ValueError(f"{name}: expected a share {'from 0 to 1' if ends else 'between 0 and 1'}, got {shown(value)}")
    return float(value)


def check_seed(seed: object, name: str = "seed") -> int:
    """``seed`` as an int; raises ValueError unless both numpy and torch take it."""
    return check_whole(seed, name, 0, 2**63 - 1)

"""``scale``, ``offset``, ``code_ranges``: what brings 8-bit codes back, by number, dimension or column."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from fct.checks import check_number, check_positive, shown
from fct.options.declare import Check
from fct.types import Array

__all__ = ["code_number", "code_ranges", "number_or_name"]


def number_or_name(given: str) -> float | str:
    """What the command line was given: a number, or the name of a file or of a column."""
    try:
        return float(given)
    except ValueError:
        return given


def code_number(*, positive: bool) -> Check:
    """A finite number (above 0), a tuple of one for each dimension (of an array or an ``.npy`` file), or the name of a
    column that has one for each row."""
    each = "positive finite numbers" if positive else "finite numbers"

    def check(value: object, name: str) -> object:
        if isinstance(value, (str, os.PathLike)):
            path = os.fspath(value)
            if not path.endswith(".npy"):
                return path
            value = _loaded(path, name)
        if isinstance(value, (np.ndarray, tuple, list)) and np.ndim(value):
            array = _floats(value, name, each)
            if array.ndim == 2 and array.shape[0] == 1:
                array = array[0]
            with np.errstate(over="ignore"):
                narrow = array.astype(np.float32)
            fits = array.ndim == 1 and array.size and np.isfinite(narrow).all() and (not positive or (narrow > 0).all())
            if not fits:
                raise ValueError(f"{name}: expected {each}, one for each dimension (d,), got {shown(value)}")
            return tuple(float(x) for x in array)
        value = value.item() if isinstance(value, np.ndarray) else value
        if positive:
            return check_positive(value, name, "a positive number")
        return check_number(value, name, -float(np.finfo(np.float32).max))

    return check


def code_ranges(value: object, name: str) -> object:
    """((lowest of each dimension), (highest)), of a (2, d) array or an ``.npy`` file; None as it is."""
    if value is None:
        return None
    if isinstance(value, (str, os.PathLike)):
        value = _loaded(os.fspath(value), name)
    array = _floats(value, name, "the lowest and the highest value of each dimension, (2, d)")
    if array.ndim != 2 or array.shape[0] != 2 or not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"{name}: expected the lowest and the highest value of each dimension, finite and (2, d), got "
            f"{shown(value)}"
        )
    if not (array[1] > array[0]).all():
        worst = int(np.flatnonzero(array[1] <= array[0])[0])
        raise ValueError(
            f"{name}: expected a highest value above the lowest, dimension {worst} has {array[0, worst]:g} and "
            f"{array[1, worst]:g}"
        )
    return tuple(tuple(float(x) for x in row) for row in array)


def _loaded(path: str, name: str) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: expected an .npy file, found none at {path}") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name}: expected a whole .npy array, {path} is not: {error}") from error


def _floats(value: object, name: str, what: str) -> Array:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"dtype {array.dtype}")
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected {what}, got {shown(value)} ({error})") from error

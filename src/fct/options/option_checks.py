"""What a single option of the backfill admits: a check for each kind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np

from fct.checks import check_number, check_positive, check_text, check_whole, shown
from fct.options.declare import Check
from fct.types import JsonDict

__all__ = [
    "at_least",
    "attempts",
    "part",
    "positive",
    "reembedder",
    "share",
    "storage_options",
    "table_or_mapping",
    "text",
    "whole",
]


def whole(least: int) -> Check:
    """A whole number of at least ``least``."""
    return lambda value, name: check_whole(value, name, least)


def text(what: str) -> Check:
    """A string that is ``what``."""
    return lambda value, name: check_text(value, name, what)


def at_least(least: float) -> Check:
    """A finite number of at least ``least``."""
    return lambda value, name: check_number(value, name, least)


def positive(what: str = "a positive number") -> Check:
    """A finite number above 0."""
    return lambda value, name: check_positive(value, name, what)


def attempts(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: expected a number of further attempts, got {shown(value)}")
    return value


def share(value: object, name: str) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        raise ValueError(f"{name}: expected a share or None, got {shown(value)}")
    return value


def part(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a share of the rows from 0 to 1, got {shown(value)}")
    return float(value)


def reembedder(value: object, name: str) -> object:
    if value is None or isinstance(value, (str, PathLike, Mapping)) or callable(value):
        return value
    raise TypeError(f"{name}: expected a function, a mapping of id and new, or the path of a table, got {shown(value)}")


def storage_options(given: Sequence[str] | None) -> JsonDict | None:
    """``KEY=VALUE`` as fsspec takes them. VALUE is JSON where it can be read as such (true, 60, {...}), else a string.

    They may hold keys: no message repeats a value.
    """
    if not given:
        return None
    options: JsonDict = {}
    for number, pair in enumerate(given, 1):
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--storage-option: expected KEY=VALUE, got no {'=' if key else 'KEY'} in number {number}")
        if key in options:
            raise ValueError(f"--storage-option: expected each KEY once, got {key} twice")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def table_or_mapping(what: str) -> Check:
    """None, the path of a table, a mapping of its columns, or an object that holds them already."""

    def check(value: object, name: str) -> object:
        if isinstance(value, (bool, int, float, bytes, list, tuple, set, np.ndarray)):
            raise TypeError(f"{name}: expected {what}, got {shown(value)}")
        return value

    return check

"""JSON that somebody else may have written, read against a schema: size, depth, names, types and ranges are checked
before a value is used. A check takes (value, where it stands) and returns the value, or raises SchemaError."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from fct.atomic_files import checksum_bytes
from fct.types import JsonDict

__all__ = [
    "SEAL",
    "Check",
    "SchemaError",
    "anything",
    "either",
    "file_name",
    "flag",
    "listed",
    "number",
    "one_of",
    "parse",
    "record",
    "sealed",
    "text",
    "unsealed",
    "whole",
]

T = TypeVar("T")
Check = Callable[[object, str], Any]
SEAL = "xxh64"
_DEPTH = 64  # of what a store keeps in a marker; everything else is as deep as its schema


class SchemaError(ValueError):
    """The content is not what the schema says; the message names the place."""


def parse(data: bytes, most: int, *, constants: bool = False) -> object:
    """``data`` as JSON, its size bounded. constants: take NaN and infinity, which JSON does not have and version 0.1
    wrote."""
    if len(data) > most:
        raise SchemaError(f"expected at most {most:,} bytes, got {len(data):,}")
    try:
        return json.loads(data, parse_constant=float if constants else _no_constant)
    except RecursionError:
        raise SchemaError("it is nested too deeply") from None
    except MemoryError:
        raise SchemaError("it does not fit into memory") from None
    except UnicodeDecodeError as error:
        raise SchemaError(f"it is no UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise SchemaError(f"it is no JSON: {error}") from None


def _no_constant(name: str) -> float:
    raise SchemaError(f"expected JSON, got {name}")


def sealed(body: JsonDict) -> bytes:
    """The body as JSON with its own checksum in it."""
    return json.dumps({SEAL: _seal(body), **body}).encode()


def unsealed(body: object) -> JsonDict:
    """The body without its checksum. Raises SchemaError where there is one and it is wrong: files that were written
    before there were checksums have none."""
    if not isinstance(body, dict):
        raise SchemaError(f"expected an object, got {_kind(body)}")
    rest = {key: value for key, value in body.items() if key != SEAL}
    if SEAL in body and body[SEAL] != _seal(rest):
        raise SchemaError("its content does not match its checksum: it was damaged or changed")
    return rest


def _seal(body: JsonDict) -> str:
    return checksum_bytes(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: object) -> str:
    shown = ascii(value) if isinstance(value, (str, int, float)) else _kind(value)
    return shown if len(shown) <= 60 else f"{shown[:56]} ..."


def whole(least: int, most: int) -> Check:
    def check(value: object, context: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise SchemaError(f"{context}: expected a whole number from {least} to {most}, got {_shown(value)}")
        return value

    return check


def number(least: float, most: float) -> Check:
    def check(value: object, context: str) -> float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300
        if not fits or not math.isfinite(value) or not least <= value <= most:  # type: ignore[arg-type,operator]
            raise SchemaError(f"{context}: expected a number from {least:g} to {most:g}, got {_shown(value)}")
        return value  # type: ignore[return-value]

    return check


def text(most: int, pattern: str | None = None) -> Check:
    """A string of at most ``most`` characters; pattern: what all of it must match."""

    def check(value: object, context: str) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise SchemaError(f"{context}: expected text of at most {most} characters, got {_shown(value)}")
        if pattern is not None and not re.fullmatch(pattern, value):
            raise SchemaError(f"{context}: expected {pattern}, got {_shown(value)}")
        return value

    return check


def one_of(choices: Collection[str]) -> Check:
    def check(value: object, context: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise SchemaError(f"{context}: expected one of {', '.join(choices)}, got {_shown(value)}")
        return value

    return check


def flag(value: object, context: str) -> bool:
    if not isinstance(value, bool):
        raise SchemaError(f"{context}: expected true or false, got {_shown(value)}")
    return value


def file_name(value: object, context: str) -> str:
    """A relative path that stays where it begins."""
    parts = value.split("/") if isinstance(value, str) else []
    fits = all(part not in ("", ".", "..") and len(part) <= 255 and "\0" not in part for part in parts)
    if not isinstance(value, str) or not fits or len(value) > 4096 or "\\" in value or parts[0].endswith(":"):
        raise SchemaError(f"{context}: expected the name of a file inside the gallery, got {_shown(value)}")
    return value


def anything(value: object, context: str) -> object:
    """Any JSON of bounded depth: what a store keeps for itself."""

    def walk(part: object, depth: int) -> None:
        if depth > _DEPTH:
            raise SchemaError(f"{context}: it is nested too deeply")
        if isinstance(part, (dict, list)):
            for inner in part.values() if isinstance(part, dict) else part:
                walk(inner, depth + 1)

    walk(value, 0)
    return value


def either(check: Check, otherwise: object) -> Check:
    """``otherwise`` as it is, or what the check takes."""
    return lambda value, where: value if value is otherwise else check(value, where)


def listed(check: Check, most: int) -> Check:
    """A list of at most ``most`` entries, as a tuple."""

    def checked(value: object, context: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > most:
            got = f"{len(value)}" if isinstance(value, list) else _kind(value)
            raise SchemaError(f"{context}: expected a list of at most {most} entries, got {got}")
        return tuple(check(entry, f"{context}[{i}]") for i, entry in enumerate(value))

    return checked


def record(make: Callable[..., T], optional: Collection[str] = (), /, **checks: Check) -> Callable[[object, str], T]:
    """An object with these keys and no others, as ``make`` builds it. optional: keys that may be missing."""

    def check(value: object, context: str) -> T:
        if not isinstance(value, dict):
            raise SchemaError(f"{context}: expected an object, got {_kind(value)}")
        missing = [name for name in checks if name not in value and name not in optional]
        unknown = [name for name in value if name not in checks]
        if missing or unknown:
            raise SchemaError(
                f"{context}: it lacks {missing[0]}" if missing else f"{context}: {_shown(unknown[0])} is no name of it"
            )
        values = {name: checks[name](entry, f"{context}.{name}" if context else name) for name, entry in value.items()}
        try:
            return make(**values)
        except (TypeError, ValueError) as error:
            raise SchemaError(f"{context}: {error}") from None

    return check

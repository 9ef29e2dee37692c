"""Damage to files: bits, bytes, ends, lengths, pieces of other files, and the structure of JSON."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

__all__ = ["mutated"]

_WIDTHS = ("<H", "<I", "<Q", ">H", ">I", ">Q")
_SIZES = (1, 2, 4, 8, 64, 500)
_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308,
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "../x", "/dev/null", "0", "\0", "\ud800", "é" * 300, [], {}, [[]], [0], {"": 0},
    *_NUMBERS,
)  # fmt: skip


def mutated(raw: bytes, draw: random.Random, *, text: bool = False) -> bytes:
    """A damaged copy. text: of JSON, or lines of it, whose structure is changed half of the time."""
    kinds = [_bit, _byte, _cut, _doubled, _zeroed, _truncated, _exchanged, _length, _length, _inserted]
    data = raw
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        kind: Callable[[bytes, random.Random], bytes] = draw.choice(kinds)
        if text and draw.random() < 0.6:
            kind = draw.choice((_json_changed, _json_changed, _json_changed, _deep, _constant, _digit))
        data = kind(data, draw) if data else draw.randbytes(draw.randrange(1, 64))
    return data


def _bit(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _byte(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    out[draw.randrange(len(out))] = draw.choice((0, 255, 127, 128, draw.randrange(256)))
    return bytes(out)


def _span(data: bytes, draw: random.Random) -> tuple[int, int]:
    """Headers and footers are where it hurts."""
    size = len(data)
    at = draw.choice((draw.randrange(size), draw.randrange(min(size, 256)), size - 1 - draw.randrange(min(size, 512))))
    return at, min(size, at + draw.choice(_SIZES))


def _cut(data: bytes, draw: random.Random) -> bytes:
    a, b = _span(data, draw)
    return data[:a] + data[b:]


def _doubled(data: bytes, draw: random.Random) -> bytes:
    a, b = _span(data, draw)
    return data[:b] + data[a:]


def _zeroed(data: bytes, draw: random.Random) -> bytes:
    a, b = _span(data, draw)
    return data[:a] + bytes(b - a) + data[b:]


def _truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _exchanged(data: bytes, draw: random.Random) -> bytes:
    """A piece of the file in another place of it."""
    a, b = _span(data, draw)
    at, _ = _span(data, draw)
    return data[:at] + data[a:b] + data[at + b - a :]


def _inserted(data: bytes, draw: random.Random) -> bytes:
    at, _ = _span(data, draw)
    return data[:at] + draw.randbytes(draw.choice((1, 8, 100))) + data[at:]


def _length(data: bytes, draw: random.Random) -> bytes:
    """A number of two, four or eight bytes, most likely a length, made another."""
    width = draw.choice(_WIDTHS)
    size = struct.calcsize(width)
    at, _ = _span(data, draw)
    at = min(at & ~(size - 1), len(data) - size)
    if at < 0:
        return data + b"\0"
    (old,) = struct.unpack_from(width, data, at)
    most = (1 << 8 * size) - 1
    new = draw.choice(
        (old + 1, old - 1, old * 2, old // 2, 0, 1, most, most >> 1, most - 7, (most >> 1) + 1, len(data))
    )
    return data[:at] + struct.pack(width, new & most) + data[at + size :]


# ---- JSON ----
def _json_changed(data: bytes, draw: random.Random) -> bytes:
    """One value, name or list of a JSON text, or of one of its lines, made another."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    try:
        whole, found = (False, json.loads(lines[at])) if len(lines) > 2 else (True, json.loads(data))
    except (ValueError, RecursionError):
        return _byte(data, draw)
    changed = json.dumps(_changed(found, draw)).encode()
    return changed if whole else b"\n".join([*lines[:at], changed, *lines[at + 1 :]])


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, str) and value[:1] in ("{", "[") and draw.random() < 0.8:  # JSON in JSON
        try:
            return json.dumps(_changed(json.loads(value), draw))
        except (ValueError, RecursionError):
            return "{"
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return _other(value, draw)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, how = draw.choice(keys), draw.random()
    out = dict(value) if isinstance(value, dict) else list(value)
    if how < 0.6:
        out[key] = _changed(value[key], draw)
    elif how < 0.75:
        del out[key]
    elif how < 0.85:
        out[key] = value[draw.choice(keys)]
    elif isinstance(out, list):
        out.insert(draw.randrange(len(out) + 1), draw.choice((value[key], *_VALUES)))
    elif how < 0.93:
        out[f"{key}{draw.choice(('_', 'x', ' '))}"] = out.pop(key)
    else:
        out[draw.choice(("", "x", "__class__", "self", "xxh64"))] = draw.choice(_VALUES)
    return out


def _other(value: Any, draw: random.Random) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and draw.random() < 0.5:
        return draw.choice((value + 1, value - 1, value * 2, -value, str(value), [value], value // 2))
    if isinstance(value, str) and draw.random() < 0.5:
        return draw.choice((value + "x", value[:-1], value.upper(), "../" + value, value * 2))
    return draw.choice(_VALUES)


def _deep(data: bytes, draw: random.Random) -> bytes:
    """A value under more brackets than a parser counts."""
    depth, at = draw.choice((70, 2000, 100_000)), data.find(b":") + 1
    opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return data[:at] + opening * depth + draw.choice((b"", b"1" + closing * depth + b"," + data[at:]))


def _constant(data: bytes, draw: random.Random) -> bytes:
    """What Python reads and JSON does not have, or a number of many digits."""
    places = [i for i, byte in enumerate(data) if byte == ord(":")]
    if not places:
        return _byte(data, draw)
    at = draw.choice(places) + 1
    end = min((i for i in (data.find(b",", at), data.find(b"}", at)) if i > 0), default=at)
    return data[:at] + draw.choice((b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"1E400", b"'x'")) + data[end:]


def _digit(data: bytes, draw: random.Random) -> bytes:
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return _byte(data, draw)
    at = draw.choice(places)
    return data[:at] + draw.choice((b"0", b"1", b"9", b"-", b"11", b"")) + data[at + 1 :]

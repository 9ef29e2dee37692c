"""PostgreSQL's binary COPY: which type a column gets there, and its values as the server's receive functions take them.

Layout: https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format"; a vector is int16 dim, int16 0 and
big-endian float4s (pgvector's ``vector_recv``), a halfvec likewise with float2s.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from fct.gallery.json_values import json_values, plain_array
from fct.types import Array

__all__ = ["END", "HEADER", "column_type_of", "encoded", "rows_of_fields", "vectors_encoded"]

HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
END = b"\xff\xff"
_EPOCH_DAYS = 10957  # 2000-01-01, from which PostgreSQL counts, after 1970-01-01
_EPOCH_US = _EPOCH_DAYS * 86_400_000_000
Field = bytes | None

_INTEGERS = {
    pa.int8(): ("smallint", ">h"), pa.uint8(): ("smallint", ">h"), pa.int16(): ("smallint", ">h"),
    pa.uint16(): ("integer", ">i"), pa.int32(): ("integer", ">i"), pa.uint32(): ("bigint", ">q"),
    pa.int64(): ("bigint", ">q"),
}  # fmt: skip


def column_type_of(kind: pa.DataType, name: str) -> str:
    """The type of PostgreSQL that holds every value of an Arrow type. Raises ValueError where there is none."""
    t = pa.types
    if t.is_dictionary(kind):
        return column_type_of(kind.value_type, name)
    if getattr(kind, "extension_name", "") == "arrow.uuid":
        return "uuid"
    if isinstance(kind, pa.BaseExtensionType):
        return column_type_of(kind.storage_type, name)
    if kind in _INTEGERS:
        return _INTEGERS[kind][0]
    if kind == pa.uint64() or t.is_decimal(kind):
        return "numeric"
    if t.is_timestamp(kind):
        return "timestamptz" if kind.tz else "timestamp"
    for holds, target in (
        (t.is_boolean, "boolean"), (t.is_float16, "real"), (t.is_float32, "real"), (t.is_float64, "double precision"),
        (t.is_string, "text"), (t.is_large_string, "text"), (t.is_string_view, "text"), (t.is_null, "text"),
        (t.is_binary, "bytea"), (t.is_large_binary, "bytea"), (t.is_binary_view, "bytea"),
        (t.is_fixed_size_binary, "bytea"), (t.is_date, "date"), (t.is_time, "time"), (t.is_duration, "interval"),
        (t.is_interval, "interval"), (t.is_nested, "jsonb"),
    ):  # fmt: skip
        if holds(kind):
            return target
    raise ValueError(f"payload: column {name!r} is {kind}, which PostgreSQL has no type for: leave it out with columns")


def encoded(column: pa.Array, name: str, first: int, hollow: Counter[str]) -> list[Field]:
    """The column's values as fields of :func:`column_type_of`'s type; None for null.

    Raises:
        ValueError: a value that the type cannot hold (nanoseconds, a NUL in text), with its row.
    """
    column = plain_array(column)
    kind, t = column.type, pa.types
    target = column_type_of(kind, name)
    if target == "jsonb":
        values = json_values(column, name, first, hollow)
        return [None if v is None else b"\x01" + _text(json.dumps(v, ensure_ascii=False), name) for v in values]
    if kind in _INTEGERS:
        return _mapped(column, struct.Struct(_INTEGERS[kind][1]).pack)
    if t.is_date(kind) or t.is_time(kind) or t.is_timestamp(kind) or t.is_duration(kind):
        return _times(column, name, first)
    if t.is_interval(kind):
        return _mapped(column, lambda v: struct.pack(">qii", _whole_us(v.nanoseconds, name), v.days, v.months))
    return _mapped(
        column,
        {
            "boolean": lambda v: b"\x01" if v else b"\x00",
            "real": struct.Struct(">f").pack,
            "double precision": struct.Struct(">d").pack,
            "text": lambda v: _text(v, name),
            "bytea": bytes,
            "uuid": lambda v: bytes(v.bytes),
            "numeric": lambda v: _numeric(Decimal(v)),
        }[target],
    )


def _mapped(column: pa.Array, pack: Callable[[Any], bytes]) -> list[Field]:
    return [None if value is None else pack(value) for value in column.to_pylist()]


def _text(value: str, name: str) -> bytes:
    if "\0" in value or "\\u0000" in value:
        raise ValueError(f"payload: column {name!r} holds a text with a NUL character, which PostgreSQL refuses")
    return value.encode()


def _whole_us(nanoseconds: int, name: str, row: int | None = None) -> int:
    micro, rest = divmod(nanoseconds, 1000)
    if rest:
        where = "" if row is None else f": row {row}"
        raise ValueError(
            f"payload: column {name!r}{where} holds nanoseconds, which PostgreSQL has no room for: round it to "
            "microseconds before, or leave it out with columns"
        )
    return micro


def _times(column: pa.Array, name: str, first: int) -> list[Field]:
    kind, t = column.type, pa.types
    if t.is_date(kind):
        days = column.cast(pa.date32()).cast(pa.int32()) if kind == pa.date64() else column.cast(pa.int32())
        return _mapped(days, lambda v: struct.pack(">i", v - _EPOCH_DAYS))
    scale = {"s": 1_000_000, "ms": 1000, "us": 1, "ns": 0}[kind.unit]
    found: list[Field] = []
    for row, value in enumerate(column.cast(pa.int64() if kind.bit_width == 64 else pa.int32()).to_pylist(), first):
        if value is None:
            found.append(None)
            continue
        micro = value * scale if scale else _whole_us(value, name, row)
        if t.is_duration(kind):
            field = struct.pack(">qii", micro, 0, 0) if abs(micro) < 2**63 else None
        elif t.is_time(kind):
            field = struct.pack(">q", micro)
        else:
            micro -= _EPOCH_US
            field = struct.pack(">q", micro) if -211_813_488_000_000_000 <= micro < 9_223_371_331_200_000_000 else None
        if field is None:
            raise ValueError(
                f"payload: column {name!r}: row {row} has {value} {kind}, outside the times that PostgreSQL holds"
            )
        found.append(field)
    return found


def _numeric(value: Decimal) -> bytes:
    """Groups of four decimal digits, the weight of the first, sign and digits behind the point."""
    sign, digits, exponent = value.as_tuple()
    places = max(0, -int(exponent))
    text = "".join(map(str, digits)) + "0" * max(0, int(exponent))
    text = text.rjust(places + 1, "0")
    whole, part = text[: len(text) - places], text[len(text) - places :]
    whole = whole.rjust(-(-len(whole) // 4) * 4, "0")
    part = part.ljust(-(-len(part) // 4) * 4, "0")
    groups = [int(g) for g in (whole[i : i + 4] for i in range(0, len(whole), 4))]
    weight = len(groups) - 1
    groups += [int(part[i : i + 4]) for i in range(0, len(part), 4)]
    while groups and groups[0] == 0:
        groups, weight = groups[1:], weight - 1
    while groups and groups[-1] == 0:
        groups.pop()
    head = struct.pack(">hhHh", len(groups), weight if groups else 0, 0x4000 if sign and groups else 0, places)
    return head + struct.pack(f">{len(groups)}h", *groups)


def vectors_encoded(values: Array, *, half: bool) -> Array:
    """(n, d) float32 as an (n,) structured array of whole fields, their length in front."""
    n, d = values.shape
    size = 2 if half else 4
    record = np.zeros(n, [("size", ">i4"), ("dim", ">i2"), ("zero", ">i2"), ("v", f">f{size}", (d,))])
    record["size"], record["dim"] = 4 + size * d, d
    with np.errstate(over="ignore"):  # the caller looks for infinities
        record["v"] = values
    return record


def rows_of_fields(ids: Sequence[bytes], vectors: Array, payload: Sequence[Sequence[Field]]) -> bytes:
    """Whole tuples: id, vector, payload columns."""
    if not payload and len({len(key) for key in ids}) == 1:
        return _without_payload(ids, vectors)
    count = struct.pack(">h", 2 + len(payload))
    size = struct.Struct(">i").pack
    raw, width = vectors.tobytes(), vectors.dtype.itemsize
    parts: list[bytes] = []
    for row, key in enumerate(ids):
        parts += (count, size(len(key)), key, raw[row * width : (row + 1) * width])
        for column in payload:
            field = column[row]
            parts += (b"\xff\xff\xff\xff",) if field is None else (size(len(field)), field)
    return b"".join(parts)


def _without_payload(ids: Sequence[bytes], vectors: Array) -> bytes:
    width = len(ids[0])
    record = np.zeros(
        len(ids),
        [("count", ">i2"), ("size", ">i4"), ("id", "u1", (width,)), ("vector", "u1", (vectors.dtype.itemsize,))],
    )
    record["count"], record["size"] = 2, width
    record["id"] = np.frombuffer(b"".join(ids), np.uint8).reshape(-1, width)
    record["vector"] = np.frombuffer(vectors.tobytes(), np.uint8).reshape(len(ids), -1)
    return bytes(record.tobytes())

"""PostgreSQL's binary COPY in Arrow: ids and vectors in blocks, payload columns as the server's own bytes or decoded.

A stream is a header of 19 bytes, then rows: int16 number of fields, and for each field int32 size (-1: null) and the
type's own bytes, big-endian; int16 -1 at the end. A ``vector`` is int16 dim, int16 0, float4s; a ``halfvec`` the same
with 2-byte floats (pgvector's vector_send and halfvec_send).
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fct.types import JsonDict

__all__ = ["END", "HEADER", "PG_TYPE", "Column", "arrow_type", "decode", "encode", "pg_type_of"]

HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
END = b"\xff\xff"
PG_TYPE = b"fct.pg_type"  # metadata of an Arrow column: the server's type
_INTS = {"int2": 2, "int4": 4, "int8": 8}
_FLOATS = {"vector": (">f4", np.float32), "halfvec": (">f2", np.float16)}
_EPOCH = 946_684_800_000_000  # microseconds from 1970 to PostgreSQL's year 2000
Cells = list[bytes | None]


@dataclass(frozen=True, slots=True)
class Column:
    """name. type: the server's name (int8, text, vector). shown: as in a table definition (``numeric(8,2)``).
    dim: of a vector column that has one, else 0. raw: taken as the server's bytes."""

    name: str
    type: str
    shown: str
    dim: int = 0
    raw: bool = False

    @property
    def is_vector(self) -> bool:
        return self.type in _FLOATS

    @property
    def select(self) -> str:
        """Appended to the column where it is selected: what has no Arrow type of its own comes as text."""
        return "" if self.raw or self.is_vector or self.type in _DECODE else "::text"

    def field(self) -> pa.Field:
        return pa.field(self.name, arrow_type(self), metadata={PG_TYPE: self.shown.encode()})


def _whole(cells: Cells) -> pa.Array:
    return pa.array([None if c is None else int.from_bytes(c, "big", signed=True) for c in cells], pa.int64())


def _floats(cells: Cells) -> pa.Array:
    form = {4: ">f", 8: ">d"}
    return pa.array([None if c is None else struct.unpack(form[len(c)], c)[0] for c in cells], pa.float64())


def _times(kind: pa.DataType) -> Callable[[Cells], pa.Array]:
    edges = {2**63 - 1: None, -(2**63): None}  # infinity has no place in Arrow

    def decoded(cells: Cells) -> pa.Array:
        numbers = [None if c is None else int.from_bytes(c, "big", signed=True) for c in cells]
        return pa.array([None if n is None or n in edges else n + _EPOCH for n in numbers], pa.int64()).cast(kind)

    return decoded


def _texts(cells: Cells) -> pa.Array:
    return pa.array([None if c is None else c.decode() for c in cells], pa.string())


_DECODE: dict[str, tuple[pa.DataType, Callable[[Cells], pa.Array]]] = {
    "int2": (pa.int64(), _whole),
    "int4": (pa.int64(), _whole),
    "int8": (pa.int64(), _whole),
    "float4": (pa.float64(), _floats),
    "float8": (pa.float64(), _floats),
    "bool": (pa.bool_(), lambda cells: pa.array([None if c is None else c != b"\0" for c in cells], pa.bool_())),
    "text": (pa.string(), _texts),
    "varchar": (pa.string(), _texts),
    "uuid": (pa.string(), lambda cells: pa.array([None if c is None else str(uuid.UUID(bytes=c)) for c in cells])),
    "bytea": (pa.binary(), lambda cells: pa.array(cells, pa.binary())),
    "timestamp": (pa.timestamp("us"), _times(pa.timestamp("us"))),
    "timestamptz": (pa.timestamp("us", "UTC"), _times(pa.timestamp("us", "UTC"))),
}


def arrow_type(column: Column) -> pa.DataType:
    """What a column is in Arrow: vectors of a known length fixed-size lists, else lists; raw ones binary."""
    if column.is_vector:
        value = pa.from_numpy_dtype(_FLOATS[column.type][1])
        return pa.list_(value, column.dim) if column.dim else pa.list_(value)
    if column.raw:
        return pa.binary()
    return _DECODE.get(column.type, (pa.string(), _texts))[0]


def decode(stream: bytes, columns: Sequence[Column]) -> pa.RecordBatch:
    """The rows of a whole COPY stream."""
    schema = pa.schema([column.field() for column in columns])
    quick = _decode_block(stream, columns)
    if quick is not None:
        return pa.RecordBatch.from_arrays(quick, schema=schema)
    cells = _cells(stream, len(columns))
    arrays = []
    for column, some in zip(columns, cells, strict=True):
        if column.is_vector:
            arrays.append(_vectors(column, some))
        elif column.raw:
            arrays.append(pa.array(some, pa.binary()))
        else:
            arrays.append(_DECODE.get(column.type, (pa.string(), _texts))[1](some))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _decode_block(stream: bytes, columns: Sequence[Column]) -> list[pa.Array] | None:
    """Rows of integers and of vectors of one length have one size: read as a block. None where they have not."""
    fields: list[tuple[str, Any] | tuple[str, Any, tuple[int]]] = [("n", ">i2")]
    sizes: dict[str, int] = {}
    for i, column in enumerate(columns):
        if column.type in _INTS and not column.raw:
            sizes[f"s{i}"] = _INTS[column.type]
            fields += [(f"s{i}", ">i4"), (f"v{i}", f">i{_INTS[column.type]}")]
        elif column.is_vector and column.dim:
            kind = np.dtype(_FLOATS[column.type][0])
            sizes[f"s{i}"] = 4 + column.dim * kind.itemsize
            fields += [(f"s{i}", ">i4"), (f"h{i}", ">i4"), (f"v{i}", kind, (column.dim,))]
        else:
            return None
    record = np.dtype(fields)
    rows, rest = divmod(len(stream) - len(HEADER) - len(END), record.itemsize)
    if rest or rows < 0:
        return None
    block = np.frombuffer(stream, record, rows, len(HEADER))
    if (block["n"] != len(columns)).any() or any((block[name] != size).any() for name, size in sizes.items()):
        return None
    arrays = []
    for i, column in enumerate(columns):
        values = block[f"v{i}"]
        if column.is_vector:
            flat = np.ascontiguousarray(values, _FLOATS[column.type][1]).reshape(-1)
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), type=arrow_type(column)))
        else:
            arrays.append(pa.array(values.astype(np.int64)))
    return arrays


def _cells(stream: bytes, columns: int) -> list[Cells]:
    """Each column's fields, as bytes."""
    found: list[Cells] = [[] for _ in range(columns)]
    at, size_of, count_of = len(HEADER), struct.Struct(">i").unpack_from, struct.Struct(">h").unpack_from
    while count_of(stream, at)[0] == columns:
        at += 2
        for cells in found:
            (size,) = size_of(stream, at)
            at += 4
            cells.append(None if size < 0 else stream[at : at + size])
            at += max(0, size)
    return found


def _vectors(column: Column, cells: Cells) -> pa.Array:
    big, native = _FLOATS[column.type]
    rows = [None if c is None else np.frombuffer(c, big, offset=4).astype(native) for c in cells]
    return pa.array(rows, arrow_type(column))


# ---- the other way ----
# What :func:`encode` can write, as format_type calls it; every other type is written as it came, or becomes text.
_ENCODED = (
    *(
        "smallint",
        "integer",
        "bigint",
        "real",
        "double precision",
        "boolean",
        "text",
        "character varying",
        "uuid",
        "json",
    ),
    *("jsonb", "timestamp without time zone", "timestamp with time zone", "vector", "halfvec"),
)


def pg_type_of(entry: pa.Field) -> str:
    """The server's type for an Arrow column: what it came from, or the nearest that has every value."""
    metadata = entry.metadata or {}
    came_as = metadata.get(PG_TYPE, b"").decode()
    if came_as and (pa.types.is_binary(entry.type) or came_as.split("(")[0] in _ENCODED):
        return str(came_as)
    if b"fct.json" in metadata:
        return "jsonb"
    kind = entry.type
    if pa.types.is_integer(kind):
        return "bigint"
    if pa.types.is_floating(kind):
        return "double precision"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_timestamp(kind):
        return "timestamptz" if kind.tz else "timestamp"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return "bytea"
    return "jsonb" if pa.types.is_nested(kind) else "text"


def encode(arrays: Sequence[pa.Array], types: Sequence[str], raw: Sequence[bool]) -> bytes:
    """Rows as COPY has them, without header and end. types: the server's names (int8, text, vector, jsonb, ...)."""
    quick = _encode_block(arrays, types)
    if quick is not None:
        return quick
    cells = [_encoded(array, kind, plain) for array, kind, plain in zip(arrays, types, raw, strict=True)]
    count, size = struct.pack(">h", len(cells)), struct.Struct(">i").pack
    null = size(-1)
    parts: list[bytes] = []
    for row in zip(*cells, strict=True):
        parts.append(count)
        for cell in row:
            parts += (null,) if cell is None else (size(len(cell)), cell)
    return b"".join(parts)


def _encode_block(arrays: Sequence[pa.Array], types: Sequence[str]) -> bytes | None:
    rows = len(arrays[0])
    fields: list[Any] = [("n", ">i2")]
    blocks: JsonDict = {"n": len(arrays)}
    for i, (array, kind) in enumerate(zip(arrays, types, strict=True)):
        if array.null_count:
            return None
        if kind in _INTS and pa.types.is_integer(array.type):
            values = array.to_numpy()
            if len(values) and (
                int(values.max()).bit_length() > 8 * _INTS[kind] - 1
                or int(values.min()).bit_length() > 8 * _INTS[kind] - 1
            ):
                return None
            fields += [(f"s{i}", ">i4"), (f"v{i}", f">i{_INTS[kind]}")]
            blocks |= {f"s{i}": _INTS[kind], f"v{i}": values}
        elif kind in _FLOATS and pa.types.is_fixed_size_list(array.type):
            d, big = array.type.list_size, np.dtype(_FLOATS[kind][0])
            fields += [(f"s{i}", ">i4"), (f"d{i}", ">i2"), (f"z{i}", ">i2"), (f"v{i}", big, (d,))]
            blocks |= {f"s{i}": 4 + d * big.itemsize, f"d{i}": d, f"v{i}": array.flatten().to_numpy().reshape(rows, d)}
        else:
            return None
    record = np.zeros(rows, fields)
    for name, values in blocks.items():
        record[name] = values
    return record.tobytes()


def _encoded(array: pa.Array, kind: str, raw: bool) -> Cells:
    if raw:
        return list(array.to_pylist())
    if kind in _FLOATS:
        big = _FLOATS[kind][0]
        rows = [None if row is None else np.asarray(row, big) for row in array.to_pylist()]
        return [None if row is None else struct.pack(">hh", len(row), 0) + row.tobytes() for row in rows]
    return [None if value is None else _cell(value, kind) for value in _plain(array, kind)]


def _plain(array: pa.Array, kind: str) -> list[object]:
    if pa.types.is_timestamp(array.type):
        return [
            None if v is None else v - _EPOCH
            for v in array.cast(pa.timestamp("us", array.type.tz)).cast(pa.int64()).to_pylist()
        ]
    return list(array.to_pylist())


def _cell(value: Any, kind: str) -> bytes:
    if kind in _INTS:
        return int(value).to_bytes(_INTS[kind], "big", signed=True)
    if kind in ("float4", "float8"):
        return struct.pack(">f" if kind == "float4" else ">d", value)
    if kind == "bool":
        return b"\1" if value else b"\0"
    if kind in ("timestamp", "timestamptz"):
        return struct.pack(">q", value)
    if kind == "uuid":
        return uuid.UUID(str(value)).bytes
    if kind == "bytea":
        return bytes(value)
    nested = isinstance(value, (list, dict)) or (kind in ("json", "jsonb") and not isinstance(value, str))
    text = _json(value) if nested else str(value)
    return (b"\1" if kind == "jsonb" else b"") + text.encode()


def _json(value: object) -> str:
    import json

    return json.dumps(value, default=str)

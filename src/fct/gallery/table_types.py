"""Columns as tables of a log hold them: Delta and Iceberg know fewer types than Arrow, and fewer names.

Nothing is lost: a type that has no place becomes the narrowest one that holds all its values (uint32: int64; uint64:
decimal(20, 0); half floats: float32; dictionaries: their values), and what has none is refused before anything is
written. Times finer than microseconds are refused where a value has such a part.
"""

from __future__ import annotations

import pyarrow as pa

from fct.errors import FctError
from fct.gallery.schemas import conform

__all__ = ["check_names", "in_table", "table_schema"]

_FORBIDDEN = " ,;{}()\n\t="  # in a Delta table without column mapping
_SIGNED = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.decimal128(20, 0)}
_DIGITS = 38


def table_schema(schema: pa.Schema, table: str, *, times: bool) -> pa.Schema:
    """The columns as they are stored; all may be null, and the metadata stays.

    table: names the table in a message. times: whether it holds times of day.

    Raises:
        FctError: a type that such a table has no place for.
    """
    fields = []
    for entry in schema:
        kind = _stored(entry.type, times)
        if kind is None:
            raise FctError(
                f"destination: expected columns that {table} can hold, {entry.name!r} is {entry.type}: write the "
                "source once with another type, or without it"
            )
        fields.append(pa.field(entry.name, kind))
    return pa.schema(fields, metadata=schema.metadata)


def check_names(schema: pa.Schema, table: str, *, forbidden: str = _FORBIDDEN) -> None:
    """Raises FctError for names of columns that such a table does not take: two that differ in case alone, too."""
    for name in schema.names:
        if not name or any(c in forbidden for c in name):
            raise FctError(
                f"destination: expected names of columns without any of {forbidden!r}, as {table} wants them, got "
                f"{name!r}"
            )
    lower = [name.lower() for name in schema.names]
    twice = next((name for name in schema.names if lower.count(name.lower()) > 1), None)
    if twice is not None:
        others = [name for name in schema.names if name.lower() == twice.lower()]
        raise FctError(f"destination: expected columns that {table} tells apart, got {' and '.join(map(repr, others))}")


def in_table(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch under :func:`table_schema` of its own schema.

    Raises:
        FctError: a time with a part finer than a microsecond.
    """
    try:
        found = conform(batch, schema)
        # Under the schema itself: fields of other tables carry metadata, such as Iceberg's numbers of columns.
        return pa.RecordBatch.from_arrays(found.columns, schema=schema)
    except pa.ArrowInvalid as error:
        raise FctError(f"destination: expected times in whole microseconds, which the table holds: {error}") from error


def _stored(kind: pa.DataType, times: bool) -> pa.DataType | None:
    """The type that stands for ``kind``; None where there is none."""
    if isinstance(kind, pa.BaseExtensionType):
        return _stored(kind.storage_type, times)
    if pa.types.is_dictionary(kind):
        return _stored(kind.value_type, times)
    if kind in _SIGNED:
        return _SIGNED[kind]
    if pa.types.is_nested(kind):
        return _nested(kind, times)
    if pa.types.is_temporal(kind):
        return _temporal(kind, times)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if _is_bytes(kind):
        return pa.binary()
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_decimal(kind):
        return pa.decimal128(kind.precision, kind.scale) if kind.precision <= _DIGITS and kind.scale >= 0 else None
    if pa.types.is_float16(kind):
        return pa.float32()
    plain = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return kind if plain else None


def _is_bytes(kind: pa.DataType) -> bool:
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return bool(binary or pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind))


def _temporal(kind: pa.DataType, times: bool) -> pa.DataType | None:
    if pa.types.is_date(kind):
        return pa.date32()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", None if kind.tz is None else "UTC")
    return pa.time64("us") if times and pa.types.is_time(kind) else None


def _nested(kind: pa.DataType, times: bool) -> pa.DataType | None:
    if pa.types.is_struct(kind):
        fields = [(kind.field(i).name, _stored(kind.field(i).type, times)) for i in range(kind.num_fields)]
        return None if not fields or any(k is None for _, k in fields) else pa.struct(fields)
    if pa.types.is_map(kind):
        key, value = _stored(kind.key_type, times), _stored(kind.item_type, times)
        return None if key is None or value is None else pa.map_(key, value)
    element = _stored(kind.value_type, times) if hasattr(kind, "value_type") else None
    if element is None or pa.types.is_union(kind):
        return None
    return pa.list_(element, kind.list_size if pa.types.is_fixed_size_list(kind) else -1)

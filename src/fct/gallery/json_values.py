"""Arrow columns as values that JSON can hold: the same value and meaning, or a refusal that names column and row."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, TypeAlias

import pyarrow as pa

from fct.gallery.schemas import without_views

__all__ = ["Json", "json_values", "lost_numbers", "plain_array", "text_of_times"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def plain_array(column: pa.Array) -> pa.Array:
    """The column in the one spelling of its type: no dictionary, no view, no extension but UUIDs."""
    if pa.types.is_dictionary(column.type):
        values = plain_array(column.dictionary)
        return values.take(column.indices)
    if isinstance(column, pa.ExtensionArray) and not _is_uuid(column.type):
        return plain_array(column.storage)
    if pa.types.is_string_view(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.string()) if column.nbytes < 1 << 31 else column.cast(pa.large_string())
    if pa.types.is_binary_view(column.type):
        return column.cast(pa.large_binary())
    return without_views(column)


def _is_uuid(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.uuid"


def json_values(column: pa.Array, name: str, first: int, hollow: Counter[str]) -> list[Json]:
    """The column's values, one for each row.

    Dates, times and timestamps become ISO 8601 text with all their digits, durations and intervals its durations,
    decimals and UUIDs text; a map of text keys becomes an object, another one a list of pairs.

    Args:
        column: of any type. name: for messages. first: the number of its first row, likewise.
        hollow: counts, by ``name``, the floats that JSON has no number for (NaN, infinities) and that became null.

    Raises:
        ValueError: bytes, or a time outside the years that can be written.
    """
    column = plain_array(column)
    kind = column.type
    if pa.types.is_null(kind):
        return [None] * len(column)
    if pa.types.is_floating(kind):
        return [_finite(value, name, hollow) for value in column.to_pylist()]
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or _is_text(kind):
        return list(column.to_pylist())
    if pa.types.is_decimal(kind):
        return [None if value is None else format(value, "f") for value in column.to_pylist()]
    if _is_uuid(kind):
        return [None if value is None else str(value) for value in column.to_pylist()]
    if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind):
        return list(text_of_times(column, name, first).to_pylist())
    if pa.types.is_duration(kind):
        digits = {"s": 0, "ms": 3, "us": 6, "ns": 9}[kind.unit]
        return [None if v is None else _duration(v, digits) for v in column.cast(pa.int64()).to_pylist()]
    if pa.types.is_interval(kind):
        return [None if v is None else _interval(v) for v in column.to_pylist()]
    if pa.types.is_struct(kind):
        return _objects(column, name, first, hollow)
    if pa.types.is_map(kind) or _is_list(kind):
        return _lists(column, name, first, hollow)
    raise ValueError(
        f"payload: column {name!r} is {kind}, which JSON cannot hold: make it text before, or leave that column out"
    )


def lost_numbers(hollow: Counter[str]) -> list[str]:
    """What became null by :func:`json_values`, a sentence for each column."""
    return [
        f"payload: {count} {'value' if count == 1 else 'values'} of {name!r} that are NaN or infinite became null: "
        "JSON has no number for them"
        for name, count in sorted(hollow.items())
    ]


def text_of_times(column: pa.Array, name: str, first: int) -> pa.Array:
    """Dates, times and timestamps as ISO 8601, with the digits of their unit and the offset of their zone."""
    import pyarrow.compute as pc

    text = column.cast(pa.string())
    if pa.types.is_timestamp(column.type):
        text = pc.replace_substring_regex(pc.replace_substring(text, " ", "T"), r"([+-]\d\d)(\d\d)$", r"\1:\2")
    wrong = pc.fill_null(pc.match_substring(text, "<value"), False)
    early = pc.fill_null(pc.match_substring_regex(text, r"^(-|0000|\d{5})"), False)
    both = pc.or_(wrong, early)
    if pc.any(both).as_py():
        row = pc.index(both, True).as_py()
        raise ValueError(
            f"payload: column {name!r}: row {first + row} holds a time outside the years 1 to 9999 "
            f"({column.cast(pa.int64() if column.type.bit_width == 64 else pa.int32())[row].as_py()} {column.type}), "
            "which ISO 8601 has no text for"
        )
    return text


def _finite(value: float | None, name: str, hollow: Counter[str]) -> float | None:
    if value is None or math.isfinite(value):
        return value
    hollow[name] += 1
    return None


def _duration(value: int, digits: int) -> str:
    sign, value = ("-" if value < 0 else ""), abs(value)
    whole, rest = divmod(value, 10**digits)
    return f"{sign}PT{whole}{f'.{rest:0{digits}d}'.rstrip('0') if rest else ''}S"


def _interval(value: pa.MonthDayNano) -> str:
    return f"P{value.months}M{value.days}D" + _duration(value.nanoseconds, 9).replace("PT", "T").replace("-T", "T-")


def _objects(column: pa.Array, name: str, first: int, hollow: Counter[str]) -> list[Json]:
    names = [column.type.field(i).name for i in range(column.type.num_fields)]
    if len(set(names)) < len(names):
        raise ValueError(f"payload: column {name!r} is {column.type}, with two fields of one name")
    fields = [json_values(part, f"{name}.{n}", first, hollow) for n, part in zip(names, column.flatten(), strict=True)]
    valid = column.is_valid().to_pylist()
    if not names:
        return [{} if ok else None for ok in valid]
    return [
        dict(zip(names, row, strict=True)) if ok else None
        for ok, row in zip(valid, zip(*fields, strict=True), strict=True)
    ]


def _lists(column: pa.Array, name: str, first: int, hollow: Counter[str]) -> list[Json]:
    """Lists of all kinds and maps, which are lists of pairs."""
    if pa.types.is_map(column.type):
        keys, items, lengths = _pairs(column)
        both = (json_values(part, name, first, hollow) for part in (keys, items))
        cells: list[Any] = list(zip(*both, strict=True))
    else:
        lengths = column.value_lengths().to_pylist()
        if pa.types.is_fixed_size_list(column.type):
            lengths = [n if ok else None for n, ok in zip(lengths, column.is_valid().to_pylist(), strict=True)]
        cells = json_values(column.flatten(), name, first, hollow)
    found: list[Json] = []
    at = 0
    for length in lengths:
        if length is None:
            found.append(None)
            continue
        part = cells[at : at + length]
        at += length
        if not pa.types.is_map(column.type):
            found.append(part)
        elif all(isinstance(key, str) for key, _ in part) and len({key for key, _ in part}) == len(part):
            found.append(dict(part))
        else:
            found.append([list(pair) for pair in part])
    return found


def _pairs(column: pa.Array) -> tuple[pa.Array, pa.Array, list[int | None]]:
    """(keys, values, how many of them each row has; None for null) of a map. Not by way of Python's values, whose
    times do not hold all of Arrow's."""
    ends = column.offsets.to_pylist()
    valid = column.is_valid().to_pylist()
    spans = [(a, b) if ok else (a, a) for a, b, ok in zip(ends, ends[1:], valid, strict=False)]
    at = pa.array([i for a, b in spans for i in range(a, b)], pa.int64())
    lengths = [b - a if ok else None for (a, b), ok in zip(spans, valid, strict=True)]
    return column.keys.take(at), column.items.take(at), lengths


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(
        t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind) or t.is_list_view(kind)
        or t.is_large_list_view(kind)
    )  # fmt: skip

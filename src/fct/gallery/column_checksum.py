"""A checksum of a column's values that does not depend on how its rows are cut into batches, nor on how Arrow spells
them: a string is the same in ``string``, ``large_string``, ``string_view`` and a dictionary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fct.types import Array, Int64s

__all__ = ["ColumnChecksum", "row_sizes"]

Update = Callable[[str, Array], None]  # (which stream, a contiguous array of bytes or numbers)


class Checksum(Protocol):
    """An empty digest, of bytes at an address."""

    def update(self, data: int, bytes: int) -> None: ...
    def digest(self) -> int: ...


class ColumnChecksum:
    """XXH64 over the rows of one column in their order: values, lengths and nulls each in a stream of their own.

    make: makes an empty digest with ``update(address, bytes)`` and ``digest()``.

    Examples:
        >>> import pyarrow as pa
        >>> from fct import _C
        >>> from fct.gallery.column_checksum import ColumnChecksum
        >>> one, two = ColumnChecksum(_C.Xxh64), ColumnChecksum(_C.Xxh64)
        >>> one.update(pa.array(["a", None, "bc"]))
        >>> for part in (["a"], [None, "bc"]):
        ...     two.update(pa.array(part, pa.large_string()))
        >>> one.hexdigest() == two.hexdigest()
        True
    """

    def __init__(self, make: Callable[[], Checksum]) -> None:
        self._make = make
        self._streams: dict[str, Checksum] = {}

    def update(self, column: pa.Array) -> None:
        """Adds the rows of an Arrow array."""
        _walk(column, "", self._add)

    def hexdigest(self) -> str:
        """16 hex digits; changes when a later :meth:`update` adds rows."""
        whole = self._make()
        for name in sorted(self._streams):
            text = np.frombuffer(f"{name}:{self._streams[name].digest():016x};".encode(), np.uint8)
            whole.update(int(text.ctypes.data), text.nbytes)
        return f"{whole.digest():016x}"

    def _add(self, stream: str, values: Array) -> None:
        values = np.ascontiguousarray(values)
        if values.nbytes:
            self._streams.setdefault(stream, self._make()).update(int(values.ctypes.data), values.nbytes)


def _walk(column: pa.Array, at: str, add: Update) -> None:
    column = _plain(column)
    kind = column.type
    if pa.types.is_null(kind):
        add(f"{at}?", np.zeros(len(column), np.uint8))
        return
    add(f"{at}?", _valid(column))
    if column.null_count:
        plain = _viewless(kind)  # Arrow takes no rows of lists and structs of views
        column = (column if plain.equals(kind) else column.cast(plain)).drop_null()
        kind = column.type
    if pa.types.is_boolean(kind):
        add(f"{at}=", np.asarray(column.to_numpy(zero_copy_only=False), np.uint8))
    elif pa.types.is_fixed_size_binary(kind) or _is_fixed(kind):
        width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else kind.bit_width // 8
        data = _bytes(column.buffers()[1])
        add(f"{at}=", data[column.offset * width : (column.offset + len(column)) * width])
    elif pa.types.is_large_binary(kind) or pa.types.is_large_string(kind):
        offsets = _offsets(column)
        add(f"{at}#", np.diff(offsets))
        add(f"{at}=", _bytes(column.buffers()[2])[offsets[0] : offsets[-1]])
    elif pa.types.is_struct(kind):
        for i, part in enumerate(column.flatten()):
            _walk(part, f"{at}.{kind.field(i).name}", add)
    elif pa.types.is_fixed_size_list(kind):
        add(f"{at}#", np.full(len(column), kind.list_size, np.int64))
        _walk(column.flatten(), f"{at}[]", add)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or _is_view_of_lists(kind):
        add(f"{at}#", pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64))
        _walk(column.flatten(), f"{at}[]", add)
    else:  # unions and what is to come: as Python writes their values
        for value in column:
            add(f"{at}=", np.frombuffer(f"{value.as_py()!r};".encode("utf-8", "surrogatepass"), np.uint8))


def _plain(column: pa.Array) -> pa.Array:
    """The column without what only says how it is stored: extensions, dictionaries, runs, views, maps, 32-bit sizes."""
    while True:
        kind = column.type
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        elif pa.types.is_dictionary(kind):
            column = column.dictionary_decode()
        elif pa.types.is_run_end_encoded(kind):
            column = pc.run_end_decode(column)
        elif pa.types.is_string(kind) or _named(kind, "string_view"):
            column = column.cast(pa.large_string())
        elif pa.types.is_binary(kind) or _named(kind, "binary_view"):
            column = column.cast(pa.large_binary())
        elif pa.types.is_map(kind):
            column = column.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)])))
        else:
            return column


def _viewless(kind: pa.DataType) -> pa.DataType:
    """A list's or struct's type with string and binary instead of their views, however deep."""
    if _named(kind, "string_view"):
        return pa.large_string()
    if _named(kind, "binary_view"):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pa.struct([f.with_type(_viewless(f.type)) for f in fields])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_field.with_type(_viewless(kind.value_type))
        if pa.types.is_fixed_size_list(kind):
            return pa.list_(inner, kind.list_size)
        return (pa.large_list if pa.types.is_large_list(kind) else pa.list_)(inner)
    return kind


def _named(kind: pa.DataType, name: str) -> bool:
    """Whether a type of newer Arrow versions; older ones have no test for it."""
    return str(kind).partition("<")[0] == name


def _is_view_of_lists(kind: pa.DataType) -> bool:
    return _named(kind, "list_view") or _named(kind, "large_list_view")


def _is_fixed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_primitive(kind) or pa.types.is_decimal(kind))


def _valid(column: pa.Array) -> Array:
    if not column.null_count:
        return np.ones(len(column), np.uint8)
    return np.asarray(column.is_valid().to_numpy(zero_copy_only=False), np.uint8)


def _bytes(buffer: pa.Buffer | None) -> Array:
    return np.frombuffer(buffer if buffer is not None else b"", np.uint8)


def _offsets(column: pa.Array) -> Int64s:
    ends = column.buffers()[1]
    if ends is None or not len(column):
        return np.zeros(len(column) + 1, np.int64)
    return np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1]


def row_sizes(batch: pa.RecordBatch) -> Int64s:
    """(n,) int64: bytes of each row, of values and lengths. A function of the rows alone, whatever batch they are in;
    a dictionary's entries, which its rows share, are not counted."""
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        sizes += np.diff(_ends(column, np.arange(len(column) + 1, dtype=np.int64)))
    return sizes


def _ends(column: pa.Array, at: Int64s) -> Int64s:
    """Bytes of the column's first ``at[i]`` entries."""
    if isinstance(column, pa.ExtensionArray):
        return _ends(column.storage, at)
    kind = column.type
    if pa.types.is_dictionary(kind):
        return at * int(kind.index_type.bit_width // 8)
    if pa.types.is_fixed_size_binary(kind):
        return at * int(kind.byte_width)
    if pa.types.is_null(kind) or _is_fixed(kind):
        return at * max(1, 0 if pa.types.is_null(kind) else int(kind.bit_width // 8))
    if pa.types.is_fixed_size_list(kind):
        child = column.values
        first = column.offset * kind.list_size
        return _ends(child, first + at * kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        offsets = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)[at]
        child = column.values if not pa.types.is_map(kind) else None
        inner = _ends(child, offsets) if child is not None else _map_ends(column, offsets)
        return inner + at * 4
    if pa.types.is_struct(kind):
        fields = column.flatten()
        sizes = np.zeros(len(at), np.int64)
        for part in fields:
            sizes += _ends(part, at)
        return sizes
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or _large(kind):
        return _lengths(pc.binary_length(column))[at] + at * 4
    if _named(kind, "string_view") or _named(kind, "binary_view"):
        return _ends(_plain(column), at)
    if _is_view_of_lists(kind):
        lengths = _lengths(pc.list_value_length(column))[at]
        return _ends(column.flatten(), lengths) + at * 4
    return at * 16  # runs and unions: by what a value usually takes


def _map_ends(column: pa.Array, at: Int64s) -> Int64s:
    return _ends(column.keys, at) + _ends(column.items, at)


def _large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(kind) or pa.types.is_large_binary(kind))


def _lengths(lengths: pa.Array) -> Int64s:
    return np.concatenate([[0], np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)])

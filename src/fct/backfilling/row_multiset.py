"""The rows of a table as a multiset: a sum that is the same in every order, and another where a row was lost, doubled,
or took a value of another row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fct.types import Array

__all__ = ["RowMultiset", "row_hashes"]

Hashes = npt.NDArray[np.uint64]
_ODD = np.uint64(0x9E3779B97F4A7C15)
_NULL = np.uint64(0xD1B54A32D192ED03)


class RowMultiset:
    """Counts rows and adds up their hashes, of whole rows and of each column.

    Examples:
        >>> import pyarrow as pa
        >>> from fct.backfilling.row_multiset import RowMultiset
        >>> one, two = RowMultiset(), RowMultiset()
        >>> one.add(pa.record_batch({"id": [1, 2], "text": ["a", "b"]}))
        >>> two.add(pa.record_batch({"id": [2, 1], "text": ["b", "a"]}))
        >>> one.differences(two)
        []
    """

    def __init__(self) -> None:
        self.rows = 0
        self._whole = np.uint64(0)
        self._columns: dict[str, np.uint64] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds rows; both sides of a comparison under one schema."""
        self.rows += batch.num_rows
        with np.errstate(over="ignore"):
            whole = np.zeros(batch.num_rows, np.uint64)
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                hashes = row_hashes(column)
                whole = _mixed(whole * _ODD + hashes)
                self._columns[name] = self._columns.get(name, np.uint64(0)) + hashes.sum(dtype=np.uint64)
            self._whole += whole.sum(dtype=np.uint64)

    def differences(self, other: RowMultiset) -> list[str]:
        """What is not the same, in words: the number of rows, columns, or only which values stand together."""
        if self.rows != other.rows:
            return [f"{self.rows:,} rows, {other.rows:,}"]
        names = [name for name, hashes in self._columns.items() if other._columns.get(name) != hashes]
        if names:
            return [f"other values in column {name!r}" for name in names]
        return [] if self._whole == other._whole else ["the same values, together in other rows"]


def row_hashes(column: pa.Array) -> Hashes:
    """(n,) a hash of each row's value, nulls too: of type and value, however rows are cut into batches."""
    with np.errstate(over="ignore"):
        return _hashes(column)


def _mixed(x: Hashes) -> Hashes:
    """splitmix64: every bit of a value in every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = x ^ (x >> np.uint64(31))
    return mixed


def _hashes(column: pa.Array) -> Hashes:
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    if pa.types.is_dictionary(kind):
        values = _hashes(column.dictionary)
        at = pc.fill_null(column.indices, 0).to_numpy(zero_copy_only=False)
        return _with_nulls(values[at] if len(values) else np.zeros(len(column), np.uint64), column)
    if pa.types.is_null(kind):
        return np.full(len(column), _NULL, np.uint64)
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
        kind = column.type
    if pa.types.is_struct(kind):
        found = np.full(len(column), np.uint64(kind.num_fields))
        for part in column.flatten():
            found = _mixed(found * _ODD + _hashes(part))
        return _with_nulls(found, column)
    if pa.types.is_map(kind):
        column = column.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)])))
        kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        return _with_nulls(_joined(_hashes(column.flatten()), lengths), column)
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_primitive(kind) or pa.types.is_decimal(kind):
        return _with_nulls(_of_width(column), column)
    if not (pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)):
        text = pa.types.is_string(kind) or str(kind) == "string_view"
        column = column.cast(pa.large_string() if text else pa.large_binary())
    column = pc.fill_null(column, "" if pa.types.is_large_string(column.type) else b"") if column.null_count else column
    ends = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]] if len(ends) else np.empty(0)
    return _joined(_mixed(data.astype(np.uint64) + _ODD), np.diff(ends)) if len(column) else np.empty(0, np.uint64)


def _with_nulls(found: Hashes, column: pa.Array) -> Hashes:
    if not column.null_count:
        return found
    valid = np.asarray(column.is_valid().to_numpy(zero_copy_only=False), bool)
    return np.where(valid, found, _NULL)


def _of_width(column: pa.Array) -> Hashes:
    """Of numbers, times, decimals and fixed-size bytes: their bytes as they lie."""
    kind = column.type
    width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else kind.bit_width // 8
    if column.buffers()[1] is None or not len(column):
        return np.zeros(len(column), np.uint64)
    data = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width : (column.offset + len(column)) * width]
    whole = np.zeros((len(column), -(-width // 8) * 8), np.uint8)
    whole[:, :width] = data.reshape(len(column), width)
    found = np.full(len(column), np.uint64(width))
    for words in whole.view("<u8").T:
        found = _mixed(found * _ODD + words.astype(np.uint64))
    return found


def _joined(parts: Hashes, lengths: Array) -> Hashes:
    """One hash for each run of parts: a polynomial of them, mixed with the run's length."""
    lengths = lengths.astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    place = np.arange(len(parts)) - np.repeat(starts, lengths)
    powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _ODD, np.uint64), dtype=np.uint64)
    found = np.zeros(len(lengths), np.uint64)
    some = lengths > 0
    if some.any():
        found[some] = np.add.reduceat(parts * powers[place], starts[some])
    return _mixed(found + lengths.astype(np.uint64) * _NULL)

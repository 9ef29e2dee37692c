"""Ids and payload of a source and its result, all rows of them: a checksum per column that runs along both and does not
depend on how either is cut into files, shards or batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fct import _C
from fct.backfilling.shard_reader import bounded
from fct.checks import shown
from fct.gallery.column_checksum import ColumnChecksum

__all__ = ["Compared", "compare_columns", "without_rows"]

_BLOCK_ROWS = 65536


@dataclass
class Compared:
    """rows: how many were compared. checksums: XXH64 of each column that is the same. problems: each in a sentence."""

    rows: int = 0
    checksums: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def without_rows(
    batches: Iterator[pa.RecordBatch], rejected: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> Iterator[pa.RecordBatch]:
    """The batches without the rows of these numbers, which are sorted."""
    first = 0
    for batch in batches:
        low, high = np.searchsorted(rejected, [first, first + batch.num_rows])
        if high > low:
            keep = np.ones(batch.num_rows, bool)
            keep[rejected[low:high] - first] = False
            first += batch.num_rows
            yield batch.filter(pa.array(keep))
        else:
            first += batch.num_rows
            yield batch


def compare_columns(
    source: Iterator[pa.RecordBatch], result: Iterator[pa.RecordBatch], columns: Sequence[str]
) -> Compared:
    """Compares two streams of the same columns, row by row, in bounded memory."""
    found, left = Compared(), list(columns)
    sums = {name: (ColumnChecksum(_C.Xxh64), ColumnChecksum(_C.Xxh64)) for name in columns}
    held: pa.RecordBatch | None = None
    for want in bounded(source, _BLOCK_ROWS, None):
        at = 0
        while at < want.num_rows:
            held = held if held is not None and held.num_rows else next((b for b in result if b.num_rows), None)
            if held is None:
                found.problems.append(f"the result ends after {found.rows} rows, the source goes on")
                return found
            rows = min(held.num_rows, want.num_rows - at)
            left = _compare(want.slice(at, rows), held.slice(0, rows), left, sums, found)
            held, at, found.rows = held.slice(rows), at + rows, found.rows + rows
    if (held is not None and held.num_rows) or any(b.num_rows for b in result):
        found.problems.append(f"the result has rows behind the source's {found.rows}")
    found.checksums = {name: sums[name][0].hexdigest() for name in left}
    return found


def _compare(
    want: pa.RecordBatch,
    got: pa.RecordBatch,
    columns: list[str],
    sums: dict[str, tuple[ColumnChecksum, ColumnChecksum]],
    found: Compared,
) -> list[str]:
    """The columns that are still the same; the others are said once, with the first row that differs."""
    same = []
    for name in columns:
        there, here = got.column(name), want.column(name)
        try:
            here = here if here.type.equals(there.type) else _spelled(here, there.type)
        except (pa.ArrowException, ValueError) as error:
            found.problems.append(f"column {name!r}: the source has {here.type}, the result {there.type}: {error}")
            continue
        sums[name][0].update(here)
        sums[name][1].update(there)
        if sums[name][0].hexdigest() == sums[name][1].hexdigest():
            same.append(name)
            continue
        row = _first_difference(here, there)
        values = f"{_value(here, row)} in the source, {_value(there, row)} here"
        found.problems.append(f"column {name!r} differs from the source's, first in row {found.rows + row}: {values}")
    return same


def _spelled(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """The column as the result spells it."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return column if column.type.equals(kind) else pc.cast(column, kind)


def _first_difference(a: pa.Array, b: pa.Array) -> int:
    low, high = 0, len(a)  # the first ``low`` rows are the same, the first ``high`` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _digest(a[:middle]) == _digest(b[:middle]) else (low, middle)
    return low


def _digest(column: pa.Array) -> str:
    whole = ColumnChecksum(_C.Xxh64)
    whole.update(column)
    return whole.hexdigest()


def _value(column: pa.Array, row: int) -> str:
    try:
        return shown(column[row].as_py())
    except (ValueError, OverflowError, pa.ArrowException):
        return str(column[row].type)

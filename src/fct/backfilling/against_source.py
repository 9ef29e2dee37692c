"""A new gallery against its source, which is read again by another way: every row counted, ids and payload compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fct.backfilling.compare_columns import compare_columns, without_rows
from fct.backfilling.job import Job
from fct.backfilling.journal import Journal, rejected_rows, shard_marker
from fct.backfilling.second_reader import columns_of_file, second_reader
from fct.errors import FctError
from fct.gallery.interfaces import Source
from fct.gallery.matrix_files import ROW

__all__ = ["AgainstSource", "compare_with_source"]

_BATCH_ROWS = 8192
_MATRICES = ("npy", "bin")


@dataclass
class AgainstSource:
    """rows: of the source, by another reader's count; None where there is none. compared: rows whose ids and payload
    were compared; checksums: of each column that is the same. unproven: what could not be."""

    rows: int | None = None
    compared: int = 0
    checksums: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)


def compare_with_source(journal: Journal, job: Job, source: Source, result: Source) -> AgainstSource:
    """Counts and compares; the journal has been checked before."""
    found = AgainstSource()
    other = second_reader(source)
    if other is None:
        found.unproven.append(f"{source.url} has no second reader: its rows were counted and read by fct's own alone")
        counts = {piece.name: piece.rows for piece in source.pieces()}
    else:
        try:
            counts = other.counts()
        except FctError as error:
            found.problems.append(str(error))
            return found
        found.rows = sum(counts.values())
    known = {piece.name: piece.rows for piece in job.pieces}
    for name in [n for n in sorted(known.keys() | counts.keys()) if known.get(n) != counts.get(n)][:20]:
        have, read = counts.get(name), known.get(name)
        what = "is not in the source" if have is None else f"has {have:,} rows in the source"
        found.problems.append(f"{name} {what}, {'none of them was' if read is None else f'{read:,} were'} read")
    if found.problems:
        return found
    columns = [n for n in source.schema.names if n != job.vector and (n != job.side_column or job.keep_side)]
    _compare(found, journal, job, source, other, result, columns)
    return found


def _compare(
    found: AgainstSource, journal: Journal, job: Job, source: Source, other: Any, result: Source, columns: list[str]
) -> None:
    names = [piece.name for piece in job.pieces]
    if other is not None and job.pieces and source.kind not in _MATRICES:
        stream = other.columns(names, columns)
    else:
        stream = _own(source, job, columns)
    gone = [row for shard in job.shards for row in rejected_rows(journal, shard)]
    if not columns:
        # Row numbers alone: a result that writes them down names exactly the rows that were not rejected.
        columns, stream = [ROW], _numbers(job)
    want = without_rows(stream, np.asarray(gone, np.int64))
    got, have = _result(journal, job, result, columns)
    missing = [name for name in columns if name not in have and name != ROW]
    found.problems += [f"column {name!r} of the source is not in the result" for name in missing]
    shared = [name for name in columns if name in have]
    if not shared:
        return
    compared = compare_columns(_only(want, shared), _only(got, shared), shared)
    found.compared, found.checksums = compared.rows, compared.checksums
    found.problems += compared.problems


def _own(source: Source, job: Job, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    now = {piece.name: piece for piece in source.pieces()}
    for piece in job.pieces:
        for batch in source.read(now[piece.name], 0, piece.rows, _BATCH_ROWS):
            yield batch.select(list(columns))


def _numbers(job: Job) -> Iterator[pa.RecordBatch]:
    for first in range(0, job.rows, _BATCH_ROWS):
        yield pa.record_batch([pa.array(np.arange(first, min(first + _BATCH_ROWS, job.rows)))], [ROW])


def _only(batches: Iterator[pa.RecordBatch], columns: list[str]) -> Iterator[pa.RecordBatch]:
    return (batch.select(columns) for batch in batches)


def _result(
    journal: Journal, job: Job, result: Source, columns: list[str]
) -> tuple[Iterator[pa.RecordBatch], Sequence[str]]:
    """(the result's rows in the source's order, the columns that it has)."""
    if job.format in ("parquet", "arrow"):
        return _files(journal, job, columns), result.schema.names
    if job.format in _MATRICES:
        first = next((o for o in shard_marker(journal, 0).outputs if o.name.startswith("_rows/")), None)
        if first is None:  # row numbers are written beside shards with rejects alone
            return iter(()), ()
        have = pq.read_schema(journal.place(first).open()).names
        return _files(journal, job, columns), have if columns != [ROW] else ()
    other = second_reader(result)
    stream = _all_of(result, columns) if other is None else other.columns([], columns)
    return stream, result.schema.names


def _all_of(result: Source, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for piece in result.pieces():
        for batch in result.read(piece, 0, piece.rows, _BATCH_ROWS):
            yield batch.select([n for n in columns if n in batch.schema.names])


def _files(journal: Journal, job: Job, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """By the files that each shard's marker names: whatever else lies there is somebody else's."""
    for number in range(len(job.shards)):
        for output in shard_marker(journal, number).outputs:
            if output.name.startswith("_rows/"):
                yield from columns_of_file("parquet", journal.place(output), columns)
            elif job.format not in _MATRICES:
                yield from columns_of_file(job.format, journal.place(output), columns)

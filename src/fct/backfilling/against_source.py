"""A new gallery against its source, which is read again by another way: every row counted, ids and payload compared,
and what was mapped held against what is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fct.artifact.transformation import Transformation
from fct.backfilling.compare_columns import compare_columns
from fct.backfilling.in_database import DatabaseResult, in_one_spelling, is_json
from fct.backfilling.job import Job
from fct.backfilling.journal import Journal, shard_marker
from fct.backfilling.row_multiset import RowMultiset
from fct.backfilling.row_reader import OwnReader, RowReader, WholeReader
from fct.backfilling.second_databases import DatabaseReader
from fct.backfilling.second_files import columns_of_file
from fct.backfilling.second_reader import second_reader
from fct.backfilling.side_join import JoinedSide
from fct.backfilling.source_walk import SourceWalk
from fct.errors import FctError, MissingExtraError
from fct.gallery.delta_table import DeltaSource
from fct.gallery.interfaces import Source
from fct.gallery.matrix_files import ROW
from fct.gallery.saved_dataset import SavedDatasetSource
from fct.gallery.schemas import conform

__all__ = ["AgainstSource", "compare_with_source"]

_MATRICES = ("npy", "bin")
_SAID = 20  # problems of one kind that are listed


@dataclass
class AgainstSource:
    """rows: of the source, by another reader's count; None where there is none. compared: rows whose ids and payload
    were compared; checksums: of each column that is the same. mapped: rows that are what the markers' checksums say was
    mapped, by another reader. unproven: what could not be checked."""

    rows: int | None = None
    compared: int = 0
    mapped: int = 0
    checksums: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)


def compare_with_source(
    journal: Journal,
    job: Job,
    source: Source,
    result: Source | DatabaseResult,
    *,
    side: Source | None = None,
    h: Transformation | None = None,
    lists: Path | None = None,
) -> AgainstSource:
    """Counts and compares; the journal has been checked before.

    side: the gallery of the side-information, in the source's order. h: the job's; without it what was mapped is not
    held against the markers. lists: the folder of a database's lists of ids.
    """
    found = AgainstSource()
    other = _other_reader(source, found, lists)
    whole = _all_rows(other, source, found) if isinstance(other, WholeReader) else None
    reader: RowReader = OwnReader(source) if other is None or isinstance(other, WholeReader) else other
    if (counts := _counts(reader, found)) is None:
        return found
    if other is reader:
        found.rows = sum(counts.values())
    _count(found, job, counts)
    if whole is not None and whole.rows != job.rows:
        found.problems.append(
            f"{source.url} has {whole.rows:,} rows by {other.by if other else ''}, {job.rows:,} were read"
        )
    if found.problems:
        return found
    beside = None if side is None else _side_reader(found, job, side)
    if found.problems:
        return found
    walk = SourceWalk(journal, job, source, reader, h, beside)
    if isinstance(reader, DatabaseReader) and reader.gone:
        _gone(found, walk, reader, isinstance(result, DatabaseResult))
        if found.problems:
            return found
    if whole is not None:
        walk.seen = RowMultiset()
    _compare(found, journal, job, source, walk, result)
    found.problems += walk.problems
    found.mapped = walk.proven if other is not None else 0
    if whole is not None and walk.seen is not None and not found.problems:
        found.problems += [
            f"{source.url} by {other.by if other else ''} and by fct's own reader: {what}"
            for what in whole.differences(walk.seen)
        ]
    return found


def _counts(reader: RowReader, found: AgainstSource) -> dict[str, int] | None:
    """Rows of each file; None where the reader cannot say, which is a problem then."""
    try:
        return reader.counts()
    except MissingExtraError:
        raise
    except FctError as error:
        found.problems.append(str(error))
        return None


def _other_reader(source: Source, found: AgainstSource, lists: Path | None) -> RowReader | WholeReader | None:
    why = "a source class of one's own has none"
    try:
        other = second_reader(source, lists)
    except MissingExtraError as error:
        other, why = None, str(error)
    if other is None:
        found.unproven.append(
            f"not proven by a second reader: the rows of {source.url}, which were counted and read by fct's own alone: "
            f"{why}"
        )
    return other


def _side_reader(found: AgainstSource, job: Job, side: Source) -> tuple[RowReader, Source]:
    """What reads the side-information, which stands in the source's order: fct's own where it was joined by id."""
    own = OwnReader(side)
    if isinstance(side, JoinedSide):
        return own, side
    other = _other_reader(side, found, None)
    if not isinstance(other, RowReader):
        return own, side
    counts = other.counts()
    wrong = [piece.name for piece in job.side_pieces if counts.get(piece.name) != piece.rows]
    found.problems += [
        f"side-information {name}: {counts.get(name, 'none')} rows by {other.by}, others were read"
        for name in wrong[:_SAID]
    ]
    return other, side


def _all_rows(reader: WholeReader, source: Source, found: AgainstSource) -> RowMultiset:
    whole = RowMultiset()
    for batch in reader.read(source.schema.names):
        whole.add(conform(batch, source.schema))
    found.rows = whole.rows
    return whole


def _count(found: AgainstSource, job: Job, counts: dict[str, int]) -> None:
    known = {piece.name: piece.rows for piece in job.pieces}
    for name in [n for n in sorted(known.keys() | counts.keys()) if known.get(n) != counts.get(n)][:_SAID]:
        have, read = counts.get(name), known.get(name)
        what = "is not in the source" if have is None else f"has {have:,} rows in the source"
        found.problems.append(f"{name} {what}, {'none of them was' if read is None else f'{read:,} were'} read")


def _gone(found: AgainstSource, walk: SourceWalk, reader: DatabaseReader, by_id: bool) -> None:
    """Rows that were read and are in the database no longer: left out where they are gone from the result as well."""
    lost = walk.lose(reader)
    if not lost:
        return
    what = f"{len(lost):,} rows that were read are in the source no longer (first {min(map(str, lost))})"
    if by_id:
        found.unproven.append(f"not proven: {what}")
    else:
        found.problems.append(f"{what}: what was made of them cannot be compared")


def _compare(
    found: AgainstSource, journal: Journal, job: Job, source: Source, walk: SourceWalk, result: Source | DatabaseResult
) -> None:
    columns = [n for n in source.schema.names if n != job.vector and (n != job.side_column or job.keep_side)]
    if isinstance(result, DatabaseResult):
        columns = result.columns(columns)
        want, got = result.beside(_only(iter(walk), source.schema.names), columns)
        shared = columns
    else:
        if not columns:
            # Row numbers alone: a result that writes them down names exactly the rows that were not rejected.
            columns = [ROW]
        got, have = _result(journal, job, result, columns)
        missing = [name for name in columns if name not in have and name != ROW]
        found.problems += [f"column {name!r} of the source is not in the result" for name in missing]
        shared = [name for name in columns if name in have]
        want = _only(iter(walk), shared)
        texts = [name for name in shared if name in source.schema.names and is_json(source.schema.field(name))]
        want, got = in_one_spelling(want, texts), in_one_spelling(got, texts)
    if not shared:
        for _ in walk:
            continue
        return
    compared = compare_columns(want, _only(got, shared), shared)
    found.compared, found.checksums = compared.rows, compared.checksums
    found.problems += compared.problems
    if isinstance(result, DeltaSource) and not found.problems:
        found.problems += _by_its_log(result)
    if isinstance(result, DatabaseResult) and not result.same_location and not found.problems:
        there = result.count()
        if there != compared.rows:
            found.problems.append(f"expected {compared.rows:,} rows, {result.source.url} counts {there:,}")


def _by_its_log(result: Source) -> list[str]:
    """Whether fct's own reader, by which a new table's rows were compared, reads what the table's library does."""
    other, own, seen = second_reader(result), OwnReader(result), RowMultiset()
    if not isinstance(other, WholeReader):
        return []
    for name in own.counts():
        for batch in own.read(name, result.schema.names):
            seen.add(batch)
    whole = RowMultiset()
    for batch in other.read(result.schema.names):
        whole.add(conform(batch, result.schema))
    return [f"{result.url} by {other.by} and by fct's own reader: {what}" for what in whole.differences(seen)]


def _only(batches: Iterator[pa.RecordBatch], columns: list[str]) -> Iterator[pa.RecordBatch]:
    return (batch.select(columns) for batch in batches)


def _result(
    journal: Journal, job: Job, result: Source, columns: list[str]
) -> tuple[Iterator[pa.RecordBatch], Sequence[str]]:
    """(the result's rows in the source's order, the columns that it has)."""
    if job.format in ("parquet", "arrow") and not isinstance(result, SavedDatasetSource):
        return _files(journal, job, columns), result.schema.names
    if job.format in _MATRICES:
        first = next((o for o in shard_marker(journal, 0).outputs if o.name.startswith("_rows/")), None)
        if first is None:  # row numbers are written beside shards with rejects alone
            return iter(()), ()
        with journal.location(first).open() as file:
            have = pq.read_schema(file).names
        return _files(journal, job, columns), have if columns != [ROW] else ()
    other: RowReader | WholeReader | None = None
    with contextlib.suppress(
        MissingExtraError
    ):  # said of the source, or of nothing: the rows are compared all the same
        other = second_reader(result)
    reader = other if isinstance(other, RowReader) else OwnReader(result)
    names = [piece.name for piece in result.pieces()]
    return (batch for name in names for batch in reader.read(name, columns)), result.schema.names


def _files(journal: Journal, job: Job, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """By the files that each shard's marker names: whatever else lies there is somebody else's."""
    for number in range(len(job.shards)):
        for output in shard_marker(journal, number).outputs:
            if output.name.startswith("_rows/"):
                yield from columns_of_file("parquet", journal.location(output), columns)
            elif job.format not in _MATRICES:
                yield from columns_of_file(job.format, journal.location(output), columns)

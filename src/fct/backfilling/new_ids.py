"""Ids that a database cannot take are refused before anything is written there: by id, it would lose the other rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from fct.backfilling.job import Job
from fct.backfilling.row_reader import OwnReader, RowReader
from fct.backfilling.second_reader import second_reader
from fct.errors import BackfillError, MissingExtraError
from fct.gallery.databases import DatabaseDestination, DatabaseSource
from fct.gallery.export_ids import RULES, IdCheck
from fct.gallery.interfaces import Destination, Source
from fct.gallery.schemas import conform

__all__ = ["refuse_ids"]


def refuse_ids(source: Source, destination: Destination, job: Job) -> None:
    """Looks at every id of the source, and at nothing else of it where its format allows that.

    Raises:
        BackfillError: an id that is null, there twice, or that the database cannot hold; with its row.
    """
    if not isinstance(destination, DatabaseDestination):
        return
    if isinstance(source, DatabaseSource) and source.address.location() == destination.address.location():
        return  # they are its own
    kind = source.schema.field(job.id_column).type
    rule = RULES.get(destination.kind, RULES["pgvector"])
    with tempfile.TemporaryDirectory() as folder:
        first = 0
        try:
            check = IdCheck(rule, job.id_column, kind, Path(folder))
            for ids in _ids(source, job):
                check(ids, first)
                first += len(ids)
            check.close(lambda: _ids(source, job))
        except ValueError as error:
            raise BackfillError(f"{error} ({destination.url} is written by id)") from None


def _ids(source: Source, job: Job) -> Iterator[pa.Array]:
    if isinstance(source, DatabaseSource):
        yield from (source.ids(piece) for piece in job.pieces)
        return
    reader, schema = _reader(source), pa.schema([source.schema.field(job.id_column)])
    for piece in job.pieces:
        for batch in reader.read(piece.name, [job.id_column]):
            yield conform(batch, schema).column(0)


def _reader(source: Source) -> RowReader:
    """What reads one column alone, where anything does."""
    try:
        found = second_reader(source)
    except MissingExtraError:
        found = None
    return found if isinstance(found, RowReader) else OwnReader(source)

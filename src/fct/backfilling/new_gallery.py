"""A finished gallery as ``verify`` opens it: its journal, its rows; of a table that was appended to, the job's own."""

from __future__ import annotations

import os

from fct.backfilling.claim import refuse_claimed
from fct.backfilling.database_job import database_journal, require_journal
from fct.backfilling.job import Job
from fct.backfilling.journal import Journal, shard_marker
from fct.errors import BackfillError
from fct.gallery import Location, journal_location, lance_in, location_of, open_destination, open_source
from fct.gallery.committed_files import files_of
from fct.gallery.databases import is_database
from fct.gallery.databases.address import Address
from fct.gallery.file_gallery import FileDestination
from fct.gallery.iceberg_catalog import is_iceberg
from fct.gallery.iceberg_table import IcebergSource
from fct.gallery.interfaces import Source
from fct.gallery.stores import Opening
from fct.types import Access

__all__ = ["changed_since", "journal_of", "open_gallery"]


def journal_of(
    path: str | os.PathLike[str], folder: str | os.PathLike[str] | None, access: Access
) -> tuple[Journal, str]:
    """(the journal of a backfill's destination, the destination as a job names it). folder: the journal's, where the
    destination is a database or a table, or the job had one."""
    if is_database(path):
        shown = Address.parse(path, "gallery").shown
        require_journal(shown, folder)
        return database_journal(folder), shown
    where = _folder_of(path, access)
    found = Journal(journal_location(where, "lance" if where.name.endswith(".lance") else ""), where)
    named = None if folder is None else Journal(database_journal(folder).root, where, apart=True)
    if named is not None and (named.job() is not None or found.job() is None):
        return named, str(where)
    if named is None:
        refuse_claimed(where)
    return found, str(where)


def _folder_of(path: str | os.PathLike[str], access: Access) -> Location:
    if not is_iceberg(path):
        return lance_in(location_of(path, **access))
    writer = open_destination(
        path, "auto", storage_options=access.get("storage_options"), retry_policy=access.get("retry_policy")
    )
    assert isinstance(writer, FileDestination)
    return writer.location


def open_gallery(path: str | os.PathLike[str], journal: Journal, job: Job, access: Opening) -> Source:
    """The gallery as any reader opens it. A table of a catalog holds others' rows, too, and is changed by others: of it
    the job's files are taken, at the snapshot that added the last of them.

    Raises:
        BackfillError: no snapshot of the table has all of the job's files.
    """
    source = open_source(path, **access)
    if not isinstance(source, IcebergSource):
        return source
    kept = source.as_added([files_of(shard_marker(journal, n).extra) for n in range(len(job.shards))])
    if kept is None:
        raise BackfillError(
            f"gallery: expected a snapshot of {path} that holds the {len(job.shards)} shards of this job; they were "
            "not committed, or their snapshots have been expired"
        )
    return kept


def changed_since(gallery: object) -> list[str]:
    """What cannot be proven of a table whose owner changed it after this job's commit."""
    if not isinstance(gallery, IcebergSource) or (now := gallery.current()).version == gallery.version:
        return []
    rows, left = (sum(piece.rows for piece in one.pieces()) for one in (gallery, now))
    if left == rows:
        return []
    return [
        f"not proven: that the table still holds this job's rows: {rows:,} were compared at snapshot "
        f"{gallery.version}, of its files the current one has {left:,} rows; they were deleted or rewritten since"
    ]

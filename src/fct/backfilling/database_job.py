"""A backfill from or to a database: where its journal lies, and what the two sides know of each other."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fct.backfilling.journal import Journal
from fct.checks import check_flag, check_path, check_positive
from fct.gallery.databases import DatabaseDestination, DatabaseSource
from fct.gallery.interfaces import Destination, Source
from fct.gallery.location import location_of

__all__ = ["database_journal", "join_databases", "require_journal"]


def database_journal(folder: str | os.PathLike[str] | None) -> Journal:
    """The journal in a local folder; where none was named (a plan), in one that nobody makes."""
    if folder is None:
        folder = Path(tempfile.gettempdir()) / f"fct-plan-{os.getpid()}"
    root = location_of(check_path(folder, "journal", "a folder of this machine").absolute(), name="journal")
    return Journal(root, root / "outputs")


def require_journal(destination: str, folder: str | os.PathLike[str] | None) -> None:
    """Raises ValueError where a database is to be written and nothing says where the journal goes."""
    if folder is None:
        raise ValueError(
            f"journal: expected a folder of this machine for the journal of the job (--journal), since {destination} "
            "has no place for it, got None"
        )


def join_databases(
    source: Source,
    side: Source | None,
    destination: Destination,
    id_column: str,
    journal: Journal,
    folder: str | os.PathLike[str] | None,
    *,
    needed: tuple[str, ...],
    rate: float | None,
    switch: bool,
) -> None:
    """Tells a database source where its lists of ids lie and how fast it may be read, and a database destination whose
    rows come.

    needed: the columns that are mapped. rate: rows a second. switch: whether an alias is switched at the end.
    """
    if rate is not None:
        check_positive(rate, "max_rows_per_s", "a positive number of rows a second or None")
    check_flag(switch, "switch_alias")
    if isinstance(side, DatabaseSource):
        raise ValueError("side_source: expected a column of the same table (&side= in the URL), got a database")
    if isinstance(source, DatabaseSource):
        place = journal.root if folder is None else database_journal(folder).root
        if not place.is_local:
            raise ValueError(
                f"journal: expected a folder of this machine, where the ids of {source.url} are kept, got None"
            )
        source.needed = tuple(filter(None, needed))
        source.limit(rate)
        source.live_in(place.local)
    elif rate is not None:
        raise ValueError("max_rows_per_s: expected None, since the source is no database that is served, got a number")
    if isinstance(destination, DatabaseDestination):
        destination.watch(source, id_column, journal.root.local)
        destination.switch = switch
    elif switch:
        raise ValueError("switch_alias: expected False, since the destination is not a database, got True")

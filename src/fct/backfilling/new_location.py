"""The place of a new gallery: its writer, its journal, and that it touches nothing that was there."""

from __future__ import annotations

import os

from fct.backfilling.claim import refuse_claimed
from fct.backfilling.database_job import database_journal
from fct.backfilling.journal import Journal
from fct.gallery import Location, Source, journal_location, lance_in, location_of, open_destination
from fct.gallery.databases import DatabaseDestination, DatabaseSource, is_database
from fct.gallery.discovery import is_hidden
from fct.gallery.file_gallery import FileDestination
from fct.gallery.iceberg_catalog import is_iceberg
from fct.gallery.interfaces import Destination
from fct.gallery.space_tags import SIDE_FILE
from fct.gallery.stores import Opening
from fct.gallery.tables import TITLES, table_kind
from fct.options.groups import Database
from fct.types import GalleryLike

__all__ = ["occupied", "open_new"]

_Old = tuple[Source, Source | None]  # the old gallery, and that of its side-information


def open_new(
    destination: GalleryLike | Destination, form: str, old: _Old, database: Database, access: Opening
) -> tuple[Destination, Journal]:
    """The writer of the new gallery and its journal, in a place that touches no old one."""
    store, retry_policy = access["storage_options"], access["retry_policy"]
    if isinstance(destination, Destination) or is_database(destination):
        writer = open_destination(destination, form, storage_options=store, retry_policy=retry_policy)
        if isinstance(writer, DatabaseDestination):
            return writer, database_journal(database.journal)
        place = location_of(writer.url, storage_options=store, retry_policy=retry_policy)
        return writer, Journal(journal_location(place, form), place)
    if is_iceberg(destination):
        writer = open_destination(destination, form, storage_options=store, retry_policy=retry_policy)
        return writer, _table_journal(writer, database.journal, old)
    place = location_of(destination, name="destination", **access)
    if form == "lance":
        table = old[0].url.rstrip("/").rpartition("/")[2].removesuffix(".lance")
        place = lance_in(place, table=table if old[0].kind == "lance" else "gallery")
    writer = open_destination(place, form, storage_options=store, retry_policy=retry_policy)
    _require_apart_from(place, old)
    _require_folder(place)
    return writer, _folder_journal(writer, place, form, database.journal, old)


def _folder_journal(
    writer: Destination, location: Location, form: str, folder: str | os.PathLike[str] | None, old: _Old
) -> Journal:
    """The journal of a folder of files: in it, or, so that nothing but data lies there, in the one that was named."""
    usual = Journal(journal_location(location, form), location)
    root = usual.root if folder is None else database_journal(folder).root
    if folder is None or (root.fs, root.path) == (usual.root.fs, usual.root.path):
        refuse_claimed(location)
        return usual
    if not isinstance(writer, FileDestination) or not writer.tags_itself:
        if isinstance(old[0], DatabaseSource):
            return usual  # the lists of ids lie in the folder that was named
        raise ValueError(
            f"journal: expected None with format {form}, which is read together with the journal beside it, got a "
            "folder: parquet and arrow files stand alone"
        )
    _require_apart_from(root, old, "journal")
    if location.is_local and (inside := _nested(root, location)):
        raise ValueError(f"journal: expected a folder apart from the destination {location}, got {root} {inside} it")
    writer.beside = False
    return Journal(root, location, apart=True)


def _table_journal(writer: Destination, folder: str | os.PathLike[str] | None, old: _Old) -> Journal:
    """The journal of rows that are appended to a table: below it, or in the folder that was named."""
    assert isinstance(writer, FileDestination)
    _require_apart_from(writer.location, old)
    root = journal_location(writer.location, writer.kind) if folder is None else database_journal(folder).root
    return Journal(root, writer.location)


def _require_apart_from(location: Location, old: _Old, name: str = "destination") -> None:
    for store, what in zip(old, ("source", "side_source"), strict=True):
        if store is not None:
            _require_apart(location, getattr(store, "inner", store), what, name)


def _require_apart(location: Location, source: Source, what: str, name: str) -> None:
    """A source is never written to: the new gallery lies neither in it nor around it, whatever the two are called."""
    mine = getattr(source, "location", None)
    if not isinstance(mine, Location) or mine.fs != location.fs or (mine.is_pattern and "**" not in mine.path):
        return
    root = mine.path.partition("**")[0].rstrip("/") if mine.is_pattern else mine.path.rstrip("/")
    inside = _nested(location, mine.at(root))
    if inside == "at":
        raise ValueError(f"{name}: expected another place than the {what}, which is never written to")
    if inside:
        raise ValueError(f"{name}: expected a place apart from the {what} {mine}, got {location} {inside} the {what}")


def _nested(new: Location, old: Location) -> str:
    """How the first of two places of one store lies to the second: "at", "inside", "around" it, or "" apart from it."""
    a, b = ((os.path.realpath(p.path) if p.is_local else p.path.rstrip("/")) + "/" for p in (new, old))
    if a == b:
        return "at"
    return "inside" if a.startswith(b) else "around" if b.startswith(a) else ""


def _require_folder(location: Location) -> None:
    """Raises NotADirectoryError where a file stands in the destination's way."""
    if location.is_local:
        way = next((p for p in (location.local, *location.local.parents) if p.exists()), None)
        if way is not None and not way.is_dir():
            raise NotADirectoryError(f"destination: expected a folder, or a place for a new one, {way} is a file")


def occupied(location: Location) -> list[str]:
    """Names in a destination that no backfill of ours began: whatever lies in the folder itself, and data files of the
    folders below, which whoever reads the new gallery would read as its rows."""
    table = TITLES.get(table_kind(location) or "")
    here = [*([table] if table else []), *(n for n in location.files() if n != SIDE_FILE)]
    return here or _data_below(location)


def _data_below(location: Location) -> list[str]:
    """The first data file of each folder."""
    root, found = location.path.rstrip("/"), []
    for folder in location.folders():
        if is_hidden([folder, "data"]):
            continue
        below = (file.path[len(root) :].strip("/").split("/") for file in (location / folder).find())
        first = min(("/".join(parts) for parts in below if not is_hidden(parts)), default=None)
        found += [] if first is None else [first]
    return found

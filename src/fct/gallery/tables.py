"""Folders whose rows are what a log or a state file says, not what lies in them: Delta, Iceberg, Hudi, datasets'.

A file in such a folder may hold rows that were deleted, replaced or copied, so that none is read by itself: the table
is read as its library reads it, at one version, or refused by its name.
"""

from __future__ import annotations

import os
import re

from fct.errors import FctError
from fct.extras import need
from fct.gallery.discovery import root_of
from fct.gallery.interfaces import Source
from fct.gallery.location import Location
from fct.types import StorageOptions

__all__ = ["TITLES", "open_table", "pinned", "refuse_inside", "split_version", "table_kind"]

_VERSION = re.compile(r"(.+)\?version=(\d+)")
_MARKS = ("_delta_log", ".hoodie", "metadata", "snapshot", "manifest", "schema")
_ABOVE, _ABOVE_REMOTE = 12, 3  # folders looked at above a place: each is a request over a network
TITLES = {
    "delta": "a Delta table",
    "iceberg": "an Iceberg table",
    "hudi": "a Hudi table",
    "paimon": "a Paimon table",
}


def split_version(location: str) -> tuple[str, int | None]:
    """(place, version) of ``TABLE?version=N``; None for the newest version.

    Examples:
        >>> from fct.gallery.tables import split_version
        >>> split_version("s3://bucket/items?version=12"), split_version("gallery")
        (('s3://bucket/items', 12), ('gallery', None))
    """
    match = _VERSION.fullmatch(location)
    return (match[1], int(match[2])) if match else (location, None)


def pinned(location: object, source: Source, named: str) -> str | None:
    """``location`` at the version that a job names, where the table has gone on since; None where there is none to pin.

    location: as the caller named it; a version of theirs stands. source: what it opened. named: the job's URL of it.
    """
    (place, now), (then_place, then) = split_version(source.url), split_version(named)
    if not isinstance(location, (str, os.PathLike)) or split_version(os.fspath(location))[1] is not None:
        return None
    if now is None or then is None or now == then or place != then_place:
        return None
    return f"{os.fspath(location).rstrip('/')}?version={then}"


def open_table(
    location: Location, version: int | None, storage_options: StorageOptions | None, name: str
) -> Source | None:
    """The table at ``location``, or None where it is no table.

    Raises:
        FctError: a table that is not read (Hudi; a part of a table; several tables). MissingExtraError: its library
        is not installed.
    """
    if location.name.endswith(".metadata.json"):
        from fct.gallery.iceberg_table import IcebergSource

        need("pyiceberg", f"{name}: {location}, an Iceberg table,")
        return IcebergSource(location.parent.parent, version, storage_options, metadata=location)
    root = location.at(root_of(location)) if location.is_pattern else location
    kind = table_kind(root)
    if kind is None:
        refuse_inside(root, name)
        if root.is_local and os.path.realpath(root.path) != os.path.abspath(root.path):
            refuse_inside(root.at(os.path.realpath(root.path)), name)
        return None
    if location.is_pattern and kind != "datasets":
        raise FctError(f"{name}: {location} means files of {TITLES[kind]}; name the table itself: {root}")
    if kind in ("hudi", "paimon"):
        raise FctError(
            f"{name}: {root} is {TITLES[kind]}, whose rows are not those of its files; fct reads none: write it once "
            f"as Parquet (in Spark: spark.read.format('{kind}').load(table).write.parquet(folder))"
        )
    return _open(kind, location, root, version, storage_options, name)


def _open(
    kind: str, location: Location, root: Location, version: int | None, options: StorageOptions | None, name: str
) -> Source:
    if kind == "delta":
        need("deltalake", f"{name}: {root}, a Delta table,")
        from fct.gallery.delta_table import DeltaSource

        return DeltaSource(root, version, options)
    if kind == "iceberg":
        need("pyiceberg", f"{name}: {root}, an Iceberg table,")
        from fct.gallery.iceberg_table import IcebergSource

        return IcebergSource(root, version, options)
    from fct.gallery.saved_dataset import open_saved_dataset

    return open_saved_dataset(root, location, name)


def table_kind(folder: Location) -> str | None:
    """delta, iceberg, hudi, paimon, datasets or None: what a folder is by what lies in it."""
    if folder.is_local:  # asked for by name: a folder above may hold any number of files
        path = folder.path
        folders = [n for n in _MARKS if os.path.isdir(os.path.join(path, n))]
        marks = ("dataset_dict.json", "state.json", "dataset_info.json")
        files = [n for n in marks if os.path.isfile(os.path.join(path, n))]
    else:
        folders, files = folder.folders(), folder.files()
    if "_delta_log" in folders:
        return "delta"
    if ".hoodie" in folders:
        return "hudi"
    if {"snapshot", "manifest", "schema"} <= set(folders) and "schema-0" in (folder / "schema").files():
        return "paimon"
    if "metadata" in folders and any(n.endswith(".metadata.json") for n in (folder / "metadata").files()):
        return "iceberg"
    if "dataset_dict.json" in files or ("state.json" in files and "dataset_info.json" in files):
        return "datasets"
    return None


def refuse_inside(folder: Location, name: str) -> None:
    """Raises FctError for a place inside a table: its files are not the table's rows."""
    at = folder
    for _ in range(_ABOVE if folder.is_local else _ABOVE_REMOTE):
        if not at.path.strip("/") or at.parent.path == at.path:
            return
        at = at.parent
        if not at.path.strip("/") or at.path.endswith(":/") or (at.path.count("/") == 2 and "://" in at.path):
            return  # above a web server's own name there is nothing to look at
        kind = table_kind(at)
        if kind in TITLES:
            raise FctError(
                f"{name}: {folder} lies in {TITLES[kind]}, where files may hold rows that the table no longer has; "
                f"name the table itself: {at}"
            )

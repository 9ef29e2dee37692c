"""Which store a path means: by its suffix, by what lies in the folder, or by the name that the user gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from fct.checks import check_choice
from fct.errors import FctError
from fct.gallery.arrow_files import ArrowDestination, ArrowSource
from fct.gallery.databases import database_destination, database_source, is_database
from fct.gallery.file_gallery import FileDestination, FileSource, find_files
from fct.gallery.interfaces import Destination, Source
from fct.gallery.location import Location, Patience, location_of
from fct.gallery.matrix_files import BinDestination, BinSource, NpyDestination, NpySource
from fct.gallery.parquet_files import ParquetDestination, ParquetSource
from fct.options.groups import StoreAccess
from fct.types import FileSystem

__all__ = ["FORMATS", "Opening", "journal_location", "lance_in", "open_destination", "open_source", "opening"]

_SOURCES: tuple[type[FileSource], ...] = (NpySource, BinSource, ParquetSource, ArrowSource)
_DESTINATIONS: dict[str, type[FileDestination]] = {
    c.kind: c for c in (NpyDestination, BinDestination, ParquetDestination, ArrowDestination)
}
FORMATS = (*_DESTINATIONS, "lance")


class Opening(TypedDict):
    """What :func:`open_source` and :func:`location_of` are told of a store."""

    filesystem: FileSystem | None
    storage_options: Mapping[str, Any] | None
    patience: Patience


def opening(access: StoreAccess) -> Opening:
    """A public function's options, as the keywords that open its stores."""
    return {
        "filesystem": access.filesystem,
        "storage_options": access.storage_options,
        "patience": Patience(access.retries, access.timeout),
    }


def open_source(
    where: Any,
    *,
    filesystem: Any = None,
    storage_options: Mapping[str, Any] | None = None,
    patience: Patience | None = None,
    name: str = "source",
) -> Source:
    """The gallery at ``where``: a file, a folder, a glob, a ``.lance`` dataset, or a Source, which is returned.

    Args:
        filesystem, storage_options: an fsspec or pyarrow filesystem, or what fsspec passes to the one that a URL names.
        patience: how a store over a network is waited for.

    Raises:
        FileNotFoundError: nothing there. FctError: files of several formats or of none that we read; an unfinished
            backfill. StoreError: a store that does not answer.

    Example:
        >>> import numpy as np, tempfile
        >>> from fct.gallery import open_source
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/a.npy", np.zeros((3, 8), np.float32))
        >>> open_source(folder).pieces()[0].rows
        3
    """
    if isinstance(where, Source):
        return where
    if is_database(where):
        return database_source(where, patience or Patience(), name=name)
    place = location_of(
        where, filesystem=filesystem, storage_options=storage_options, patience=patience, name=name
    )  # fmt: skip
    place = lance_in(place)
    if place.name.endswith(".lance"):
        from fct.gallery.lance_dataset import LanceSource

        return LanceSource(str(place), storage_options)
    if (place / "_fct/job.json").exists() and not (place / "_fct/manifest.json").exists():
        raise FctError(f"{name}: {place} is an unfinished backfill; run it to the end first")
    files = find_files(place, name)
    kinds = {kind: [f for f in files if f.path.endswith(kind.suffixes)] for kind in _SOURCES}
    found = {kind: some for kind, some in kinds.items() if some}
    if len(found) != 1 or sum(map(len, found.values())) != len(files):
        endings = sorted({"." + f.name.rpartition(".")[2] for f in files})
        known = ", ".join(s for kind in _SOURCES for s in kind.suffixes)
        raise FctError(f"{name}: expected files of one format ({known} or .lance) at {place}, got {', '.join(endings)}")
    ((kind, some),) = found.items()
    return kind(place, some)


def open_destination(
    where: Any,
    format: str,
    *,
    filesystem: Any = None,
    storage_options: Mapping[str, Any] | None = None,
    patience: Patience | None = None,
) -> Destination:
    """The writer for ``where``: a folder of ``format`` files, a ``.lance`` dataset, or a Destination, as it is."""
    if isinstance(where, Destination):
        return where
    if is_database(where):
        return database_destination(where, patience or Patience())
    check_choice(format, "format", FORMATS)
    place = location_of(
        where, filesystem=filesystem, storage_options=storage_options, patience=patience, name="destination"
    )  # fmt: skip
    if format == "lance":
        from fct.gallery.lance_dataset import LanceDestination

        return LanceDestination(str(place), storage_options)
    return _DESTINATIONS[format](place)


def lance_in(folder: Location, *, table: str = "") -> Location:
    """The Lance dataset that a folder stands for: the only table of a LanceDB database; else the place as it is.

    table: the dataset to be made in a folder that holds none, as a table that LanceDB lists.
    """
    if folder.name.endswith(".lance") or folder.is_pattern:
        return folder
    found = [name for name in folder.folders() if name.endswith(".lance")]
    if not found and table:
        return folder / f"{table}.lance"
    if len(found) > 1:
        raise FctError(f"{folder} holds {len(found)} tables: expected the path of one, such as {folder / found[0]}")
    alone = found and (table or not [n for n in folder.files() if not n.startswith(("_", "."))])
    return folder / found[0] if alone else folder


def journal_location(where: Location, format: str) -> Location:
    """Where a backfill's journal lies: in the new gallery's folder, or beside a Lance dataset."""
    return where.at(where.path.removesuffix(".lance") + ".fct") if format == "lance" else where / "_fct"

"""Which store a path means: by its suffix, by what lies in the folder, or by the name that the user gives."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypedDict

from fct.checks import check_choice
from fct.errors import FctError
from fct.gallery.arrow_files import ArrowDestination, ArrowSource
from fct.gallery.arrow_stream import arrow_stream
from fct.gallery.chunked_arrays import Hdf5Source, ZarrSource, is_zarr
from fct.gallery.clip_folder import ClipSource, is_clip_folder
from fct.gallery.databases import database_destination, database_source, is_database
from fct.gallery.file_gallery import FileDestination, FileSource, find_files
from fct.gallery.gathered_files import refuse_mixtures
from fct.gallery.iceberg_catalog import IcebergAddress, is_iceberg
from fct.gallery.interfaces import Destination, Source
from fct.gallery.location import Location, RetryPolicy, location_of
from fct.gallery.matrix_files import BinDestination, BinSource, NpyDestination, NpySource
from fct.gallery.members import split_member
from fct.gallery.npz_files import NpzSource
from fct.gallery.parquet_files import ParquetDestination, ParquetSource
from fct.gallery.tables import open_table, split_version
from fct.gallery.urls import without_query
from fct.gallery.vortex_files import VortexDestination, VortexSource
from fct.options.groups import StoreAccess
from fct.types import FileSystem, GalleryLike, StorageOptions

__all__ = ["FORMATS", "Opening", "journal_location", "lance_in", "open_destination", "open_source", "opening"]

_SOURCES: tuple[type[FileSource], ...] = (
    *(NpySource, BinSource, ParquetSource, ArrowSource, NpzSource, Hdf5Source),
    VortexSource,
)
_DESTINATIONS: dict[str, type[FileDestination]] = {
    c.kind: c for c in (NpyDestination, BinDestination, ParquetDestination, ArrowDestination, VortexDestination)
}
FORMATS = (*_DESTINATIONS, "lance", "delta")
# Text formats, by the one line of DuckDB that makes a gallery of them (docs/galleries.md).
_JSON = "COPY (SELECT * REPLACE (embedding::FLOAT[] AS embedding) FROM read_json('FILES')) TO 'gallery.parquet'"
_CSV = _JSON.replace("read_json", "read_csv")
_TSV = _CSV.replace("'FILES'", r"'FILES', delim='\t'")  # else the commas of a list are taken for columns
_REWRITE = {".json": _JSON, ".jsonl": _JSON, ".ndjson": _JSON, ".csv": _CSV, ".tsv": _TSV}


class Opening(TypedDict):
    """What :func:`open_source` and :func:`location_of` are told of a store."""

    filesystem: FileSystem | None
    storage_options: StorageOptions | None
    retry_policy: RetryPolicy


def opening(access: StoreAccess) -> Opening:
    """A public function's options, as the keywords that open its stores."""
    return {
        "filesystem": access.filesystem,
        "storage_options": access.storage_options,
        "retry_policy": RetryPolicy(access.retries, access.timeout),
    }


def open_source(
    location: GalleryLike,
    *,
    filesystem: FileSystem | None = None,
    storage_options: StorageOptions | None = None,
    retry_policy: RetryPolicy | None = None,
    name: str = "source",
) -> Source:
    """The gallery at ``location``: a file, a folder, a glob, a table (Lance, Delta, Iceberg, a saved dataset), or a
    Source, which is returned. ``TABLE?version=N`` is one version of a table.

    Args:
        location: ``FILE.npz:MEMBER``, ``FILE.hdf5:/PATH`` and ``STORE.zarr:/PATH`` are one array of a container; a
            clip-retrieval folder is one gallery.
        filesystem, storage_options: an fsspec or pyarrow filesystem, or what fsspec passes to the one that a URL names.
        retry_policy: how a store over a network is waited for.

    Raises:
        FileNotFoundError: nothing there. FctError: files of several formats or of none that we read; an unfinished
            backfill. StoreError: a store that does not answer.

    Examples:
        >>> import numpy as np, tempfile
        >>> from fct.gallery import open_source
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/a.npy", np.zeros((3, 8), np.float32))
        >>> open_source(folder).pieces()[0].rows
        3
    """
    if isinstance(location, Source):
        return location
    if is_database(location):
        return database_source(location, retry_policy or RetryPolicy(), name=name)
    if is_iceberg(location):
        return _of_catalog(os.fspath(location), storage_options, retry_policy or RetryPolicy(), name)
    stream = None if isinstance(location, (str, Location)) else arrow_stream(location, name)
    if stream is not None:
        return stream
    version, member = None, ""
    if isinstance(location, (str, os.PathLike)):
        location, member = split_member(os.fspath(location))
        location, version = split_version(location)
    place = location_of(
        location, filesystem=filesystem, storage_options=storage_options, retry_policy=retry_policy, name=name
    )  # fmt: skip
    if without_query(place.path) != place.path:
        return _files_at(place, member, name)  # its signature is of one file: nothing around it may be asked for
    place = lance_in(place)
    if place.name.endswith(".lance"):
        from fct.gallery.lance_dataset import LanceSource

        return LanceSource(str(place), storage_options, version)
    if (place / "_fct/job.json").exists() and not (place / "_fct/manifest.json").exists():
        raise FctError(f"{name}: {place} is an unfinished backfill; run it to the end first")
    if place.name.endswith(".zarr") or is_zarr(place):
        return ZarrSource(_there(place, name), [place], member)
    if is_clip_folder(place):
        return ClipSource(place)
    table = open_table(place, version, storage_options, name)
    if table is not None:
        return table
    if version is not None:
        raise FctError(f"{name}: expected a table of versions, {place} is none")
    return _files_at(place, member, name)


def _files_at(location: Location, member: str, name: str) -> FileSource:
    """The files of one format at a place."""
    files = find_files(location, name)
    if files != [location]:
        refuse_mixtures(location, files, name)
    kinds = {kind: [f for f in files if without_query(f.path).endswith(kind.suffixes)] for kind in _SOURCES}
    found = {kind: some for kind, some in kinds.items() if some}
    if len(found) != 1 or sum(map(len, found.values())) != len(files):
        raise FctError(_not_one_format(location, files, found, name))
    ((kind, some),) = found.items()
    if kind in (NpzSource, Hdf5Source):
        return kind(location, some, member)
    return kind(location, some)


def _of_catalog(url: str, storage_options: StorageOptions | None, retry_policy: RetryPolicy, name: str) -> Source:
    """The table that a catalog has by the URL's name, at its current snapshot or the one of ``?version=``."""
    from fct.gallery.iceberg_table import IcebergSource

    url, version = split_version(url)
    address = IcebergAddress.of(url, storage_options, name)
    table = address.load(address.open())
    if table is None:
        raise FileNotFoundError(f"{name}: expected a table of the catalog {address.catalog!r}, found no {address.url}")
    root, newest = (
        address.folder(at, table.io.properties, retry_policy) for at in (str(table.location()), table.metadata_location)
    )
    return IcebergSource(root, version, table.io.properties, metadata=newest)


def _there(location: Location, name: str) -> Location:
    if location.is_pattern:
        raise FctError(f"{name}: expected one Zarr store, got the pattern {location}")
    if not location.exists():
        raise FileNotFoundError(f"{name}: expected a gallery, found nothing at {location}")
    return location


def _not_one_format(
    location: Location, files: Sequence[Location], found: Mapping[type[FileSource], Sequence[Location]], name: str
) -> str:
    """The refusal of a place that holds files of no format, of several, or others beside the data: each named."""
    known = ", ".join(s for kind in _SOURCES for s in kind.suffixes)
    endings = sorted({"." + without_query(f.path).rpartition("/")[2].rpartition(".")[2] for f in files})
    if len(found) > 1:
        some = "; ".join(f"{len(fs)} as {fs[0].name}" for fs in found.values())
        return (
            f"{name}: expected files of one format ({known} or .lance) at {location}, got {', '.join(endings)} "
            f"({some}); name one kind alone, such as {location}/**/*{next(iter(found)).suffixes[0]}"
        )
    data = {f.path for fs in found.values() for f in fs}
    others = [f for f in files if f.path not in data]
    if data:
        listed = ", ".join(str(f) for f in others[:20]) + (f" and {len(others) - 20} more" if len(others) > 20 else "")
        kind = next(iter(found))
        return (
            f"{name}: expected files of one format at {location}, got {', '.join(endings)}: {listed} "
            f"{'is' if len(others) == 1 else 'are'} no {kind.kind} data; move {'it' if len(others) == 1 else 'them'} "
            "elsewhere or begin the name with '_', or name the data alone, "
            f"such as {location}/**/*{kind.suffixes[0]}"
        )
    text = next((e for e in endings if e in _REWRITE), "")
    hint = f"; write it once as Parquet, in DuckDB: {_rewritten(location, text)}" if text else ""
    return f"{name}: expected files of one format ({known} or .lance) at {location}, got {', '.join(endings)}{hint}"


def _rewritten(location: Location, ending: str) -> str:
    """The line of DuckDB for a file, a pattern, or the files below a folder."""
    files = f"{location}/**/*{ending}" if location.is_folder() else str(location)
    return _REWRITE[ending].replace("FILES", files.replace("'", "''"))


def open_destination(
    location: GalleryLike,
    format: str,
    *,
    filesystem: FileSystem | None = None,
    storage_options: StorageOptions | None = None,
    retry_policy: RetryPolicy | None = None,
) -> Destination:
    """The writer for ``location``: a folder of ``format`` files, a ``.lance`` dataset, a Delta table, a table of an
    Iceberg catalog (``iceberg://CATALOG/NAMESPACE.TABLE``), or a Destination, as it is."""
    if isinstance(location, Destination):
        return location
    if is_database(location):
        return database_destination(location, retry_policy or RetryPolicy())
    if is_iceberg(location):
        from fct.gallery.iceberg_destination import IcebergDestination

        address = IcebergAddress.of(os.fspath(location), storage_options, "destination")
        return IcebergDestination(address, retry_policy or RetryPolicy())
    check_choice(format, "format", FORMATS)
    place = location_of(
        location, filesystem=filesystem, storage_options=storage_options, retry_policy=retry_policy, name="destination"
    )  # fmt: skip
    if format == "lance":
        from fct.gallery.lance_dataset import LanceDestination

        return LanceDestination(str(place), storage_options)
    if format == "delta":
        from fct.gallery.delta_destination import DeltaDestination

        return DeltaDestination(place, storage_options)
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


def journal_location(location: Location, format: str) -> Location:
    """Where a backfill's journal lies: in the new gallery's folder, or beside a Lance dataset."""
    return location.at(location.path.removesuffix(".lance") + ".fct") if format == "lance" else location / "_fct"

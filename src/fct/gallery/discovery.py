"""Which files a path, a folder or a glob means, what each is called below it, and the columns in folders' names.

A file's identity is its path below the folder, or below the part of a pattern that is fixed: ``g/*/emb.npy`` means
``d1/emb.npy``, ``d2/emb.npy``. Names and folders that start with ``_`` or ``.`` are no data, except that a folder like
``_lang=de`` is a partition.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.dataset as ds

from fct.errors import FctError
from fct.gallery.location import Location
from fct.gallery.urls import without_query
from fct.types import JsonDict

__all__ = [
    "check_readable",
    "find_files",
    "is_hidden",
    "is_partition",
    "natural",
    "partition_columns",
    "root_of",
    "unmarked",
]


# Beside data and no rows: the space as version 0.1 wrote it, what datasets says of its files.
_BESIDE = re.compile(r"(.*\.)?space\.json|dataset_infos?\.json|state\.json|dataset_dict\.json")
# Where committers keep what is not committed: Hadoop's, S3A's, Spark's dynamic overwrite, Hive's.
_STAGING = re.compile(r"_temporary|__magic.*|\.spark-staging.*|\.hive-staging.*|_tmp\..*|\.emrfs_staging.*")
_OF_SPARK = re.compile(r"part-\d{5}-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}[-.].*")


def unmarked(location: Location, files: Sequence[Location]) -> str:
    """What to know of a folder that Spark wrote and that has no ``_SUCCESS``, which it writes last; else ""."""
    ours = next((f for f in files if _OF_SPARK.fullmatch(f.name)), None)
    if ours is None or location.is_pattern or not location.is_folder():
        return ""
    folder = location
    while is_partition(folder.name):
        folder = folder.parent
    if "_SUCCESS" in folder.files():
        return ""
    return (
        f"source: {ours.name} is named as Spark names files, and {folder} has no _SUCCESS, which Spark writes last: a "
        "write that was ended in the middle looks the same; hold the rows against your own count with --expect-rows"
    )


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts part-2 before part-10. Digits are what ``int`` reads: ``10²`` is 10 and a sign."""
    return tuple(
        (0, int(p), "") if p.isdecimal() and len(p) < 4300 else (1, 0, p) for p in re.split(r"(\d+)", name) if p
    )


def root_of(location: Location) -> str:
    """The folder below which files are named: the folder itself, a pattern's fixed part, or the folder of a file."""
    if location.is_pattern:
        magic = re.search(r"[*?[]", location.path)
        return location.path[: magic.start()].rpartition("/")[0] if magic else location.path
    return location.path.rstrip("/") if location.is_folder() else location.parent.path


def find_files(location: Location, name: str = "source") -> list[Location]:
    """The data files of a folder (at any depth), a glob or a single file, in natural order; side files left out.

    Raises:
        FileNotFoundError: nothing there. FctError: what may stand for rows and cannot be read (a link to a folder),
        or a write that has not ended (Spark's ``_temporary``).
    """
    if without_query(location.path) != location.path:
        return [location]  # a URL with a query, whose "?" is no pattern
    if not location.is_pattern and not location.is_folder():
        if location.exists():
            check_readable(location)
            return [location]
        raise FileNotFoundError(f"{name}: expected a gallery, found nothing at {location}")
    root, found = root_of(location), []
    for file in location.find():
        parts = file.path[len(root) :].strip("/").split("/")
        _refuse_table(location, root, parts, name)
        _refuse_stream(location, parts, name)
        _refuse_staging(location, root, parts, name)
        if is_hidden(parts) or _BESIDE.fullmatch(parts[-1]):
            continue
        check_readable(file)
        found.append(file)
    if not found:
        raise FileNotFoundError(f"{name}: expected a gallery, found no data files at {location}")
    return sorted(found, key=lambda f: natural(f.path))


def _refuse_table(location: Location, root: str, parts: Sequence[str], name: str) -> None:
    """Raises FctError where a table lies below a folder: its files are not its rows."""
    *folders, file = parts
    at = next((folders.index(mark) for mark in ("_delta_log", ".hoodie") if mark in folders), None)
    if at is None and file.endswith(".metadata.json") and folders[-1:] == ["metadata"]:
        at = len(folders) - 1
    if at is None and file in ("state.json", "dataset_dict.json"):
        at = len(folders)
    if at is not None:
        table = location.at("/".join([root, *folders[:at]]))
        raise FctError(
            f"{name}: {location} holds a table or a saved dataset, where files may hold rows that it no longer has; "
            f"name the table itself: {table}"
        )


def _refuse_stream(location: Location, parts: Sequence[str], name: str) -> None:
    """Raises FctError for what a stream of Spark wrote: its log names those of the files that count."""
    if "_spark_metadata" in parts[:-1]:
        raise FctError(
            f"{name}: {location} is what a stream of Spark wrote, whose rows are those of the files that "
            "_spark_metadata names: read it once by Spark and write it as Parquet, or name its files (such as "
            f"{location}/*.parquet) if all of them count"
        )


def _refuse_staging(location: Location, root: str, parts: Sequence[str], name: str) -> None:
    """Raises FctError where a write goes on, or was ended in the middle: what is there already is a part of it."""
    folders = parts[:-1]
    at = next((i for i, folder in enumerate(folders) if _STAGING.fullmatch(folder)), None)
    if at is not None:
        staging = location.at("/".join([root, *folders[: at + 1]]))
        raise FctError(
            f"{name}: {location} is written by a job of Spark, Hadoop or Hive that has not ended: {staging} holds "
            f"{parts[-1]}; wait for that job, or, if it died, write the gallery anew (remove {staging} only if you "
            "know that all rows are there)"
        )


def is_hidden(parts: Sequence[str]) -> bool:
    """Whether a file is no data by its name or a folder's. parts: of its path below the gallery."""
    *folders, file = parts
    if file.startswith(("_", ".")) or any(f.startswith(".") for f in folders):
        return True
    return any(f.startswith("_") and "=" not in f for f in folders)


def check_readable(file: Location) -> None:
    """Raises FctError for what stands among the files and is none: it may mean rows, so it is not passed over."""
    if not file.is_local:
        return
    try:
        kind = os.stat(file.path).st_mode
        file.path.encode()
    except FileNotFoundError:
        raise FctError(f"source: {file} is a link to nothing") from None
    except UnicodeEncodeError:
        raise FctError(f"source: expected file names in UTF-8, got {file.path!a}") from None
    if stat.S_ISDIR(kind):
        raise FctError(
            f"source: {file} is a link to a folder, which is not followed: put the files or links to them here"
        )
    if not stat.S_ISREG(kind):
        raise FctError(f"source: expected files, {file} is none (a pipe, a socket or a device)")


def partition_columns(names: Sequence[str]) -> tuple[pa.Schema, list[JsonDict]]:
    """The columns that folders' names hold (``year=2024/lang=de/a.parquet``), typed as pyarrow's hive partitioning
    types them: int32 where every value is one, else strings; percent-decoded; ``__HIVE_DEFAULT_PARTITION__`` is null.

    Args:
        names: of the files, below the gallery.

    Returns:
        (their schema, the values of each file, None for null).
    """
    folders = [[part for part in name.split("/")[:-1] if is_partition(part)] for name in names]
    keys = list(dict.fromkeys(unquote(part.partition("=")[0]) for parts in folders for part in parts))
    if not keys:
        return pa.schema([]), [{} for _ in names]
    text = ds.HivePartitioning(pa.schema([(key, pa.string()) for key in keys]))
    try:
        rows = [ds.get_partition_keys(text.parse("/".join([*parts, ""]))) if parts else {} for parts in folders]
    except pa.ArrowInvalid as error:
        raise FctError(f"source: expected folder names like key=value, percent-encoded in UTF-8: {error}") from error
    values = {key: pa.array([row.get(key) for row in rows], pa.string()) for key in keys}
    for key, column in values.items():
        try:
            values[key] = column.cast(pa.int32())
        except pa.ArrowInvalid:
            continue
    schema = pa.schema([(key, column.type) for key, column in values.items()])
    return schema, [{key: values[key][i].as_py() for key in keys} for i in range(len(names))]


def is_partition(folder: str) -> bool:
    """Whether a folder's name is that of a partition, ``key=value``."""
    key, equals, _ = folder.partition("=")
    return bool(key and equals)

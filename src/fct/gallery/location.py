"""A file or a folder, on this machine's disk or on any fsspec filesystem (``s3://``, ``gs://``, ``memory://``)."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fct.errors import FctError
from fct.files import checksum_file, write_bytes

__all__ = ["Location", "Version", "location_of", "with_retries"]

T = TypeVar("T")
_BLOCK = 8 << 20
# Waiting longer does not make these go away; nor a full or read-only disk.
_FINAL = (FctError, FileNotFoundError, PermissionError, IsADirectoryError, TypeError, ValueError, MemoryError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True, slots=True)
class Version:
    """What tells one content of a file from another without reading it: its size, and its mtime or etag."""

    bytes: int
    stamp: str


@dataclass(frozen=True, slots=True)
class Location:
    """``path`` on ``fs``. Cheap to make, picklable, compares by value."""

    fs: Any
    path: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def local(self) -> Path:
        if not self.is_local:
            raise ValueError(f"path: expected a local path, got {self}")
        return Path(self.path)

    def __truediv__(self, name: str) -> Location:
        return Location(self.fs, f"{self.path.rstrip('/')}/{name}")

    @property
    def parent(self) -> Location:
        return Location(self.fs, self.path.rstrip("/").rpartition("/")[0])

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

    # ---- looking ----
    def _fresh(self) -> None:
        if not self.is_local:
            self.fs.invalidate_cache()

    def exists(self) -> bool:
        self._fresh()
        return bool(self.fs.exists(self.path))

    def is_folder(self) -> bool:
        self._fresh()
        return bool(self.fs.isdir(self.path))

    def version(self) -> Version:
        """Raises FileNotFoundError when there is no such file."""
        if self.is_local:
            state = os.stat(self.path)
            return Version(state.st_size, str(state.st_mtime_ns))
        self._fresh()
        info = self.fs.info(self.path)
        known = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
        stamp = next((info[k] for k in known if k in info), "")
        return Version(int(info["size"]), str(stamp))

    def files(self) -> list[str]:
        """Names of the files directly in this folder, sorted; [] when there is no such folder."""
        self._fresh()
        try:
            entries = self.fs.ls(self.path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "file")

    def free_bytes(self) -> int | None:
        """Free space where this would be written; None where the filesystem cannot say (object stores)."""
        if not self.is_local:
            return None
        folder = Path(self.path).absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    # ---- reading and writing ----
    def open(self) -> Any:
        """A binary file object for reading with ``readinto`` and ``seek``."""
        if self.is_local:
            return open(self.path, "rb", buffering=0)
        return self.fs.open(self.path, "rb", block_size=_BLOCK, cache_type="readahead")

    def read_bytes(self) -> bytes:
        return Path(self.path).read_bytes() if self.is_local else bytes(self.fs.cat_file(self.path))

    def write_bytes(self, data: bytes) -> None:
        """Whole or not at all: written beside and renamed, or one PUT."""
        if self.is_local:
            write_bytes(self.path, data)
        else:
            self.fs.pipe_file(self.path, data)

    def publish(self, part: Path) -> None:
        """Moves a finished local file here, atomically: a rename after fsync, or an upload that appears when whole."""
        if self.is_local:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
                _let_go(file.fileno())
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, self.path)
        else:
            self.fs.put_file(str(part), self.path)
            part.unlink()

    def checksum(self) -> str:
        """XXH64 of the file as 16 hex digits; what ``xxhsum -H64`` prints."""
        with self.open() as file:
            return checksum_file(file)

    def remove(self) -> None:
        if self.exists():
            self.fs.rm(self.path, recursive=True)


def _let_go(descriptor: int) -> None:
    """Takes a finished file out of the page cache: a backfill's output would only push out what is still to be read,
    and pages that were just freed are the cheapest to write the next shard into."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def location_of(
    where: Any, *, filesystem: Any = None, storage_options: Mapping[str, Any] | None = None, name: str = "path"
) -> Location:
    """A Location from a path, a URL or a Location.

    filesystem: an fsspec or pyarrow filesystem that ``where`` is a path on. storage_options: what fsspec passes to the
    filesystem that the URL names (endpoint, keys, ...).
    """
    if isinstance(where, Location):
        return where
    if not isinstance(where, (str, os.PathLike)) or not os.fspath(where):
        raise TypeError(f"{name}: expected a path or a URL, got {where!r}")
    text = os.fspath(where)
    if filesystem is not None:
        if not isinstance(filesystem, fsspec.AbstractFileSystem):
            from fsspec.implementations.arrow import ArrowFSWrapper

            filesystem = ArrowFSWrapper(filesystem)
        return Location(filesystem, str(filesystem._strip_protocol(text)))
    fs, path = fsspec.core.url_to_fs(text, **(storage_options or {}))
    return Location(fs, path.rstrip("/") or "/")


def with_retries(
    do: Callable[[], T], what: str, *, retries: int, say: Callable[[str], None] | None = None, first_wait: float = 0.5
) -> T:
    """``do()``, again after 0.5, 1, 2, ... up to 60 s while it fails with what may pass: time-outs, 5xx, resets.

    A missing file, a refused permission, a full disk and wrong content are final. Raises the last error.
    """
    for attempt in range(retries + 1):
        try:
            return do()
        except _FINAL:
            raise
        except Exception as error:
            if attempt == retries or (isinstance(error, OSError) and error.errno in _FULL):
                raise
            wait = min(60.0, first_wait * 2**attempt)
            if say is not None:
                say(f"{what}: {error}; trying again in {wait:g} s ({attempt + 1} of {retries})")
            time.sleep(wait)
    raise AssertionError("unreachable")

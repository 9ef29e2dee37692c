"""A file or a folder, on this machine's disk or on any fsspec filesystem (``s3://``, ``gs://``, ``memory://``)."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fct.atomic_files import atomic_path, checksum_file, write_bytes
from fct.checks import check_path, check_positive, shown
from fct.errors import FctError, StoreError
from fct.gallery.urls import check_scheme, redacted, require_package, without_query, without_secrets
from fct.terminal import plain_log, printable
from fct.types import FileSystem, StorageOptions

if TYPE_CHECKING:
    from typing_extensions import Buffer


__all__ = ["DELTA", "Location", "RetryPolicy", "Version", "location_of", "with_retries"]

T = TypeVar("T")
_log = plain_log("fct.gallery")
DELTA = "delta://"  # in front of a path or a URL: a Delta table is meant
_BLOCK = 8 << 20
_SMALL = 64 << 20  # bytes of what is read whole: tags, states, markers
_BYTES_PER_SECOND = 1e6  # a request that moves many bytes gets a second more for each of these
# Waiting longer does not make these go away; nor a full or read-only disk.
_FINAL = (FctError, FileNotFoundError, PermissionError, IsADirectoryError, TypeError, ValueError, MemoryError)
_REFUSED = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True, slots=True)
class Version:
    """What tells one content of a file from another without reading it: its size, and its mtime or etag."""

    bytes: int
    stamp: str


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a store over a network is waited for; a disk of this machine is not.

    retries: further attempts, after 0.5, 1, 2, ... up to 60 s. timeout: seconds until a request counts as failed,
    and one more for each megabyte that it moves.
    """

    retries: int = 6
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise ValueError(f"retries: expected a number of further attempts, got {self.retries!r}")
        check_positive(self.timeout, "timeout", "a positive number of seconds")

    def ask(self, do: Callable[[], T], what: str, *, moves: int = 0) -> T:
        """``do()`` with these retries; moves: bytes."""
        return with_retries(do, what, retries=self.retries, timeout=self.timeout + moves / _BYTES_PER_SECOND)


@dataclass(frozen=True, slots=True)
class Location:
    """``path`` on ``fs``. Cheap to make, picklable, compares by value.

    What goes over a network is tried again as ``retry_policy`` says, and then raises :class:`StoreError`.
    """

    fs: Any
    path: str
    retry_policy: RetryPolicy = RetryPolicy()

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

    def at(self, path: str) -> Location:
        """Another path in the same place."""
        return replace(self, path=path)

    def __truediv__(self, name: str) -> Location:
        return self.at(f"{self.path.rstrip('/')}/{name}")

    @property
    def parent(self) -> Location:
        return self.at(self.path.rstrip("/").rpartition("/")[0])

    def __str__(self) -> str:
        return self.path if self.is_local else redacted(str(self.fs.unstrip_protocol(self.path)))

    # ---- looking ----
    def _ask(self, what: str, do: Callable[[], T], *, moves: int = 0) -> T:
        if self.is_local:
            return do()
        try:
            return self.retry_policy.ask(discreet(do, self.path), f"{what} {self}", moves=moves)
        except TypeError as error:  # some filesystems look at their options only now
            if not self.fs.storage_options:
                raise
            raise TypeError(f"storage_options: expected what {self}'s filesystem takes, got others: {error}") from error

    def _look(self, do: Callable[[], T]) -> T:
        def fresh() -> T:
            self.fs.invalidate_cache()
            return do()

        return do() if self.is_local else self._ask("looking at", fresh)

    def exists(self) -> bool:
        return bool(self._look(lambda: self.fs.exists(self.path)))

    def is_folder(self) -> bool:
        return bool(self._look(lambda: self.fs.isdir(self.path)))

    def version(self) -> Version:
        """Raises FileNotFoundError when there is no such file."""
        if self.is_local:
            state = os.stat(self.path)
            return Version(state.st_size, str(state.st_mtime_ns))
        info = self._look(lambda: self.fs.info(self.path))
        known = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
        stamp = next((info[k] for k in known if k in info), "")
        return Version(int(info["size"]), str(stamp))

    def sizes(self) -> dict[str, int]:
        """Bytes of the files directly in this folder, by name; {} when there is no such folder."""
        try:
            entries = self._look(lambda: self.fs.ls(self.path, detail=True))
        except FileNotFoundError:
            return {}
        return {e["name"].rstrip("/").rpartition("/")[2]: int(e["size"] or 0) for e in entries if e["type"] == "file"}

    def files(self) -> list[str]:
        """Names of the files directly in this folder, sorted; [] when there is no such folder.

        The empty objects that stand for folders on S3 (``gallery/``) are none.
        """
        return self._names("file")

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted."""
        return self._names("directory")

    def _names(self, kind: str) -> list[str]:
        try:
            entries = self._look(lambda: self.fs.ls(self.path, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        mine = self.path.rstrip("/")
        names = (e["name"] for e in entries if e["type"] == kind and e["name"].rstrip("/") != mine)
        return sorted(n.rstrip("/").rpartition("/")[2] for n in names if kind != "file" or not n.endswith("/"))

    @property
    def is_pattern(self) -> bool:
        """Whether this is a pattern (``*``, ``?``, ``[``), and not the name of something that is there."""
        return any(c in without_query(self.path) for c in "*?[") and not self.exists()

    def find(self) -> list[Location]:
        """Every file below this folder, or that this pattern means; in no particular order."""
        pattern = self.is_pattern

        def paths() -> list[str]:
            if self.is_local:
                found = self.fs.glob(self.path) if pattern else self.fs.find(self.path)
                return [str(p) for p in found if not pattern or not self.fs.isdir(p)]
            infos = (self.fs.glob if pattern else self.fs.find)(self.path, detail=True)
            return [p for p in _without_markers(infos, self.path) if not pattern or infos[p]["type"] != "directory"]

        return [self.at(path) for path in self._look(paths)]

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
        return open(self.path, "rb", buffering=0) if self.is_local else _Remote(self)

    def read_bytes(self) -> bytes:
        """All of a small file. Raises FctError, at once, for what is no file (a pipe, a device) or is over 64 MB."""
        if self.is_local:
            return _small_file(self.path)
        return self._ask("reading", lambda: bytes(self.fs.cat_file(self.path)))

    def write_bytes(self, data: bytes) -> None:
        """Whole or not at all: written beside and renamed, or one PUT."""
        if self.is_local:
            write_bytes(self.path, data)
        else:
            self._ask("writing", lambda: self.fs.pipe_file(self.path, data), moves=len(data))

    def publish(self, part: Path) -> None:
        """Moves a finished local file here, atomically: a rename after fsync, or an upload that appears when whole."""
        if self.is_local:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
                _let_go(file.fileno())
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(part, self.path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                with atomic_path(self.path) as whole:  # another disk: written beside, and renamed there
                    shutil.copyfile(part, whole)
                part.unlink()
        else:
            self._ask("writing", lambda: self.fs.put_file(str(part), self.path), moves=part.stat().st_size)
            part.unlink()

    def checksum(self) -> str:
        """XXH64 of the file as 16 hex digits; what ``xxhsum -H64`` prints."""
        with self.open() as file:
            return checksum_file(file)

    def remove(self) -> None:
        if self.exists():
            self._ask("removing", lambda: self.fs.rm(self.path, recursive=True))


def _without_markers(infos: Mapping[str, Mapping[str, object]], root: str) -> list[str]:
    """Paths of a store's objects, the empty ones left out that consoles and tools make for folders: ``gallery/``, a
    name that other objects lie below, Hadoop's ``gallery_$folder$``."""
    above = {root.rstrip("/")}
    for path in infos:
        while (path := path.rpartition("/")[0]) and path not in above:
            above.add(path)

    def marks(path: str) -> bool:
        return path.endswith(("/", "_$folder$")) or path.rstrip("/") in above

    return [str(path) for path, info in infos.items() if info.get("size") or not marks(str(path))]


class _Remote(io.RawIOBase):
    """A remote file; each read is tried again on a file opened anew, for one that timed out may still be at work."""

    def __init__(self, location: Location) -> None:
        self._place, self._at, self._file = location, 0, None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += self._place.version().bytes
        self._at = offset + (self._at if whence == io.SEEK_CUR else 0)
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._place._ask("reading", lambda: self._read(view.nbytes), moves=view.nbytes)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        file, self._file = self._file, None
        file = file or self._place.fs.open(self._place.path, "rb", block_size=_BLOCK, cache_type="readahead")
        file.seek(self._at)
        data = bytes(file.read(count))
        self._file = file
        return data

    def close(self) -> None:
        self._file = None
        super().close()


def _small_file(path: str) -> bytes:
    """A folder is somebody's: what has a file's name there may be a pipe that nobody writes to, or have no end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        state = os.fstat(descriptor)
        if stat.S_ISDIR(state.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(state.st_mode):
            raise FctError(f"gallery: expected a file, {path} is none (a pipe or a device): remove it")
        if state.st_size > _SMALL:
            raise FctError(f"gallery: expected at most {_SMALL:,} bytes in {path}, it has {state.st_size:,}: remove it")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(_SMALL)
    finally:
        os.close(descriptor)


def _let_go(descriptor: int) -> None:
    """Takes a finished file out of the page cache: a backfill's output would only push out what is still to be read,
    and pages that were just freed are the cheapest to write the next shard into."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def location_of(
    location: object,
    *,
    filesystem: FileSystem | None = None,
    storage_options: StorageOptions | None = None,
    retry_policy: RetryPolicy | None = None,
    name: str = "path",
) -> Location:
    """A Location from a path, a URL or a Location; ``delta://`` in front of one is left out.

    filesystem: an fsspec or pyarrow filesystem that ``location`` is a path on. storage_options: what fsspec passes to
    the filesystem that the URL names (endpoint, keys, ...). retry_policy: how a network is waited for.

    Raises:
        StoreError: the store that the URL names cannot be reached.
    """
    retry_policy = retry_policy or RetryPolicy()
    if isinstance(location, Location):
        return location
    check_path(location, name, "a path or a URL")
    if storage_options is not None and not isinstance(storage_options, Mapping):  # they may hold keys: none is shown
        raise TypeError(f"storage_options: expected a mapping or None, got {type(storage_options).__name__}")
    assert isinstance(location, (str, os.PathLike))  # says check_path
    text = os.fspath(location).removeprefix(DELTA)
    if filesystem is not None:
        if not isinstance(filesystem, fsspec.AbstractFileSystem):
            from fsspec.implementations.arrow import ArrowFSWrapper
            from pyarrow.fs import FileSystem

            if not isinstance(filesystem, FileSystem):
                raise TypeError(f"filesystem: expected fsspec's or pyarrow's or None, got {shown(filesystem)}")
            filesystem = ArrowFSWrapper(filesystem)
        return Location(filesystem, str(filesystem._strip_protocol(text)), retry_policy)
    if text.startswith("iceberg://"):
        raise ValueError(
            f"{name}: expected the folder of the Iceberg table (its catalog's warehouse says where), got {text}, which "
            "is taken as a source and as the destination of a backfill alone"
        )
    scheme = check_scheme(text, name)
    if not scheme:  # fsspec would take "::" in a name for a chain of filesystems
        fs = LocalFileSystem()
        path = str(fs._strip_protocol(text))
    else:  # some filesystems ask their store for a token or a region when they are made
        require_package(scheme, f"{name}: {redacted(text)}")
        opened = discreet(lambda: fsspec.core.url_to_fs(text, **(storage_options or {})), text)
        fs, path = retry_policy.ask(opened, f"opening {redacted(text)}")
    return Location(fs, path.rstrip("/") or "/", retry_policy)


def discreet(do: Callable[[], T], url: str) -> Callable[[], T]:
    """``do``, whose errors do not repeat the secrets of ``url``: libraries name the URL that they failed with."""

    def careful() -> T:
        try:
            return do()
        except Exception as error:
            text = str(error)
            clean = without_secrets(text, url)
            if clean == text:
                raise
            kind = type(error) if isinstance(error, _FINAL) and not isinstance(error, FctError) else OSError
        raise kind(clean)

    return careful


def with_retries(
    do: Callable[[], T], what: str, *, retries: int, timeout: float | None = None, first_wait: float = 0.5
) -> T:
    """``do()``, again after 0.5, 1, 2, ... up to 60 s while it fails with what may pass: time-outs, 5xx, resets.

    A missing file, a refused permission, a full disk and wrong content are final, and raised as they are; missing
    credentials are final too, and a StoreError.

    Args:
        timeout: seconds after which an attempt counts as failed; what it began is left to itself.

    Raises:
        StoreError: all attempts failed; the last error is its cause.
    """
    for attempt in range(retries + 1):
        try:
            return do() if timeout is None else _within(do, timeout)
        except _FINAL:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            if type(error).__name__ in _REFUSED:
                keys = "its keys are read from its own environment variables or configuration, or from storage options"
                raise StoreError(f"{what}: {error}; {keys}") from error
            if attempt == retries:
                times = {0: "once", 1: "twice"}.get(retries, f"{retries + 1} times")
                raise StoreError(f"{what}: {error} (tried {times})") from error
            wait = min(60.0, first_wait * 2**attempt)
            said = printable(f"{what}: {error}")
            _log.warning("%s; trying again in %g s (%d of %d)", said, wait, attempt + 1, retries)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _within(do: Callable[[], T], seconds: float) -> T:
    """``do()`` on a thread of its own. Raises TimeoutError when it takes longer; the thread then ends by itself."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(do())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="fct-request", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer within {seconds:.3g} s")
    return done[0]

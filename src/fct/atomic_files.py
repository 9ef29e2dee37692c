"""Writing files so that a crash or a full disk leaves the old one: write beside, flush, then rename; checksums."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fct import _C
from fct.checks import check_path

# No room left: on the device, in the quota, for a file of this size.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

__all__ = [
    "atomic_path",
    "checksum_bytes",
    "checksum_file",
    "new_checksum",
    "refuse_existing",
    "replace_folder",
    "write_bytes",
    "write_text",
]


_BLOCK = 8 << 20


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a fresh path in the same folder; on success it replaces ``path`` atomically, on any error it is removed.

    The bytes are on the disk (fsync of file and folder) before the old file goes.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path: expected the path of a file to write, got the folder {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)
        os.replace(part, target)
        _sync_folder(target.parent)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            text = f"{os.strerror(error.errno)}, in the middle of writing; what was there before is untouched"
            raise OSError(error.errno, text, str(target)) from error
        raise


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    with atomic_path(path) as part:
        part.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def refuse_existing(
    path: str | os.PathLike[str], *, overwrite: bool | None, name: str = "output", folder: bool = False
) -> Path:
    """``path`` as a Path; raises FileExistsError when it is there (a folder: with anything in it) and may not go.

    overwrite: None where the caller has no such choice. folder: what will be written is one; where it is a file, a
    folder in its place is refused before anything is calculated for it.
    """
    target = check_path(path, name)
    if "://" in os.fspath(path):
        raise ValueError(f"{name}: expected a path of this machine, got {path}")
    if target.is_dir() and not folder:
        raise IsADirectoryError(f"{name}: expected a file to write, {target} is a folder; name a file in it")
    occupied = any(target.iterdir()) if target.is_dir() else target.exists()
    if occupied and not overwrite:
        choice = "" if overwrite is None else " or pass --overwrite (overwrite=True)"
        raise FileExistsError(f"{name}: {target} exists; choose another place{choice}")
    return target


def replace_folder(target: Path, part: Path) -> None:
    """Puts the finished folder ``part``, in the same file system, in the place of ``target``.

    Where something is there it is moved aside first and removed last: a crash between leaves both, whole.
    """
    aside = part.parent / "replaced"
    if target.exists():
        os.replace(target, aside)
    try:
        os.replace(part, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise
    _sync_folder(target.parent)
    if aside.is_dir():
        shutil.rmtree(aside)


def new_checksum() -> _C.Xxh64:
    """An empty XXH64 with ``update(address, bytes)`` and ``digest()``."""
    return _C.Xxh64()


def checksum_file(file: io.RawIOBase | io.BufferedIOBase) -> str:
    """XXH64 of what is left of a binary file object, as 16 hex digits: what ``xxhsum -H64`` prints."""
    block = np.empty(_BLOCK, np.uint8)
    digest = new_checksum()
    while count := file.readinto(block.data):
        digest.update(int(block.ctypes.data), count)
    return f"{digest.digest():016x}"


def checksum_bytes(data: bytes) -> str:
    """XXH64 of ``data`` as 16 hex digits."""
    return checksum_file(io.BytesIO(data))

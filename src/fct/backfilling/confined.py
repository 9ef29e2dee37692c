"""Files of a folder that somebody else may have made: opened without following links, and only where they are files.

A gallery is somebody's input. A link in its journal would let a run write, and read, wherever it points.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from fct.errors import BackfillError

__all__ = ["open_confined", "read_confined", "refuse_links"]

_CAREFUL = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC if os.name == "posix" else 0


def refuse_links(base: Path, name: str) -> Path:
    """``base/name``, a path below ``base``; ``base`` itself may be a link, since the caller named it.

    Raises:
        BackfillError: one of the parts below ``base`` is a link, or ``name`` leads out of it.
    """
    path = base
    for part in PurePosixPath(name).parts:
        if part in ("..", "/") or "\0" in part:
            raise BackfillError(f"gallery: expected the name of a file inside {base}, got {name!a}")
        path = path / part
        if path.is_symlink():
            raise BackfillError(
                f"gallery: {path} is a link, and a gallery's own files are not followed elsewhere: replace the link by "
                "what it points to, or remove it"
            )
    return path


def open_confined(base: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of the regular file ``base/name``, which no link leads to.

    Raises:
        BackfillError: a link, or no file (a pipe, a device, a folder). FileNotFoundError.
    """
    path = refuse_links(base, name)
    try:
        descriptor = os.open(path, flags | _CAREFUL, 0o666)
    except (IsADirectoryError, NotADirectoryError):
        raise BackfillError(f"gallery: expected a file, {path} is none: remove it") from None
    except OSError as error:
        if path.is_symlink() or _special(path):
            raise BackfillError(f"gallery: expected a file, {path} is none (a link, a pipe or a device)") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BackfillError(f"gallery: expected a file, {path} is none (a pipe, a device or a folder): remove it")
    return descriptor


def _special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def read_confined(base: Path, name: str, most: int) -> bytes:
    """The content of ``base/name``, at most ``most`` bytes of it and one more, so that the caller sees the excess."""
    with os.fdopen(open_confined(base, name), "rb") as file:
        return file.read(min(most, os.fstat(file.fileno()).st_size) + 1)

"""A temporary folder for an object that nobody closes: it goes with the object, or with the process."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

__all__ = ["ScratchFolder"]


class ScratchFolder:
    """A folder that lasts as long as something refers to this object.

    ``tempfile.TemporaryDirectory`` warns when it is collected, since its owner should have closed it. A source or an
    index of memory maps has no end that its user would announce, and several copies may read one folder: whoever drops
    the last of them is the end. Processes that are forked meanwhile leave the folder alone.

    Args:
        prefix: of its name. within: where it is made; by default where temporary files go (TMPDIR).
    """

    def __init__(self, prefix: str, within: Path | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=within))
        self._end = weakref.finalize(self, _remove, self.path, os.getpid())

    def remove(self) -> None:
        """At once. A second call does nothing."""
        self._end()


def _remove(path: Path, made_by: int) -> None:
    if os.getpid() == made_by:
        shutil.rmtree(path, ignore_errors=True)

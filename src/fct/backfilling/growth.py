"""A gallery that grows while it is read: said at once, not only at the end."""

from __future__ import annotations

import copy
import time

from fct.gallery.file_gallery import FileSource
from fct.gallery.interfaces import Source
from fct.terminal import plain_log

__all__ = ["Growth"]

_log = plain_log("fct.gallery")
_SECONDS, _REMOTE_SECONDS = 10.0, 60.0  # between two looks: a listing of a large store takes its time


class Growth:
    """Looks now and then whether files came, and says so, each name once."""

    def __init__(self, source: Source, follow: bool) -> None:
        self._source = source if isinstance(source, FileSource) else None
        self._next = (
            "they are mapped in a second pass" if follow else "add --follow to map them too, or stop the writer"
        )
        self._last = time.monotonic()
        self._known = set() if self._source is None else {self._source.name_of(f) for f in self._source.files}

    def look(self) -> None:
        """Lists the source again, if the last time is long enough ago."""
        source = self._source
        if source is None or time.monotonic() - self._last < (
            _SECONDS if source.location.is_local else _REMOTE_SECONDS
        ):
            return
        try:
            now = copy.copy(source)
            now.refresh()
            new = sorted({now.name_of(f) for f in now.files} - self._known)
        except Exception as error:  # what is wrong with the source is said by whoever reads it
            _log.info("%s could not be listed: %s", source.url, error)
            new = []
        self._last = time.monotonic()
        self._known |= set(new)
        if new:
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            _log.warning("source: %s%s came while the gallery is read; %s", new[0], more, self._next)

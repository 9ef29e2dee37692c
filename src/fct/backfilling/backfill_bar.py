"""The bar of a backfill on stderr, with what its stores log above it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fct.progress import row_bar

__all__ = ["Bar", "backfill_bar"]


class Bar:
    """Progress on stderr, or silence; messages go above it."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._task = progress, None

    def start(self, rows: int, done: int) -> None:
        if self._progress is not None:
            self._task = self._progress.add_task("rows", total=rows, completed=done)

    def advance(self, rows: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, rows)

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)

    def track(self, items: list[int], what: str) -> Iterable[int]:
        if self._progress is None or not items:
            return items
        tracked: Iterable[int] = self._progress.track(items, description=what)
        return tracked


class _Above(logging.Handler):
    """Shows what the galleries log above the bar."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self.bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self.bar.say(record.getMessage())


@contextmanager
def backfill_bar(show: bool) -> Iterator[Bar]:
    if not show:
        yield Bar(None)
        return
    with row_bar() as progress:
        bar = Bar(progress)
        above, log = _Above(bar), logging.getLogger("fct.gallery")
        log.addHandler(above)
        try:
            yield bar
        finally:
            log.removeHandler(above)

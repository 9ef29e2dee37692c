"""Bars on stderr: for calls that last, of which nothing is shown, or loaded, before; and for work of many steps."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fct.checks import check_flag

__all__ = ["LongCall", "Report", "row_bar", "step_bar"]

Report = Callable[[float], None]  # told the share that is done, 0 to 1

_AFTER_SECONDS = 2.0
_shown = threading.Lock()  # one bar at a time: a call inside another's, or in another thread, shows none


class LongCall:
    """Shows how far a call is, once it has lasted two seconds, where stderr is a terminal.

    show: False for silence. A bar that cannot be drawn (the terminal is gone) never stops the call.

    Examples:
        >>> with LongCall(True) as call:
        ...     report = call.stage("searching")
        ...     if report is not None:
        ...         report(0.5)
    """

    def __init__(self, show: bool) -> None:
        self._show = check_flag(show, "progress")
        self._begun = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> LongCall:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._close()

    def stage(self, what: str) -> Report | None:
        """What one part of the call reports to, from any number of steps; None where nothing will be shown."""
        return (lambda share: self._tell(what, share)) if self._show else None

    def _tell(self, what: str, share: float) -> None:
        if not self._show or time.monotonic() - self._begun < _AFTER_SECONDS:
            return
        try:
            if self._bar is None:
                self._show = self._open()
            if self._bar is not None:
                self._bar.update(self._task, description=what, completed=share, refresh=True)
        except OSError:
            self._show = False

    def _open(self) -> bool:
        stream = sys.stderr
        if stream is None or stream.closed or not stream.isatty() or not _shown.acquire(blocking=False):
            return False
        from fct.terminal import PlainConsole

        # Drawn when told, by the calling thread; the kernels tell every 100 ms.
        self._bar = _bar(PlainConsole(stderr=True), auto_refresh=False)
        self._task = self._bar.add_task("", total=1.0)
        self._bar.start()
        return True

    def _close(self) -> None:
        try:
            self._bar.stop()
        except OSError:
            pass
        finally:
            self._bar = None
            _shown.release()


def step_bar(show: bool) -> Any:
    """A ``rich.progress.Progress`` on stderr for work of many steps, from the first one on.

    Nothing is drawn without ``show``, nor where stderr is neither a terminal nor a notebook. show: what callers call
    progress, and is refused by that name.
    """
    from fct.terminal import PlainConsole

    show, console = check_flag(show, "progress"), PlainConsole(stderr=True)
    return _bar(console, disable=not (show and (console.is_terminal or console.is_jupyter)))


def row_bar() -> Any:
    """A ``rich.progress.Progress`` on stderr that counts rows and their rate, and stays when it is full."""
    from rich.progress import MofNCompleteColumn, TextColumn

    from fct.terminal import PlainConsole

    class Rate(TextColumn):
        def __init__(self) -> None:
            super().__init__("")

        def render(self, task: Any) -> Any:
            from rich.text import Text

            return Text(f"{task.speed or 0:,.0f} /s")

    return _bar(PlainConsole(stderr=True), MofNCompleteColumn(), Rate(), transient=False)


def _bar(console: Any, *counts: Any, transient: bool = True, **how: Any) -> Any:
    """counts: the columns between the bar and the time to come; by default the share that is done."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    middle = counts or (TaskProgressColumn(),)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *middle, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=transient, **how)

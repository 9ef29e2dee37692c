"""Where the commands print: results on stdout, errors and bars on stderr."""

from __future__ import annotations

from fct.terminal import PlainConsole

__all__ = ["console", "error_console"]

console = PlainConsole()
error_console = PlainConsole(stderr=True)

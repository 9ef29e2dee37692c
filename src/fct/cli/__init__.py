"""``fct …``: thin commands over the public API; one file per command."""

from fct.cli.app import main

__all__ = ["main"]

"""The typer application, and the one place where an error becomes one line and an exit code.

Exit codes: 0 done; 1 failed; 2 bad usage; 3 refused by a quality gate; 4 finished, with rows in rejects/.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console

from fct.errors import FctError, FctWarning

__all__ = ["app", "console", "error_console", "main"]

app = typer.Typer(
    name="fct",
    help="Upgrade your embedding model without re-embedding your gallery.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()
error_console = Console(stderr=True)
_state = {"debug": False}


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    _state["debug"] = debug


@app.command()
def info() -> None:
    """Show what was built, what runs here, and why not.

    Example: fct info
    """
    from rich.table import Table

    from fct.info import build_info

    facts = build_info()
    console.print(f"fct {facts['version']}, Python {facts['python']}, {facts['platform']}, {facts['threads']} threads")
    table = Table("backend", "device", "runs", "why not")
    for name, state in facts["backends"].items():
        table.add_row(name, state["device"], "yes" if state["runs"] else "no", "; ".join(state["why_not"]))
    console.print(table)
    if facts["cuda_build"]:
        console.print(f"CUDA kernels: {facts['cuda_build']}")


def main(argv: list[str] | None = None) -> None:
    """Runs a command; errors are one line on stderr, a traceback only with --debug."""
    from fct.cli import commands  # noqa: F401 (registers them)

    warnings.showwarning = _show_warning
    args = sys.argv[1:] if argv is None else argv
    _state["debug"] = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        app(args, prog_name="fct")
    except (FctError, ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if _state["debug"]:
            raise
        error_console.print(f"[bold red]error:[/] {type(error).__name__ if not str(error) else error}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        error_console.print("interrupted")
        sys.exit(130)


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    if issubclass(category, FctWarning):
        error_console.print(f"[yellow]warning:[/] {message}", highlight=False)

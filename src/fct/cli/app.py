"""The typer application, and the one place where an error becomes one line and an exit code.

Exit codes: 0 done; 1 failed; 2 bad usage; 3 refused by a quality gate; 4 finished, with rows in rejects/.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from types import TracebackType
from typing import Annotated

import typer

from fct.cli.commands import COMMANDS
from fct.cli.console import console, error_console
from fct.errors import FctError, FctWarning
from fct.extras import explained
from fct.terminal import printable

__all__ = ["app", "main"]

app = typer.Typer(
    name="fct",
    help="Upgrade your embedding model without re-embedding your gallery.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import fct

        console.print(f"fct {fct.__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Upgrade your embedding model without re-embedding your gallery.

    Start with [bold]fct quickstart[/]: it lives through one upgrade on real images in a few minutes.
    """


for _command in COMMANDS:
    app.command()(_command)


def main(argv: list[str] | None = None) -> None:
    """Runs a command and leaves with its exit code; errors are one line on stderr, a traceback only with --debug.

    ``--debug`` may stand anywhere on the line.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(args, prog_name="fct", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        sys.exit(130)
    except Exception as error:
        if debug:
            sys.excepthook = _show_traceback
            raise
        if isinstance(error, ImportError):
            error = explained(error, f"fct {args[0] if args else ''}".strip())
        if hasattr(error, "format_message"):  # typer's own: bad usage
            if message := error.format_message():
                context = getattr(error, "ctx", None)
                _say(f"{message} (see {context.command_path if context else 'fct'} --help)")
            sys.exit(getattr(error, "exit_code", 2))
        _say(_one_line(error))
        sys.exit(1)
    if code == 130:  # typer turns Ctrl-C into this
        _say("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: Exception) -> str:
    """The message alone where it was written for people; else with the error's type, and where to see more."""
    text = " ".join(str(error).split())
    expected = isinstance(error, (FctError, ValueError, TypeError, OSError, ImportError))
    if text and expected:
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} (run again with --debug for the traceback)"


def _say(message: str) -> None:
    error_console.say("error:", message, "bold red")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    if issubclass(category, FctWarning):
        error_console.say("warning:", str(message), "yellow")


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    for part in traceback.format_exception(kind, error, trace):
        sys.stderr.write("".join(f"{printable(line)}\n" for line in part.split("\n") if line))

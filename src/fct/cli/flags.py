"""The command line's flags from the same declarations as the public functions' keywords, :mod:`fct.options.groups`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

import typer

from fct.options.declare import Flag, OptionSet, choices_of, flat, title

__all__ = ["flags"]

Command = Callable[..., None]


def flags(options: type[OptionSet], *, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Gives a command a flag for each option of a set, after its own parameters: name, type, default and help text.

    The command takes them as ``**options: Unpack[...Keywords]`` and hands them on to the public function.

    Args:
        without: options that the command leaves at their default.
    """
    panels = {f.name: title(group) for group in options.groups().values() for f in fields(group)}
    taken = [
        (known, hint, _flag(known)) for known, hint in flat(options)
        if known.metadata["flag"] is not False and known.name not in without
    ]  # fmt: skip

    def decorate(command: Command) -> Command:
        def run(**given: object) -> None:
            for known, _, flag in taken:
                if flag.parse is not None:
                    given[known.name] = flag.parse(given[known.name])
            command(**given)

        hints = get_type_hints(command, include_extras=True)
        own = [
            p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(command).parameters.values()
            if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        shown = [_parameter(known, hint, flag, panels[known.name]) for known, hint, flag in taken]
        run.__signature__ = inspect.Signature([*own, *shown])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *shown)}
        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        return run

    return decorate


def _flag(known: Field[Any]) -> Flag:
    flag = known.metadata["flag"]
    return flag if isinstance(flag, Flag) else Flag()


def _parameter(known: Field[Any], hint: object, flag: Flag, panel: str) -> inspect.Parameter:
    kind = flag.type if flag.type is not None else str if choices_of(hint) else hint
    names = flag.name.split("/") if flag.name else []
    if not names and hint is bool and known.default is False:
        names = [f"--{known.name.replace('_', '-')}"]  # there is no --no-... for what is off by default
    option = typer.Option(*names, help=known.metadata["help"], metavar=flag.metavar, rich_help_panel=panel)
    return inspect.Parameter(
        known.name, inspect.Parameter.KEYWORD_ONLY, default=known.default, annotation=Annotated[kind, option]
    )

"""How an option is declared, checked, split into groups and shown: one field says all of it.

A *group* is a frozen dataclass of options that belong together. A *set* is a frozen dataclass of groups: what one
public function takes. The function keeps flat keywords, ``**options: Unpack[BackfillKeywords]``, and splits them once:
``given = BackfillOptions.split(options)``, then ``given.access.retries``.
"""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from typing_extensions import Self

from fct.checks import check_choice, check_flag
from fct.types import JsonDict

__all__ = ["Flag", "Group", "OptionSet", "choices_of", "flat", "option", "optional", "takes", "title"]

Check = Callable[[Any, str], Any]  # (value, name) -> the value as it is kept; raises ValueError or TypeError
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How the command line takes an option, where its name and type do not say it.

    name: "--storage-option"; None for the option's own. type: what the command line hands over. parse: makes the
    option's value of that; None where it is the value already.
    """

    name: str | None = None
    type: Any = None
    metavar: str | None = None
    parse: Callable[[Any], Any] | None = None


def option(default: Any, help: str, *, check: Check | None = None, flag: Flag | bool = True) -> Any:
    """A field of a :class:`Group`.

    Args:
        default: where it is not given. help: one sentence, for ``help()`` and for ``--help`` alike.
        check: ``check(value, name)`` returns the value as it is kept, or raises; None for a bool or a Literal, which
            say themselves what fits, and for what is checked where it is opened.
        flag: False for what the command line cannot say; a :class:`Flag` where it says it otherwise.
    """
    return field(default=default, metadata={"help": help, "check": check, "flag": flag})


def optional(check: Check) -> Check:
    """``check``, or None as it is."""
    return lambda value, name: None if value is None else check(value, name)


def _hints(cls: type) -> JsonDict:
    return get_type_hints(cls)


def choices_of(hint: Any) -> tuple[str, ...]:
    """The strings of a Literal, or of a union of Literals; () for any other type."""
    if get_origin(hint) is Literal:
        return tuple(get_args(hint))
    if get_origin(hint) is Union:
        return tuple(choice for part in get_args(hint) for choice in choices_of(part))
    return ()


def _checked(cls: type, known: Field[Any], value: Any) -> Any:
    hint, check = _hints(cls)[known.name], known.metadata["check"]
    if check is not None:
        return check(value, known.name)
    if hint is bool:
        return check_flag(value, known.name)
    choices = choices_of(hint)
    return check_choice(value, known.name, choices) if choices else value


@dataclass(frozen=True, kw_only=True)
class Group:
    """Options that belong together, checked as they are made."""

    def __post_init__(self) -> None:
        for known in fields(self):
            object.__setattr__(self, known.name, _checked(type(self), known, getattr(self, known.name)))


@dataclass(frozen=True, kw_only=True)
class OptionSet:
    """The groups of one public function; every field is a :class:`Group`."""

    @classmethod
    def groups(cls) -> dict[str, type[Group]]:
        """The set's field -> its group."""
        hints = _hints(cls)
        return {known.name: hints[known.name] for known in fields(cls)}

    @classmethod
    def split(cls, keywords: Mapping[str, Any]) -> Self:
        """Groups from flat keywords. Raises TypeError for one that the function does not know."""
        names = [known.name for known, _ in flat(cls)]
        for name in keywords:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                raise TypeError(
                    f"{name}: expected an option that this function knows"
                    + (f" (did you mean {close[0]!r}?)" if close else f": {', '.join(names)}")
                )
        return cls(
            **{
                field_name: group(**{f.name: keywords[f.name] for f in fields(group) if f.name in keywords})
                for field_name, group in cls.groups().items()
            }
        )


def title(group: type[Group]) -> str:
    """StoreAccess -> "Store access"."""
    return re.sub(r"(?<!^)([A-Z])", lambda letter: f" {letter[1].lower()}", group.__name__)


def flat(options: type[OptionSet]) -> Iterator[tuple[Field[Any], Any]]:
    """(field, type) of every option of a set, in order."""
    for group in options.groups().values():
        hints = _hints(group)
        for known in fields(group):
            yield known, hints[known.name]


def takes(options: type[OptionSet]) -> Callable[[F], F]:
    """Shows a function's ``**options`` as what they are: flat keywords in its signature, help texts in its docstring.

    Examples:
        >>> import inspect, fct
        >>> inspect.signature(fct.backfill).parameters["retries"].default
        6
    """

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        before = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        shown = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f, _ in flat(options)
        ]
        function.__signature__ = own.replace(parameters=[*before, *shown])  # type: ignore[attr-defined]
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{described(options)}\n"
        return function

    return decorate


def described(options: type[OptionSet]) -> str:
    """The section of a docstring that lists a set's options."""
    lines = ["Keyword Args:"]
    for known, _ in flat(options):
        default = "" if known.default is MISSING else f", {known.default!r}"
        text = f"{known.name} ({known.type}{default}): {known.metadata['help']}"
        lines += textwrap.wrap(text, 116, initial_indent="    ", subsequent_indent="        ")
    return "\n".join(lines)
